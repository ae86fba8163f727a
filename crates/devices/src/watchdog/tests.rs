//! A driver that does what Linux's `i6300esb` does, or does not.

use super::*;
use crate::Effects;

/// Nanoseconds of a tick of the timer at 1 kHz.
const TICK: u64 = PCI_TICK << SLOW_SHIFT;

struct Bench {
    watchdog: Watchdog,
    now: u64,
    effects: Effects,
}

impl Bench {
    fn new(action: Option<Power>) -> Self {
        Self { watchdog: Watchdog::new(action), now: 5, effects: Effects::default() }
    }

    fn access<R>(&mut self, call: impl FnOnce(&mut Watchdog, &mut Access) -> R) -> R {
        call(&mut self.watchdog, &mut Access { now: self.now, effects: &mut self.effects })
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.access(|watchdog, access| watchdog.bar_write(access, 0, offset, data));
    }

    /// A write behind the two that unlock it.
    fn unlocked(&mut self, offset: u64, data: &[u8]) {
        self.write(0x0c, &[0x80, 0]);
        self.write(0x0c, &[0x86, 0]);
        self.write(offset, data);
    }

    fn config(&mut self, register: u16, value: u8) {
        self.access(|watchdog, access| watchdog.config_write(access, register, value.into(), 1));
    }

    fn timed_out(&mut self) -> bool {
        let mut data = [0; 2];
        self.access(|watchdog, access| watchdog.bar_read(access, 0, 0x0c, &mut data));
        u16::from_le_bytes(data) & TIMED_OUT != 0
    }

    /// Both stages have so many ticks, and the timer runs.
    fn start(&mut self, ticks: u32) {
        self.unlocked(0, &ticks.to_le_bytes());
        self.unlocked(4, &ticks.to_le_bytes());
        self.config(LOCK, ENABLED);
    }

    /// Lets the time go on to the deadline that it has named last, and calls it.
    fn expire(&mut self) -> bool {
        self.now = self.effects.watchdog.filter(|time| *time != NEVER).expect("it runs");
        self.access(|watchdog, access| watchdog.tick(access))
    }
}

#[test]
fn a_system_that_is_silent_for_two_stages_is_dealt_with() {
    let mut bench = Bench::new(Some(Power::Reset));
    bench.start(100);
    assert_eq!(bench.effects.watchdog, Some(5 + 100 * TICK));
    assert!(!bench.expire() && !bench.timed_out() && bench.effects.power.is_none());
    assert_eq!(bench.effects.watchdog, Some(5 + 200 * TICK));
    assert!(bench.expire() && bench.timed_out());
    assert_eq!((bench.effects.power, bench.effects.watchdog), (Some(Power::Reset), Some(NEVER)));
    bench.access(|watchdog, access| watchdog.reset(access));
    assert!(bench.timed_out(), "the next system hears of it");
    bench.unlocked(0x0c, &[0, 2]);
    assert!(!bench.timed_out());
    assert_eq!(bench.watchdog.state(), Watchdog::new(None).state(), "all else is as after power-up");
}

#[test]
fn a_ping_begins_with_the_first_stage_again() {
    let mut bench = Bench::new(Some(Power::Off));
    bench.start(100);
    for _ in 0..3 {
        assert!(!bench.expire());
        bench.now += 50 * TICK;
        bench.unlocked(0x0c, &[0, 1]);
        assert_eq!(bench.effects.watchdog, Some(bench.now + 100 * TICK));
    }
    bench.now += 99 * TICK;
    assert!(!bench.access(|watchdog, access| watchdog.tick(access)), "a call that is early is none");
    assert_eq!(bench.effects.power, None);
}

#[test]
fn writes_count_behind_the_ones_that_unlock_only() {
    let mut bench = Bench::new(None);
    bench.start(100);
    let deadline = bench.effects.watchdog;
    bench.now += TICK;
    for writes in [&[][..], &[0x80], &[0x86], &[0x86, 0x80], &[0x80, 0x80, 0x86], &[0x80, 0x86, 0x80]] {
        for &value in writes {
            bench.write(0x0c, &[value, 0]);
        }
        bench.write(0x0c, &[0, 1]);
        bench.write(0x00, &[1, 0, 0, 0]);
    }
    assert_eq!(bench.effects.watchdog, deadline);
    for (offset, data) in [(0x0c, &[0][..]), (0x0c, &[0; 8]), (0x40, &[0; 4]), (u64::MAX, &[1; 4])] {
        bench.unlocked(offset, data);
    }
    assert_eq!(bench.effects.watchdog, deadline, "other widths and registers are none");
}

#[test]
fn the_timer_can_be_fast_stopped_and_locked() {
    let mut bench = Bench::new(None);
    bench.config(CONFIG, FAST);
    bench.start(100);
    assert_eq!(bench.effects.watchdog, Some(5 + 100 * (PCI_TICK << FAST_SHIFT)));
    bench.config(LOCK, 0);
    assert_eq!(bench.effects.watchdog, Some(NEVER));
    bench.unlocked(0x0c, &[0, 1]);
    assert_eq!(bench.effects.watchdog, Some(NEVER), "what does not run is not begun by a ping");
    bench.config(LOCK, LOCKED | ENABLED | FREE_RUNNING);
    bench.config(LOCK, 0);
    let lock = bench.access(|watchdog, access| watchdog.config_read(access, LOCK));
    assert_eq!(lock, 7, "it is locked");
    assert!(!bench.expire() && bench.expire() && !bench.expire() && bench.expire(), "it runs on");
    bench.config(CONFIG, NO_OUTPUT);
    assert!(!bench.expire() && !bench.expire());
}

#[test]
fn the_time_that_a_machine_is_held_does_not_count() {
    let mut bench = Bench::new(Some(Power::Reset));
    bench.access(Watchdog::held);
    assert_eq!(bench.effects.watchdog, Some(NEVER));
    bench.start(100);
    bench.expire();
    bench.now += 1000 * TICK;
    bench.access(Watchdog::held);
    assert_eq!(bench.effects.watchdog, Some(bench.now + 100 * TICK));
    let saved = bench.watchdog.state();
    let text = serde_json::to_string(&saved).unwrap();
    let mut other = Bench::new(Some(Power::Reset));
    other.access(|watchdog, access| watchdog.restore(access, &serde_json::from_str(&text).unwrap()));
    assert_eq!((other.watchdog.state(), other.effects.watchdog), (saved, bench.effects.watchdog));
    assert!(other.expire(), "in the second stage, as it was");
}
