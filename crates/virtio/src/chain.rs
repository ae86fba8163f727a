//! What a driver has made available at once: buffers that the device reads, then buffers that it writes.

use serde::{Deserialize, Serialize};

use crate::dma::{Dma, GuestSlice};
use crate::ring::RingError;

/// A run of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buffer {
    /// Guest physical address.
    pub at: u64,
    /// Bytes.
    pub len: u32,
}

/// A descriptor chain without its descriptors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// What the driver knows it by.
    pub(crate) id: u16,
    /// Entries of the ring that it takes.
    pub(crate) entries: u16,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
    readable_len: u64,
    writable_len: u64,
}

impl Chain {
    /// A chain without buffers.
    pub(crate) fn new(id: u16, entries: u16) -> Self {
        Self { id, entries, ..Self::default() }
    }

    /// Appends a buffer. Devices count bytes in 32 bits, so that no chain has more (virtio 1.2, 2.7.4 and 2.8.5).
    pub(crate) fn add(&mut self, buffer: Buffer, writable: bool) -> Result<(), RingError> {
        if !writable && !self.writable.is_empty() {
            return Err(RingError::Chain("a buffer to read follows one to write"));
        }
        if self.readable_len + self.writable_len + u64::from(buffer.len) > u64::from(u32::MAX) {
            return Err(RingError::Chain("more than 4 GiB"));
        }
        let (list, len) = match writable {
            true => (&mut self.writable, &mut self.writable_len),
            false => (&mut self.readable, &mut self.readable_len),
        };
        list.push(buffer);
        *len += u64::from(buffer.len);
        Ok(())
    }

    /// Buffers in it.
    pub(crate) fn len(&self) -> usize {
        self.readable.len() + self.writable.len()
    }

    /// The buffers for the device to read.
    pub fn readable(&self) -> &[Buffer] {
        &self.readable
    }

    /// The buffers for the device to write.
    pub fn writable(&self) -> &[Buffer] {
        &self.writable
    }

    /// Bytes for the device to read.
    pub fn readable_len(&self) -> u64 {
        self.readable_len
    }

    /// Bytes for the device to write.
    pub fn writable_len(&self) -> u64 {
        self.writable_len
    }

    /// Reads `bytes.len()` bytes from `offset` of what is readable.
    pub fn read(&self, dma: &Dma, offset: u64, bytes: &mut [u8]) -> Result<(), RingError> {
        let mut rest = bytes;
        for part in within(&self.readable, offset, rest.len() as u64)? {
            let (here, after) = rest.split_at_mut(part.len as usize);
            dma.read(part.at, here)?;
            rest = after;
        }
        Ok(())
    }

    /// Writes `bytes` to `offset` of what is writable.
    pub fn write(&self, dma: &Dma, offset: u64, bytes: &[u8]) -> Result<(), RingError> {
        let mut rest = bytes;
        for part in within(&self.writable, offset, rest.len() as u64)? {
            let (here, after) = rest.split_at(part.len as usize);
            dma.write(part.at, here)?;
            rest = after;
        }
        Ok(())
    }

    /// The host memory behind `len` bytes from `offset` of what is readable.
    pub fn readable_slices<'a>(
        &self,
        dma: &Dma<'a>,
        offset: u64,
        len: u64,
    ) -> Result<Vec<GuestSlice<'a>>, RingError> {
        slices(&self.readable, dma, offset, len, false)
    }

    /// The host memory behind `len` bytes from `offset` of what is writable.
    pub fn writable_slices<'a>(
        &self,
        dma: &Dma<'a>,
        offset: u64,
        len: u64,
    ) -> Result<Vec<GuestSlice<'a>>, RingError> {
        slices(&self.writable, dma, offset, len, true)
    }
}

/// The parts of buffers that are `len` bytes from `offset` on.
fn within(buffers: &[Buffer], offset: u64, len: u64) -> Result<Vec<Buffer>, RingError> {
    let (mut skip, mut left, mut parts) = (offset, len, Vec::new());
    for buffer in buffers {
        let here = u64::from(buffer.len).saturating_sub(skip).min(left);
        if here > 0 {
            let at = buffer.at.checked_add(skip).ok_or(RingError::Memory { at: buffer.at })?;
            parts.push(Buffer { at, len: here as u32 });
        }
        skip = skip.saturating_sub(u64::from(buffer.len));
        left -= here;
    }
    if left == 0 { Ok(parts) } else { Err(RingError::Chain("shorter than what has to be in it")) }
}

fn slices<'a>(
    buffers: &[Buffer],
    dma: &Dma<'a>,
    offset: u64,
    len: u64,
    write: bool,
) -> Result<Vec<GuestSlice<'a>>, RingError> {
    let mut all = Vec::new();
    for part in within(buffers, offset, len)? {
        all.extend(dma.slices(part.at, part.len as usize, write)?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use ruse_memory::GuestRam;

    use super::*;

    #[test]
    fn bytes_go_across_buffers() {
        let ram = GuestRam::new(0x10000).unwrap();
        let dma = Dma::new(&ram);
        let mut chain = Chain::default();
        for (at, len, writable) in
            [(0x1000, 3, false), (0x2000, 0, false), (0x3000, 5, false), (0x4000, 2, true), (0x5000, 9, true)]
        {
            chain.add(Buffer { at, len }, writable).unwrap();
        }
        assert_eq!((chain.readable_len(), chain.writable_len(), chain.len()), (8, 11, 5));
        dma.write(0x1000, b"abc").unwrap();
        dma.write(0x3000, b"defgh").unwrap();
        let mut bytes = [0; 5];
        chain.read(&dma, 2, &mut bytes).unwrap();
        assert_eq!(&bytes, b"cdefg");
        assert!(chain.read(&dma, 4, &mut bytes).is_err());
        chain.write(&dma, 1, b"xyz").unwrap();
        let mut written = [0; 2];
        dma.read(0x5000, &mut written).unwrap();
        assert_eq!((&written, dma.load(0x4000).unwrap() >> 8), (b"yz", u16::from(b'x')));
        let slices = chain.writable_slices(&dma, 0, 11).unwrap();
        assert_eq!(slices.iter().map(|slice| slice.len()).collect::<Vec<_>>(), [2, 9]);
        assert!(chain.write(&dma, u64::MAX, b"x").is_err());
    }

    #[test]
    fn what_no_driver_may_do_is_refused() {
        let mut chain = Chain::default();
        chain.add(Buffer { at: 0, len: 1 }, true).unwrap();
        assert!(chain.add(Buffer { at: 0, len: 1 }, false).is_err());
        let mut chain = Chain::default();
        chain.add(Buffer { at: 0, len: u32::MAX }, false).unwrap();
        assert!(chain.add(Buffer { at: 0, len: 1 }, true).is_err());
    }
}
