//! Large tables that begin as zeroes and take host memory only where they are used.

use std::{
    io,
    ops::{Deref, DerefMut},
    ptr::NonNull,
};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Types for which zeroes are a value.
///
/// # Safety
/// All bytes zero is valid, and the type neither needs dropping nor an alignment above a page's.
pub unsafe trait Zeroable: Copy {}

// SAFETY: an integer.
unsafe impl Zeroable for u32 {}

/// A slice on pages of its own.
pub struct Zeroed<T: Zeroable> {
    start: NonNull<T>,
    len: usize,
}

// SAFETY: it owns its values, as a box does.
unsafe impl<T: Zeroable + Send> Send for Zeroed<T> {}

impl<T: Zeroable> Zeroed<T> {
    /// `len` (at least one) values.
    ///
    /// # Errors
    /// The host has no room.
    pub fn new(len: usize) -> io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let bytes = len * size_of::<T>();
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, prot, MapFlags::PRIVATE) }?;
        let start = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len })
    }
}

impl<T: Zeroable> Deref for Zeroed<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: mapped in `new`, zeroes are values of `T`, and the borrow is that of the owner.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Zeroable> DerefMut for Zeroed<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T: Zeroable> Drop for Zeroed<T> {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size, and nobody borrows it.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len * size_of::<T>()) };
    }
}
