//! Ruse over /dev/kvm beside other monitors, in one interleaved run: from the start of the process to the guest's first
//! instruction, round trips of exits, system calls, the boot of a stock kernel, resident memory.

mod guest;
mod lab;
mod measure;
mod peer;
mod report;

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::bench::{self, Materials};
use crate::lab::read;
use crate::vmlinux;
use measure::Bench;
use peer::Peer;

/// Runs of the small guest in a round, which take no time beside a boot.
const SHORT_RUNS: usize = 3;

/// What to measure.
#[derive(Args, Clone)]
pub struct Options {
    /// Rounds; each runs every monitor once.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Whom to run.
    #[arg(long, value_delimiter = ',', default_values = ["ruse", "qemu-microvm", "qemu-q35", "alioth"])]
    peers: Vec<Peer>,
    /// Runs all of it in the lab, on hardware virtualization that QEMU emulates.
    #[arg(long)]
    lab: bool,
    /// Boots the stock kernel also where /dev/kvm is software, which takes many minutes.
    #[arg(long)]
    boot: bool,
    /// The `ruse` to measure; without it, the one of this tree is built.
    #[arg(long)]
    ruse: Option<PathBuf>,
    /// An ELF kernel to boot; without it, the default guest's.
    #[arg(long, requires = "initrd")]
    kernel: Option<PathBuf>,
    /// The initramfs of the benchmark guest, for that kernel.
    #[arg(long, requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Writes all figures to this file as well.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Everything that was measured.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Rounds that were made.
    pub rounds: u32,
    /// Each monitor's figures.
    pub peers: BTreeMap<Peer, Figures>,
}

/// The figures of one monitor, a value for each run.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Figures {
    /// Seconds from the start of the process to the guest's first instruction.
    pub first_instruction: Vec<f64>,
    /// Nanoseconds of an exit, by kind.
    pub exits: BTreeMap<String, Vec<f64>>,
    /// System calls from the start of the program to the first entry into the guest.
    pub system_calls: Option<usize>,
    /// Seconds from the start of the process to a system that is up.
    pub up: Vec<f64>,
    /// KiB that are resident then besides the guest's RAM.
    pub resident_kib: Vec<u64>,
}

/// Measures and prints a report.
pub fn run(options: &Options) -> Result<()> {
    let measured = if options.lab { lab::measure(options)? } else { measure(options)? };
    report::print(&measured);
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&measured)?;
        fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// Measures on this machine.
fn measure(options: &Options) -> Result<Measured> {
    measure::need_kvm()?;
    let peers = present(&options.peers)?;
    let directory = directory()?;
    let ruse = bench::ruse(options.ruse.as_deref())?;
    let system = if options.boot || kvm_is_fast(&ruse)? { Some(system(options, &directory)?) } else { None };
    if system.is_none() {
        eprintln!("no boots: /dev/kvm is software here (--boot makes them all the same; --lab has hardware)");
    }
    let exits = directory.join("exits.elf");
    fs::write(&exits, guest::elf()).with_context(|| format!("writing {}", exits.display()))?;
    let bench = Bench { ruse, exits, system, ticks_per_ns: measure::ticks_per_ns() };
    let can_trace = measure::can_trace();
    if !can_trace {
        eprintln!("no counts of system calls: there is no strace (Debian has it)");
    }
    let mut measured = Measured { rounds: options.rounds, peers: BTreeMap::new() };
    for round in 1..=options.rounds {
        for &peer in &peers {
            eprintln!("round {round} of {}: {}", options.rounds, peer.name());
            let figures = measured.peers.entry(peer).or_default();
            one_round(&bench, peer, figures).with_context(|| format!("running {}", peer.name()))?;
            if can_trace && figures.system_calls.is_none() {
                figures.system_calls = Some(bench.system_calls(peer)?);
            }
        }
    }
    Ok(measured)
}

fn one_round(bench: &Bench, peer: Peer, figures: &mut Figures) -> Result<()> {
    for _ in 0..SHORT_RUNS {
        let (first, exits) = bench.exits(peer)?;
        figures.first_instruction.push(first);
        for (kind, ns) in exits {
            figures.exits.entry(kind).or_default().push(ns);
        }
    }
    if let Some((kernel, initrd)) = &bench.system {
        let (up, resident) = bench.boot(peer, kernel, initrd)?;
        figures.up.push(up);
        figures.resident_kib.push(resident);
    }
    Ok(())
}

/// The peers that this machine has.
fn present(wanted: &[Peer]) -> Result<Vec<Peer>> {
    let (here, missing): (Vec<Peer>, Vec<Peer>) = wanted.iter().partition(|peer| peer.is_here());
    for (peer, (program, source)) in missing.iter().filter_map(|peer| Some((peer, peer.program()?))) {
        eprintln!("{} is left out: there is no {program} ({source})", peer.name());
    }
    if here.is_empty() { bail!("nobody to run") } else { Ok(here) }
}

/// Whether `ruse` finds that /dev/kvm is hardware.
fn kvm_is_fast(ruse: &Path) -> Result<bool> {
    let output = Command::new(ruse).args(["doctor", "--json"]).output().context("running ruse doctor")?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).context("reading ruse doctor")?;
    Ok(report["auto"]["engine"] == "kvm")
}

/// The kernel, as an ELF file, and the initramfs to boot.
fn system(options: &Options, directory: &Path) -> Result<(PathBuf, PathBuf)> {
    if let (Some(kernel), Some(initrd)) = (&options.kernel, &options.initrd) {
        return Ok((kernel.clone(), initrd.clone()));
    }
    let materials = Materials::prepare(None)?;
    let kernel = directory.join("vmlinux");
    let elf = vmlinux::extract(&read(&materials.kernel)?).context("no ELF file in the kernel")?;
    fs::write(&kernel, elf).with_context(|| format!("writing {}", kernel.display()))?;
    Ok((kernel, materials.initrd))
}

/// Where files of this benchmark are.
fn directory() -> Result<PathBuf> {
    let this = env::current_exe().context("finding this program")?;
    let directory = this.parent().context("finding this program's directory")?.join("monitors");
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    Ok(directory)
}
