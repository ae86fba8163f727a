//! One request (virtio 1.2, 5.2.6): a header, data, and a byte for the answer.

use std::cell::Cell;
use std::io;

use ruse_block::{Disk, Slice};
use vm_memory::bitmap::Bitmap;

use super::{MOST_RANGES, MOST_SECTORS, SECTOR, SERIAL_LEN};
use crate::chain::Chain;
use crate::dma::{Dma, GuestSlice};
use crate::ring::RingError;

/// Bytes of the header, and of a range to discard or to zero.
const HEADER: u64 = 16;
const RANGE: u64 = 16;
/// Flag of a range to zero: its storage may be given back.
const UNMAP: u32 = 1;

/// Types of requests.
mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// Why a request has failed.
enum Failure {
    /// The driver hears of it.
    Request(Status),
    /// The disk has failed, of which the driver hears too.
    Disk(io::Error),
    /// The chain is broken.
    Ring(RingError),
}

impl From<RingError> for Failure {
    fn from(error: RingError) -> Self {
        Self::Ring(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

/// A request that is impossible.
const IMPOSSIBLE: Failure = Failure::Request(Status::IoError);

/// A request, and what it is for.
pub(super) struct Request<'a> {
    pub(super) chain: &'a Chain,
    pub(super) dma: &'a Dma<'a>,
    pub(super) disk: &'a dyn Disk,
    pub(super) serial: &'a [u8; SERIAL_LEN],
    pub(super) write_through: bool,
    pub(super) complained: &'a Cell<bool>,
}

impl Request<'_> {
    /// Does what the request asks for and writes the answer; gives the bytes written.
    pub(super) fn serve(&self) -> Result<u32, RingError> {
        let Some(answer_at) = self.chain.writable_len().checked_sub(1) else {
            return Err(RingError::Chain("a request without room for the answer"));
        };
        let (status, written) = match self.run(answer_at) {
            Ok(written) => (Status::Ok, written),
            Err(Failure::Request(status)) => (status, 0),
            Err(Failure::Disk(error)) => {
                if !self.complained.replace(true) {
                    tracing::warn!(%error, "a disk fails; more of its errors are the guest's alone");
                }
                (Status::IoError, 0)
            }
            Err(Failure::Ring(error)) => return Err(error),
        };
        self.chain.write(self.dma, answer_at, &[status as u8])?;
        // Bytes are written from the beginning, without a gap (2.7.8.2): after a failure, none is sure.
        Ok(if written == answer_at { written as u32 + 1 } else { 0 })
    }

    /// Does what the request asks for, with `room` bytes for data; gives the bytes written.
    fn run(&self, room: u64) -> Result<u64, Failure> {
        if self.chain.readable_len() < HEADER {
            return Err(IMPOSSIBLE);
        }
        let mut header = [0; HEADER as usize];
        self.chain.read(self.dma, 0, &mut header)?;
        let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let data = self.chain.readable_len() - HEADER;
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            kind::IN => self.read(sector, room),
            kind::OUT => self.write(sector, data),
            kind::FLUSH => Ok(self.disk.flush().map(|()| 0)?),
            kind::GET_ID => {
                let len = room.min(SERIAL_LEN as u64);
                self.chain.write(self.dma, 0, &self.serial[..len as usize])?;
                Ok(len)
            }
            kind @ (kind::DISCARD | kind::WRITE_ZEROES) => self.ranges(kind, data),
            _ => Err(Failure::Request(Status::Unsupported)),
        }
    }

    /// Where `len` bytes from a sector on are, if the disk has them all.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let offset = sector.checked_mul(SECTOR).ok_or(IMPOSSIBLE)?;
        let end = offset.checked_add(len).ok_or(IMPOSSIBLE)?;
        let fits = len.is_multiple_of(SECTOR) && end <= self.disk.size() / SECTOR * SECTOR;
        if fits { Ok(offset) } else { Err(IMPOSSIBLE) }
    }

    fn read(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let offset = self.offset(sector, len)?;
        let slices = self.chain.writable_slices(self.dma, 0, len)?;
        let result = self.disk.read(offset, &plain(&slices));
        // Whatever has come of it, bytes may have been written.
        slices.iter().for_each(|slice| slice.bitmap().mark_dirty(0, slice.len()));
        Ok(result.map(|()| len)?)
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.disk.is_read_only() { Err(IMPOSSIBLE) } else { Ok(()) }
    }

    fn write(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        self.check_writable()?;
        let offset = self.offset(sector, len)?;
        let slices = self.chain.readable_slices(self.dma, HEADER, len)?;
        self.disk.write(offset, &plain(&slices))?;
        self.finish_write()
    }

    fn finish_write(&self) -> Result<u64, Failure> {
        if self.write_through {
            self.disk.flush()?;
        }
        Ok(0)
    }

    /// Discards or zeroes ranges. All are looked at before the first is touched.
    fn ranges(&self, kind: u32, len: u64) -> Result<u64, Failure> {
        self.check_writable()?;
        let count = len / RANGE;
        if len == 0 || !len.is_multiple_of(RANGE) || count > MOST_RANGES.into() {
            return Err(IMPOSSIBLE);
        }
        let ranges: Vec<_> =
            (0..count).map(|n| self.range(kind, HEADER + n * RANGE)).collect::<Result<_, _>>()?;
        for (offset, len, unmap) in ranges.into_iter().filter(|(_, len, _)| *len > 0) {
            match kind {
                kind::DISCARD => self.disk.discard(offset, len)?,
                _ => self.disk.write_zeroes(offset, len, unmap)?,
            }
        }
        self.finish_write()
    }

    /// The range at `at`: its place, its length and whether its storage may be given back.
    fn range(&self, kind: u32, at: u64) -> Result<(u64, u64, bool), Failure> {
        let mut bytes = [0; RANGE as usize];
        self.chain.read(self.dma, at, &mut bytes)?;
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let (sectors, flags) = (u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes([f0, f1, f2, f3]));
        let known = if kind == kind::WRITE_ZEROES { UNMAP } else { 0 };
        if flags & !known != 0 {
            return Err(Failure::Request(Status::Unsupported));
        }
        if sectors > MOST_SECTORS {
            return Err(IMPOSSIBLE);
        }
        let len = u64::from(sectors) * SECTOR;
        Ok((self.offset(sector, len)?, len, flags & UNMAP != 0))
    }
}

/// Slices without their tracker.
fn plain<'a>(slices: &[GuestSlice<'a>]) -> Vec<Slice<'a>> {
    slices
        .iter()
        // SAFETY: the memory is that of the slice, which is valid for as long; both are for access that is volatile.
        .map(|slice| unsafe { Slice::new(slice.ptr_guard_mut().as_ptr(), slice.len()) })
        .collect()
}
