//! Pages that the kernel shares through a vCPU's file.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::NonNull,
};

/// Bytes of a page, in which the kernel counts what it shares.
const PAGE: usize = 4096;

/// A mapping of such pages.
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns the mapping; whoever follows the address answers for it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes from page `page` of the vCPU's file on.
    pub fn new(vcpu: BorrowedFd, page: u32, len: usize) -> io::Result<Self> {
        let offset = (page as usize * PAGE) as libc::off_t;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, vcpu.as_raw_fd(), offset)
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len })
    }

    /// Address of the `index`th `T` from `offset` bytes on.
    ///
    /// # Panics
    /// It does not lie in the mapping.
    pub fn at<T>(&self, offset: usize, index: usize) -> *mut T {
        let offset = offset + index * size_of::<T>();
        assert!(offset + size_of::<T>() <= self.len, "the kernel's ring is as large as its interface says");
        self.start.as_ptr().wrapping_add(offset).cast()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size, and its owner is gone.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
