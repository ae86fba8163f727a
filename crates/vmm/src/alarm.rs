//! The clock that wakes the I/O thread: a timerfd set to the earliest deadline that anyone has.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ruse_engine::Clock;
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};

/// No deadline.
const NEVER: u64 = u64::MAX;

/// Deadlines of everything that waits for a time, and the timer that is set to the earliest.
///
/// Any thread may set a deadline. One that is earlier than the timer's sets the timer; a later one costs nothing but a
/// wake-up that finds nothing due.
pub(crate) struct Alarm {
    clock: Arc<Clock>,
    timer: OwnedFd,
    /// What the timer is set to; changed under `setting` only.
    armed: AtomicU64,
    setting: Mutex<()>,
    slots: Vec<AtomicU64>,
}

impl Alarm {
    /// An alarm with `slots` deadlines, none set.
    pub(crate) fn new(clock: Arc<Clock>, slots: usize) -> std::io::Result<Self> {
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let slots = (0..slots).map(|_| AtomicU64::new(NEVER)).collect();
        Ok(Self { clock, timer, armed: AtomicU64::new(NEVER), setting: Mutex::new(()), slots })
    }

    /// What becomes readable when the earliest deadline has come.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Sets the deadline of `slot`, in nanoseconds since the machine's start. The caller holds the lock of what the
    /// slot belongs to.
    pub(crate) fn set(&self, slot: usize, deadline: Option<u64>) {
        let deadline = deadline.unwrap_or(NEVER);
        let Some(place) = self.slots.get(slot) else { return };
        if place.load(Ordering::Relaxed) != deadline {
            place.store(deadline, Ordering::SeqCst);
            self.advance(deadline);
        }
    }

    /// Brings the deadline of `slot` forward to `deadline`, if it is later or not set.
    pub(crate) fn bring_forward(&self, slot: usize, deadline: u64) {
        if let Some(place) = self.slots.get(slot)
            && place.fetch_min(deadline, Ordering::SeqCst) > deadline
        {
            self.advance(deadline);
        }
    }

    /// Whether the deadline of `slot` has come.
    pub(crate) fn is_due(&self, slot: usize, now: u64) -> bool {
        self.slots.get(slot).is_some_and(|place| place.load(Ordering::SeqCst) <= now)
    }

    /// The timer has expired: from here on every deadline sets it anew. To be followed by looking at what is due, and
    /// then by [`Alarm::rearm`].
    pub(crate) fn expired(&self) {
        let _setting = self.setting.lock().unwrap_or_else(PoisonError::into_inner);
        self.armed.store(NEVER, Ordering::SeqCst);
        let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
    }

    /// Sets the timer to the earliest deadline of all.
    pub(crate) fn rearm(&self) {
        if let Some(earliest) = self.slots.iter().map(|slot| slot.load(Ordering::SeqCst)).min() {
            self.advance(earliest);
        }
    }

    /// Sets the timer if `deadline` is earlier than what it is set to.
    fn advance(&self, deadline: u64) {
        if deadline >= self.armed.load(Ordering::SeqCst) {
            return;
        }
        let _setting = self.setting.lock().unwrap_or_else(PoisonError::into_inner);
        if deadline < self.armed.load(Ordering::SeqCst) {
            self.armed.store(deadline, Ordering::SeqCst);
            self.set_timer(deadline);
        }
    }

    fn set_timer(&self, deadline: u64) {
        let host = clock_gettime(ClockId::Monotonic);
        // A timer of zero would be none at all.
        let wait = self.clock.host_ns(deadline.saturating_sub(self.clock.now_ns())).clamp(1, 1 << 60);
        let nanoseconds = host.tv_nsec as u64 + wait;
        let it_value = Timespec {
            tv_sec: host.tv_sec.saturating_add((nanoseconds / 1_000_000_000) as i64),
            tv_nsec: (nanoseconds % 1_000_000_000) as _,
        };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        let new = Itimerspec { it_interval, it_value };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &new) {
            tracing::error!(%error, "cannot set the timer");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn wait(alarm: &Alarm, at_most: Duration) -> bool {
        let limit = Timespec::try_from(at_most).unwrap();
        poll(&mut [PollFd::new(&alarm.timer, PollFlags::IN)], Some(&limit)).unwrap() == 1
    }

    #[test]
    fn the_earliest_deadline_counts() {
        let clock = Arc::new(Clock::start());
        let alarm = Alarm::new(clock.clone(), 3).unwrap();
        assert!(!wait(&alarm, Duration::from_millis(5)));
        let now = clock.now_ns();
        alarm.set(0, Some(now + 60_000_000_000));
        alarm.set(1, Some(now + 20_000_000));
        alarm.set(2, Some(now + 40_000_000));
        let start = Instant::now();
        assert!(wait(&alarm, Duration::from_secs(5)));
        assert!(start.elapsed() >= Duration::from_millis(15));
        alarm.expired();
        assert!(alarm.is_due(1, now + 20_000_000) && !alarm.is_due(2, now + 20_000_000));
        alarm.set(1, None);
        alarm.rearm();
        assert!(wait(&alarm, Duration::from_secs(5)));
        alarm.expired();
        alarm.set(2, None);
        alarm.rearm();
        assert!(!wait(&alarm, Duration::from_millis(5)));
    }

    #[test]
    fn deadlines_of_the_past_come_at_once() {
        let alarm = Alarm::new(Arc::new(Clock::start()), 1).unwrap();
        alarm.set(0, Some(0));
        assert!(wait(&alarm, Duration::from_secs(5)));
        alarm.expired();
        alarm.set(0, None);
        alarm.bring_forward(0, u64::MAX - 1);
        alarm.bring_forward(9, 0);
        assert!(!wait(&alarm, Duration::from_millis(1)));
    }
}
