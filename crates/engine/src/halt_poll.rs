//! Waiting that looks before it sleeps.

use std::{
    hint::spin_loop,
    sync::LazyLock,
    thread::available_parallelism,
    time::{Duration, Instant},
};

/// Whether somebody else can make true what a thread looks for, while it looks.
static SEVERAL_CPUS: LazyLock<bool> =
    LazyLock::new(|| available_parallelism().is_ok_and(|cpus| cpus.get() > 1));

/// Looks for what a thread waits for before the thread sleeps, while its waits are short: to wake it takes tens of
/// microseconds, and more where the host is a virtual machine itself. So KVM does for vCPUs that halt (the kernel's
/// Documentation/virt/kvm/halt-polling.rst), and by the same rule.
#[derive(Debug, Default)]
pub struct HaltPoll {
    /// How long it looks.
    time: Duration,
}

impl HaltPoll {
    const FIRST: Duration = Duration::from_micros(10);
    /// A wait that takes longer is not worth it.
    const MOST: Duration = Duration::from_micros(200);

    /// Waits by `sleep`, which returns at once when `ready` says yes.
    pub fn wait<R>(&mut self, ready: impl Fn() -> bool, sleep: impl FnOnce() -> R) -> R {
        let begun = Instant::now();
        while begun.elapsed() < self.time && !ready() {
            spin_loop();
        }
        let result = sleep();
        self.learn(begun.elapsed());
        result
    }

    /// A wait has taken so long.
    fn learn(&mut self, waited: Duration) {
        self.time = if waited <= self.time {
            self.time
        } else if waited > Self::MOST || !*SEVERAL_CPUS {
            Duration::ZERO
        } else {
            (self.time * 2).clamp(Self::FIRST, Self::MOST)
        };
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn short_waits_are_looked_through_and_long_ones_are_slept_through() {
        let mut poll = HaltPoll::default();
        let looked = Cell::new(false);
        let never = || {
            looked.set(true);
            false
        };
        poll.wait(never, || ());
        assert!(!looked.get(), "it begins with sleep");
        for _ in 0..5 {
            poll.learn(Duration::from_micros(70));
        }
        if !*SEVERAL_CPUS {
            assert_eq!(poll.time, Duration::ZERO);
            return;
        }
        assert!(poll.time >= Duration::from_micros(70) && poll.time <= HaltPoll::MOST);
        let time = poll.time;
        poll.wait(|| true, || ());
        assert_eq!(poll.time, time, "what comes in time changes nothing");
        poll.wait(never, || std::thread::sleep(Duration::from_millis(1)));
        assert!(looked.get());
        assert_eq!(poll.time, Duration::ZERO);
    }
}
