//! Descriptors (virtio 1.2, 2.7.5 and 2.8.13), and tables of them.

use crate::chain::{Buffer, Chain};
use crate::dma::Dma;
use crate::ring::RingError;

/// Bytes of a descriptor.
pub(super) const SIZE: u64 = 16;
/// The chain goes on.
pub(super) const NEXT: u16 = 1;
/// The device writes.
pub(super) const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub(super) const INDIRECT: u16 = 4;

/// A descriptor. Its last two words are flags and next one in a split ring, id and flags in a packed one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub(super) buffer: Buffer,
    pub(super) words: [u16; 2],
}

impl Descriptor {
    /// Reads entry `index` of the table at `table`.
    pub(super) fn read(dma: &Dma, table: u64, index: u16) -> Result<Self, RingError> {
        let at = table.checked_add(SIZE * u64::from(index)).ok_or(RingError::Memory { at: table })?;
        let mut bytes = [0; SIZE as usize];
        dma.read(at, &mut bytes)?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, x0, x1, y0, y1] = bytes;
        Ok(Self {
            buffer: Buffer {
                at: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
                len: u32::from_le_bytes([l0, l1, l2, l3]),
            },
            words: [u16::from_le_bytes([x0, x1]), u16::from_le_bytes([y0, y1])],
        })
    }
}

/// The number of descriptors in a table of its own. No chain has more than the queue has entries (2.7.5.3.1).
pub(super) fn table_len(table: Buffer, most: u16) -> Result<u16, RingError> {
    let len = u64::from(table.len) / SIZE;
    let whole = u64::from(table.len).is_multiple_of(SIZE) && len > 0;
    match u16::try_from(len) {
        Ok(len) if whole && len <= most => Ok(len),
        _ => Err(RingError::Chain("a table of an impossible length")),
    }
}

/// Appends what a descriptor describes that is no table.
pub(super) fn add(chain: &mut Chain, buffer: Buffer, flags: u16, most: u16) -> Result<(), RingError> {
    if chain.len() >= usize::from(most) {
        return Err(RingError::Chain("longer than the queue, or a loop"));
    }
    chain.add(buffer, flags & WRITE != 0)
}
