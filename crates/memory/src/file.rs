//! RAM as a file. It is filled from files without touching its mapping: the host's kernel copies from its cache into the memfd, so that no
//! page is zeroed first, and none is mapped that the guest never reads.

use std::{fs::File, io};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
    pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice},
};
use vm_memory::bitmap::Bitmap;

use crate::{GuestRam, PAGE_SIZE};

/// Bytes that go through the pipe at once, where the host allows it.
const PIPE: usize = 1 << 20;

impl GuestRam {
    /// Copies `len` bytes of a file from `offset` on to guest address `gpa`. They count as written by a device.
    ///
    /// # Errors
    /// The range is not RAM, the file is shorter, or it is of a kind that cannot be spliced: then bytes may have been
    /// copied already, and another way of copying is to be taken.
    pub fn write_file(&self, gpa: u64, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let (region, mut to) = self.file_range(gpa, len).ok_or(io::ErrorKind::InvalidInput)?;
        let (output, input) = pipe_with(PipeFlags::CLOEXEC)?;
        let _ = fcntl_setpipe_size(&input, PIPE);
        let (mut from, end) = (offset, offset + len);
        while from < end {
            let most = PIPE.min((end - from) as usize);
            let mut taken =
                retry(|| splice(file, Some(&mut from), &input, None, most, SpliceFlags::empty()))?;
            if taken == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            while taken > 0 {
                let memory = &*self.inner.file;
                taken -= retry(|| splice(&output, None, memory, Some(&mut to), taken, SpliceFlags::empty()))?;
            }
        }
        let start = (gpa - self.inner.regions[region].gpa) as usize;
        self.inner.trackers[region].mark_dirty(start, len as usize);
        Ok(())
    }

    /// Gives whole pages back to the host. They count as written by a device, with zeroes.
    ///
    /// # Errors
    /// The range is not RAM of one region in whole pages, or the host refuses.
    pub fn release(&self, gpa: u64, len: u64) -> io::Result<()> {
        let whole = gpa.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE) && len > 0;
        let (region, offset) =
            self.file_range(gpa, len).filter(|_| whole).ok_or(io::ErrorKind::InvalidInput)?;
        if self.inner.regions[region].read_only {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        fallocate(&*self.inner.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)?;
        let start = (gpa - self.inner.regions[region].gpa) as usize;
        self.inner.trackers[region].mark_dirty(start, len as usize);
        Ok(())
    }

    /// The region that holds the whole range, and where that begins in the memfd.
    fn file_range(&self, gpa: u64, len: u64) -> Option<(usize, u64)> {
        let region = self.region(gpa)?;
        let r = &self.inner.regions[region];
        let start = gpa - r.gpa;
        let fits = len <= r.size - start;
        self.inner.offsets[region].filter(|_| fits).map(|offset| (region, offset + start))
    }
}

/// Calls again what a signal has interrupted.
fn retry(mut call: impl FnMut() -> Result<usize, Errno>) -> Result<usize, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::{HIGH_RAM_START, LOW_RAM_END, Layout};

    #[test]
    fn a_file_is_copied_to_both_regions() {
        let ram = GuestRam::new(LOW_RAM_END + (4 << 20)).unwrap();
        let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n * 7 / 8) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        for gpa in [0x1003, HIGH_RAM_START + 0x2001] {
            ram.write_file(gpa, &file, 5, 2_999_000).unwrap();
            let mut found = vec![0; 2_999_000];
            ram.memory().read_slice(&mut found, GuestAddress(gpa)).unwrap();
            assert!(found == bytes[5..][..2_999_000]);
            let (tracker, offset) = ram.tracker(gpa).unwrap();
            assert!(tracker.take_dirty(offset) && tracker.take_dirty(offset + 2_990_000));
        }
    }

    #[test]
    fn what_cannot_be_copied_is_refused() {
        let ram = GuestRam::new(16 * PAGE_SIZE).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE_SIZE).unwrap();
        assert!(ram.write_file(15 * PAGE_SIZE + 1, &file, 0, PAGE_SIZE).is_err(), "past the end of RAM");
        assert!(ram.write_file(0, &file, 1, PAGE_SIZE).is_err(), "past the end of the file");
        assert!(ram.write_file(LOW_RAM_END, &file, 0, 1).is_err(), "no RAM");
    }

    #[test]
    fn released_pages_are_zero_and_of_no_cost() {
        let layout = Layout::of_ram(LOW_RAM_END + (4 << 20)).unwrap().with_read_only(0xfffc_0000, 0x4_0000);
        let ram = GuestRam::with_layout(&layout.unwrap()).unwrap();
        let blocks = || rustix::fs::fstat(ram.file()).unwrap().st_blocks;
        let before = blocks();
        let at = HIGH_RAM_START + (1 << 20);
        ram.memory().write_slice(&vec![7; 2 << 20], GuestAddress(at)).unwrap();
        assert!(blocks() - before >= 4096);
        let (tracker, offset) = ram.tracker(at + PAGE_SIZE).unwrap();
        tracker.take_dirty(offset);
        ram.release(at + PAGE_SIZE, (2 << 20) - PAGE_SIZE).unwrap();
        assert!(tracker.take_dirty(offset), "it is seen as written");
        assert!(blocks() - before < 4096);
        let mut bytes = vec![0; 2 * PAGE_SIZE as usize];
        ram.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        assert!(bytes[..4096] == [7; 4096] && bytes[4096..] == [0; 4096]);
        for (gpa, len) in [
            (at + 1, PAGE_SIZE),
            (at, 1),
            (at, 0),
            (0xfffc_0000, PAGE_SIZE),
            (LOW_RAM_END - PAGE_SIZE, 2 * PAGE_SIZE),
            (LOW_RAM_END, PAGE_SIZE),
            (u64::MAX - 4095, PAGE_SIZE),
        ] {
            assert!(ram.release(gpa, len).is_err(), "{len:#x} bytes at {gpa:#x}");
        }
    }
}
