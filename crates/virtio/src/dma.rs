//! Guest memory as devices reach it: RAM and nothing else.

use std::io;
use std::sync::atomic::Ordering;

use ruse_memory::{GuestRam, PageTracker};
use vm_memory::bitmap::{Bitmap, RefSlice};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::chain::Buffer;
use crate::ring::RingError;

/// A run of guest memory in this process; writes through it are tracked.
pub type GuestSlice<'a> = VolatileSlice<'a, RefSlice<'a, PageTracker>>;

/// Guest memory for a device. What could be plugged in and is not there is none.
#[derive(Clone, Copy)]
pub struct Dma<'a> {
    ram: &'a GuestRam,
}

impl<'a> Dma<'a> {
    /// All of a guest's RAM.
    pub fn new(ram: &'a GuestRam) -> Self {
        Self { ram }
    }

    /// What is not plugged in, no device reaches.
    fn check(&self, at: u64, len: usize) -> Result<(), RingError> {
        match self.ram.is_unplugged(at, len as u64) {
            true => Err(RingError::Memory { at }),
            false => Ok(()),
        }
    }

    /// What guest CPUs cannot write, devices cannot either.
    fn check_write(&self, at: u64, len: usize) -> Result<(), RingError> {
        self.check(at, len)?;
        let last = at.saturating_add((len as u64).saturating_sub(1));
        let meets = |first: u64, size: u64| at <= first + (size - 1) && first <= last;
        match self.ram.regions().iter().any(|r| r.read_only && meets(r.gpa, r.size)) {
            true => Err(RingError::Memory { at }),
            false => Ok(()),
        }
    }

    /// Gives RAM back to the host: it is zero afterwards.
    pub fn release(&self, at: u64, len: u64) -> io::Result<()> {
        self.ram.release(at, len)
    }

    /// The memory itself, for the device that plugs in and out.
    pub(crate) fn ram(&self) -> &'a GuestRam {
        self.ram
    }

    /// Reads bytes.
    pub fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), RingError> {
        self.check(at, bytes.len())?;
        self.ram.memory().read_slice(bytes, GuestAddress(at)).map_err(|_| RingError::Memory { at })
    }

    /// Writes bytes.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<(), RingError> {
        self.check_write(at, bytes.len())?;
        self.ram.memory().write_slice(bytes, GuestAddress(at)).map_err(|_| RingError::Memory { at })
    }

    /// Reads a word that a driver may be writing; what it wrote before is seen by later reads.
    pub fn load(&self, at: u64) -> Result<u16, RingError> {
        self.check(at, 2)?;
        let word = self.ram.memory().load::<u16>(GuestAddress(at), Ordering::Acquire);
        word.map(u16::from_le).map_err(|_| RingError::Memory { at })
    }

    /// Writes a word that a driver may be reading, after all that was written before.
    pub fn store(&self, at: u64, word: u16) -> Result<(), RingError> {
        self.check_write(at, 2)?;
        let stored = self.ram.memory().store(word.to_le(), GuestAddress(at), Ordering::Release);
        stored.map_err(|_| RingError::Memory { at })
    }

    /// Whether a buffer is RAM that a device may read, or write.
    pub fn check_buffer(&self, buffer: Buffer, write: bool) -> Result<(), RingError> {
        match write {
            true => self.check_write(buffer.at, buffer.len as usize)?,
            false => self.check(buffer.at, buffer.len as usize)?,
        }
        match self.ram.memory().check_range(GuestAddress(buffer.at), buffer.len as usize) {
            true => Ok(()),
            false => Err(RingError::Memory { at: buffer.at }),
        }
    }

    /// Somebody outside this process may have written to these buffers.
    pub fn written(&self, buffers: &[Buffer]) {
        for buffer in buffers {
            let slices = self.slices(buffer.at, buffer.len as usize, false);
            written(&slices.unwrap_or_default());
        }
    }

    /// The host memory behind a range: one slice for each region of RAM that it crosses.
    pub fn slices(&self, at: u64, len: usize, write: bool) -> Result<Vec<GuestSlice<'a>>, RingError> {
        match write {
            true => self.check_write(at, len)?,
            false => self.check(at, len)?,
        }
        let slices = self.ram.memory().get_slices(GuestAddress(at), len);
        slices.collect::<Result<_, _>>().map_err(|_| RingError::Memory { at })
    }
}

/// Slices without their tracker. Whoever lets the host write to them says so afterwards ([`written`]).
pub(crate) fn plain<'a>(slices: &[GuestSlice<'a>]) -> Vec<VolatileSlice<'a, ()>> {
    slices
        .iter()
        // SAFETY: the memory is that of the slice, which is valid for as long; both are for access that is volatile.
        .map(|slice| unsafe { VolatileSlice::new(slice.ptr_guard_mut().as_ptr(), slice.len()) })
        .collect()
}

/// The host may have written to slices.
pub(crate) fn written(slices: &[GuestSlice]) {
    slices.iter().for_each(|slice| slice.bitmap().mark_dirty(0, slice.len()));
}
