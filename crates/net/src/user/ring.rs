//! A ring of bytes with a fixed size. Its memory is there as soon as it is used.

use std::io::{IoSlice, IoSliceMut};

use crate::Slice;

/// Bytes that wait.
pub(super) struct Ring {
    bytes: Vec<u8>,
    size: usize,
    start: usize,
    len: usize,
}

impl Ring {
    /// An empty ring for `size` bytes.
    pub(super) fn new(size: usize) -> Self {
        Self { bytes: Vec::new(), size, start: 0, len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes for which there is room.
    pub(super) fn free(&self) -> usize {
        self.size - self.len
    }

    /// The room, in two parts.
    pub(super) fn room(&mut self) -> [IoSliceMut<'_>; 2] {
        if self.bytes.is_empty() {
            // Zeroed pages come from the host when they are touched.
            self.bytes = vec![0; self.size];
        }
        let end = self.start + self.len;
        let (before, after) = self.bytes.split_at_mut(if end < self.size { end } else { end - self.size });
        match end < self.size {
            true => [IoSliceMut::new(after), IoSliceMut::new(&mut before[..self.start])],
            false => [IoSliceMut::new(&mut after[..self.size - self.len]), IoSliceMut::new(&mut [])],
        }
    }

    /// So many bytes were put into the room.
    pub(super) fn commit(&mut self, count: usize) {
        self.len += count.min(self.free());
    }

    /// Bytes from an offset on, in two parts.
    pub(super) fn range(&self, offset: usize, len: usize) -> [&[u8]; 2] {
        let offset = offset.min(self.len);
        let len = len.min(self.len - offset);
        if len == 0 {
            return [&[], &[]];
        }
        let at = self.start + offset;
        let at = if at < self.size { at } else { at - self.size };
        let first = len.min(self.size - at);
        [&self.bytes[at..at + first], &self.bytes[..len - first]]
    }

    /// All of it, in two parts.
    pub(super) fn all(&self) -> [IoSlice<'_>; 2] {
        self.range(0, self.len).map(IoSlice::new)
    }

    /// Forgets the first bytes.
    pub(super) fn consume(&mut self, count: usize) {
        let count = count.min(self.len);
        self.len -= count;
        self.start = if self.len == 0 { 0 } else { (self.start + count) % self.size };
    }

    /// Appends what fits of slices; gives how much that was.
    pub(super) fn append(&mut self, slices: &[Slice]) -> usize {
        let mut done = 0;
        for slice in slices {
            let mut rest = *slice;
            while !rest.is_empty() && self.free() > 0 {
                let copied = rest.copy_to(&mut self.room()[0]);
                self.commit(copied);
                done += copied;
                match rest.offset(copied) {
                    Ok(next) => rest = next,
                    Err(_) => break,
                }
            }
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use ruse_random::Random;

    use super::*;

    #[test]
    fn it_holds_what_a_queue_holds() {
        let mut random = Random::new(7);
        let (mut ring, mut model) = (Ring::new(13), VecDeque::new());
        for round in 0..10_000u32 {
            let mut bytes: Vec<u8> = (0..random.below(20)).map(|n| (n as u8) ^ round as u8).collect();
            if random.below(2) == 0 {
                let cut = random.below(20).min(bytes.len() as u64) as usize;
                let (one, other) = bytes.split_at_mut(cut);
                let count = ring.append(&[Slice::from(one), Slice::from(other)]);
                assert_eq!(count, bytes.len().min(13 - model.len()));
                model.extend(&bytes[..count]);
            } else {
                let count = random.below(15) as usize;
                ring.consume(count);
                model.drain(..count.min(model.len()));
            }
            assert_eq!(
                (ring.len(), ring.free(), ring.is_empty()),
                (model.len(), 13 - model.len(), model.is_empty())
            );
            let (offset, len) = (random.below(15) as usize, random.below(15) as usize);
            let expected: Vec<u8> = model.iter().skip(offset).take(len).copied().collect();
            assert_eq!(ring.range(offset, len).concat(), expected);
            assert_eq!(ring.room().iter().map(|part| part.len()).sum::<usize>(), ring.free());
        }
    }
}
