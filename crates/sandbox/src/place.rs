//! The host's CPU that a thread shares with its sandboxes. Only one of them runs at a time; where another CPU had to be woken for
//! each change, a trap would take twenty times as long.

use std::{
    fs,
    time::{Duration, Instant},
};

use rustix::{
    process::Pid,
    thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity},
};

use crate::Sandbox;

/// How often it is looked at how long the threads have waited for their CPU.
const PERIOD: Duration = Duration::from_millis(50);

/// Where the calling thread and its sandboxes run.
#[derive(Debug, Default)]
pub struct Place {
    /// The CPU, and those that the thread could run on before.
    kept: Option<(usize, CpuSet)>,
    looked: Option<Look>,
}

/// What was seen last.
#[derive(Clone, Copy, Debug)]
struct Look {
    at: Instant,
    /// Which sandbox.
    thread: u32,
    /// How long its thread and the calling one have waited for a CPU in all.
    waited: Duration,
}

impl Place {
    /// Keeps the calling thread where it is, and the sandbox with it. If others want the CPU as well, another one is taken.
    pub fn share(&mut self, sandbox: &mut Sandbox) {
        if self.is_crowded(sandbox) {
            self.move_on();
        }
        let cpu = match &self.kept {
            Some((cpu, _)) => *cpu,
            None => self.keep(sched_getaffinity(None).unwrap_or_else(|_| only(0))),
        };
        if sandbox.cpu != Some(cpu) {
            sandbox.cpu = Some(cpu);
            for thread in [sandbox.child.0.id(), sandbox.thread] {
                run_on(Pid::from_raw(thread as i32), &only(cpu));
            }
        }
    }

    /// Lets the calling thread run where it could before.
    pub fn leave(&mut self) {
        if let Some((_, before)) = self.kept.take() {
            run_on(None, &before);
        }
        self.looked = None;
    }

    /// Stays on the CPU of the moment, until [`Place::leave`] gives back what was before.
    fn keep(&mut self, before: CpuSet) -> usize {
        let cpu = sched_getcpu();
        run_on(None, &only(cpu));
        self.kept = Some((cpu, before));
        cpu
    }

    /// Leaves the CPU for another one of those that are allowed, which the kernel chooses.
    fn move_on(&mut self) {
        let Some((cpu, before)) = self.kept.take() else { return };
        let mut others = before;
        others.unset(cpu);
        if others.count() > 0 {
            run_on(None, &others);
        }
        self.keep(before);
    }

    /// Whether the threads have waited for their CPU for a quarter of the time.
    fn is_crowded(&mut self, sandbox: &Sandbox) -> bool {
        let now = Instant::now();
        let thread = sandbox.thread;
        if self.looked.is_some_and(|look| now - look.at < PERIOD) {
            return false;
        }
        let waited = waited("thread-self") + waited(&format!("{}/task/{thread}", sandbox.child.0.id()));
        let before = self.looked.replace(Look { at: now, thread, waited });
        before.is_some_and(|look| {
            let fresh = look.thread == thread && now - look.at < 4 * PERIOD;
            fresh && (waited.saturating_sub(look.waited)) * 4 > now - look.at
        })
    }
}

fn only(cpu: usize) -> CpuSet {
    let mut set = CpuSet::new();
    if cpu < CpuSet::MAX_CPU {
        set.set(cpu);
    }
    set
}

/// `None` is the calling thread. What the kernel refuses makes things slower, not wrong.
fn run_on(thread: Option<Pid>, cpus: &CpuSet) {
    let _ = sched_setaffinity(thread, cpus);
}

/// How long a thread has waited for a CPU, by the second number of its schedstat.
fn waited(thread: &str) -> Duration {
    let text = fs::read_to_string(format!("/proc/{thread}/schedstat")).unwrap_or_default();
    Duration::from_nanos(text.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0))
}
