//! The local APIC's timer (SDM volume 3, 10.5.4): one-shot, periodic and TSC-deadline.

use super::{Lapic, LapicState, registers as r};

/// Frequency of the timer's input before division, in Hz: one count is one nanosecond at divide 1.
pub const TIMER_HZ: u64 = 1_000_000_000;

/// A periodic timer is not ticked more often than this, whatever the guest asks for: the interrupts in between
/// would find their request bit still set, and the host would do nothing but tick.
pub(crate) const MIN_INTERVAL_NS: u64 = 20_000;

/// How the timer counts (LVT timer, bits 17 and 18).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

/// When the guest's TSC reaches `tsc`, in nanoseconds since the machine's start, rounded up so that it is never early.
fn tsc_to_ns(tsc: u64, tsc_hz: u64) -> u64 {
    let ns = (u128::from(tsc) * 1_000_000_000).div_ceil(u128::from(tsc_hz.max(1)));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

impl Lapic {
    /// When the timer next wants [`Lapic::tick`], in nanoseconds since the machine's start.
    pub fn deadline(&self) -> Option<u64> {
        self.timer_expiry
    }

    /// Time has come to `now`: fires the timer if it is due. Periods that were missed make one interrupt.
    pub fn tick(&mut self, now: u64) {
        let Some(expiry) = self.timer_expiry.filter(|&at| at <= now) else { return };
        self.timer_expiry = match self.timer_mode() {
            Mode::Periodic => self.next_period(expiry, now),
            Mode::OneShot | Mode::TscDeadline | Mode::Reserved => None,
        };
        // The MSR reads zero once the deadline has passed (10.5.4.1).
        self.tsc_deadline = 0;
        self.fire_lvt(r::LVT_TIMER);
    }

    /// The first end of a period after `now` (and after the shortest interval) for a timer that was due at `expiry`.
    fn next_period(&self, expiry: u64, now: u64) -> Option<u64> {
        let period = self.period();
        if period == 0 {
            return None;
        }
        let after = if period < MIN_INTERVAL_NS { now.saturating_add(MIN_INTERVAL_NS) } else { now };
        let periods = (after.saturating_sub(expiry) / period).saturating_add(1);
        Some(expiry.saturating_add(periods.saturating_mul(period)))
    }

    fn timer_mode(&self) -> Mode {
        match self.regs[r::LVT_TIMER] >> 17 & 3 {
            0 => Mode::OneShot,
            1 => Mode::Periodic,
            2 => Mode::TscDeadline,
            _ => Mode::Reserved,
        }
    }

    /// The divisor (figure 10-10): bits 0, 1 and 3 give 2, 4, ... 128, and then 1.
    fn divisor(&self) -> u64 {
        let raw = self.regs[r::DIVIDE];
        let code = (raw & 3) | (raw >> 1 & 4);
        1 << ((code + 1) & 7)
    }

    /// Length of a whole count in nanoseconds.
    fn period(&self) -> u64 {
        u64::from(self.regs[r::INITIAL_COUNT]) * self.divisor()
    }

    /// What the current-count register reads.
    pub(super) fn current_count(&self, now: u64) -> u32 {
        let Some(expiry) = self.timer_expiry else { return 0 };
        let left = match self.timer_mode() {
            Mode::OneShot => expiry.saturating_sub(now),
            Mode::Periodic => {
                let period = self.period().max(1);
                if now >= expiry { period - (now - expiry) % period } else { (expiry - now - 1) % period + 1 }
            }
            Mode::TscDeadline | Mode::Reserved => 0,
        };
        u32::try_from(left.div_ceil(self.divisor())).unwrap_or(u32::MAX)
    }

    /// Starts the timer; zero stops it. Without effect in TSC-deadline mode (10.5.4.1).
    pub(super) fn set_initial_count(&mut self, value: u32, now: u64) {
        if self.timer_mode() == Mode::TscDeadline {
            return;
        }
        self.regs[r::INITIAL_COUNT] = value;
        self.restart(now);
    }

    /// Starts a whole count, if there is one.
    fn restart(&mut self, now: u64) {
        let counts = matches!(self.timer_mode(), Mode::OneShot | Mode::Periodic);
        self.timer_expiry = (counts && self.period() != 0).then(|| now.saturating_add(self.period()));
    }

    /// A new divisor: the count that is left goes on at the new pace.
    pub(super) fn set_divide(&mut self, value: u32, now: u64) {
        let left = u64::from(self.current_count(now));
        self.regs[r::DIVIDE] = value & r::DIVIDE_WRITABLE;
        if self.timer_expiry.is_some() && self.timer_mode() != Mode::TscDeadline {
            self.timer_expiry = Some(now.saturating_add(left * self.divisor()));
        }
    }

    /// Writes the timer's LVT entry, `value` already reduced to bits that exist.
    pub(super) fn set_lvt_timer(&mut self, value: u32) {
        let before = self.timer_mode();
        self.regs[r::LVT_TIMER] = value;
        let after = self.timer_mode();
        let counts = |mode| matches!(mode, Mode::OneShot | Mode::Periodic);
        if before != after && !(counts(before) && counts(after)) {
            // A change to or from TSC-deadline mode disarms the timer (10.5.4.1).
            self.timer_expiry = None;
            self.tsc_deadline = 0;
            self.regs[r::INITIAL_COUNT] = 0;
        }
    }

    /// IA32_TSC_DEADLINE; zero outside of TSC-deadline mode and once the deadline has passed.
    pub(super) fn tsc_deadline(&self, now: u64) -> u64 {
        if self.timer_expiry.is_some_and(|at| at > now) { self.tsc_deadline } else { 0 }
    }

    /// Writes IA32_TSC_DEADLINE: zero disarms, a deadline in the past fires at once; ignored in the other modes.
    pub(super) fn set_tsc_deadline(&mut self, value: u64, now: u64) {
        if self.timer_mode() != Mode::TscDeadline || !self.is_enabled() {
            return;
        }
        self.tsc_deadline = value;
        self.timer_expiry = (value != 0).then(|| tsc_to_ns(value, self.tsc_hz));
        self.tick(now);
    }
}

/// Computes the expiry from the registers for a page that came from elsewhere (KVM's, at time `now`), which has no
/// expiry of its own.
pub fn derive_expiry(state: &mut LapicState, now: u64, tsc_hz: u64) {
    let mut lapic = Lapic::new(0, tsc_hz);
    if lapic.restore(state).is_err() {
        return;
    }
    let left = u64::from(lapic.regs[r::CURRENT_COUNT]) * lapic.divisor();
    state.timer_expiry = match lapic.timer_mode() {
        Mode::OneShot | Mode::Periodic => (left != 0).then(|| now.saturating_add(left)),
        Mode::TscDeadline => (state.tsc_deadline != 0).then(|| tsc_to_ns(state.tsc_deadline, tsc_hz)),
        Mode::Reserved => None,
    };
}
