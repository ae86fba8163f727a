//! A disk in words: `vhost-user=SOCKET[,queues=N][,ring=split]`, or
//! `PATH[,format=NAME][,readonly][,serial=TEXT][,queues=N][,iops=N][,bps=SIZE][,on-error=pause][,ring=split]`.

use std::path::PathBuf;
use std::str::FromStr;

use super::size::parse_size;
use ruse_block::Format;
use serde::{Deserialize, Serialize};

/// Most bytes of a serial number that a guest sees.
const SERIAL_LEN: usize = 20;
/// Most queues of a disk.
const MAX_QUEUES: u16 = 64;

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// A file or block device with the disk's bytes, or the socket of whoever serves the disk.
    pub path: PathBuf,
    /// Another process serves the disk, by the protocol of vhost-user.
    pub vhost_user: bool,
    /// The format of the file; what its content says, if nothing is said.
    pub format: Option<Format>,
    /// The guest cannot write.
    pub read_only: bool,
    /// Its serial number, by which guests find it (`/dev/disk/by-id/virtio-…`).
    pub serial: Option<String>,
    /// Its queues, each with a thread; as many as vCPUs, at most four, for which nothing is said.
    pub queues: Option<u16>,
    /// Requests in a second at most.
    pub iops: Option<u64>,
    /// Bytes in a second at most.
    pub bps: Option<u64>,
    /// If the host fails a request, the machine is paused, and the request is tried again when it goes on. Otherwise the
    /// guest hears of it.
    pub pause_on_error: bool,
    /// Its rings are split, not packed, whatever the guest's driver would like best.
    pub split_rings: bool,
}

impl DiskConfig {
    /// The disk in a file, with nothing said about it.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            vhost_user: false,
            format: None,
            read_only: false,
            serial: None,
            queues: None,
            iops: None,
            bps: None,
            pause_on_error: false,
            split_rings: false,
        }
    }
}

impl FromStr for DiskConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let path = words.next().unwrap_or_default();
        let socket = path.strip_prefix("vhost-user=");
        let path = socket.unwrap_or(path);
        if path.is_empty() {
            return Err("expected the path of a disk".into());
        }
        let mut disk = Self { vhost_user: socket.is_some(), ..Self::new(path.into()) };
        for word in words {
            if disk.vhost_user && !word.starts_with("queues=") && !word.starts_with("ring=") {
                return Err(format!("'{word}': a disk of vhost-user has queues=N and ring=split only"));
            }
            match word.split_once('=') {
                None if word == "readonly" => disk.read_only = true,
                Some(("format", name)) => {
                    disk.format = Some(name.parse().map_err(|error| format!("format: {error}"))?)
                }
                Some(("iops", text)) => disk.iops = Some(rate("iops", text.parse().ok())?),
                Some(("bps", text)) => disk.bps = Some(rate("bps", parse_size(text).ok())?),
                Some(("on-error", "pause")) => disk.pause_on_error = true,
                Some(("on-error", "report")) => disk.pause_on_error = false,
                Some(("ring", "split")) => disk.split_rings = true,
                Some(("serial", serial)) => disk.serial = Some(checked_serial(serial)?),
                Some(("queues", queues)) => {
                    let queues = queues.parse().ok().filter(|queues| (1..=MAX_QUEUES).contains(queues));
                    disk.queues = Some(queues.ok_or(format!("queues: expected 1 to {MAX_QUEUES}"))?);
                }
                _ => {
                    return Err(format!(
                        "'{word}': expected format=NAME, readonly, serial=TEXT, queues=N, iops=N, bps=SIZE, on-error=pause or report, or ring=split"
                    ));
                }
            }
        }
        Ok(disk)
    }
}

/// A rate: more than nothing.
fn rate(name: &str, number: Option<u64>) -> Result<u64, String> {
    number
        .filter(|&number| number > 0)
        .ok_or_else(|| format!("{name}: expected how much in a second, more than 0"))
}

fn checked_serial(text: &str) -> Result<String, String> {
    let printable = text.bytes().all(|byte| byte.is_ascii_graphic());
    match printable && (1..=SERIAL_LEN).contains(&text.len()) {
        true => Ok(text.to_owned()),
        false => Err(format!("serial: expected 1 to {SERIAL_LEN} printable characters")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood() {
        let disk: DiskConfig =
            "/tmp/a b,format=qcow2,readonly,serial=X-1,queues=3,iops=7,bps=2M,on-error=pause,ring=split"
                .parse()
                .unwrap();
        let expected = DiskConfig {
            path: "/tmp/a b".into(),
            vhost_user: false,
            format: Some(Format::Qcow2),
            read_only: true,
            serial: Some("X-1".into()),
            queues: Some(3),
            iops: Some(7),
            bps: Some(2 << 20),
            pause_on_error: true,
            split_rings: true,
        };
        assert_eq!(disk, expected);
        assert!(!"d".parse::<DiskConfig>().unwrap().read_only);
        let served: DiskConfig = "vhost-user=/tmp/s,queues=2,ring=split".parse().unwrap();
        let expected = DiskConfig {
            vhost_user: true,
            queues: Some(2),
            split_rings: true,
            ..DiskConfig::new("/tmp/s".into())
        };
        assert_eq!(served, expected);
        for bad in [
            "",
            "vhost-user=",
            "vhost-user=/tmp/s,readonly",
            "vhost-user=/tmp/s,iops=5",
            ",readonly",
            "d,",
            "d,ro",
            "d,serial=",
            "d,serial=a b",
            "d,queues=0",
            "d,queues=65",
            "d,queues=x",
            "d,ring=x",
            "d,format=x",
            "d,iops=0",
            "d,iops=x",
            "d,bps=1Q",
            "d,on-error=x",
        ] {
            assert!(bad.parse::<DiskConfig>().is_err(), "{bad}");
        }
        assert!(format!("d,serial={}", "x".repeat(21)).parse::<DiskConfig>().is_err());
    }
}
