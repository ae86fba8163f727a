//! Tests of the KVM engine on hardware virtualization, for hosts that have none: QEMU emulates an AMD CPU with nested
//! paging, on that runs Debian's kernel with its own kvm-amd, and in there Ruse.

mod archive;
mod build;
mod image;
mod installed;
mod run;

use anyhow::{Context, Result, bail};
use clap::Args;
use ruse_guest::{DefaultGuest, Silent};

pub use archive::{Archive, read};
use build::Programs;
pub use image::Image;
pub use installed::{add_installed, measuring};
use run::Outcome;
pub use run::start;

use crate::bench::{Materials, QEMU, qemu_is_here};
use crate::vmlinux;

/// Boots of the stock kernel to the benchmark guest's init: the kernel's form and the guest's CPUs. One reboots; some boot the
/// default guest with devices.
const BOOTS: [&str; 9] = [
    "bzimage-1",
    "bzimage-2",
    "vmlinux-1",
    "vmlinux-2",
    "reboot-2",
    "disk-2",
    "microvm-2",
    "vhost-1",
    "devices-1",
];

/// What to run in the lab.
#[derive(Args)]
pub struct Options {
    /// Cases, separated by commas; without any, all. An unknown one lists them.
    #[arg(long = "case", value_delimiter = ',')]
    cases: Vec<String>,
    /// Seconds that a case may take before the lab is said to hang.
    #[arg(long, default_value_t = 330)]
    timeout: u64,
    /// Shows all that the lab prints.
    #[arg(short, long)]
    verbose: bool,
}

/// Builds the lab, runs the cases in it and prints how each ended.
pub fn run(options: &Options) -> Result<()> {
    if !qemu_is_here() {
        println!("the lab is skipped: there is no {QEMU} (Debian has it in qemu-system-x86)");
        return Ok(());
    }
    let programs = Programs::build()?;
    let cases = choose(&programs.tests.iter().map(|(name, _)| &**name).collect::<Vec<_>>(), &options.cases)?;
    let image = Image::prepare("lab", archive(&programs)?)?;
    let outcomes = run::run(&image, &cases, options)?;
    println!("{:24} {:8} {:>8}  what it says", "case", "result", "seconds");
    for Outcome { name, passed, seconds, says } in &outcomes {
        let result = if *passed { "passed" } else { "FAILED" };
        println!("{name:24} {result:8} {seconds:8.1}  {says}");
    }
    match outcomes.iter().filter(|outcome| !outcome.passed).count() + cases.len() - outcomes.len() {
        0 => Ok(()),
        failed => bail!("{failed} of {} cases failed", cases.len()),
    }
}

/// The archive of all that cases need.
fn archive(programs: &Programs) -> Result<Archive> {
    let materials = Materials::prepare(None)?;
    let kernel = read(&materials.kernel)?;
    let mut archive = Archive::new();
    archive.file("lab/cases", 0o644, include_bytes!("cases.sh"))?;
    archive.program("lab/ruse", &programs.ruse)?;
    for (name, path) in &programs.tests {
        archive.program(&format!("lab/tests/{name}"), path)?;
    }
    archive.file("lab/vmlinux", 0o644, &vmlinux::extract(&kernel).context("no ELF file in the kernel")?)?;
    archive.file("lab/bzimage", 0o644, &kernel)?;
    archive.file("lab/guest.cpio.gz", 0o644, &read(&materials.initrd)?)?;
    let sockets = image::directory()?.join("vsock");
    build::sockets(&sockets)?;
    archive.program("lab/vsock", &sockets)?;
    let mut added = Archive::new();
    added.program("bin/vsock", &sockets)?;
    let default = read(&DefaultGuest::new()?.prepare(&mut Silent)?.initrd)?;
    archive.file("lab/default.cpio", 0o644, &[default, added.finish()?].concat())?;
    Ok(archive)
}

/// The cases to run, in the order in which they are known.
fn choose<'a>(tests: &[&'a str], wanted: &[String]) -> Result<Vec<&'a str>> {
    let all: Vec<&str> = tests.iter().copied().chain(BOOTS).collect();
    if let Some(unknown) = wanted.iter().find(|name| !all.contains(&name.as_str())) {
        bail!("there is no case '{unknown}'; there are: {}", all.join(", "));
    }
    Ok(all.into_iter().filter(|name| wanted.is_empty() || wanted.iter().any(|w| w == name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_chosen_by_name() {
        let wanted = ["vmlinux-2".to_owned(), "vcpu".to_owned()];
        assert_eq!(choose(&["vcpu", "moves"], &wanted).unwrap(), ["vcpu", "vmlinux-2"]);
        assert_eq!(choose(&["vcpu"], &[]).unwrap().len(), 1 + BOOTS.len());
        let error = choose(&["vcpu"], &["vpcu".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("'vpcu'") && error.contains("bzimage-1"), "{error}");
    }
}
