//! Vectored reads and writes of files from and to memory that is shared.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::Slice;

/// Most vectors of one call (IOV_MAX).
const MOST: usize = 1024;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// From the file.
    Read,
    /// To the file.
    Write,
}

/// Moves all bytes of `slices`, from or to `offset` of the file on. A file that ends early reads as zeros behind its end:
/// someone else has cut it.
pub(crate) fn transfer(file: &File, way: Way, offset: u64, slices: &[Slice]) -> io::Result<()> {
    let mut vectors: Vec<libc::iovec> = slices
        .iter()
        .filter(|slice| !slice.is_empty())
        .map(|slice| libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() })
        .collect();
    let (mut rest, mut at) = (&mut vectors[..], offset);
    while !rest.is_empty() {
        let moved = call(file, way, at, rest)?;
        if moved == 0 && way == Way::Write {
            return Err(io::ErrorKind::WriteZero.into());
        }
        if moved == 0 {
            zero(rest);
            return Ok(());
        }
        at += moved as u64;
        rest = advance(rest, moved);
    }
    Ok(())
}

fn call(file: &File, way: Way, offset: u64, vectors: &[libc::iovec]) -> io::Result<usize> {
    let at = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let (fd, count) = (file.as_raw_fd(), vectors.len().min(MOST) as i32);
    loop {
        let moved = match way {
            // SAFETY: the vectors were made from slices that are valid for as long as they are borrowed, and nobody
            // relies on what is in them meanwhile.
            Way::Read => unsafe { libc::preadv(fd, vectors.as_ptr(), count, at) },
            // SAFETY: as above.
            Way::Write => unsafe { libc::pwritev(fd, vectors.as_ptr(), count, at) },
        };
        match usize::try_from(moved) {
            Ok(moved) => return Ok(moved),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// What is left of vectors after `moved` bytes.
fn advance(vectors: &mut [libc::iovec], mut moved: usize) -> &mut [libc::iovec] {
    let mut done = 0;
    for vector in &mut *vectors {
        let here = vector.iov_len.min(moved);
        vector.iov_base = vector.iov_base.wrapping_byte_add(here);
        vector.iov_len -= here;
        moved -= here;
        if vector.iov_len > 0 {
            break;
        }
        done += 1;
    }
    &mut vectors[done..]
}

fn zero(vectors: &[libc::iovec]) {
    for vector in vectors {
        // SAFETY: as for the call above.
        unsafe { std::ptr::write_bytes(vector.iov_base.cast::<u8>(), 0, vector.iov_len) };
    }
}
