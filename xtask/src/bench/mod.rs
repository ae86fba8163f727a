//! The benchmark: one static program, natively and in a guest under each peer, interleaved.

mod build;
mod floor;
mod report;
mod run;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};

pub use build::{Materials, ruse};
use floor::Floors;
pub use report::{cell, median};
pub use run::{Accel, CaseTime, GUEST_RAM, Guest, QEMU, qemu_is_here, qemu_version};
use run::{Job, Outcome};

/// What to run, and how often.
#[derive(Args)]
pub struct Options {
    /// Rounds; each runs every peer once, and medians are taken over them.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Cases or groups, separated by commas; `none` measures the boot alone. Without it: all that
    /// the number of CPUs allows.
    #[arg(long, value_delimiter = ',')]
    cases: Vec<String>,
    /// The guest's CPUs. The group `smp` is run from 2 on.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    cpus: u32,
    /// Whom to run.
    #[arg(long, value_delimiter = ',', default_values = ["native", "qemu", "ruse"])]
    peers: Vec<Peer>,
    /// The kernel; without it, the default guest's.
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// The `ruse` to measure; without it, the one of this tree is built.
    #[arg(long)]
    ruse: Option<PathBuf>,
    /// More arguments for `ruse run`, as one word each.
    #[arg(long = "ruse-arg", allow_hyphen_values = true)]
    ruse_args: Vec<String>,
    /// QEMU's machine type.
    #[arg(long, default_value = "pc")]
    qemu_machine: String,
    /// Ends a run that takes longer than this many seconds.
    #[arg(long, default_value_t = 900)]
    timeout: u64,
    /// Writes all figures to this file as well.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Fails where the ratio of QEMU's time to Ruse's is below the one in this file.
    #[arg(long, value_name = "FILE", conflicts_with = "record_floors")]
    floors: Option<PathBuf>,
    /// Writes such a file from the figures of this run.
    #[arg(long, value_name = "FILE")]
    record_floors: Option<PathBuf>,
}

/// Who runs the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Peer {
    /// This host, without a guest.
    Native,
    /// QEMU with TCG, `-cpu max`.
    Qemu,
    /// Ruse with `--accel dbt`.
    Ruse,
}

impl Peer {
    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Peer::Native => "native",
            Peer::Qemu => "qemu",
            Peer::Ruse => "ruse",
        }
    }
}

/// All figures of one peer, a value for each round.
#[derive(Default)]
pub struct Figures {
    /// Seconds from the start of the process to `GUEST-UP`, and to its end, with nothing to run.
    pub boots: Vec<(f64, f64)>,
    /// The times of each case.
    pub cases: BTreeMap<String, CaseFigures>,
    /// KiB of resident memory that is not guest RAM, after the boot.
    pub overhead_kib: Option<u64>,
}

/// The times of one case under one peer.
#[derive(Default)]
pub struct CaseFigures {
    /// Seconds, a value for each round.
    pub seconds: Vec<f64>,
    /// The result, which has to be the same everywhere.
    pub check: String,
}

/// Everything that was measured.
pub struct Measured {
    /// Group and name of each case, in the program's order.
    pub cases: Vec<(String, String)>,
    /// Each peer's figures.
    pub peers: BTreeMap<Peer, Figures>,
}

/// Runs the benchmark and prints its report.
pub fn run(options: &Options) -> Result<()> {
    if options.floors.is_some() && !qemu_is_here() {
        println!("skipped: there is no {QEMU} to compare with (Debian has it in qemu-system-x86)");
        return Ok(());
    }
    let materials = Materials::prepare(options.kernel.as_deref())?;
    let cases = choose_cases(&materials.list_cases()?, options)?;
    let peers = present_peers(&options.peers)?;
    let job = Job::new(options, &materials, &cases)?;
    let mut measured =
        Measured { cases, peers: peers.iter().map(|&peer| (peer, Figures::default())).collect() };
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        one_round(&job, &mut measured)?;
    }
    measured.report(options.rounds, options.cpus, options.json.as_deref())?;
    if let Some(path) = &options.record_floors {
        Floors::record(&measured, path)?;
    }
    match &options.floors {
        Some(path) => hold_to(&Floors::read(path)?, measured, options, &materials),
        None => Ok(()),
    }
}

/// Fails if something is slower than it may be, twice.
fn hold_to(floors: &Floors, mut measured: Measured, options: &Options, materials: &Materials) -> Result<()> {
    let missing = floors.missing(&measured);
    ensure!(missing.is_empty(), "no floor is recorded for {}", missing.join(", "));
    let below = floors.below(&measured);
    if below.is_empty() {
        println!("\nnothing is below its floor");
        return Ok(());
    }
    print_below("below the floor, so that it runs once more", &below);
    // A mean may be too low without any of its cases.
    let slow = |(_, name): &&(String, String)| below.iter().any(|below| below.name() == name);
    let mut again: Vec<_> = measured.cases.iter().filter(slow).cloned().collect();
    if again.is_empty() {
        again.clone_from(&measured.cases);
    }
    one_round(&Job::new(options, materials, &again)?, &mut measured)?;
    let below = floors.below(&measured);
    if below.is_empty() {
        return Ok(());
    }
    print_below(&format!("below the floor (recorded with {})", floors.qemu()), &below);
    bail!("{} of the ratios to QEMU's time are below their floor", below.len())
}

fn print_below(heading: &str, below: &[floor::Below]) {
    println!("\n{heading}:");
    below.iter().for_each(|below| println!("  {below}"));
}

/// Runs every peer once.
fn one_round(job: &Job, measured: &mut Measured) -> Result<()> {
    for (&peer, figures) in &mut measured.peers {
        eprintln!("{}", peer.name());
        one_run(job, peer, figures).with_context(|| format!("running {}", peer.name()))?;
    }
    Ok(())
}

fn one_run(job: &Job, peer: Peer, figures: &mut Figures) -> Result<()> {
    if peer != Peer::Native {
        figures.boots.push(job.boot(peer)?);
    }
    if peer == Peer::Ruse && figures.overhead_kib.is_none() {
        figures.overhead_kib = Some(job.overhead_kib()?);
    }
    if job.has_cases() {
        let Outcome { cases, .. } = job.cases(peer)?;
        for CaseTime { name, seconds, check } in cases {
            let case = figures.cases.entry(name.clone()).or_default();
            if !case.check.is_empty() && case.check != check {
                bail!("{name} gave {check} after {}", case.check);
            }
            case.seconds.push(seconds);
            case.check = check;
        }
    }
    Ok(())
}

/// The cases that are asked for; names that do not exist are an error.
fn choose_cases(all: &[(String, String)], options: &Options) -> Result<Vec<(String, String)>> {
    if options.cases == ["none"] {
        return Ok(Vec::new());
    }
    for want in &options.cases {
        if !all.iter().any(|(group, name)| want == group || want == name) {
            bail!("no case or group {want:?}; there are: {}", names(all).join(", "));
        }
    }
    let wanted = |(group, name): &&(String, String)| match &options.cases[..] {
        [] => options.cpus > 1 || group != "smp",
        some => some.contains(group) || some.contains(name),
    };
    let chosen: Vec<_> = all.iter().filter(wanted).cloned().collect();
    if options.cpus < 2 && chosen.iter().any(|(group, _)| group == "smp") {
        bail!("the cases of group smp need --cpus 2");
    }
    Ok(chosen)
}

fn names(cases: &[(String, String)]) -> Vec<String> {
    cases.iter().map(|(_, name)| name.clone()).collect()
}

/// The peers that this machine has. Without QEMU the others are still measured.
pub fn present_peers(wanted: &[Peer]) -> Result<Vec<Peer>> {
    let mut peers = wanted.to_vec();
    if peers.contains(&Peer::Qemu) && !qemu_is_here() {
        eprintln!("{} is not on this machine: left out (Debian has it in qemu-system-x86)", QEMU);
        peers.retain(|&peer| peer != Peer::Qemu);
    }
    peers.dedup();
    if peers.is_empty() { bail!("nobody to run") } else { Ok(peers) }
}
