//! Which pages were written.

use crate::{GuestRam, PAGE_SIZE};

/// Pages of one region, a bit for each: the lowest bit of the first word is its first page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPages {
    /// Where the region begins.
    pub gpa: u64,
    /// The bits.
    pub bitmap: Vec<u64>,
}

impl DirtyPages {
    /// Guest physical addresses of the pages.
    pub fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        let words = self.bitmap.iter().enumerate();
        words.flat_map(move |(n, &word)| {
            let set = (0..64).filter(move |bit| word >> bit & 1 != 0);
            set.map(move |bit| self.gpa + (n as u64 * 64 + bit) * PAGE_SIZE)
        })
    }

    /// How many pages there are.
    pub fn count(&self) -> u64 {
        self.bitmap.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

impl GuestRam {
    /// Takes the pages that were noted as written since the last call, by region. Writes of vCPUs are noted only while
    /// the engine is told to; `ruse_engine::DirtyLog` sees to that.
    pub fn take_dirty(&self) -> Vec<DirtyPages> {
        let regions = self.inner.regions.iter().zip(&self.inner.trackers);
        let take = |(region, tracker): (&crate::RamRegion, &crate::PageTracker)| {
            let mut bitmap = vec![0; (region.size / PAGE_SIZE).div_ceil(64) as usize];
            for page in 0..region.size / PAGE_SIZE {
                if tracker.take_dirty((page * PAGE_SIZE) as usize) {
                    bitmap[(page / 64) as usize] |= 1 << (page % 64);
                }
            }
            DirtyPages { gpa: region.gpa, bitmap }
        };
        regions.map(take).collect()
    }

    /// Notes that vCPUs may have written every page that they can write to.
    pub fn note_all_writes(&self) {
        let regions = self.inner.regions.iter().zip(&self.inner.trackers);
        for (region, tracker) in regions.filter(|(region, _)| !region.read_only) {
            (0..region.size as usize)
                .step_by(PAGE_SIZE as usize)
                .for_each(|offset| tracker.note_write(offset));
        }
    }

    /// Notes that vCPUs have written these pages.
    pub fn note_writes(&self, written: &DirtyPages) {
        for page in written.pages() {
            if let Some((tracker, offset)) = self.tracker(page) {
                tracker.note_write(offset);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::{HIGH_RAM_START, LOW_RAM_END};

    #[test]
    fn pages_written_by_devices_and_vcpus_are_taken_once() {
        let ram = GuestRam::new(LOW_RAM_END + 70 * PAGE_SIZE).unwrap();
        let last = HIGH_RAM_START + 69 * PAGE_SIZE;
        ram.memory().write_slice(&[1; 2], GuestAddress(2 * PAGE_SIZE - 1)).unwrap();
        ram.note_writes(&DirtyPages { gpa: HIGH_RAM_START, bitmap: vec![1, 1 << 5] });
        let taken = ram.take_dirty();
        let pages: Vec<_> = taken.iter().flat_map(DirtyPages::pages).collect();
        assert_eq!(pages, [PAGE_SIZE, 2 * PAGE_SIZE, HIGH_RAM_START, last]);
        assert_eq!(taken.iter().map(DirtyPages::count).collect::<Vec<_>>(), [2, 2]);
        assert!(ram.take_dirty().iter().all(|region| region.count() == 0));
    }
}
