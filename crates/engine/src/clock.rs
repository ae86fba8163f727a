//! Guest time: the guest's time-stamp counter and the nanoseconds that the devices' timers count, from one source.

use std::time::{Duration, Instant};

/// A clock that starts at zero with the VM. The guest's TSC is the host's plus an offset, so that RDTSC needs no
/// help; the nanoseconds are derived from it.
#[derive(Clone, Debug)]
pub struct Clock {
    tsc_hz: u64,
    /// Guest TSC minus host TSC, wrapping.
    offset: u64,
}

impl Clock {
    /// Measures the host's TSC and starts a clock at zero. Takes about two milliseconds.
    pub fn start() -> Self {
        Self::with_frequency(measure_tsc_hz())
    }

    /// A clock at zero over a TSC of known frequency, in Hz.
    pub fn with_frequency(tsc_hz: u64) -> Self {
        Self { tsc_hz: tsc_hz.max(1_000_000), offset: 0u64.wrapping_sub(host_tsc()) }
    }

    /// Frequency of the guest's TSC in Hz.
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }
    /// What is added to the host's TSC to give the guest's, before IA32_TSC_ADJUST.
    pub fn tsc_offset(&self) -> u64 {
        self.offset
    }
    /// The guest's TSC now.
    pub fn tsc(&self) -> u64 {
        host_tsc().wrapping_add(self.offset)
    }
    /// Nanoseconds since the clock's start.
    pub fn now_ns(&self) -> u64 {
        self.tsc_to_ns(self.tsc())
    }
    /// Converts a guest TSC value to nanoseconds since the clock's start.
    pub fn tsc_to_ns(&self, tsc: u64) -> u64 {
        (u128::from(tsc) * 1_000_000_000 / u128::from(self.tsc_hz)).min(u128::from(u64::MAX)) as u64
    }
    /// Converts nanoseconds since the clock's start to a guest TSC value.
    pub fn ns_to_tsc(&self, ns: u64) -> u64 {
        (u128::from(ns) * u128::from(self.tsc_hz) / 1_000_000_000).min(u128::from(u64::MAX)) as u64
    }
}

/// The host's time-stamp counter.
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC has no preconditions; Linux on x86-64 leaves it enabled in user mode.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Counts the TSC against the system's monotonic clock for two milliseconds.
fn measure_tsc_hz() -> u64 {
    // The pair read with the least delay between its halves has the least error.
    let pair = || {
        (0..5)
            .map(|_| {
                let before = host_tsc();
                let at = Instant::now();
                (host_tsc() - before, before, at)
            })
            .min_by_key(|p| p.0)
            .map(|(width, tsc, at)| (tsc + width / 2, at))
            .expect("five pairs")
    };
    let (tsc0, t0) = pair();
    std::thread::sleep(Duration::from_millis(2));
    let (tsc1, t1) = pair();
    let ns = (t1 - t0).as_nanos().max(1) as u64;
    let hz = u128::from(tsc1 - tsc0) * 1_000_000_000 / u128::from(ns);
    // Frequencies are whole multiples of 100 kHz where the measurement is that close.
    let rounded = (hz + 50_000) / 100_000 * 100_000;
    if rounded.abs_diff(hz) < hz / 50_000 { rounded as u64 } else { hz as u64 }
}
