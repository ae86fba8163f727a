//! Memory for generated code: one region mapped twice, writable at one address and executable at another, so that no
//! address is ever both and no mapping changes while code runs. Where the system refuses that, one mapping whose
//! protection changes at each write.

use std::{io, ptr::NonNull};

use rustix::mm::{
    Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags, madvise, mmap_anonymous, mprotect, mremap,
    munmap,
};

/// Bytes after which the writable mapping is trimmed; whole pages.
const RELEASED: usize = 1 << 20;

/// A region for generated code with a bump allocator. Belongs to one thread at a time; code in it may be executed only
/// by the owner (where the two mappings are one, a write makes it unexecutable for a moment).
pub struct CodeMemory {
    rw: NonNull<u8>,
    rx: NonNull<u8>,
    size: usize,
    used: usize,
    /// Up to here, pages were taken out of the writable mapping.
    released: usize,
}

// SAFETY: the mappings belong to the value, and nothing in it belongs to a thread.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// Maps a region of `size` bytes, rounded up to whole pages. Host memory is taken when code is written.
    pub fn new(size: usize) -> io::Result<Self> {
        let size = size.max(1).next_multiple_of(4096);
        match Self::map_twice(size) {
            Ok(memory) => Ok(memory),
            Err(_) => Self::map_once(size),
        }
    }

    fn map_twice(size: usize) -> io::Result<Self> {
        let mut memory = Self::map(size, MapFlags::SHARED)?;
        // SAFETY: from an old size of 0, mremap(2) maps shared memory once more, where the kernel chooses.
        memory.rx = mapped(unsafe { mremap(memory.rw.as_ptr().cast(), 0, size, MremapFlags::MAYMOVE) }?)?;
        memory.protect(MprotectFlags::READ | MprotectFlags::EXEC)?;
        Ok(memory)
    }

    fn map_once(size: usize) -> io::Result<Self> {
        let memory = Self::map(size, MapFlags::PRIVATE)?;
        memory.protect(MprotectFlags::READ | MprotectFlags::EXEC)?;
        Ok(memory)
    }

    /// A writable mapping. It is of no file, for only in such does Linux `perf` look for code that it can name.
    fn map(size: usize, sharing: MapFlags) -> io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = mapped(unsafe { mmap_anonymous(std::ptr::null_mut(), size, prot, sharing) }?)?;
        Ok(Self { rw: at, rx: at, size, used: 0, released: 0 })
    }

    /// Whether the writable and the executable mapping are two.
    pub fn is_dual(&self) -> bool {
        self.rw != self.rx
    }
    /// Size of the region in bytes.
    pub fn size(&self) -> usize {
        self.size
    }
    /// Bytes allocated so far.
    pub fn used(&self) -> usize {
        self.used
    }
    /// First byte of the writable mapping. It can be written through only if [`CodeMemory::is_dual`].
    pub fn rw_ptr(&self) -> *mut u8 {
        self.rw.as_ptr()
    }
    /// First byte of the executable mapping.
    pub fn rx_ptr(&self) -> *const u8 {
        self.rx.as_ptr()
    }

    /// Takes `len` bytes at a multiple of `align` (a power of two); returns their offset, or `None` when the region is
    /// full.
    pub fn alloc(&mut self, len: usize, align: usize) -> Option<usize> {
        let offset = self.used.checked_next_multiple_of(align.max(1))?;
        let end = offset.checked_add(len)?;
        (end <= self.size).then(|| {
            self.used = end;
            offset
        })
    }

    /// Takes back everything from `offset` on.
    pub fn truncate(&mut self, offset: usize) {
        self.used = self.used.min(offset);
    }

    /// Writes code at an offset; `false` (and nothing is written) if it leaves the region or the host refuses.
    #[must_use]
    pub fn write(&mut self, offset: usize, bytes: &[u8]) -> bool {
        if offset.checked_add(bytes.len()).is_none_or(|end| end > self.size) {
            return false;
        }
        let dual = self.is_dual();
        if !dual && self.protect(MprotectFlags::READ | MprotectFlags::WRITE).is_err() {
            return false;
        }
        // SAFETY: the range was checked to lie in the mapping, which is writable now; no Rust reference leads there.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.rw.as_ptr().add(offset), bytes.len());
        }
        dual || self.protect(MprotectFlags::READ | MprotectFlags::EXEC).is_ok()
    }

    /// Copies code from an offset.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        assert!(offset + bytes.len() <= self.used, "only what was allocated is read");
        // SAFETY: the range lies in the executable mapping, which can be read always; no Rust reference leads there.
        unsafe { self.rx.as_ptr().add(offset).copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Allocates and writes code; returns its executable address, or `None` when the region is full.
    pub fn push(&mut self, bytes: &[u8], align: usize) -> Option<*const u8> {
        let before = self.used;
        let offset = self.alloc(bytes.len(), align)?;
        if !self.write(offset, bytes) {
            self.used = before;
            return None;
        }
        self.release_written();
        Some(self.rx_ptr().wrapping_add(offset))
    }

    /// Takes pages that are full out of the writable mapping, where they are seldom needed again: they would count as
    /// used memory twice. Those that were patched since the last time go again.
    fn release_written(&mut self) {
        let full = self.used & !(RELEASED - 1);
        if self.is_dual() && full > self.released {
            // SAFETY: whole pages of our shared mapping; what they hold stays in the file behind it.
            let _ = unsafe { madvise(self.rw_ptr().cast(), full, Advice::LinuxDontNeed) };
        }
        self.released = full;
    }

    /// Changes what the mapping allows from which code runs.
    fn protect(&self, flags: MprotectFlags) -> io::Result<()> {
        // SAFETY: the whole mapping belongs to `self`, and no reference leads into it.
        Ok(unsafe { mprotect(self.rx.as_ptr().cast(), self.size, flags) }?)
    }
}

fn mapped(at: *mut std::ffi::c_void) -> io::Result<NonNull<u8>> {
    NonNull::new(at.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        let dual = self.is_dual();
        // SAFETY: mapped in `new` with this size; the owner does not execute code from it any more.
        unsafe {
            let _ = munmap(self.rw.as_ptr().cast(), self.size);
            if dual {
                let _ = munmap(self.rx.as_ptr().cast(), self.size);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(mut memory: CodeMemory) {
        for value in [7u8, 42] {
            // mov eax, value; ret
            let code = memory.push(&[0xb8, value, 0, 0, 0, 0xc3], 16).expect("room");
            assert!((code as usize).is_multiple_of(16));
            // SAFETY: the bytes above are a function of this type.
            let function: extern "C" fn() -> u32 = unsafe { std::mem::transmute(code) };
            assert_eq!(function(), u32::from(value));
        }
        assert!(memory.alloc(1 << 20, 1).is_none());
        assert!(!memory.write(memory.size() - 1, &[0, 0]));
    }

    #[test]
    fn code_runs_from_both_kinds_of_mapping() {
        run(CodeMemory::map_twice(8192).expect("mapped"));
        run(CodeMemory::map_once(8192).expect("mapped"));
    }
}
