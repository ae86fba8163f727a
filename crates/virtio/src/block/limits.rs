//! How much a disk may do in a second.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// For so long, a disk that was idle may do all at once.
const BURST: Duration = Duration::from_millis(100);

/// Limits that all queues of a disk share. A request begins when those before it are paid for, and is paid for after that.
#[derive(Debug)]
pub struct Limits {
    /// Requests and bytes in a second.
    rates: [Option<u64>; 2],
    /// When what has begun will be paid for.
    paid: Mutex<[Instant; 2]>,
}

impl Limits {
    /// So many requests and so many bytes in a second; `None` is as many as one likes.
    pub fn new(requests: Option<u64>, bytes: Option<u64>) -> Self {
        Self { rates: [requests, bytes], paid: Mutex::new([Instant::now(); 2]) }
    }

    /// How long the next request has to wait.
    pub(super) fn wait(&self, now: Instant) -> Option<Duration> {
        let paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = paid.iter().zip(self.rates).filter(|(_, rate)| rate.is_some());
        waits.map(|(paid, _)| paid.saturating_duration_since(now)).max().filter(|wait| !wait.is_zero())
    }

    /// A request of so many bytes begins.
    pub(super) fn begin(&self, now: Instant, bytes: u64) {
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        for ((paid, rate), amount) in paid.iter_mut().zip(self.rates).zip([1, bytes]) {
            let Some(rate) = rate else { continue };
            let cost = u128::from(amount) * 1_000_000_000 / u128::from(rate.max(1));
            // A day is as good as more.
            let cost = Duration::from_nanos(cost.min(86_400_000_000_000) as u64);
            let earliest = now.checked_sub(BURST).unwrap_or(now);
            *paid = (*paid).max(earliest) + cost;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many requests of so many bytes begin in ten seconds.
    fn count(limits: &Limits, bytes: u64) -> u32 {
        let (start, mut now, mut count) = (Instant::now(), Instant::now(), 0);
        while now < start + Duration::from_secs(10) {
            match limits.wait(now) {
                Some(wait) => now += wait,
                None => {
                    limits.begin(now, bytes);
                    count += 1;
                }
            }
        }
        count
    }

    #[test]
    fn no_more_is_done_than_allowed() {
        assert!((100..=102).contains(&count(&Limits::new(Some(10), None), 1 << 30)));
        assert!((1000..=1012).contains(&count(&Limits::new(None, Some(409_600)), 4096)));
        assert!((100..=102).contains(&count(&Limits::new(Some(10), Some(1 << 40)), 4096)));
        assert!((50..=52).contains(&count(&Limits::new(Some(10), Some(5 << 20)), 1 << 20)));
    }

    #[test]
    fn who_was_idle_may_hurry_for_a_moment() {
        let limits = Limits::new(Some(100), None);
        let now = Instant::now() + Duration::from_secs(5);
        for _ in 0..10 {
            assert_eq!(limits.wait(now), None);
            limits.begin(now, 0);
        }
        limits.begin(now, 0);
        assert!(limits.wait(now).is_some());
    }
}
