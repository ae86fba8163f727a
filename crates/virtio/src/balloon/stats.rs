//! What the guest tells of its memory (virtio 1.2, 5.5.6.3). It always has a buffer with it at the device; giving that back
//! asks for a new one.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use crate::chain::Chain;
use crate::core::Work;
use crate::device::{BATCH, Handler, Served};
use crate::dma::Dma;
use crate::ring::RingError;

use super::{Report, feature};

/// Bytes of one value: a tag and a number.
const VALUE: usize = 10;
/// Most values of a buffer that are looked at.
const MOST: usize = 64;
/// The values, by their tags.
const NAMES: [&str; 10] = [
    "swap-in",
    "swap-out",
    "major-faults",
    "minor-faults",
    "free-memory",
    "total-memory",
    "available-memory",
    "disk-caches",
    "hugetlb-allocations",
    "hugetlb-failures",
];

/// Values by their names; faults are counted, all else is in bytes.
pub type Statistics = BTreeMap<String, u64>;

#[derive(Default)]
struct State {
    statistics: Statistics,
    /// Counts what has come.
    received: u64,
    /// New ones are asked for.
    wanted: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the guest's statistics come from. Clones ask the same guest.
#[derive(Clone)]
pub struct StatisticsSource {
    shared: Arc<Shared>,
    wake: Arc<OwnedFd>,
}

impl std::fmt::Debug for StatisticsSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StatisticsSource").finish_non_exhaustive()
    }
}

impl StatisticsSource {
    /// Asks the guest, waits for its answer no longer than `patience`, and gives what it has told last.
    pub fn ask(&self, patience: Duration) -> Statistics {
        let until = Instant::now() + patience;
        let mut state = self.shared.lock();
        let before = state.received;
        state.wanted = true;
        // It can only fail because so many signals wait already.
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        while state.received == before {
            let Some(rest) = until.checked_duration_since(Instant::now()) else { break };
            state = self.shared.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.statistics.clone()
    }
}

/// Serves the queue of statistics, or of reports if the driver has taken no statistics ([`super::Balloon`]'s queues).
struct Handle {
    source: StatisticsSource,
    /// The driver's buffer, and after how many resets it came.
    held: Option<(Chain, u64)>,
}

/// The two sides of the queue.
pub(super) fn pair() -> io::Result<(StatisticsSource, Box<dyn Handler>)> {
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let source = StatisticsSource { shared: Arc::default(), wake };
    Ok((source.clone(), Box::new(Handle { source, held: None })))
}

impl Handler for Handle {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        if work.features & feature::STATISTICS == 0 {
            return Report.serve(work, dma);
        }
        let _ = rustix::io::read(&*self.source.wake, &mut [0; 8]);
        let (queue, mut more) = (&mut work.queue, true);
        self.held = self.held.take().filter(|(_, resets)| *resets == work.resets);
        queue.disable_notifications(dma)?;
        for _ in 0..BATCH {
            match queue.pop(dma)? {
                Some(chain) => {
                    self.receive(&chain, dma)?;
                    if let Some((old, _)) = self.held.replace((chain, work.resets)) {
                        queue.push(dma, &old, 0)?;
                    }
                }
                None => {
                    more = queue.enable_notifications(dma)?;
                    if !more {
                        break;
                    }
                }
            }
        }
        if self.source.shared.lock().wanted
            && let Some((chain, _)) = self.held.take()
        {
            queue.push(dma, &chain, 0)?;
            self.source.shared.lock().wanted = false;
        }
        Ok(Served { interrupt: queue.needs_interrupt(dma)?, more, ..Served::default() })
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.source.wake.as_fd())
    }

    fn idle(&mut self, _resets: u64) {
        self.held = None;
    }
}

impl Handle {
    fn receive(&self, chain: &Chain, dma: &Dma) -> Result<(), RingError> {
        let count = (chain.readable_len() / VALUE as u64).min(MOST as u64) as usize;
        let mut bytes = vec![0; count * VALUE];
        chain.read(dma, 0, &mut bytes)?;
        let value = |bytes: &[u8]| {
            let tag = usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
            let mut number = [0; 8];
            number.copy_from_slice(&bytes[2..]);
            Some((NAMES.get(tag)?.to_string(), u64::from_le_bytes(number)))
        };
        let mut state = self.source.shared.lock();
        state.statistics = bytes.chunks_exact(VALUE).filter_map(value).collect();
        state.received += 1;
        self.source.shared.changed.notify_all();
        Ok(())
    }
}
