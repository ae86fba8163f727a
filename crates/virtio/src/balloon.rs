//! The balloon (virtio 1.2, 5.5): the guest gives pages back to the host, as many as it is asked to, those that it does not use
//! just now (reporting), and takes them again; and it tells of its memory.
//!
//! Pages that are given back lose their content at once: what a guest reads there afterwards is zero.

mod stats;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ruse_memory::PAGE_SIZE;

use crate::chain::Chain;
use crate::core::Work;
use crate::device::{Device, Handler, Identity, Served, serve};
use crate::dma::Dma;
use crate::features;
use crate::ring::RingError;
pub use stats::{Statistics, StatisticsSource};

/// Device type.
const KIND: u16 = 5;
/// A device that fits no other class.
const PCI_CLASS: u32 = 0xff_00_00;
/// Entries of each queue.
const ENTRIES: u16 = 128;
/// Most bytes of a list of pages. Drivers send lists of 256.
const MOST: u64 = 64 << 10;
/// Where the driver writes how large the balloon is.
const ACTUAL: u64 = 4;

/// Feature bits (5.5.3). Hints of free pages (bit 3) are not offered: a driver may use a page again before the device has seen
/// the hint (5.5.6.5.1), and then it must not lose its content. Reports tell of the same pages, and hold them until the answer.
mod feature {
    pub const STATISTICS: u64 = 1 << 1;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const REPORTING: u64 = 1 << 5;
}

/// Sizes in pages that device and machine have in common.
#[derive(Debug, Default)]
struct Sizes {
    target: AtomicU32,
    actual: AtomicU32,
}

/// What the machine reaches the balloon by. Clones reach the same.
#[derive(Clone, Debug)]
pub struct BalloonControl {
    sizes: Arc<Sizes>,
    /// The guest's statistics.
    pub statistics: StatisticsSource,
}

impl BalloonControl {
    /// Asks for a balloon of so many bytes; the guest hears of it by a change of the configuration. Says whether it was
    /// another size.
    pub fn set_target(&self, bytes: u64) -> bool {
        let pages = u32::try_from(bytes / PAGE_SIZE).unwrap_or(u32::MAX);
        self.sizes.target.swap(pages, Ordering::AcqRel) != pages
    }

    /// Bytes that are asked for.
    pub fn target(&self) -> u64 {
        u64::from(self.sizes.target.load(Ordering::Acquire)) * PAGE_SIZE
    }

    /// Bytes that the guest has given, as it says.
    pub fn actual(&self) -> u64 {
        u64::from(self.sizes.actual.load(Ordering::Acquire)) * PAGE_SIZE
    }
}

/// The registers' side.
#[derive(Debug)]
pub struct Balloon {
    control: BalloonControl,
}

impl Balloon {
    /// A balloon that is to be of so many bytes, with the handlers of its queues.
    pub fn new(bytes: u64) -> io::Result<(Self, Vec<Box<dyn Handler>>)> {
        let (statistics, handler) = stats::pair()?;
        let control = BalloonControl { sizes: Arc::default(), statistics };
        control.set_target(bytes);
        let handlers: Vec<Box<dyn Handler>> =
            vec![Box::new(Inflate), Box::new(Deflate), handler, Box::new(Report), Box::new(Report)];
        Ok((Self { control }, handlers))
    }

    /// What reaches it.
    pub fn control(&self) -> BalloonControl {
        self.control.clone()
    }
}

impl Device for Balloon {
    fn identity(&self) -> Identity {
        Identity { kind: KIND, pci_class: PCI_CLASS }
    }

    fn features(&self) -> u64 {
        features::COMMON | feature::STATISTICS | feature::DEFLATE_ON_OOM | feature::REPORTING
    }

    /// Reports are in queue 4 (5.5.2). Drivers, Linux's for one, may count those queues only that they have the features of:
    /// theirs are in queue 3, without hints, or 2, without statistics.
    fn queues(&self) -> Vec<u16> {
        vec![ENTRIES; 5]
    }

    fn config(&self) -> Vec<u8> {
        let sizes = &self.control.sizes;
        let [target, actual] =
            [&sizes.target, &sizes.actual].map(|size| size.load(Ordering::Acquire).to_le_bytes());
        [target, actual].concat()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, &[a, b, c, d]) = (offset, data) {
            self.control.sizes.actual.store(u32::from_le_bytes([a, b, c, d]), Ordering::Release);
        }
    }
}

/// Serves the queue of pages that the guest gives.
struct Inflate;

impl Handler for Inflate {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        serve(&mut work.queue, dma, |chain| {
            for (first, count) in runs(page_numbers(chain, dma)?) {
                release(dma, u64::from(first) * PAGE_SIZE, count * PAGE_SIZE);
            }
            Ok(0)
        })
    }
}

/// The list of pages in a chain (5.5.6).
fn page_numbers(chain: &Chain, dma: &Dma) -> Result<Vec<u32>, RingError> {
    let len = chain.readable_len();
    if len > MOST {
        return Err(RingError::Chain("a list of more pages than a balloon takes at once"));
    }
    let mut bytes = vec![0; len as usize];
    chain.read(dma, 0, &mut bytes)?;
    let number = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    Ok(bytes.chunks_exact(4).map(number).collect())
}

/// Pages in any order as runs: first, and how many.
fn runs(mut pages: Vec<u32>) -> Vec<(u32, u64)> {
    pages.sort_unstable();
    pages.dedup();
    let mut runs: Vec<(u32, u64)> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some((first, count)) if u64::from(*first) + *count == u64::from(page) => *count += 1,
            _ => runs.push((page, 1)),
        }
    }
    runs
}

/// Gives memory back to the host. What is not the guest's RAM stays; the guest loses nothing by that.
fn release(dma: &Dma, at: u64, len: u64) {
    if let Err(error) = dma.release(at, len) {
        tracing::debug!(%error, at, len, "memory is not given back");
    }
}

/// Serves the queue of pages that the guest takes back: they are there when they are touched.
struct Deflate;

impl Handler for Deflate {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        serve(&mut work.queue, dma, |_| Ok(0))
    }
}

/// Serves a queue of pages that the guest does not use just now: it takes none of them before the answer (5.5.6.7).
struct Report;

impl Handler for Report {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        serve(&mut work.queue, dma, |chain| {
            for buffer in chain.writable() {
                // Whole pages, whatever the driver says.
                let first = buffer.at.checked_next_multiple_of(PAGE_SIZE);
                let end = buffer.at.saturating_add(buffer.len.into()) / PAGE_SIZE * PAGE_SIZE;
                if let Some(first) = first.filter(|first| *first < end) {
                    release(dma, first, end - first);
                }
            }
            Ok(0)
        })
    }
}
