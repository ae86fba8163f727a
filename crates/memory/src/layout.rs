//! Where memory lies in guest physical space.

use std::{fs::File, sync::Arc};

use crate::{BLOCK_SIZE, HIGH_RAM_START, LOW_RAM_END, MAX_RAM, MemoryError, PAGE_SIZE, RegionKind};

/// A run of memory.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub gpa: u64,
    pub size: u64,
    pub kind: RegionKind,
    pub read_only: bool,
    /// What it is a mapping of, if not of the RAM's own memfd.
    pub file: Option<Arc<File>>,
}

impl Part {
    fn end(&self) -> Option<u64> {
        self.gpa.checked_add(self.size)
    }
}

/// Runs of RAM, of memory that guest CPUs can only read, and of memory that devices bring.
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
        let part = |gpa, size| Part { gpa, size, kind: RegionKind::Ram, read_only: false, file: None };
        let parts = [part(0, low), part(HIGH_RAM_START, size - low)];
        Ok(Self { parts: parts.into_iter().filter(|part| part.size > 0).collect() })
    }

    /// With `size` bytes from `gpa` on that guest CPUs can only read, for firmware. Loaders write to them as to RAM.
    pub fn with_read_only(self, gpa: u64, size: u64) -> Result<Self, MemoryError> {
        self.with(Part { gpa, size, kind: RegionKind::Firmware, read_only: true, file: None }, PAGE_SIZE)
    }

    /// With room from `gpa` on for `size` bytes of RAM that is plugged in later, in blocks of [`BLOCK_SIZE`]. There can be one
    /// such region.
    pub fn with_pluggable(self, gpa: u64, size: u64) -> Result<Self, MemoryError> {
        if self.parts.iter().any(|part| part.kind == RegionKind::Pluggable) {
            return Err(MemoryError::Place(gpa));
        }
        let part = Part { gpa, size, kind: RegionKind::Pluggable, read_only: false, file: None };
        self.with(part, BLOCK_SIZE)
    }

    /// With the first `size` bytes of a file from `gpa` on. Guest CPUs and devices cannot change them if `read_only`.
    pub fn with_file(
        self,
        gpa: u64,
        size: u64,
        file: Arc<File>,
        read_only: bool,
    ) -> Result<Self, MemoryError> {
        self.with(Part { gpa, size, kind: RegionKind::Persistent, read_only, file: Some(file) }, PAGE_SIZE)
    }

    fn with(mut self, new: Part, unit: u64) -> Result<Self, MemoryError> {
        let gpa = new.gpa;
        let whole = new.size > 0 && gpa.is_multiple_of(unit) && new.size.is_multiple_of(unit);
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

    /// Bytes of all parts that are no file's.
    pub(crate) fn total(&self) -> u64 {
        self.parts.iter().filter(|part| part.file.is_none()).map(|part| part.size).sum()
    }

    /// Bytes of RAM.
    pub(crate) fn ram(&self) -> u64 {
        self.parts.iter().filter(|part| part.kind == RegionKind::Ram).map(|part| part.size).sum()
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
    fn memory_of_a_file_is_the_file() {
        let at = HIGH_RAM_START;
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(2 * PAGE_SIZE).unwrap();
        let layout = |read_only| {
            Layout::of_ram(PAGE_SIZE).unwrap().with_file(at, PAGE_SIZE, file.clone(), read_only).unwrap()
        };
        let byte = || {
            let mut byte = [0];
            std::os::unix::fs::FileExt::read_exact_at(&*file, &mut byte, 9).unwrap();
            byte[0]
        };
        let ram = GuestRam::with_layout(&layout(false)).unwrap();
        assert_eq!((ram.size(), ram.regions()[1].kind), (PAGE_SIZE, RegionKind::Persistent));
        ram.memory().write_obj(7u8, GuestAddress(at + 9)).unwrap();
        assert_eq!(byte(), 7);
        assert!(ram.release(at, PAGE_SIZE).is_err(), "a file keeps its bytes");
        assert_eq!((ram.file_offset(at), ram.file_offset(0)), (None, Some(0)));
        let ram = GuestRam::with_layout(&layout(true)).unwrap();
        assert!(ram.regions()[1].read_only);
        ram.memory().write_obj(8u8, GuestAddress(at + 9)).unwrap();
        assert_eq!(byte(), 7, "whoever writes past the guest writes to a copy");
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
