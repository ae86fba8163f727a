//! A timer that runs out once, as a file that an event loop waits for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// A timer of the host's monotonic clock (timerfd_create(2)). Its file is readable from when it has run out until
/// [`OneShot::take`] is told so, or it is set again or stopped.
#[derive(Debug)]
pub struct OneShot {
    file: OwnedFd,
}

impl OneShot {
    /// A timer that is stopped. It is closed in programs that this one starts. Fails where the host gives no more files.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self { file: timerfd_create(TimerfdClockId::Monotonic, flags)? })
    }

    /// It runs out so long from now, whatever it was set to before; at once for no time at all. Fails for times that the
    /// host does not count to, of hundreds of years.
    pub fn set(&self, after: Duration) -> io::Result<()> {
        // Zero would stop it.
        self.set_to(after.max(Duration::from_nanos(1)))
    }

    /// It does not run out any more, and if it has, that is forgotten.
    pub fn stop(&self) -> io::Result<()> {
        self.set_to(Duration::ZERO)
    }

    /// Whether it has run out since it was last set, which is told once.
    pub fn take(&self) -> bool {
        rustix::io::read(&self.file, &mut [0; 8]).is_ok()
    }

    fn set_to(&self, after: Duration) -> io::Result<()> {
        let tv_sec = after.as_secs().try_into().unwrap_or(i64::MAX);
        let it_value = Timespec { tv_sec, tv_nsec: after.subsec_nanos().into() };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        let setting = Itimerspec { it_interval, it_value };
        timerfd_settime(&self.file, TimerfdTimerFlags::empty(), &setting)?;
        Ok(())
    }
}

impl AsFd for OneShot {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    /// Whether its file becomes readable within so many milliseconds.
    fn runs_out(timer: &OneShot, within: i64) -> bool {
        let wait = Timespec { tv_sec: within / 1000, tv_nsec: (within % 1000 * 1_000_000) as _ };
        poll(&mut [PollFd::new(timer, PollFlags::IN)], Some(&wait)).unwrap() == 1
    }

    #[test]
    fn it_runs_out_once_and_tells_once() {
        let timer = OneShot::new().unwrap();
        assert!(!runs_out(&timer, 10) && !timer.take(), "it is stopped");
        timer.set(Duration::from_millis(2)).unwrap();
        assert!(runs_out(&timer, 10_000));
        assert!(timer.take() && !timer.take());
        assert!(!runs_out(&timer, 10), "once");
        timer.set(Duration::ZERO).unwrap();
        assert!(runs_out(&timer, 10_000), "at once");
    }

    #[test]
    fn what_it_has_told_is_forgotten_when_it_is_set_or_stopped() {
        let timer = OneShot::new().unwrap();
        for forget in [|timer: &OneShot| timer.set(Duration::from_secs(3600)), OneShot::stop] {
            timer.set(Duration::ZERO).unwrap();
            assert!(runs_out(&timer, 10_000));
            forget(&timer).unwrap();
            assert!(!runs_out(&timer, 10) && !timer.take());
        }
    }

    #[test]
    fn long_times_are_long_or_refused() {
        let timer = OneShot::new().unwrap();
        assert!(timer.set(Duration::MAX).is_err() || !runs_out(&timer, 10));
    }
}
