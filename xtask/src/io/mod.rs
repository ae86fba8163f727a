//! I/O: a program in the guest that reads and writes disks, sends and receives, and works on files of a shared folder,
//! under QEMU and under Ruse, interleaved.

mod host;
mod lab;
mod machine;
mod tap;

use std::net::Ipv4Addr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};

use crate::bench::{self, Accel, CaseTime, Figures, Measured, Peer, present_peers};
use crate::running::Running;
use host::Host;
use machine::{Machine, Net};
use tap::Tap;

/// What to run, and how often.
#[derive(Args)]
pub struct Options {
    /// Rounds; each runs every peer once, and medians are taken over them.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// What to measure, separated by commas.
    #[arg(long, value_delimiter = ',', default_values = ["raw", "qcow2", "net", "share"])]
    groups: Vec<Group>,
    /// What executes the guest's instructions, under both.
    #[arg(long, default_value = "dbt")]
    accel: Accel,
    /// The guest's CPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    cpus: u32,
    /// Whom to run.
    #[arg(long, value_delimiter = ',', default_values = ["qemu", "ruse"])]
    peers: Vec<Peer>,
    /// The `ruse` to measure; without it, the one of this tree is built.
    #[arg(long)]
    ruse: Option<PathBuf>,
    /// More arguments for `ruse run`, as one word each.
    #[arg(long = "ruse-arg", allow_hyphen_values = true)]
    ruse_args: Vec<String>,
    /// Where images and the shared folder lie; without it, beside what is built. On /dev/shm the host's own disk does
    /// not count.
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Divides all amounts by this, for hosts that are slow.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    scale: u32,
    /// Runs all of it in the lab under KVM, on hardware virtualization that QEMU emulates.
    #[arg(long, conflicts_with_all = ["accel", "directory", "json", "kernel", "ruse_args"])]
    lab: bool,
    /// The kernel of the guest; without it, the default guest's.
    #[arg(long, requires = "initrd")]
    kernel: Option<PathBuf>,
    /// An initramfs with the program, for that kernel.
    #[arg(long, requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Ends a run that takes longer than this many seconds.
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Writes all figures to this file as well.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// A group of cases with its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Group {
    /// A disk whose image is raw.
    Raw,
    /// A disk whose image is qcow2.
    Qcow2,
    /// The user-mode network.
    Net,
    /// A tap of the host's, which is made and removed; it takes root.
    Tap,
    /// A shared folder.
    Share,
}

impl Group {
    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Group::Raw => "raw",
            Group::Qcow2 => "qcow2",
            Group::Net => "net",
            Group::Tap => "tap",
            Group::Share => "share",
        }
    }
}

/// Runs the benchmark and prints its report.
pub fn run(options: &Options) -> Result<()> {
    ensure!(
        !options.peers.contains(&Peer::Native),
        "there is no native I/O to compare with: --peers qemu,ruse"
    );
    let peers = present_peers(&options.peers)?;
    if options.lab {
        return lab::run(options, &peers);
    }
    let ruse = bench::ruse(options.ruse.as_deref())?;
    let machine = Machine::prepare(options, ruse)?;
    let tap = options.groups.contains(&Group::Tap).then(Tap::make).transpose()?;
    let host = Host::start(Ipv4Addr::LOCALHOST)?;
    let mut measured =
        Measured { cases: Vec::new(), peers: peers.iter().map(|&peer| (peer, Figures::default())).collect() };
    for round in 1..=options.rounds {
        for (&peer, figures) in &mut measured.peers {
            eprintln!("round {round} of {}: {}", options.rounds, peer.name());
            let cases = one_run(&machine, &host, tap.as_ref(), peer, options)
                .with_context(|| format!("running {}", peer.name()))?;
            note(&mut measured.cases, figures, cases);
        }
    }
    measured.report(options.rounds, options.cpus, options.json.as_deref())
}

/// Runs all cases under a peer, on images that no case has changed.
fn one_run(
    machine: &Machine,
    host: &Host,
    tap: Option<&Tap>,
    peer: Peer,
    options: &Options,
) -> Result<Vec<CaseTime>> {
    machine.renew()?;
    let port = Host::free_port()?;
    let (command, _helper) = machine.command(peer, &Net { server: host.port(), published: port, tap })?;
    let mut running = Running::start(command, options.timeout)?;
    let mut cases = Vec::new();
    while let Some((_, line)) = running.next_line()? {
        if let Some(count) = line.strip_prefix("IO-CONNECT ") {
            Host::connect(port, count.parse().context("the number of connections")?);
        } else if let Some(case) = CaseTime::parse(&line) {
            cases.push(case);
        }
    }
    let (status, _) = running.wait()?;
    ensure!(status.success(), "it ended with {status}:\n{}", running.last_lines());
    if let Some(group) = options.groups.iter().find(|group| !complete(**group, &cases)) {
        bail!("not all cases of {} ran:\n{}", group.name(), running.last_lines());
    }
    Ok(cases)
}

/// Whether all cases of a group are there.
fn complete(group: Group, cases: &[CaseTime]) -> bool {
    let prefix = format!("{}/", group.name());
    let count = cases.iter().filter(|case| case.name.starts_with(&prefix)).count();
    count
        == match group {
            Group::Net => 3,
            Group::Tap => 2,
            Group::Raw | Group::Qcow2 | Group::Share => 6,
        }
}

fn note(all: &mut Vec<(String, String)>, figures: &mut Figures, cases: Vec<CaseTime>) {
    for CaseTime { name, seconds, check } in cases {
        let group = name.split('/').next().unwrap_or_default().to_owned();
        if !all.iter().any(|(_, known)| *known == name) {
            all.push((group, name.clone()));
        }
        let case = figures.cases.entry(name).or_default();
        case.seconds.push(seconds);
        case.check = check;
    }
}
