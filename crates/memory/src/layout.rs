//! Where memory lies in guest physical space.

use crate::{HIGH_RAM_START, LOW_RAM_END, MAX_RAM, MemoryError, PAGE_SIZE};

/// A run of memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub gpa: u64,
    pub size: u64,
    pub read_only: bool,
}

impl Part {
    fn end(&self) -> Option<u64> {
        self.gpa.checked_add(self.size)
    }
}

/// Runs of RAM, and of memory that guest CPUs can only read.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Lowest address first.
    parts: Vec<Part>,
}

impl Layout {
    /// A PC's RAM: up to 3 GiB from address 0, the rest from 4 GiB.
    pub fn of_ram(size: u64) -> Result<Self, MemoryError> {
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) || size > MAX_RAM {
            return Err(MemoryError::Size(size));
        }
        let low = size.min(LOW_RAM_END);
        let part = |gpa, size| Part { gpa, size, read_only: false };
        let parts = [part(0, low), part(HIGH_RAM_START, size - low)];
        Ok(Self { parts: parts.into_iter().filter(|part| part.size > 0).collect() })
    }

    /// With `size` bytes from `gpa` on that guest CPUs can only read, for firmware. Loaders write to them as to RAM.
    pub fn with_read_only(mut self, gpa: u64, size: u64) -> Result<Self, MemoryError> {
        let new = Part { gpa, size, read_only: true };
        let whole = size > 0 && gpa.is_multiple_of(PAGE_SIZE) && size.is_multiple_of(PAGE_SIZE);
        let end = new.end().filter(|_| whole).ok_or(MemoryError::Place(gpa))?;
        if self.parts.iter().any(|part| part.gpa < end && part.end().is_none_or(|end| gpa < end)) {
            return Err(MemoryError::Place(gpa));
        }
        let at = self.parts.partition_point(|part| part.gpa < gpa);
        self.parts.insert(at, new);
        Ok(self)
    }

    pub(crate) fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Bytes of all parts.
    pub(crate) fn total(&self) -> u64 {
        self.parts.iter().map(|part| part.size).sum()
    }

    /// Bytes of RAM.
    pub(crate) fn ram(&self) -> u64 {
        self.parts.iter().filter(|part| !part.read_only).map(|part| part.size).sum()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::GuestRam;

    const FIRMWARE: u64 = 0xfffc_0000;

    #[test]
    fn firmware_lies_between_low_and_high_ram() {
        let layout = Layout::of_ram(LOW_RAM_END + PAGE_SIZE).unwrap();
        let ram = GuestRam::with_layout(&layout.with_read_only(FIRMWARE, 0x4_0000).unwrap()).unwrap();
        let regions: Vec<_> = ram.regions().iter().map(|r| (r.gpa, r.size, r.read_only)).collect();
        let expected =
            [(0, LOW_RAM_END, false), (FIRMWARE, 0x4_0000, true), (HIGH_RAM_START, PAGE_SIZE, false)];
        assert_eq!(regions, expected);
        assert_eq!(ram.size(), LOW_RAM_END + PAGE_SIZE);
        ram.memory().write_obj(7u64, GuestAddress(FIRMWARE + 8)).unwrap();
        assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(FIRMWARE + 8)).unwrap(), 7);
        assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(HIGH_RAM_START + 8)).unwrap(), 0);
    }

    #[test]
    fn memory_that_meets_other_memory_is_refused() {
        let layout = Layout::of_ram(16 * PAGE_SIZE).unwrap().with_read_only(FIRMWARE, PAGE_SIZE).unwrap();
        let places = [
            (15 * PAGE_SIZE, PAGE_SIZE),
            (FIRMWARE - PAGE_SIZE, 2 * PAGE_SIZE),
            (FIRMWARE + 1, PAGE_SIZE),
            (1 << 40, 0),
            (1 << 40, 5),
            (u64::MAX - PAGE_SIZE + 1, PAGE_SIZE),
        ];
        for (gpa, size) in places {
            assert!(layout.clone().with_read_only(gpa, size).is_err(), "{size:#x} bytes at {gpa:#x}");
        }
        assert!(layout.with_read_only(FIRMWARE + PAGE_SIZE, PAGE_SIZE).is_ok());
    }
}
