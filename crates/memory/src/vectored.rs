//! Reads and writes of files from and to memory that others may change meanwhile, such as a guest's.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::VolatileSlice;

/// Most vectors of one call (IOV_MAX).
pub const MOST: usize = 1024;

/// Reads from `offset` of a file on until all slices are full or the file ends; gives the bytes read.
pub fn read_at(file: impl AsFd, offset: u64, to: &[VolatileSlice]) -> io::Result<usize> {
    let file = file.as_fd().as_raw_fd();
    // SAFETY: `transfer` has made the vectors from slices that are valid for as long as they are borrowed, and nobody relies
    // on what is in them meanwhile.
    transfer(offset, to, |at, vectors| unsafe {
        libc::preadv(file, vectors.as_ptr(), vectors.len() as i32, at)
    })
}

/// Writes all slices to `offset` of a file on, or as many bytes as it takes; gives the bytes written.
pub fn write_at(file: impl AsFd, offset: u64, from: &[VolatileSlice]) -> io::Result<usize> {
    let file = file.as_fd().as_raw_fd();
    // SAFETY: as above.
    transfer(offset, from, |at, vectors| unsafe {
        libc::pwritev(file, vectors.as_ptr(), vectors.len() as i32, at)
    })
}

/// Slices as the kernel takes them, but those without bytes. They are valid for as long as the slices are borrowed.
pub fn iovecs(slices: &[VolatileSlice]) -> Vec<libc::iovec> {
    let vector = |slice: &VolatileSlice| libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    };
    slices.iter().filter(|slice| !slice.is_empty()).map(vector).collect()
}

/// Calls until everything is moved, or nothing more. A failure after some bytes is left to the next call.
fn transfer(
    offset: u64,
    slices: &[VolatileSlice],
    call: impl Fn(i64, &[libc::iovec]) -> isize,
) -> io::Result<usize> {
    let mut vectors = iovecs(slices);
    let (mut rest, mut done) = (&mut vectors[..], 0);
    while !rest.is_empty() {
        let at = offset.checked_add(done as u64).and_then(|at| i64::try_from(at).ok());
        let moved = call(at.ok_or(io::ErrorKind::InvalidInput)?, &rest[..rest.len().min(MOST)]);
        match usize::try_from(moved) {
            Ok(0) => break,
            Ok(moved) => {
                done += moved;
                rest = advance(rest, moved);
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                _ if done > 0 => break,
                error => return Err(error),
            },
        }
    }
    Ok(done)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_through_many_slices() {
        let file = tempfile::tempfile().unwrap();
        let mut bytes: Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
        let whole = VolatileSlice::from(&mut bytes[..]);
        let parts: Vec<_> = (0..2500).map(|n| whole.subslice(2 * n, 2).unwrap()).collect();
        assert_eq!(write_at(&file, 100, &parts).unwrap(), 5000);
        let mut read = vec![0; 6000];
        let whole = VolatileSlice::from(&mut read[..]);
        let parts: Vec<_> = (0..2000).map(|n| whole.subslice(3 * n, 3).unwrap()).collect();
        assert_eq!(read_at(&file, 99, &parts).unwrap(), 5001, "the file ends");
        assert!(read_at(&file, u64::MAX - 10, &parts).is_err());
        assert_eq!(read_at(&file, u64::MAX, &[]).unwrap(), 0);
        assert_eq!((read[0], &read[1..5001], &read[5001..]), (0, &bytes[..], &[0; 999][..]));
    }
}
