//! Bytes between files and memory that is shared.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use ruse_memory::vectored::{self, MOST, iovecs};

use crate::Slice;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the file.
    Read,
    /// To the file.
    Write,
}

/// Moves all bytes of `slices`, from or to `offset` of the file on. A file that ends early reads as zeros behind its end:
/// someone else has cut it.
pub(crate) fn transfer(file: &File, way: Way, offset: u64, slices: &[Slice]) -> io::Result<()> {
    let (mut done, all) = (0, total(slices));
    while done < all {
        let rest = part(slices, done, all - done);
        let at = offset.checked_add(done).ok_or(io::ErrorKind::InvalidInput)?;
        let moved = match way {
            Way::Read => vectored::read_at(file, at, &rest)?,
            Way::Write => vectored::write_at(file, at, &rest)?,
        };
        match (moved, way) {
            (0, Way::Write) => return Err(io::ErrorKind::WriteZero.into()),
            (0, Way::Read) => {
                clear(&rest);
                return Ok(());
            }
            _ => done += moved as u64,
        }
    }
    Ok(())
}

/// Reads without waiting for the storage; `false` if not all could be had so, and anything may have been read then.
pub(crate) fn read_cached(file: BorrowedFd, offset: u64, slices: &[Slice]) -> bool {
    let vectors = iovecs(slices);
    let Ok(at) = i64::try_from(offset) else { return false };
    if vectors.len() > MOST {
        return false;
    }
    let (fd, count) = (file.as_raw_fd(), vectors.len() as i32);
    // SAFETY: the vectors were made from slices that are valid for as long as they are borrowed, and nobody relies on
    // what is in them meanwhile.
    let read = unsafe { libc::preadv2(fd, vectors.as_ptr(), count, at, libc::RWF_NOWAIT) };
    u64::try_from(read) == Ok(total(slices))
}

/// `len` bytes of slices from `skip` on.
pub(crate) fn part<'a>(slices: &[Slice<'a>], skip: u64, len: u64) -> Vec<Slice<'a>> {
    let (mut skip, mut left, mut parts) = (skip as usize, len as usize, Vec::new());
    for slice in slices {
        let (from, here) = (skip.min(slice.len()), slice.len().saturating_sub(skip).min(left));
        if here > 0
            && let Ok(part) = slice.subslice(from, here)
        {
            parts.push(part);
        }
        (skip, left) = (skip - from, left - here);
        if left == 0 {
            break;
        }
    }
    parts
}

/// Bytes of all slices.
pub(crate) fn total(slices: &[Slice]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

/// Copies bytes into slices, which have no more of them.
pub(crate) fn fill(slices: &[Slice], mut bytes: &[u8]) {
    for slice in slices {
        let (here, rest) = bytes.split_at(slice.len().min(bytes.len()));
        slice.copy_from(here);
        bytes = rest;
    }
}

/// Makes all bytes of slices zero.
pub(crate) fn clear(slices: &[Slice]) {
    for slice in slices {
        // SAFETY: the slice is valid for as long as it is borrowed, and nobody relies on what is in it meanwhile.
        unsafe { std::ptr::write_bytes(slice.ptr_guard_mut().as_ptr(), 0, slice.len()) };
    }
}
