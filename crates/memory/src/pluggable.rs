//! RAM that is plugged in and out while the machine runs, block by block.

use std::{
    io,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::GuestRam;

/// Bytes of a block: a large page of the guest's and of the host's.
pub const BLOCK_SIZE: u64 = 2 << 20;

/// Which blocks of the pluggable region there are.
pub(crate) struct Blocks {
    gpa: u64,
    size: u64,
    /// A bit for each block: it is there.
    words: Box<[AtomicU64]>,
}

/// What is there of a range of pluggable memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plugged {
    /// Nothing.
    Nothing,
    /// Some blocks.
    Some,
    /// All of it.
    All,
}

impl Blocks {
    pub(crate) fn new(gpa: u64, size: u64) -> Self {
        let words = (size / BLOCK_SIZE).div_ceil(64);
        Self { gpa, size, words: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    /// The numbers of the blocks of which a range has bytes, and whether all of it lies in this region.
    fn blocks(&self, gpa: u64, len: u64) -> (Range<u64>, bool) {
        let (first, end) = (gpa.max(self.gpa), gpa.saturating_add(len).min(self.gpa + self.size));
        if first >= end {
            return (0..0, false);
        }
        let blocks = (first - self.gpa) / BLOCK_SIZE..(end - self.gpa).div_ceil(BLOCK_SIZE);
        (blocks, first == gpa && end - first == len)
    }

    fn is_there(&self, block: u64) -> bool {
        self.words[(block / 64) as usize].load(Ordering::Acquire) >> (block % 64) & 1 != 0
    }

    fn set(&self, block: u64, there: bool) {
        let (word, bit) = (&self.words[(block / 64) as usize], 1 << (block % 64));
        match there {
            true => word.fetch_or(bit, Ordering::AcqRel),
            false => word.fetch_and(!bit, Ordering::AcqRel),
        };
    }
}

impl GuestRam {
    /// What is there of a range in whole blocks of pluggable memory; `None` of any other range.
    pub fn plugged(&self, gpa: u64, len: u64) -> Option<Plugged> {
        let pluggable = self.inner.pluggable.as_ref()?;
        let range = self.whole_blocks(gpa, len)?;
        let (count, there) =
            (range.end - range.start, range.filter(|&n| pluggable.is_there(n)).count() as u64);
        Some(match there {
            0 => Plugged::Nothing,
            _ if there == count => Plugged::All,
            _ => Plugged::Some,
        })
    }

    /// Plugs in blocks of which nothing is there. Nobody else plugs meanwhile.
    ///
    /// # Errors
    /// The range is something else.
    pub fn plug(&self, gpa: u64, len: u64) -> io::Result<()> {
        match (&self.inner.pluggable, self.whole_blocks(gpa, len), self.plugged(gpa, len)) {
            (Some(pluggable), Some(blocks), Some(Plugged::Nothing)) => {
                blocks.for_each(|block| pluggable.set(block, true));
                Ok(())
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Takes away blocks of which all are there; their memory is the host's again.
    ///
    /// # Errors
    /// The range is something else, or the host refuses; then they are there as before.
    pub fn unplug(&self, gpa: u64, len: u64) -> io::Result<()> {
        match (&self.inner.pluggable, self.whole_blocks(gpa, len), self.plugged(gpa, len)) {
            (Some(pluggable), Some(blocks), Some(Plugged::All)) => {
                // Before the memory goes, so that no device begins to write to it behind that.
                blocks.clone().for_each(|block| pluggable.set(block, false));
                let released = self.release(gpa, len);
                if released.is_err() {
                    blocks.for_each(|block| pluggable.set(block, true));
                }
                released
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Takes away all that was plugged in.
    ///
    /// # Errors
    /// The host refuses to take the memory back.
    pub fn unplug_all(&self) -> io::Result<()> {
        let Some(pluggable) = &self.inner.pluggable else { return Ok(()) };
        pluggable.words.iter().for_each(|word| word.store(0, Ordering::Release));
        // What a guest has written to without plugging it in first goes as well.
        self.release(pluggable.gpa, pluggable.size)
    }

    /// Whether a range has bytes that could be plugged in and are not there: devices must not reach them.
    pub fn is_unplugged(&self, gpa: u64, len: u64) -> bool {
        let Some(pluggable) = &self.inner.pluggable else { return false };
        let (mut blocks, _) = pluggable.blocks(gpa, len.max(1));
        blocks.any(|block| !pluggable.is_there(block))
    }

    /// The blocks of a range that lies in the pluggable region and is of whole blocks.
    fn whole_blocks(&self, gpa: u64, len: u64) -> Option<Range<u64>> {
        let (blocks, inside) = self.inner.pluggable.as_ref()?.blocks(gpa, len);
        let whole = gpa.is_multiple_of(BLOCK_SIZE) && len.is_multiple_of(BLOCK_SIZE);
        (inside && whole).then_some(blocks)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::{HIGH_RAM_START, Layout, PAGE_SIZE};

    const AT: u64 = HIGH_RAM_START + (1 << 30);

    fn ram(blocks: u64) -> GuestRam {
        let layout = Layout::of_ram(16 * PAGE_SIZE).unwrap().with_pluggable(AT, blocks * BLOCK_SIZE).unwrap();
        assert!(layout.clone().with_pluggable(AT << 1, BLOCK_SIZE).is_err(), "there is one such region");
        GuestRam::with_layout(&layout).unwrap()
    }

    #[test]
    fn blocks_are_there_from_plug_to_unplug() {
        let ram = ram(70);
        let block = |n: u64| AT + n * BLOCK_SIZE;
        assert_eq!((ram.size(), ram.plugged(AT, 70 * BLOCK_SIZE)), (16 * PAGE_SIZE, Some(Plugged::Nothing)));
        ram.plug(block(62), 4 * BLOCK_SIZE).unwrap();
        assert!(ram.plug(block(65), BLOCK_SIZE).is_err() && ram.plug(block(61), 2 * BLOCK_SIZE).is_err());
        assert_eq!(ram.plugged(block(62), 4 * BLOCK_SIZE), Some(Plugged::All));
        assert_eq!(ram.plugged(block(62), 5 * BLOCK_SIZE), Some(Plugged::Some));
        assert!(!ram.is_unplugged(block(62), 4 * BLOCK_SIZE) && !ram.is_unplugged(0, PAGE_SIZE));
        assert!(ram.is_unplugged(block(62) - 1, 2) && ram.is_unplugged(block(66) - 1, 2));
        assert!(ram.is_unplugged(0, u64::MAX) && !ram.is_unplugged(u64::MAX, u64::MAX));
        assert!(ram.unplug(block(61), 2 * BLOCK_SIZE).is_err(), "one of them is not there");
        ram.memory().write_obj(7u8, GuestAddress(block(63))).unwrap();
        ram.unplug(block(63), BLOCK_SIZE).unwrap();
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(block(63))).unwrap(), 0);
        assert_eq!(ram.plugged(block(62), 4 * BLOCK_SIZE), Some(Plugged::Some));
        ram.memory().write_obj(7u8, GuestAddress(block(69))).unwrap();
        ram.unplug_all().unwrap();
        assert_eq!(ram.plugged(AT, 70 * BLOCK_SIZE), Some(Plugged::Nothing));
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(block(69))).unwrap(), 0);
    }

    #[test]
    fn other_ranges_are_refused() {
        let ram = ram(4);
        for (gpa, len) in [
            (AT, 0),
            (AT + PAGE_SIZE, BLOCK_SIZE),
            (AT, BLOCK_SIZE - PAGE_SIZE),
            (AT - BLOCK_SIZE, 2 * BLOCK_SIZE),
            (AT + 3 * BLOCK_SIZE, 2 * BLOCK_SIZE),
            (AT + 4 * BLOCK_SIZE, BLOCK_SIZE),
            (0, BLOCK_SIZE),
            (AT, !(BLOCK_SIZE - 1)),
            (!(BLOCK_SIZE - 1), BLOCK_SIZE),
        ] {
            assert_eq!(ram.plugged(gpa, len), None, "{len:#x} bytes at {gpa:#x}");
            assert!(ram.plug(gpa, len).is_err() && ram.unplug(gpa, len).is_err());
        }
        let without = GuestRam::new(4 * BLOCK_SIZE).unwrap();
        assert!(without.plug(0, BLOCK_SIZE).is_err() && without.unplug_all().is_ok());
        assert!(!without.is_unplugged(0, u64::MAX));
    }
}
