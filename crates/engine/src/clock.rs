//! Guest time: the guest's time-stamp counter and the nanoseconds that the devices' timers count, from one source.

use std::time::{Duration, Instant};

/// A clock that starts at zero with the VM. The guest's TSC is the host's plus an offset, so that RDTSC needs no
/// help; the nanoseconds are derived from it.
#[derive(Clone, Debug)]
pub struct Clock {
    tsc_hz: u64,
    /// Guest TSC minus [`Clock::counter`], wrapping.
    offset: u64,
    /// log2 of how much slower than the host's time it goes.
    slow: u32,
}

impl Clock {
    /// Measures the host's TSC and starts a clock at zero. Takes about two milliseconds.
    pub fn start() -> Self {
        Self::start_after(&TscMeasurement::begin(), 0)
    }

    /// As [`Clock::start`], with a measurement that has begun before, so that it costs no time. The clock's time goes
    /// 2^`slow` times slower than the host's: for a guest that runs so slowly that its timers would leave it no time.
    pub fn start_after(measurement: &TscMeasurement, slow: u32) -> Self {
        Self::new(measurement.finish(), slow)
    }

    /// A clock at zero over a TSC of known frequency, in Hz.
    pub fn with_frequency(tsc_hz: u64) -> Self {
        Self::new(tsc_hz, 0)
    }

    fn new(tsc_hz: u64, slow: u32) -> Self {
        let mut clock = Self { tsc_hz: tsc_hz.max(1_000_000), offset: 0, slow };
        clock.offset = 0u64.wrapping_sub(clock.counter());
        clock
    }

    /// What the guest's TSC counts along with: the host's TSC, unless the clock is slow.
    pub fn counter(&self) -> u64 {
        host_tsc() >> self.slow
    }
    /// Whether the guest's TSC is another than the host's plus an offset.
    pub fn is_slow(&self) -> bool {
        self.slow != 0
    }
    /// How many nanoseconds of the host's time pass in `ns` of this clock's.
    pub fn host_ns(&self, ns: u64) -> u64 {
        ns.saturating_mul(1 << self.slow)
    }

    /// Frequency of the guest's TSC in Hz.
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }
    /// What is added to [`Clock::counter`] to give the guest's TSC, before IA32_TSC_ADJUST.
    pub fn tsc_offset(&self) -> u64 {
        self.offset
    }
    /// The guest's TSC now.
    pub fn tsc(&self) -> u64 {
        self.counter().wrapping_add(self.offset)
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

/// The TSC's frequency, measured against the system's monotonic clock over at least two milliseconds.
pub struct TscMeasurement {
    tsc: u64,
    at: Instant,
    /// How many ticks the counter may be off at that instant.
    error: u64,
}

impl TscMeasurement {
    const LEAST: Duration = Duration::from_millis(2);
    /// Longer than that, no start of a machine waits.
    const MOST: Duration = Duration::from_millis(128);
    /// The frequency is to be right to one in so many: NTP corrects a clock that is off by up to 500 in a million.
    const PRECISION: u64 = 20_000;

    /// Begins to measure.
    pub fn begin() -> Self {
        // The pair read with the least delay between its halves has the least error.
        let (width, tsc, at) = (0..5)
            .map(|_| {
                let before = host_tsc();
                let at = Instant::now();
                (host_tsc() - before, before, at)
            })
            .min_by_key(|p| p.0)
            .expect("five pairs");
        Self { tsc: tsc + width / 2, at, error: width / 2 }
    }

    /// Waits if it has not taken long enough, and gives the frequency in Hz. A host that reads its clock from a device
    /// (its counter is not trusted) does so with microseconds of doubt, and takes longer.
    fn finish(&self) -> u64 {
        let mut time = Self::LEAST;
        let end = loop {
            std::thread::sleep(time.saturating_sub(self.at.elapsed()));
            let end = Self::begin();
            let precise = (end.tsc - self.tsc) / Self::PRECISION >= self.error + end.error;
            if precise || end.at - self.at >= Self::MOST {
                break end;
            }
            time = (time * 4).min(Self::MOST);
        };
        let ns = (end.at - self.at).as_nanos().max(1);
        let hz = u128::from(end.tsc - self.tsc) * 1_000_000_000 / ns;
        // Frequencies are whole multiples of 100 kHz where the measurement is that close.
        let rounded = (hz + 50_000) / 100_000 * 100_000;
        if rounded.abs_diff(hz) < hz / 50_000 { rounded as u64 } else { hz as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_clock_goes_slower_than_the_hosts_time() {
        let clock = Clock::start_after(&TscMeasurement::begin(), 5);
        let (begun, host) = (clock.now_ns(), Instant::now());
        std::thread::sleep(Duration::from_millis(20));
        let passed = clock.now_ns() - begun;
        assert!(passed > 0);
        assert!(u128::from(clock.host_ns(passed)) <= host.elapsed().as_nanos() * 11 / 10);
    }
    #[test]
    fn a_measurement_takes_longer_where_the_clock_is_read_with_doubt() {
        let begun = TscMeasurement::begin();
        let doubtful = TscMeasurement { error: u64::MAX / 2, ..TscMeasurement::begin() };
        let (close, far) = (begun.finish(), doubtful.finish());
        assert!(doubtful.at.elapsed() >= TscMeasurement::MOST);
        assert!(close.abs_diff(far) < far / 1000, "{close} {far}");
    }
}
