//! Guest memory as devices reach it: RAM and nothing else.

use std::sync::atomic::Ordering;

use ruse_memory::{GuestRam, PageTracker};
use vm_memory::bitmap::RefSlice;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::ring::RingError;

/// A run of guest memory in this process; writes through it are tracked.
pub type GuestSlice<'a> = VolatileSlice<'a, RefSlice<'a, PageTracker>>;

/// Guest memory for a device.
#[derive(Clone, Copy)]
pub struct Dma<'a> {
    ram: &'a GuestRam,
}

impl<'a> Dma<'a> {
    /// All of a guest's RAM.
    pub fn new(ram: &'a GuestRam) -> Self {
        Self { ram }
    }

    /// What guest CPUs cannot write, devices cannot either.
    fn check_write(&self, at: u64, len: usize) -> Result<(), RingError> {
        let last = at.saturating_add((len as u64).saturating_sub(1));
        let meets = |first: u64, size: u64| at <= first + (size - 1) && first <= last;
        match self.ram.regions().iter().any(|r| r.read_only && meets(r.gpa, r.size)) {
            true => Err(RingError::Memory { at }),
            false => Ok(()),
        }
    }

    /// Reads bytes.
    pub fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), RingError> {
        self.ram.memory().read_slice(bytes, GuestAddress(at)).map_err(|_| RingError::Memory { at })
    }

    /// Writes bytes.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<(), RingError> {
        self.check_write(at, bytes.len())?;
        self.ram.memory().write_slice(bytes, GuestAddress(at)).map_err(|_| RingError::Memory { at })
    }

    /// Reads a word that a driver may be writing; what it wrote before is seen by later reads.
    pub fn load(&self, at: u64) -> Result<u16, RingError> {
        let word = self.ram.memory().load::<u16>(GuestAddress(at), Ordering::Acquire);
        word.map(u16::from_le).map_err(|_| RingError::Memory { at })
    }

    /// Writes a word that a driver may be reading, after all that was written before.
    pub fn store(&self, at: u64, word: u16) -> Result<(), RingError> {
        self.check_write(at, 2)?;
        let stored = self.ram.memory().store(word.to_le(), GuestAddress(at), Ordering::Release);
        stored.map_err(|_| RingError::Memory { at })
    }

    /// The host memory behind a range: one slice for each region of RAM that it crosses.
    pub fn slices(&self, at: u64, len: usize, write: bool) -> Result<Vec<GuestSlice<'a>>, RingError> {
        if write {
            self.check_write(at, len)?;
        }
        let slices = self.ram.memory().get_slices(GuestAddress(at), len);
        slices.collect::<Result<_, _>>().map_err(|_| RingError::Memory { at })
    }
}
