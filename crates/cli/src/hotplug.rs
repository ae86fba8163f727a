//! Devices of machines that run: attach, detach, link.

use std::path::Path;
use std::time::Duration;

use clap::{Args, ValueEnum};
use ruse_manager::protocol::Request;
use ruse_vmm::{DiskConfig, NetOption};

use crate::failure::Failure;
use crate::manage::connect;
use crate::output::print;

/// Options of `ruse attach`.
#[derive(Debug, Args)]
pub struct AttachOptions {
    /// The machine's name.
    pub name: String,
    #[command(flatten)]
    device: AttachedDevice,
}

/// One device.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct AttachedDevice {
    /// A disk in the words of `ruse run --disk`
    #[arg(long, value_name = "DISK", value_parser = disk_words)]
    disk: Option<String>,
    /// A network device in the words of `ruse run --net`
    #[arg(long, value_name = "NET", value_parser = net_words)]
    net: Option<String>,
}

/// Options of `ruse detach`.
#[derive(Debug, Args)]
pub struct DetachOptions {
    /// The machine's name.
    pub name: String,
    /// What the device was called when it was attached.
    pub id: String,
    /// Take it out though the machine's system uses it.
    #[arg(long)]
    pub force: bool,
    /// Seconds that the machine's system has to let go of it.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, conflicts_with = "force")]
    pub timeout: u64,
}

/// Options of `ruse link`.
#[derive(Debug, Args)]
pub struct LinkOptions {
    /// The machine's name.
    pub name: String,
    /// Whether the cable is plugged.
    pub state: LinkState,
    /// The network device, as `ruse info` calls it [default: all].
    #[arg(long, value_name = "ID")]
    pub device: Option<String>,
}

/// Whether a cable is plugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LinkState {
    /// It is.
    Up,
    /// It is not.
    Down,
}

/// What stands before the path of a socket at which another process serves a device.
const VHOST_USER: &str = "vhost-user=";

fn disk_words(text: &str) -> Result<String, String> {
    text.parse::<DiskConfig>()?;
    match text.strip_prefix(VHOST_USER) {
        Some(words) => Ok(format!("{VHOST_USER}{}", from_root(words)?)),
        None => from_root(text),
    }
}

fn net_words(text: &str) -> Result<String, String> {
    match (text.parse::<NetOption>()?.0, text.strip_prefix(VHOST_USER)) {
        (Some(_), Some(words)) => Ok(format!("{VHOST_USER}{}", from_root(words)?)),
        (Some(_), None) => Ok(text.to_owned()),
        (None, _) => Err("'none' is no network".into()),
    }
}

/// Words that begin with a path, with that from the root on: the machine's process is elsewhere.
fn from_root(words: &str) -> Result<String, String> {
    let (path, options) = words.split_at(words.find(',').unwrap_or(words.len()));
    let path = std::path::absolute(Path::new(path)).map_err(|error| error.to_string())?;
    match path.to_str() {
        Some(path) if !path.contains(',') => Ok(format!("{path}{options}")),
        _ => Err(format!("'{}' has a comma or other letters in it that cannot be passed on", path.display())),
    }
}

/// Puts a device into a slot.
pub fn attach(options: &AttachOptions) -> Result<u8, Failure> {
    let request = match &options.device {
        AttachedDevice { disk: Some(disk), .. } => Request::AttachDisk { disk: disk.clone() },
        AttachedDevice { net, .. } => Request::AttachNet { net: net.clone().unwrap_or_default() },
    };
    print(&format!("{}\n", connect(&options.name)?.attach(request)?))
}

/// Takes a device out.
pub fn detach(options: &DetachOptions) -> Result<u8, Failure> {
    let patience = Duration::from_secs(options.timeout);
    connect(&options.name)?.detach(&options.id, options.force, patience)?;
    Ok(0)
}

/// Plugs or pulls cables.
pub fn link(options: &LinkOptions) -> Result<u8, Failure> {
    let request = Request::Link { up: options.state == LinkState::Up, device: options.device.clone() };
    connect(&options.name)?.request(request)?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_disks_are_those_of_this_process() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(disk_words("d,readonly"), Ok(format!("{},readonly", here.join("d").display())));
        assert_eq!(disk_words("/d"), Ok("/d".into()));
        let socket = format!("vhost-user={}", here.join("s").display());
        assert_eq!(disk_words("vhost-user=s,queues=2"), Ok(format!("{socket},queues=2")));
        assert_eq!(net_words("vhost-user=s"), Ok(socket));
        assert!(disk_words("d,ro").is_err() && disk_words("").is_err());
        assert!(net_words("none").is_err() && net_words("user,loopback").is_ok());
    }
}
