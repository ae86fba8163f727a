//! Programs that are installed here, for the lab.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::archive::Archive;
use crate::bench::{self, QEMU};

/// Firmware and option ROMs of QEMU's machines. They are where QEMU looks for them, in one of two directories.
const FIRMWARE: [&str; 6] = [
    "bios-256k.bin",
    "bios-microvm.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
    "pvh.bin",
    "multiboot_dma.bin",
];
const FIRMWARE_DIRECTORIES: [&str; 2] = ["/usr/share/qemu", "/usr/share/seabios"];
/// An archive with this program and the `ruse` that it is to measure.
pub fn measuring(ruse: Option<&Path>) -> Result<Archive> {
    let mut archive = Archive::new();
    archive.program("lab/xtask", &env::current_exe().context("finding this program")?)?;
    archive.program("lab/ruse", &bench::ruse(ruse)?)?;
    Ok(archive)
}

/// Adds an installed program and what it needs beside its libraries.
pub fn add_installed(archive: &mut Archive, program: &str) -> Result<()> {
    archive.program(&format!("usr/bin/{program}"), &find(program)?)?;
    if program == QEMU { firmware().iter().try_for_each(|file| archive.as_here(file)) } else { Ok(()) }
}

/// The firmware that is installed.
fn firmware() -> Vec<PathBuf> {
    let paths = FIRMWARE_DIRECTORIES
        .iter()
        .flat_map(|directory| FIRMWARE.map(|name| Path::new(directory).join(name)));
    paths.filter(|path| path.is_file()).collect()
}

/// Where a program is in the search path.
fn find(program: &str) -> Result<PathBuf> {
    let directories = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&directories).map(|path| path.join(program)).find(|path| path.is_file());
    found.with_context(|| format!("there is no {program}"))
}
