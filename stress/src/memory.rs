//! Mappings, and values in memory that processes share.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// No access.
pub const NONE: i32 = libc::PROT_NONE;
/// Reading.
pub const R: i32 = libc::PROT_READ;
/// Reading and writing.
pub const RW: i32 = R | libc::PROT_WRITE;
/// Reading and executing.
pub const RX: i32 = R | libc::PROT_EXEC;
/// Everything.
pub const RWX: i32 = RW | libc::PROT_EXEC;

/// A mapping that nothing but its owner knows of.
pub struct Mapping {
    start: *mut u8,
    len: usize,
}

// SAFETY: a mapping belongs to the process; who uses its pointer from several threads orders the accesses.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Private memory somewhere.
    pub fn new(len: usize, protection: i32) -> Mapping {
        Mapping::make(0, len, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// Private memory at an address where nothing is yet.
    pub fn at(address: usize, len: usize, protection: i32) -> Mapping {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        Mapping::make(address, len, protection, flags, -1)
    }

    /// Memory that is shared with children.
    pub fn shared(len: usize) -> Mapping {
        Mapping::make(0, len, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1)
    }

    /// A whole file.
    pub fn of(file: &File, protection: i32) -> Mapping {
        Mapping::make(0, file.len, protection, libc::MAP_SHARED, file.fd.as_raw_fd())
    }

    fn make(address: usize, len: usize, protection: i32, flags: i32, file: i32) -> Mapping {
        // SAFETY: a new mapping that replaces none.
        let start = unsafe { libc::mmap(address as *mut _, len, protection, flags, file, 0) };
        assert!(start != libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
        Mapping { start: start.cast(), len }
    }

    /// Where it begins.
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// Changes the rights to a part of it.
    pub fn protect(&self, offset: usize, len: usize, protection: i32) {
        assert!(offset + len <= self.len);
        // SAFETY: the part belongs to the mapping, and who uses it reckons with faults.
        let done = unsafe { libc::mprotect(self.start.add(offset).cast(), len, protection) };
        check(done, "mprotect");
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and nothing refers to it any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// A file in memory.
pub struct File {
    fd: OwnedFd,
    len: usize,
}

impl File {
    /// A file of so many zeros.
    pub fn new(len: usize) -> File {
        // SAFETY: a plain system call with a valid name; the descriptor is new.
        let fd = unsafe {
            let fd = libc::memfd_create(c"stress".as_ptr(), 0);
            check(fd, "memfd_create");
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: the descriptor is valid.
        check(unsafe { libc::ftruncate(fd.as_raw_fd(), len as i64) }, "ftruncate");
        File { fd, len }
    }

    /// Maps a page of it in place of what is at an address of an arena.
    pub fn map_page(&self, page: usize, address: usize, protection: i32) {
        let (flags, offset) = (libc::MAP_SHARED | libc::MAP_FIXED, (page * PAGE) as i64);
        // SAFETY: the caller owns the arena and reckons with what happens to it.
        let at =
            unsafe { libc::mmap(address as *mut _, PAGE, protection, flags, self.fd.as_raw_fd(), offset) };
        assert!(at != libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
    }
}

/// A value that is shared with children.
pub struct Shared<T> {
    at: NonNull<T>,
    _mapping: Mapping,
}

impl<T: Sync> Shared<T> {
    /// Puts a value into memory that children will share.
    pub fn new(value: T) -> Shared<T> {
        let mapping = Mapping::shared(size_of::<T>().next_multiple_of(PAGE));
        let at = NonNull::new(mapping.start().cast::<T>()).expect("a mapping");
        // SAFETY: the mapping is large enough, aligned, and this value's alone.
        unsafe { at.write(value) };
        Shared { at, _mapping: mapping }
    }
}

impl<T: Sync> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: written in `new`, mapped as long as this value lives, and only referred to as shared.
        unsafe { self.at.as_ref() }
    }
}

/// Asserts that a system call has succeeded.
pub fn check(result: i32, what: &str) {
    assert!(result >= 0, "{what}: {}", io::Error::last_os_error());
}
