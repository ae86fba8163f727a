//! Which user code runs directly.
//!
//! Direct execution costs some microseconds for each way into the guest's kernel, and saves what translation makes slower.
//! So code that stays in user mode for long is worth it, and code that calls its kernel or has page faults all the time is
//! not. A program does both, one after the other.
//!
//! Translated code is looked at when an interrupt comes (a tick, mostly): an address space whose user code is met by two in a
//! row, and was entered seldom since the last one, runs directly from then on. Direct stays are measured. After some that
//! are short, translated code takes over for a number of stays, which doubles each time, or until interrupts find long
//! ones.
//!
//! A page is executed directly or written directly, not both. Who changes code that has run and runs it again, faster than that
//! pays, is left to translated code for a number of interrupts.

use std::collections::HashMap;

use super::DirectMode;

/// Translated stays of so many microseconds, in the mean between two interrupts, are worth a try.
const WORTH: u64 = 25;
/// Direct stays that take so many microseconds more than the shortest of their kind, which is nothing but the way in and out,
/// are short.
const SHORT: u64 = 4;
/// Direct stays of so many microseconds let what was before be forgotten.
const LONG: u64 = 100;
/// Short stays in a row that are enough.
const ENOUGH: u32 = 4;
/// Translated stays after that, the first time and at most.
const FIRST_PAUSE: u32 = 16;
const LONGEST_PAUSE: u32 = 1 << 16;
/// A change of code costs direct execution about a quarter of so many microseconds.
const REWRITE: u64 = 300;
/// Changes that come faster, less those that don't, that are enough.
const REWRITES: u32 = 8;
/// Interrupts of user code for which nothing runs directly then.
const BAN: u32 = 32;
/// Address spaces that are known at most.
const KNOWN: usize = 256;

/// What is known of an address space.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// Translated stays to come.
    translated: u32,
    /// Those after the next short stays.
    pause: u32,
    /// Short stays in a row.
    short: u32,
    /// The last interrupt found a long stay.
    met: bool,
    /// When code was changed last, by the time-stamp counter.
    rewritten: u64,
    /// Changes of code that came too fast, less those that did not.
    rewrites: u32,
    /// Interrupts to come before something runs directly again.
    banned: u32,
}

const UNKNOWN: Known = Known {
    translated: u32::MAX,
    pause: FIRST_PAUSE,
    short: 0,
    met: false,
    rewritten: 0,
    rewrites: 0,
    banned: 0,
};

/// The decisions of a vCPU.
#[derive(Debug)]
pub struct Policy {
    mode: DirectMode,
    known: HashMap<u64, Known>,
    /// The address space that was asked for last (CR3 without its flags); not in `known` meanwhile.
    root: u64,
    current: Known,
    /// User code was entered so often.
    entries: u64,
    /// When the last interrupt of user code came (by the time-stamp counter), and `entries` then.
    last: (u64, u64),
    /// Ticks of the shortest stay: of those that began with no change of mappings, and with some.
    least: [u64; 2],
    /// Ticks of the time-stamp counter in a microsecond.
    ticks: u64,
}

impl Policy {
    /// Decides by `mode`; the time-stamp counter's frequency is in Hz.
    pub fn new(mode: DirectMode, tsc_hz: u64) -> Self {
        Self {
            mode,
            known: HashMap::new(),
            root: 0,
            current: UNKNOWN,
            entries: 0,
            last: (0, 0),
            least: [u64::MAX; 2],
            ticks: (tsc_hz / 1_000_000).max(1),
        }
    }

    /// User code of an address space (CR3 without its flags) is entered: whether it is to run directly.
    #[inline]
    pub fn enter(&mut self, root: u64) -> bool {
        match self.mode {
            DirectMode::Off => false,
            DirectMode::Always => true,
            DirectMode::Auto => {
                self.entries += 1;
                let known = self.of(root);
                if known.translated != u32::MAX {
                    known.translated = known.translated.saturating_sub(1);
                }
                known.translated == 0
            }
        }
    }

    /// Whether user code of an address space is to run directly now.
    pub fn wants(&mut self, root: u64) -> bool {
        match self.mode {
            DirectMode::Off => false,
            DirectMode::Always => true,
            DirectMode::Auto => self.of(root).translated == 0,
        }
    }

    /// Code of an address space has run directly for so many ticks of the time-stamp counter. `mapped`: mappings were changed
    /// before.
    pub fn stayed(&mut self, root: u64, ticks: u64, mapped: bool) {
        let least = &mut self.least[usize::from(mapped)];
        *least = ticks.min(*least);
        let (short, long) = (ticks - *least < SHORT * self.ticks, ticks >= LONG * self.ticks);
        let known = self.of(root);
        known.short = if short { known.short + 1 } else { 0 };
        if known.short >= ENOUGH {
            let pause = (2 * known.pause).min(LONGEST_PAUSE);
            *known = Known { translated: known.pause, pause, short: 0, met: false, ..*known };
        } else if long {
            known.pause = FIRST_PAUSE;
        }
    }

    /// Code of an address space that has run directly is changed at a time (of the time-stamp counter).
    pub fn rewritten(&mut self, root: u64, now: u64) {
        let worth = REWRITE * self.ticks;
        let known = self.of(root);
        let fast = now.saturating_sub(std::mem::replace(&mut known.rewritten, now)) < worth;
        known.rewrites = if fast { known.rewrites + 1 } else { known.rewrites.saturating_sub(1) };
        if known.rewrites >= REWRITES {
            *known = Known { banned: BAN, ..UNKNOWN };
        }
    }

    /// An interrupt comes at a time (of the time-stamp counter) while code of an address space is executed, user code or the
    /// kernel's.
    pub fn interrupted(&mut self, root: u64, user: bool, now: u64) {
        let (then, before) = std::mem::replace(&mut self.last, (now, self.entries));
        if self.mode != DirectMode::Auto {
            return;
        }
        let stays = (self.entries - before).max(1);
        let long = user && now.saturating_sub(then) / stays >= WORTH * self.ticks;
        let known = self.of(root);
        if user && known.banned > 0 {
            known.banned -= 1;
            return;
        }
        if long && known.met {
            known.translated = 0;
        }
        known.met = long;
    }

    /// The address space has become another one.
    pub fn forget(&mut self, root: u64) {
        *self.of(root) = UNKNOWN;
    }

    /// Nothing runs directly from now on.
    pub fn give_up(&mut self) {
        self.mode = DirectMode::Off;
    }

    #[inline]
    fn of(&mut self, root: u64) -> &mut Known {
        if self.root != root {
            self.switch(root);
        }
        &mut self.current
    }

    fn switch(&mut self, root: u64) {
        if self.known.len() >= KNOWN {
            // They are soon known again.
            self.known.clear();
        }
        self.known.insert(self.root, self.current);
        self.current = self.known.remove(&root).unwrap_or(UNKNOWN);
        self.root = root;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MHZ: u64 = 1000;
    const A: u64 = 0x1000;
    const B: u64 = 0x2000;

    /// A policy that has seen an interrupt at time 0.
    fn policy() -> Policy {
        let mut policy = Policy::new(DirectMode::Auto, MHZ * 1_000_000);
        policy.interrupted(0, true, 0);
        policy
    }

    #[test]
    fn long_stays_in_user_code_are_worth_it() {
        let mut policy = policy();
        assert!(!policy.enter(A) && !policy.wants(A));
        policy.interrupted(A, true, 4000 * MHZ);
        assert!(!policy.wants(A));
        policy.interrupted(A, false, 8000 * MHZ);
        policy.interrupted(A, true, 12000 * MHZ);
        assert!(!policy.wants(A));
        policy.interrupted(A, true, 16000 * MHZ);
        assert!(policy.wants(A) && policy.enter(A) && !policy.wants(B));
    }

    #[test]
    fn short_stays_are_not() {
        let mut policy = policy();
        for tick in 1..10 {
            assert!((0..1000).all(|_| !policy.enter(A)));
            policy.interrupted(A, true, tick * 4000 * MHZ);
        }
        assert!(!policy.wants(A));
    }

    #[test]
    fn after_short_stays_translated_code_takes_over_longer_each_time() {
        let mut policy = policy();
        (1..3).for_each(|tick| policy.interrupted(A, true, tick * 4000 * MHZ));
        let mut pauses = Vec::new();
        for _ in 0..3 {
            (0..ENOUGH).for_each(|_| policy.stayed(A, MHZ, false));
            assert!(!policy.wants(A));
            // Another address space in between changes nothing.
            assert!(!policy.enter(B));
            pauses.push((1..).find(|_| policy.enter(A)).unwrap());
        }
        assert_eq!(pauses, [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE]);
        policy.stayed(A, 1000 * MHZ, true);
        (0..ENOUGH).for_each(|_| policy.stayed(A, MHZ, false));
        assert_eq!((1..).find(|_| policy.enter(A)), Some(FIRST_PAUSE));
    }

    #[test]
    fn long_stays_end_a_pause() {
        let mut policy = policy();
        (0..ENOUGH).for_each(|_| policy.stayed(A, MHZ, false));
        (1..3).for_each(|tick| policy.interrupted(A, true, tick * 4000 * MHZ));
        assert!(policy.wants(A));
        policy.forget(A);
        assert!(!policy.wants(A));
    }

    #[test]
    fn code_that_is_changed_all_the_time_is_left_to_the_translator() {
        let mut policy = policy();
        let mut time = 0;
        let mut change = |policy: &mut Policy, pause: u64| {
            time += pause * MHZ;
            policy.rewritten(A, time);
        };
        let tick = |policy: &mut Policy, n: u64| policy.interrupted(A, true, n * 4000 * MHZ);
        (1..3).for_each(|n| tick(&mut policy, n));
        (0..100).for_each(|_| change(&mut policy, REWRITE));
        (0..20).for_each(|n| change(&mut policy, if n % 2 == 0 { 1 } else { REWRITE }));
        assert!(policy.wants(A));
        (0..REWRITES).for_each(|_| change(&mut policy, 1));
        assert!(!policy.wants(A));
        (3..3 + u64::from(BAN) + 1).for_each(|n| tick(&mut policy, n));
        assert!(!policy.wants(A));
        tick(&mut policy, 4 + u64::from(BAN));
        assert!(policy.wants(A));
    }

    #[test]
    fn not_everything_is_remembered() {
        let mut policy = policy();
        for n in 1..10_000 {
            policy.interrupted(n << 12, true, n * 8000 * MHZ);
            policy.interrupted(n << 12, true, (n * 8000 + 4000) * MHZ);
            assert!(policy.known.len() <= KNOWN);
        }
        assert!(policy.wants(9999 << 12) && !policy.wants(1 << 12));
    }
}
