//! One request (virtio 1.2, 5.2.6): a header, data, and a byte for the answer.

use std::io;

use ruse_block::{Disk, Way};

use super::{MOST_RANGES, MOST_SECTORS, SECTOR, SERIAL_LEN};
use crate::chain::Chain;
use crate::dma::{Dma, GuestSlice, written};
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
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// Why a request has failed.
pub(super) enum Failure {
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
}

/// What a request asks for.
pub(super) enum Task<'a> {
    /// Bytes are to go between the disk and guest memory.
    Transfer {
        way: Way,
        offset: u64,
        slices: Vec<GuestSlice<'a>>,
    },
    Flush,
    Serial,
    /// Ranges are to be discarded or zeroed: offset, length and whether storage may be given back.
    Ranges {
        zero: bool,
        ranges: Vec<(u64, u64, bool)>,
    },
}

impl<'a> Request<'a> {
    /// Where the answer is, behind the data that is written.
    fn answer_at(&self) -> Result<u64, RingError> {
        let room = self.chain.writable_len().checked_sub(1);
        room.ok_or(RingError::Chain("a request without room for the answer"))
    }

    /// What the request asks for.
    pub(super) fn task(&self) -> Result<Task<'a>, Failure> {
        let room = self.answer_at()?;
        if self.chain.readable_len() < HEADER {
            return Err(IMPOSSIBLE);
        }
        let mut header = [0; HEADER as usize];
        self.chain.read(self.dma, 0, &mut header)?;
        let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let data = self.chain.readable_len() - HEADER;
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            kind::IN => {
                let offset = self.offset(sector, room)?;
                let slices = self.chain.writable_slices(self.dma, 0, room)?;
                Ok(Task::Transfer { way: Way::Read, offset, slices })
            }
            kind::OUT => {
                self.check_writable()?;
                let offset = self.offset(sector, data)?;
                let slices = self.chain.readable_slices(self.dma, HEADER, data)?;
                Ok(Task::Transfer { way: Way::Write, offset, slices })
            }
            kind::FLUSH => Ok(Task::Flush),
            kind::GET_ID => Ok(Task::Serial),
            kind @ (kind::DISCARD | kind::WRITE_ZEROES) => self.ranges(kind, data),
            _ => Err(Failure::Request(Status::Unsupported)),
        }
    }

    /// Does what is no transfer; gives the bytes written.
    pub(super) fn run(&self, task: &Task) -> Result<u64, Failure> {
        match task {
            Task::Transfer { .. } => return Ok(0),
            Task::Flush => self.disk.flush()?,
            Task::Serial => {
                let len = self.answer_at()?.min(SERIAL_LEN as u64);
                self.chain.write(self.dma, 0, &self.serial[..len as usize])?;
                return Ok(len);
            }
            Task::Ranges { zero, ranges } => {
                for &(offset, len, unmap) in ranges.iter().filter(|(_, len, _)| *len > 0) {
                    match zero {
                        false => self.disk.discard(offset, len)?,
                        true => self.disk.write_zeroes(offset, len, unmap)?,
                    }
                }
                self.finish_write()?;
            }
        }
        Ok(0)
    }

    /// What a transfer has come to: the bytes written into guest memory.
    pub(super) fn finish_transfer(
        &self,
        way: Way,
        slices: &[GuestSlice],
        result: io::Result<()>,
    ) -> Result<u64, Failure> {
        if way == Way::Write {
            result?;
            return self.finish_write().map(|()| 0);
        }
        // Whatever has come of it, bytes may have been written.
        written(slices);
        result?;
        Ok(slices.iter().map(|slice| slice.len() as u64).sum())
    }

    /// Writes the answer; gives the bytes written.
    pub(super) fn answer(&self, result: Result<u64, Status>) -> Result<u32, RingError> {
        let answer_at = self.answer_at()?;
        let (status, written) = match result {
            Ok(written) => (Status::Ok, written),
            Err(status) => (status, 0),
        };
        self.chain.write(self.dma, answer_at, &[status as u8])?;
        // Bytes are written from the beginning, without a gap (2.7.8.2): after a failure, none is sure.
        Ok(if written == answer_at { written as u32 + 1 } else { 0 })
    }

    /// Where `len` bytes from a sector on are, if the disk has them all.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let offset = sector.checked_mul(SECTOR).ok_or(IMPOSSIBLE)?;
        let end = offset.checked_add(len).ok_or(IMPOSSIBLE)?;
        let fits = len.is_multiple_of(SECTOR) && end <= self.disk.size() / SECTOR * SECTOR;
        if fits { Ok(offset) } else { Err(IMPOSSIBLE) }
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.disk.is_read_only() { Err(IMPOSSIBLE) } else { Ok(()) }
    }

    fn finish_write(&self) -> Result<(), Failure> {
        if self.write_through {
            self.disk.flush()?;
        }
        Ok(())
    }

    /// Ranges to discard or to zero. All are looked at before the first is touched.
    fn ranges(&self, kind: u32, len: u64) -> Result<Task<'a>, Failure> {
        self.check_writable()?;
        let count = len / RANGE;
        if len == 0 || !len.is_multiple_of(RANGE) || count > MOST_RANGES.into() {
            return Err(IMPOSSIBLE);
        }
        let ranges = (0..count).map(|n| self.range(kind, HEADER + n * RANGE)).collect::<Result<_, _>>()?;
        Ok(Task::Ranges { zero: kind == kind::WRITE_ZEROES, ranges })
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
