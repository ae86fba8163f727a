//! Memory that is plugged in and out while the machine runs (virtio 1.2, 5.15): the host says how much the guest is to have,
//! the guest asks for blocks or gives them back.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ruse_memory::{BLOCK_SIZE, GuestRam, Plugged};

use crate::chain::Chain;
use crate::core::Work;
use crate::device::{Device, Handler, Identity, Served, serve};
use crate::dma::Dma;
use crate::features;
use crate::ring::RingError;

/// Device type.
const KIND: u16 = 24;
/// A memory controller of no other kind.
const PCI_CLASS: u32 = 0x05_80_00;
/// Entries of its queue.
const ENTRIES: u16 = 64;
/// Bytes of a request and of an answer (5.15.6).
const REQUEST_LEN: usize = 24;
const ANSWER_LEN: usize = 10;

/// Types of requests.
mod request {
    pub const PLUG: u16 = 0;
    pub const UNPLUG: u16 = 1;
    pub const UNPLUG_ALL: u16 = 2;
    pub const STATE: u16 = 3;
}

/// What is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// It is done; to a request for the state, what that is.
    Ack(u16),
    /// Not now: the guest has what it is to have.
    Nack,
    /// Not just now.
    Busy,
    /// It makes no sense.
    Error,
}

impl Answer {
    fn bytes(self) -> [u8; ANSWER_LEN] {
        let (kind, state): (u16, u16) = match self {
            Self::Ack(state) => (0, state),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        let mut bytes = [0; ANSWER_LEN];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&state.to_le_bytes());
        bytes
    }
}

/// What device and machine have in common.
#[derive(Debug)]
struct Shared {
    start: u64,
    size: u64,
    requested: AtomicU64,
    plugged: AtomicU64,
}

/// What the machine reaches the memory by. Clones reach the same.
#[derive(Clone, Debug)]
pub struct MemControl(Arc<Shared>);

impl MemControl {
    /// The guest is to have so many bytes, whole blocks and no more than there can be; it hears of it by a change of the
    /// configuration. Says whether it was another number.
    pub fn request(&self, bytes: u64) -> bool {
        let bytes = bytes.min(self.0.size) / BLOCK_SIZE * BLOCK_SIZE;
        self.0.requested.swap(bytes, Ordering::AcqRel) != bytes
    }
    /// Bytes that the guest is to have.
    pub fn requested(&self) -> u64 {
        self.0.requested.load(Ordering::Acquire)
    }
    /// Bytes that it has.
    pub fn plugged(&self) -> u64 {
        self.0.plugged.load(Ordering::Acquire)
    }
    /// The machine is reset: nothing is plugged in any more.
    ///
    /// # Errors
    /// The host refuses to take the memory back.
    pub fn unplug_all(&self, ram: &GuestRam) -> std::io::Result<()> {
        self.0.plugged.store(0, Ordering::Release);
        ram.unplug_all()
    }
}

/// The registers' side.
#[derive(Debug)]
pub struct Mem(MemControl);

impl Mem {
    /// A device for the pluggable region of RAM, which is `size` bytes from `start` on, with the handler of its queue. At first
    /// the guest is to have nothing.
    pub fn new(start: u64, size: u64) -> (Self, Vec<Box<dyn Handler>>) {
        let (requested, plugged) = Default::default();
        let control = MemControl(Arc::new(Shared { start, size, requested, plugged }));
        (Self(control.clone()), vec![Box::new(Requests(control.0))])
    }

    /// What reaches it.
    pub fn control(&self) -> MemControl {
        self.0.clone()
    }
}

impl Device for Mem {
    fn identity(&self) -> Identity {
        Identity { kind: KIND, pci_class: PCI_CLASS }
    }

    /// There are no nodes (VIRTIO_MEM_F_ACPI_PXM), and CPUs may read what is not plugged in
    /// (VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE).
    fn features(&self) -> u64 {
        features::COMMON
    }

    fn queues(&self) -> Vec<u16> {
        vec![ENTRIES]
    }

    /// Block size, node, address, bytes of the region, of what of it can be used, that are plugged in, that are requested
    /// (5.15.4).
    fn config(&self) -> Vec<u8> {
        let Shared { start, size, .. } = *self.0.0;
        [BLOCK_SIZE, 0, start, size, size, self.0.plugged(), self.0.requested()]
            .map(u64::to_le_bytes)
            .concat()
    }
}

/// Serves its queue.
struct Requests(Arc<Shared>);

impl Handler for Requests {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        serve(&mut work.queue, dma, |chain| self.request(chain, dma))
    }
}

impl Requests {
    fn request(&self, chain: &Chain, dma: &Dma) -> Result<u32, RingError> {
        let mut bytes = [0; REQUEST_LEN];
        chain.read(dma, 0, &mut bytes)?;
        if chain.writable_len() < ANSWER_LEN as u64 {
            return Err(RingError::Chain("no room for the answer about memory"));
        }
        let answer = self.answer(dma.ram(), &bytes);
        // A driver that has its answer in memory that it has just given back gets none.
        chain.write(dma, 0, &answer.bytes())?;
        Ok(ANSWER_LEN as u32)
    }

    fn answer(&self, ram: &GuestRam, bytes: &[u8; REQUEST_LEN]) -> Answer {
        let kind = u16::from_le_bytes([bytes[0], bytes[1]]);
        let at = u64::from_le_bytes([8, 9, 10, 11, 12, 13, 14, 15].map(|n: usize| bytes[n]));
        let len = u64::from(u16::from_le_bytes([bytes[16], bytes[17]])) * BLOCK_SIZE;
        if kind == request::UNPLUG_ALL {
            return self.unplug_all(ram);
        }
        // Other than whole blocks of the region are none of the driver's business.
        match (kind, ram.plugged(at, len)) {
            (request::PLUG, Some(Plugged::Nothing)) => self.plug(ram, at, len),
            (request::UNPLUG, Some(Plugged::All)) => self.unplug(ram, at, len),
            (request::STATE, Some(state)) => Answer::Ack(match state {
                Plugged::All => 0,
                Plugged::Nothing => 1,
                Plugged::Some => 2,
            }),
            _ => Answer::Error,
        }
    }

    fn plug(&self, ram: &GuestRam, at: u64, len: u64) -> Answer {
        let plugged = self.0.plugged.load(Ordering::Acquire);
        if plugged + len > self.0.requested.load(Ordering::Acquire) {
            return Answer::Nack;
        }
        match ram.plug(at, len) {
            Ok(()) => {
                self.0.plugged.store(plugged + len, Ordering::Release);
                Answer::Ack(0)
            }
            Err(_) => Answer::Error,
        }
    }

    fn unplug(&self, ram: &GuestRam, at: u64, len: u64) -> Answer {
        match ram.unplug(at, len) {
            Ok(()) => {
                self.0.plugged.fetch_sub(len, Ordering::AcqRel);
                Answer::Ack(0)
            }
            Err(error) => busy(&error),
        }
    }

    fn unplug_all(&self, ram: &GuestRam) -> Answer {
        match MemControl(self.0.clone()).unplug_all(ram) {
            Ok(()) => Answer::Ack(0),
            Err(error) => busy(&error),
        }
    }
}

/// The host does not take memory back.
fn busy(error: &std::io::Error) -> Answer {
    tracing::warn!(%error, "memory is not given back");
    Answer::Busy
}
