//! The block device (virtio 1.2, 5.2) over a [`Disk`].

mod limits;
mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use ruse_block::{Disk, Lane, Transfer};
use ruse_timer::OneShot;

use crate::chain::Chain;
use crate::core::Work;
use crate::device::{Device, Handler, Identity, Served};
use crate::dma::{Dma, plain};
use crate::features;
use crate::ring::RingError;
pub use limits::Limits;
use request::{Failure, Request, Status, Task};

/// Device type.
const KIND: u16 = 2;
/// A mass storage controller of no kind that PCI knows.
const PCI_CLASS: u32 = 0x01_80_00;
/// Entries of each queue.
pub const ENTRIES: u16 = 256;
/// Bytes of a sector, which is what drivers count in (5.2.4).
pub const SECTOR: u64 = 512;
/// Bytes of a serial number (5.2.6.1).
pub const SERIAL_LEN: usize = 20;
/// The most sectors and ranges of a request to discard or to zero.
const MOST_SECTORS: u32 = 1 << 17;
const MOST_RANGES: u32 = 16;

/// Requests that are under way together at most.
const BATCH: usize = ENTRIES as usize / 4;

/// Feature bits (5.2.3).
mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// A disk, and how the guest sees it.
#[derive(Clone)]
pub struct Block {
    disk: Arc<dyn Disk>,
    serial: [u8; SERIAL_LEN],
    queues: u16,
    common_features: u64,
    limits: Option<Arc<Limits>>,
    on_error: OnError,
}

impl Block {
    /// A block device with `queues` queues (at least one). Of `serial`, the first 20 bytes count.
    pub fn new(disk: Arc<dyn Disk>, serial: &str, queues: u16) -> Self {
        let mut bytes = [0; SERIAL_LEN];
        bytes.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        Self {
            disk,
            serial: bytes,
            queues: queues.max(1),
            common_features: features::COMMON,
            limits: None,
            on_error: OnError::default(),
        }
    }

    /// The same with split rings only, for drivers that make mistakes with packed ones.
    pub fn with_split_rings(self) -> Self {
        Self { common_features: self.common_features & !features::RING_PACKED, ..self }
    }

    /// The same with limits.
    pub fn with_limits(self, limits: Limits) -> Self {
        Self { limits: Some(Arc::new(limits)), ..self }
    }

    /// The same, when the host fails requests.
    pub fn on_error(self, on_error: OnError) -> Self {
        Self { on_error, ..self }
    }

    /// What serves one of its queues.
    pub fn handler(&self) -> BlockHandler {
        let timer = self.limits.as_ref().map(|_| OneShot::new());
        BlockHandler {
            disk: self.disk.clone(),
            serial: self.serial,
            lane: Lane::new(),
            limits: self.limits.clone(),
            timer: timer.and_then(|timer| {
                timer.inspect_err(|error| tracing::warn!(%error, "no timer: the disk has no limits")).ok()
            }),
            waiting: false,
            on_error: self.on_error,
            stuck: Vec::new(),
            resets: 0,
            fault: None,
            complained: false,
        }
    }

    /// Whole sectors of the disk.
    fn sectors(&self) -> u64 {
        self.disk.size() / SECTOR
    }
}

impl Device for Block {
    fn identity(&self) -> Identity {
        Identity { kind: KIND, pci_class: PCI_CLASS }
    }

    fn features(&self) -> u64 {
        let writes = match self.disk.is_read_only() {
            true => feature::RO,
            false => feature::DISCARD | feature::WRITE_ZEROES,
        };
        let queues = if self.queues > 1 { feature::MQ } else { 0 };
        let own = feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH | feature::TOPOLOGY;
        self.common_features | own | writes | queues
    }

    fn queues(&self) -> Vec<u16> {
        vec![ENTRIES; self.queues.into()]
    }

    /// The configuration (5.2.4).
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors().to_le_bytes());
        // Each request has a header and a status beside its data.
        put(12, &(u32::from(ENTRIES) - 2).to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Blocks of the storage behind it: 4 KiB, which are best written whole.
        put(24, &[3, 0]);
        put(26, &8u16.to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        put(36, &MOST_SECTORS.to_le_bytes());
        put(40, &MOST_RANGES.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        put(48, &MOST_SECTORS.to_le_bytes());
        put(52, &MOST_RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }
}

/// What becomes of requests that the host fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// The driver hears of it.
    #[default]
    Report,
    /// The machine is held; requests that have failed are tried again when it goes on.
    Hold,
}

/// Serves one queue of a block device; each has its own.
pub struct BlockHandler {
    disk: Arc<dyn Disk>,
    serial: [u8; SERIAL_LEN],
    lane: Lane,
    limits: Option<Arc<Limits>>,
    /// Runs out when the next request may begin.
    timer: Option<OneShot>,
    waiting: bool,
    on_error: OnError,
    /// Requests that have failed and are to be tried again, and of which start of the driver they are.
    stuck: Vec<Chain>,
    resets: u64,
    fault: Option<String>,
    /// The disk has failed before, of which the log tells once.
    complained: bool,
}

impl Handler for BlockHandler {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        if self.resets != work.resets {
            self.idle(work.resets);
        }
        let mut chains = std::mem::take(&mut self.stuck);
        let more = self.take_chains(work, dma, &mut chains)?;
        // A driver that knows of no flush relies on what is written being there (5.2.6.2).
        let write_through = work.features & feature::FLUSH == 0;
        let answers = self.run(dma, &chains, write_through)?;
        for (chain, answer) in chains.into_iter().zip(answers) {
            match answer {
                Some(written) => work.queue.push(dma, &chain, written)?,
                None => self.stuck.push(chain),
            }
        }
        let interrupt = work.queue.needs_interrupt(dma)?;
        Ok(Served { interrupt, more: more || !self.stuck.is_empty(), ..Served::default() })
    }

    fn idle(&mut self, resets: u64) {
        // Requests of a driver that has left are nobody's.
        if self.resets != resets {
            self.stuck.clear();
            self.resets = resets;
        }
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.timer.as_ref().filter(|_| self.waiting).map(AsFd::as_fd)
    }

    fn take_fault(&mut self) -> Option<String> {
        self.fault.take()
    }
}

impl BlockHandler {
    /// Takes requests, as many as may begin; says whether there are more.
    fn take_chains(
        &mut self,
        work: &mut Work,
        dma: &Dma,
        chains: &mut Vec<Chain>,
    ) -> Result<bool, RingError> {
        work.queue.disable_notifications(dma)?;
        while chains.len() < BATCH {
            if self.has_to_wait() {
                return Ok(false);
            }
            if let Some(chain) = work.queue.pop(dma)? {
                if let Some(limits) = &self.limits {
                    limits.begin(Instant::now(), chain.readable_len() + chain.writable_len());
                }
                chains.push(chain);
            } else if !work.queue.enable_notifications(dma)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether the limits let no request begin now; then the timer says when.
    fn has_to_wait(&mut self) -> bool {
        let (Some(limits), Some(timer)) = (&self.limits, &self.timer) else { return false };
        let wait = limits.wait(Instant::now());
        self.waiting = wait.is_some();
        if let Some(wait) = wait {
            // Setting it takes back what it has said before.
            if let Err(error) = timer.set(wait) {
                tracing::warn!(%error, "no timer: the disk has no limits");
                self.waiting = false;
            }
        }
        self.waiting
    }

    /// Does what requests ask for, all transfers together; gives the bytes written for each, `None` where it is to be
    /// tried again.
    fn run(
        &mut self,
        dma: &Dma,
        chains: &[Chain],
        write_through: bool,
    ) -> Result<Vec<Option<u32>>, RingError> {
        let (disk, serial) = (&*self.disk, &self.serial);
        let requests: Vec<_> =
            chains.iter().map(|chain| Request { chain, dma, disk, serial, write_through }).collect();
        let tasks: Vec<_> = requests.iter().map(Request::task).collect();
        let mut transfers: Vec<_> =
            tasks.iter().filter_map(|task| task.as_ref().ok().and_then(transfer)).collect();
        let mut others = Vec::new();
        self.lane.run(disk, &mut transfers, || {
            let run =
                |(request, task): (&Request, &Result<Task, Failure>)| Some(request.run(task.as_ref().ok()?));
            others = requests.iter().zip(&tasks).map(run).collect();
        });
        let mut results = transfers.into_iter().map(|transfer| transfer.result);
        let mut outcomes = Vec::new();
        for ((request, task), other) in requests.iter().zip(tasks).zip(others) {
            outcomes.push(match (task, other) {
                (Ok(Task::Transfer { way, slices, .. }), _) => {
                    request.finish_transfer(way, &slices, results.next().unwrap_or(Ok(())))
                }
                (Ok(_), Some(outcome)) => outcome,
                (Ok(_), None) => Ok(0),
                (Err(failure), _) => Err(failure),
            });
        }
        let mut answers = Vec::new();
        for (chain, outcome) in chains.iter().zip(outcomes) {
            let answer = match outcome {
                Ok(written) => Ok(written),
                Err(Failure::Request(status)) => Err(status),
                Err(Failure::Ring(error)) => return Err(error),
                Err(Failure::Disk(error)) if self.holds(&error) => {
                    answers.push(None);
                    continue;
                }
                Err(Failure::Disk(_)) => Err(Status::IoError),
            };
            let request = Request { chain, dma, disk: &*self.disk, serial: &self.serial, write_through };
            answers.push(Some(request.answer(answer)?));
        }
        Ok(answers)
    }

    /// The disk has failed: whether the machine is to be held.
    fn holds(&mut self, error: &io::Error) -> bool {
        use io::ErrorKind::{InvalidInput, PermissionDenied, ReadOnlyFilesystem, Unsupported};
        // What will never succeed is not tried again.
        let lasting =
            matches!(error.kind(), InvalidInput | PermissionDenied | ReadOnlyFilesystem | Unsupported);
        if self.on_error == OnError::Hold && !lasting {
            self.fault.get_or_insert_with(|| error.to_string());
            return true;
        }
        if !std::mem::replace(&mut self.complained, true) {
            tracing::warn!(%error, "a disk fails; more of its errors are the guest's alone");
        }
        false
    }
}

/// A task as a transfer, if it is one.
fn transfer<'a>(task: &Task<'a>) -> Option<Transfer<'a>> {
    match task {
        Task::Transfer { way, offset, slices } => {
            Some(Transfer { way: *way, offset: *offset, slices: plain(slices), result: Ok(()) })
        }
        _ => None,
    }
}
