//! One run of one peer: the process, what it prints and when.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use super::build::{self, Materials};
use super::{Options, Peer};
use crate::resident;
use crate::running::Running;

/// QEMU's program.
pub const QEMU: &str = "qemu-system-x86_64";
/// How the guest's RAM is named among the mappings of `ruse`.
pub const GUEST_RAM: &str = "memfd:guest-ram";

/// Whether QEMU is on this machine.
pub fn qemu_is_here() -> bool {
    Command::new(QEMU).arg("--version").stdout(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// The first line of what QEMU says of its version.
pub fn qemu_version() -> String {
    let output = Command::new(QEMU).arg("--version").output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).lines().next().unwrap_or_default().to_owned()
}

/// What every run has in common.
pub struct Job<'a> {
    options: &'a Options,
    materials: &'a Materials,
    ruse: PathBuf,
    cases: Vec<String>,
}

/// What a run gave.
pub struct Outcome {
    /// Seconds from the start to `GUEST-UP`.
    pub up: Option<f64>,
    /// Seconds from the start to the end.
    pub end: f64,
    /// The cases that ran.
    pub cases: Vec<CaseTime>,
    /// What it printed at last.
    pub last_lines: String,
}

/// One case's line.
pub struct CaseTime {
    /// The case.
    pub name: String,
    /// How long it took, by its own clock.
    pub seconds: f64,
    /// Its result.
    pub check: String,
}

impl<'a> Job<'a> {
    /// Prepares runs of these cases.
    pub fn new(
        options: &'a Options,
        materials: &'a Materials,
        cases: &[(String, String)],
    ) -> Result<Job<'a>> {
        let ruse = match options.peers.contains(&Peer::Ruse) {
            true => build::ruse(options.ruse.as_deref())?,
            false => PathBuf::new(),
        };
        Ok(Job { options, materials, ruse, cases: super::names(cases) })
    }

    /// Whether there is more to run than the boot.
    pub fn has_cases(&self) -> bool {
        !self.cases.is_empty()
    }

    /// Boots and powers off: seconds to `GUEST-UP` and to the end of the process.
    pub fn boot(&self, peer: Peer) -> Result<(f64, f64)> {
        let outcome = self.finish(self.command(peer, "bench=none"))?;
        let up =
            outcome.up.with_context(|| format!("the guest never said GUEST-UP:\n{}", outcome.last_lines))?;
        Ok((up, outcome.end))
    }

    /// Runs the cases.
    pub fn cases(&self, peer: Peer) -> Result<Outcome> {
        let outcome = self.finish(self.command(peer, &format!("bench={}", self.cases.join(","))))?;
        let expected = |name: &&String| !outcome.cases.iter().any(|case| case.name == **name);
        if let Some(missing) = self.cases.iter().find(expected) {
            bail!("case {missing} did not run:\n{}", outcome.last_lines);
        }
        Ok(outcome)
    }

    /// Resident memory of `ruse` that is not guest RAM, in KiB, with the guest up and idle.
    pub fn overhead_kib(&self) -> Result<u64> {
        let mut run = Running::start(self.command(Peer::Ruse, "bench=none shell"), self.options.timeout)?;
        while let Some((_, line)) = run.next_line()? {
            if line.contains("GUEST-DONE") {
                thread::sleep(Duration::from_millis(500));
                return resident::besides(GUEST_RAM, run.id());
            }
        }
        bail!("the guest ended early:\n{}", run.last_lines())
    }

    fn finish(&self, command: Command) -> Result<Outcome> {
        let mut run = Running::start(command, self.options.timeout)?;
        let (mut up, mut cases) = (None, Vec::new());
        while let Some((seconds, line)) = run.next_line()? {
            if line.contains("GUEST-UP") {
                up = Some(seconds);
            } else if let Some(case) = CaseTime::parse(&line) {
                cases.push(case);
            }
        }
        let (status, end) = run.wait()?;
        ensure!(status.success(), "it ended with {status}:\n{}", run.last_lines());
        Ok(Outcome { up, end, cases, last_lines: run.last_lines() })
    }

    fn command(&self, peer: Peer, what: &str) -> Command {
        let Materials { program, initrd, kernel } = self.materials;
        let line = format!("console=ttyS0 panic=-1 quiet {what}");
        let guest =
            Guest { kernel, initrd, line, mebibytes: 1024, cpus: self.options.cpus, accel: Accel::Dbt };
        match peer {
            Peer::Native => {
                let mut command = Command::new(program);
                command.args(&self.cases);
                command
            }
            Peer::Qemu => guest.under_qemu(&self.options.qemu_machine),
            Peer::Ruse => guest.under_ruse(&self.ruse, &self.options.ruse_args),
        }
    }
}

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// Ruse's translator, and QEMU's (TCG).
    Dbt,
    /// /dev/kvm.
    Kvm,
}

/// A guest that every peer can run.
pub struct Guest<'a> {
    /// The kernel.
    pub kernel: &'a Path,
    /// The initramfs.
    pub initrd: &'a Path,
    /// The kernel's command line.
    pub line: String,
    /// The size of its RAM.
    pub mebibytes: u32,
    /// The number of its CPUs.
    pub cpus: u32,
    /// What executes its instructions.
    pub accel: Accel,
}

impl Guest<'_> {
    /// Under QEMU, as a machine of this type.
    pub fn under_qemu(&self, machine: &str) -> Command {
        let mut command = Command::new(QEMU);
        command.args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]);
        let accel = if self.accel == Accel::Kvm { "kvm" } else { "tcg" };
        command.args(["-M", machine, "-accel", accel, "-cpu", "max"]);
        command.args(["-m", &self.mebibytes.to_string(), "-smp", &self.cpus.to_string()]);
        command.args(["-append", &self.line]);
        command.arg("-kernel").arg(self.kernel).arg("-initrd").arg(self.initrd);
        command
    }

    /// Under this `ruse`, with more arguments.
    pub fn under_ruse(&self, ruse: &Path, arguments: &[String]) -> Command {
        let mut command = Command::new(ruse);
        let accel = if self.accel == Accel::Kvm { "kvm" } else { "dbt" };
        command.args(["run", "--accel", accel, "--memory", &format!("{}M", self.mebibytes)]);
        command.args(["--cpus", &self.cpus.to_string(), "--cmdline", &self.line]);
        command.arg("--kernel").arg(self.kernel).arg("--initrd").arg(self.initrd).args(arguments);
        command
    }
}

impl CaseTime {
    /// Reads `BENCH group name seconds check`; a case that this CPU cannot run has no seconds.
    pub fn parse(line: &str) -> Option<CaseTime> {
        let mut words = line[line.find("BENCH ")?..].split_whitespace().skip(2);
        let (name, seconds, check) = (words.next()?, words.next()?, words.next()?);
        let seconds = if seconds == "-" { f64::NAN } else { seconds.parse().ok()? };
        Some(CaseTime { name: name.to_owned(), seconds, check: check.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_cases_are_read() {
        let case = CaseTime::parse("[ 1.0] BENCH int sieve 0.1234 00000000000001ab").unwrap();
        assert_eq!(
            (case.name.as_str(), case.seconds, case.check.as_str()),
            ("sieve", 0.1234, "00000000000001ab")
        );
        assert!(CaseTime::parse("BENCH fp avx2 - no-avx2").unwrap().seconds.is_nan());
        assert!(CaseTime::parse("BENCH int sieve").is_none());
        assert!(CaseTime::parse("GUEST-UP 1.0").is_none());
    }
}
