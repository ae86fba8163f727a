//! Which parts of guest memory the loader has given away.

use std::ops::Range;

use ruse_memory::{GuestRam, LOW_RAM_END, PAGE_SIZE};

use crate::e820::LOW_MEMORY_END;

/// First address above the PC's reserved areas.
pub(crate) const ONE_MIB: u64 = 0x10_0000;

/// What is taken of the RAM below 4 GiB.
pub(crate) struct Placer {
    taken: Vec<Range<u64>>,
    end: u64,
}

impl Placer {
    /// All RAM is free but the interrupt vectors with the BIOS data area, and the BIOS areas below 1 MiB.
    pub(crate) fn new(ram: &GuestRam) -> Self {
        let end = ram.size().min(LOW_RAM_END);
        Self { taken: vec![0..PAGE_SIZE, LOW_MEMORY_END..ONE_MIB], end }
    }

    /// End of the RAM that starts at address 0.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    fn conflict(&self, wanted: &Range<u64>) -> Option<&Range<u64>> {
        self.taken.iter().find(|t| t.start < wanted.end && wanted.start < t.end)
    }

    /// Takes a run. `Err` is the taken run that it meets.
    pub(crate) fn take(&mut self, wanted: Range<u64>) -> Result<(), Range<u64>> {
        if wanted.is_empty() {
            return Ok(());
        }
        if let Some(taken) = self.conflict(&wanted) {
            return Err(taken.clone());
        }
        self.taken.push(wanted);
        Ok(())
    }

    /// Takes the lowest free run in the first 640 KiB. `align` is a power of two.
    pub(crate) fn low(&mut self, size: u64, align: u64) -> Option<u64> {
        let mut start = 0u64;
        loop {
            let wanted = start..start.checked_add(size)?;
            if wanted.end > self.end.min(LOW_MEMORY_END) {
                return None;
            }
            match self.conflict(&wanted) {
                Some(taken) => start = taken.end.checked_next_multiple_of(align)?,
                None => {
                    self.taken.push(wanted);
                    return Some(start);
                }
            }
        }
    }

    /// Takes the highest free run of whole pages from 1 MiB up to `limit`. `Err` is the largest one that is free.
    pub(crate) fn high(&mut self, size: u64, limit: u64) -> Result<u64, u64> {
        let mut top = limit.min(self.end);
        let mut largest = 0;
        while top > ONE_MIB {
            // The gap below `top`: from the end of the last taken run that starts under it.
            let below = self.taken.iter().filter(|t| t.start < top).max_by_key(|t| t.end);
            let bottom = below.map_or(ONE_MIB, |t| t.end.max(ONE_MIB).next_multiple_of(PAGE_SIZE));
            if bottom < top {
                largest = largest.max(top - bottom);
                if let Some(start) = top.checked_sub(size).map(|s| s & !(PAGE_SIZE - 1))
                    && start >= bottom
                {
                    self.taken.push(start..start + size);
                    return Ok(start);
                }
            }
            top = match below {
                Some(t) => t.start.min(top),
                None => break,
            };
        }
        Err(largest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_do_not_meet() {
        let mut place = Placer::new(&GuestRam::new(64 << 20).unwrap());
        assert_eq!(place.low(10, 8), Some(0x1000));
        assert_eq!(place.low(10, 16), Some(0x1010));
        assert_eq!(place.low(4096, 4096), Some(0x2000));
        assert_eq!(place.low(0x9_e000, 1), None);
        place.take(0x200_0000..0x300_0000).unwrap();
        assert_eq!(place.take(0x2ff_ffff..0x300_0001), Err(0x200_0000..0x300_0000));
        assert_eq!(place.high(0x1001, u64::MAX), Ok(0x3ff_e000));
        assert_eq!(place.high(0x100_0000, u64::MAX), Ok(0x100_0000));
        assert_eq!(place.high(0x100_0000, u64::MAX), Err(0xff_e000));
        assert_eq!(place.high(0x10_0000, 0x100_0000), Ok(0xf0_0000));
        assert_eq!(place.high(u64::MAX, u64::MAX), Err(0xff_e000));
    }
}
