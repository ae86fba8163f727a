//! One run of a monitor, and what it shows.

use std::arch::x86_64::_rdtsc;
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::guest::EXITS;
use super::peer::{Guest, Peer};
use crate::resident;
use crate::running::Running;

/// Seconds that a run may take.
const TIMEOUT: u64 = 300;

/// What all runs have in common.
pub struct Bench {
    /// The program of Ruse.
    pub ruse: PathBuf,
    /// The guest that times exits.
    pub exits: PathBuf,
    /// The stock kernel and the initramfs of the benchmark guest, if it is booted.
    pub system: Option<(PathBuf, PathBuf)>,
    /// Ticks of the time-stamp counter in a nanosecond.
    pub ticks_per_ns: f64,
}

impl Bench {
    /// Seconds from the start of the process to the guest's first instruction, and nanoseconds of each kind of exit.
    pub fn exits(&self, peer: Peer) -> Result<(f64, BTreeMap<String, f64>)> {
        let guest = Guest { kernel: &self.exits, system: None };
        let input = peer.input()?;
        let mut run = Running::start_reading(input.program, peer.command(&self.ruse, &guest), TIMEOUT)?;
        let (mut first, mut exits) = (None, BTreeMap::new());
        while let Some((seconds, line)) = run.next_line()? {
            match line.as_str() {
                "FIRST" => first = Some(seconds),
                "END" => return Ok((first.context("the guest does not say FIRST")?, exits)),
                line => exits.extend(exit(line, self.ticks_per_ns)),
            }
        }
        bail!("the guest ended early:\n{}", run.last_lines())
    }

    /// Seconds from the start of the process to a system that is up, and KiB that are resident then besides its RAM.
    pub fn boot(&self, peer: Peer, kernel: &Path, initrd: &Path) -> Result<(f64, u64)> {
        let cmdline = "console=ttyS0 quiet panic=-1 bench=none shell";
        let guest = Guest { kernel, system: Some((initrd, cmdline)) };
        let input = peer.input()?;
        let mut run = Running::start_reading(input.program, peer.command(&self.ruse, &guest), TIMEOUT)?;
        let mut up = None;
        while let Some((seconds, line)) = run.next_line()? {
            if line.contains("GUEST-UP") {
                up = Some(seconds);
            } else if line.contains("GUEST-DONE") {
                let resident = resident::besides(peer.ram(), run.id())?;
                return Ok((up.context("the guest does not say GUEST-UP")?, resident));
            }
        }
        bail!("the guest ended early:\n{}", run.last_lines())
    }

    /// System calls of all threads from the start of the program to the first entry into the guest.
    pub fn system_calls(&self, peer: Peer) -> Result<usize> {
        let trace = self.exits.with_extension("strace");
        // Written anew, so that nothing is read of an earlier run.
        fs::write(&trace, "")?;
        let guest = Guest { kernel: &self.exits, system: None };
        let program = peer.command(&self.ruse, &guest);
        // With -D the program is the child, so that its end is the tracer's.
        let mut command = Command::new("strace");
        command.args(["-D", "-f", "-qq", "-o"]).arg(&trace);
        command.arg(program.get_program()).args(program.get_args());
        let input = peer.input()?;
        let run = Running::start_reading(input.program, command, TIMEOUT)?;
        let deadline = Instant::now() + Duration::from_secs(TIMEOUT);
        while Instant::now() < deadline {
            if let Some(count) = calls_before_entry(&fs::read_to_string(&trace)?) {
                return Ok(count);
            }
            thread::sleep(Duration::from_millis(20));
        }
        bail!("strace shows no KVM_RUN:\n{}", run.last_lines())
    }
}

/// Whether system calls can be counted here.
pub fn can_trace() -> bool {
    Command::new("strace")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Ticks of the time-stamp counter in a nanosecond.
pub fn ticks_per_ns() -> f64 {
    // SAFETY: RDTSC is in every x86-64 CPU, and Linux lets programs use it.
    let ticks = || unsafe { _rdtsc() };
    let (start, before) = (Instant::now(), ticks());
    thread::sleep(Duration::from_millis(100));
    (ticks() - before) as f64 / start.elapsed().as_nanos() as f64
}

/// Reads `NAME TICKS` of [`EXITS`] exits: the name, and nanoseconds of one.
fn exit(line: &str, ticks_per_ns: f64) -> Option<(String, f64)> {
    let (name, ticks) = line.split_once(' ')?;
    let ticks = u64::from_str_radix(ticks, 16).ok()?;
    Some((name.to_owned(), ticks as f64 / EXITS / ticks_per_ns))
}

/// Counts the calls in a trace of `strace -f` before the first KVM_RUN.
fn calls_before_entry(trace: &str) -> Option<usize> {
    let mut count = 0;
    for line in trace.lines() {
        let call = line.split_once(' ')?.1.trim_start();
        if call.starts_with("ioctl(") && call.contains("KVM_RUN") {
            return Some(count);
        }
        // The second half of a call that another thread's has interrupted, a signal, an end.
        count +=
            usize::from(!call.starts_with("<...") && !call.starts_with("---") && !call.starts_with("+++"));
    }
    None
}

/// Checks that KVM is here at all; each monitor would say it in its own way.
pub fn need_kvm() -> Result<()> {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    opened.map(drop).context("opening /dev/kvm (with --lab none is needed)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_guest_are_read() {
        assert_eq!(exit("port-in 0000000000800000", 2.0), Some(("port-in".to_owned(), 1024.0)));
        assert_eq!(exit("SeaBIOS (version 1)", 2.0), None);
    }

    #[test]
    fn calls_are_counted_to_the_first_entry() {
        let trace = "10 execve(\"/ruse\", [\"ruse\"], 0x1) = 0\n10 clone3({flags=0} <unfinished ...>\n11 rseq(0x7f) = 0\n\
                     10 <... clone3 resumed>) = 11\n10 --- SIGCHLD {si_signo=SIGCHLD} ---\n11 +++ exited with 0 +++\n\
                     10 ioctl(3, KVM_CREATE_VM, 0) = 4\n10 ioctl(5, KVM_RUN <unfinished ...>\n11 read(0) = 0\n";
        assert_eq!(calls_before_entry(trace), Some(4));
        assert_eq!(calls_before_entry("10 execve(\"/ruse\") = 0\n"), None);
    }
}
