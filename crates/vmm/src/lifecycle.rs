//! What a machine is doing, and how its threads agree on it.
//!
//! Whoever wants a change sets the phase and kicks the vCPUs. A vCPU thread looks at the phase before each entry, and
//! parks while the machine does not run. The I/O thread carries out resets and the end once all have parked.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ruse_arch::VcpuState;
use ruse_devices::Power;
use ruse_engine::Counters;
use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

use crate::platform::lock;
use crate::report::{Outcome, VcpuReport};

/// How long [`Lifecycle::reports`] waits for a vCPU.
const REPORT_WAIT: Duration = Duration::from_millis(200);

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are held until it is resumed.
    Paused,
    /// It is being reset.
    Resetting,
    /// It has ended.
    Ended,
}

/// What a vCPU thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Run on.
    Run,
    /// Run on after the machine was held.
    Resume,
    /// Take the state of the start, then run.
    Start,
    /// Leave.
    Leave,
}

/// The shared state.
struct Life {
    phase: Phase,
    /// To be paused once a reset is done.
    pause_after_reset: bool,
    /// Counts the starts of the system: one more with each reset.
    epoch: u64,
    /// The vCPU that asked for the reset under way, or told of a panic.
    reset_by: Option<u32>,
    outcome: Option<Outcome>,
    /// The I/O thread is done: all output is written.
    finished: bool,
    vcpus: Vec<VcpuLife>,
    first_entry: Option<Instant>,
}

#[derive(Clone, Default)]
struct VcpuLife {
    parked: bool,
    reports: u64,
    state: Option<Box<VcpuState>>,
    counters: Counters,
}

/// The lifecycle of a machine.
pub(crate) struct Lifecycle {
    life: Mutex<Life>,
    changed: Condvar,
    wake: OwnedFd,
}

impl Lifecycle {
    /// A machine of `cpus` vCPUs that has not started.
    pub(crate) fn new(cpus: u32) -> std::io::Result<Self> {
        let life = Life {
            phase: Phase::Running,
            pause_after_reset: false,
            epoch: 1,
            reset_by: None,
            outcome: None,
            finished: false,
            vcpus: vec![VcpuLife::default(); cpus as usize],
            first_entry: None,
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { life: Mutex::new(life), changed: Condvar::new(), wake })
    }

    /// What becomes readable when the I/O thread is wanted.
    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
    /// Wakes the I/O thread.
    pub(crate) fn wake_io(&self) {
        // It can only fail because so many wake-ups wait already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
    /// The I/O thread is awake.
    pub(crate) fn clear_wake(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
    }

    /// What the machine is doing.
    pub(crate) fn phase(&self) -> Phase {
        lock(&self.life).phase
    }
    /// When vCPU 0 first entered the guest.
    pub(crate) fn first_entry(&self) -> Option<Instant> {
        lock(&self.life).first_entry
    }

    fn wait<'a>(&self, life: MutexGuard<'a, Life>) -> MutexGuard<'a, Life> {
        self.changed.wait(life).unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest asks for a change of power. The caller kicks the vCPUs.
    pub(crate) fn power(&self, power: Power, vcpu: Option<u32>) {
        match power {
            Power::Off => self.end(Outcome::PowerOff),
            Power::Exit(code) => self.end(Outcome::DebugExit(code)),
            Power::Reset => self.reset(vcpu),
            Power::Pause => drop(self.pause()),
            Power::Panicked => {
                lock(&self.life).reset_by = vcpu;
                let message = "it says so by pvpanic".to_owned();
                self.end(Outcome::GuestPanic { message, vcpu: vcpu.unwrap_or(0), dump: None });
            }
        }
    }

    /// The machine is to be reset. The caller kicks the vCPUs.
    pub(crate) fn reset(&self, vcpu: Option<u32>) {
        let mut life = lock(&self.life);
        if matches!(life.phase, Phase::Running | Phase::Paused) {
            life.pause_after_reset = life.phase == Phase::Paused;
            life.phase = Phase::Resetting;
            life.reset_by = vcpu;
            drop(life);
            self.wake_io();
        }
    }

    /// The machine ends, unless it has already: the first outcome counts. The caller kicks the vCPUs.
    pub(crate) fn end(&self, outcome: Outcome) {
        let mut life = lock(&self.life);
        if life.phase != Phase::Ended {
            life.phase = Phase::Ended;
            life.outcome = Some(outcome);
            drop(life);
            self.changed.notify_all();
            self.wake_io();
        }
    }

    /// Holds the machine; `false` if it has ended. The caller kicks the vCPUs.
    pub(crate) fn pause(&self) -> bool {
        let mut life = lock(&self.life);
        match life.phase {
            Phase::Running => life.phase = Phase::Paused,
            Phase::Resetting => life.pause_after_reset = true,
            Phase::Paused => {}
            Phase::Ended => return false,
        }
        true
    }

    /// Lets the machine run on; `false` if it has ended.
    pub(crate) fn resume(&self) -> bool {
        let mut life = lock(&self.life);
        match life.phase {
            Phase::Paused => life.phase = Phase::Running,
            Phase::Resetting => life.pause_after_reset = false,
            Phase::Running => {}
            Phase::Ended => return false,
        }
        drop(life);
        self.changed.notify_all();
        self.wake_io();
        true
    }

    /// Waits until the machine runs; `false` if it has ended, or `gone` was set meanwhile ([`Lifecycle::dismiss`]).
    pub(crate) fn wait_running(&self, gone: &AtomicBool) -> bool {
        let mut life = lock(&self.life);
        while matches!(life.phase, Phase::Paused | Phase::Resetting) && !gone.load(Ordering::Acquire) {
            life = self.wait(life);
        }
        life.phase == Phase::Running
    }

    /// Sets `gone`: those who look at it do not wait for the machine any more.
    pub(crate) fn dismiss(&self, gone: &AtomicBool) {
        // Under the lock, or who is about to wait would miss it.
        let life = lock(&self.life);
        gone.store(true, Ordering::Release);
        drop(life);
        self.changed.notify_all();
    }

    /// Whether the machine has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.phase() == Phase::Ended
    }

    /// Waits until all vCPUs have parked.
    pub(crate) fn wait_parked(&self) {
        let mut life = lock(&self.life);
        while !life.vcpus.iter().all(|vcpu| vcpu.parked) {
            life = self.wait(life);
        }
    }

    /// The vCPU that asked for the reset under way, or told of a panic, and its state; vCPU 0's where it was nobody.
    pub(crate) fn reset_by(&self) -> (u32, Option<Box<VcpuState>>) {
        let life = lock(&self.life);
        let vcpu = life.reset_by.unwrap_or(0);
        (vcpu, life.vcpus.get(vcpu as usize).and_then(|v| v.state.clone()))
    }

    /// The reset is done: the vCPUs start anew.
    pub(crate) fn reset_done(&self) {
        let mut life = lock(&self.life);
        if life.phase == Phase::Resetting {
            life.epoch += 1;
            life.phase = if life.pause_after_reset { Phase::Paused } else { Phase::Running };
        }
        drop(life);
        self.changed.notify_all();
    }

    /// What vCPU `id` does next; parks while the machine does not run. `epoch` is of the thread, zero at first.
    pub(crate) fn next(&self, id: u32, epoch: &mut u64) -> Step {
        let mut life = lock(&self.life);
        let held = life.phase == Phase::Paused;
        if life.phase != Phase::Running {
            self.set_parked(&mut life, id, true);
            while matches!(life.phase, Phase::Paused | Phase::Resetting) {
                life = self.wait(life);
            }
        }
        if life.phase == Phase::Ended {
            return Step::Leave;
        }
        self.set_parked(&mut life, id, false);
        if *epoch == life.epoch {
            return if held { Step::Resume } else { Step::Run };
        }
        *epoch = life.epoch;
        if id == 0 && life.first_entry.is_none() {
            life.first_entry = Some(Instant::now());
        }
        Step::Start
    }

    fn set_parked(&self, life: &mut Life, id: u32, parked: bool) {
        if let Some(vcpu) = life.vcpus.get_mut(id as usize)
            && vcpu.parked != parked
        {
            vcpu.parked = parked;
            self.changed.notify_all();
        }
    }

    /// vCPU `id` will not run again.
    pub(crate) fn left(&self, id: u32) {
        self.set_parked(&mut lock(&self.life), id, true);
    }

    /// vCPU `id` has left the guest in this state.
    pub(crate) fn report(&self, id: u32, state: Option<VcpuState>, counters: Counters) {
        let mut life = lock(&self.life);
        if let Some(vcpu) = life.vcpus.get_mut(id as usize) {
            vcpu.reports += 1;
            vcpu.state = state.map(Box::new);
            vcpu.counters = counters;
            self.changed.notify_all();
        }
    }

    /// What the vCPUs report. Those that run are kicked by `kick` and waited for, but not long.
    pub(crate) fn reports(&self, kick: impl FnOnce()) -> Vec<VcpuReport> {
        let mut life = lock(&self.life);
        let before: Vec<_> = life.vcpus.iter().map(|v| v.reports).collect();
        drop(life);
        kick();
        let limit = Instant::now() + REPORT_WAIT;
        life = lock(&self.life);
        // Of a machine that is paused, the vCPUs are waited for until they stand still.
        let done = |life: &Life| {
            let paused = life.phase == Phase::Paused;
            life.vcpus.iter().zip(&before).all(|(v, &before)| v.parked || (!paused && v.reports > before))
        };
        while !done(&life) {
            let Some(rest) = limit.checked_duration_since(Instant::now()) else { break };
            life = self.changed.wait_timeout(life, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
        (0..)
            .zip(&life.vcpus)
            .map(|(id, v)| VcpuReport::new(id, v.parked, v.state.as_deref(), &v.counters))
            .collect()
    }

    /// Whether the user has ended it.
    pub(crate) fn is_stopped(&self) -> bool {
        matches!(lock(&self.life).outcome, Some(Outcome::Stopped))
    }

    /// Replaces the outcome, before anyone has seen it.
    pub(crate) fn amend(&self, change: impl FnOnce(Outcome) -> Outcome) {
        let mut life = lock(&self.life);
        life.outcome = life.outcome.take().map(change);
    }

    /// All output is written: whoever waits for the outcome may have it.
    pub(crate) fn finish(&self) {
        lock(&self.life).finished = true;
        self.changed.notify_all();
    }

    /// Waits for the end.
    pub(crate) fn wait_outcome(&self) -> Outcome {
        let mut life = lock(&self.life);
        while !life.finished {
            life = self.wait(life);
        }
        life.outcome.clone().unwrap_or(Outcome::Stopped)
    }
}
