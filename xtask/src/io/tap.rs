//! A tap of the host's, with an address, and the server that listens there.

use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::host::Host;

/// Its name.
pub const NAME: &str = "ruse-io";
/// The host's address, and the guest's, in a network of 24 bits.
pub const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 177, 1);
pub const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 177, 2);

/// The tap, as long as it is wanted.
pub struct Tap {
    host: Host,
    _device: Device,
}

impl Tap {
    /// Makes it, and listens there.
    pub fn make() -> Result<Tap> {
        ip(&["tuntap", "add", "dev", NAME, "mode", "tap"])?;
        let device = Device;
        ip(&["addr", "add", &format!("{HOST}/24"), "dev", NAME])?;
        ip(&["link", "set", NAME, "up"])?;
        Ok(Tap { host: Host::start(HOST)?, _device: device })
    }

    /// The server's port.
    pub fn port(&self) -> u16 {
        self.host.port()
    }
}

/// The host's device, which goes when this is dropped.
struct Device;

impl Drop for Device {
    fn drop(&mut self) {
        if let Err(error) = ip(&["link", "delete", NAME]) {
            eprintln!("the tap {NAME} is left behind: {error:#}");
        }
    }
}

fn ip(words: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(words).output().context("running ip (Debian has it in iproute2)")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {}: {}", words.join(" "), said.trim());
    Ok(())
}
