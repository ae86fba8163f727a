//! The same measurement inside the lab: this program goes there too, with the monitors and what they load.

use anyhow::{Context, Result};

use super::peer::Peer;
use super::{Measured, Options, directory, measure::can_trace, present, system};
use crate::lab::{Archive, Image, add_installed, measuring, read, start};

/// What the line of figures begins with.
const MARK: &str = "MEASURED ";
/// Seconds that all of it may take for each monitor and round, with the lab's start.
const TIMEOUT: u64 = 120;

/// Measures in the lab.
pub fn measure(options: &Options) -> Result<Measured> {
    let peers = present(&options.peers)?;
    let image = Image::prepare("monitors", archive(options, &peers)?)?;
    let names: Vec<_> = peers.iter().map(|peer| peer.name()).collect();
    // The kernel's messages would get between the figures.
    let script = format!(
        "dmesg -n 1; export PATH=/usr/bin:/bin; cd /lab && ./xtask monitors --boot --ruse ./ruse --kernel vmlinux --initrd guest.cpio.gz \
         --rounds {} --peers {} --json json 2>&1 && echo \"{MARK}$(tr -d '\\n' < json)\"",
        options.rounds,
        names.join(",")
    );
    let timeout = TIMEOUT * (1 + u64::from(options.rounds) * peers.len() as u64);
    let mut lab = start(&image, &script, timeout, false)?;
    while let Some((at, line)) = lab.next_line()? {
        match line.split_once(MARK) {
            Some((_, figures)) => return serde_json::from_str(figures).context("reading the lab's figures"),
            None => eprintln!("{at:8.1} s: {line}"),
        }
    }
    anyhow::bail!("the lab ended without figures:\n{}", lab.last_lines())
}

/// All that is needed in the lab.
fn archive(options: &Options, peers: &[Peer]) -> Result<Archive> {
    let mut archive = measuring(options.ruse.as_deref())?;
    let (kernel, initrd) = system(options, &directory()?)?;
    archive.file("lab/vmlinux", 0o644, &read(&kernel)?)?;
    archive.file("lab/guest.cpio.gz", 0o644, &read(&initrd)?)?;
    let mut programs: Vec<&str> = peers.iter().filter_map(|peer| Some(peer.program()?.0)).collect();
    programs.dedup();
    programs.extend(can_trace().then_some("strace"));
    programs.into_iter().try_for_each(|program| add_installed(&mut archive, program))?;
    Ok(archive)
}
