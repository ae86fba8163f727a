//! The same measurement inside the lab: this program goes there too, with QEMU, Ruse and the guest.

use anyhow::{Result, bail, ensure};

use super::machine::{System, directory};
use super::{Group, Options};
use crate::bench::{Peer, QEMU};
use crate::lab::{Archive, Image, add_installed, measuring, read, start};

/// What can be measured there.
const GROUPS: [Group; 3] = [Group::Raw, Group::Qcow2, Group::Net];
/// What the last line begins with.
const END: &str = "IO-END ";

/// Measures in the lab, and passes on what is printed there.
pub fn run(options: &Options, peers: &[Peer]) -> Result<()> {
    if let Some(group) = options.groups.iter().find(|group| !GROUPS.contains(group)) {
        bail!("{} cannot be measured in the lab: --groups raw,qcow2,net", group.name());
    }
    let image = Image::prepare("io", archive(options, peers)?)?;
    let timeout = options.timeout * (1 + u64::from(options.rounds));
    let mut lab = start(&image, &script(options, peers), timeout, false)?;
    while let Some((at, line)) = lab.next_line()? {
        match line.split_once(END) {
            Some((_, status)) => {
                ensure!(status == "0", "it failed in the lab");
                return Ok(());
            }
            None if line.starts_with("round ") => eprintln!("{at:8.1} s: {line}"),
            None => println!("{line}"),
        }
    }
    bail!("the lab ended without figures:\n{}", lab.last_lines())
}

/// What the lab does. The kernel's messages would get between the figures.
fn script(options: &Options, peers: &[Peer]) -> String {
    let words = |names: Vec<&str>| names.join(",");
    format!(
        "dmesg -n 1; export PATH=/usr/bin:/bin; ip link set lo up; mkdir -p /tmp; cd /lab && ./xtask io --ruse ./ruse \
         --accel kvm --kernel kernel --initrd initrd --directory /tmp --rounds {} --scale {} --cpus {} --timeout {} \
         --groups {} --peers {} 2>&1; echo \"{END}$?\"",
        options.rounds,
        options.scale,
        options.cpus,
        options.timeout,
        words(options.groups.iter().map(|group| group.name()).collect()),
        words(peers.iter().map(|peer| peer.name()).collect()),
    )
}

/// All that is needed in the lab.
fn archive(options: &Options, peers: &[Peer]) -> Result<Archive> {
    let mut archive = measuring(options.ruse.as_deref())?;
    let system = System::prepare(&directory()?)?;
    archive.file("lab/kernel", 0o644, &read(&system.kernel)?)?;
    archive.file("lab/initrd", 0o644, &read(&system.initrd)?)?;
    if peers.contains(&Peer::Qemu) {
        add_installed(&mut archive, QEMU)?;
    }
    Ok(archive)
}
