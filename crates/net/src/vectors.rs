//! Writes of memory that is shared.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::Slice;

/// Most vectors of one call (IOV_MAX).
const MOST: usize = 1024;

fn vectors(slices: &[Slice]) -> Vec<libc::iovec> {
    slices
        .iter()
        .take(MOST)
        .map(|slice| libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() })
        .collect()
}

fn count(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Writes to a character device.
pub(crate) fn write(fd: BorrowedFd, slices: &[Slice]) -> io::Result<usize> {
    let vectors = vectors(slices);
    // SAFETY: the vectors were made from slices that are valid for as long as they are borrowed, and nobody relies on
    // what is in them meanwhile.
    count(unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32) })
}

/// Sends to a connected socket.
pub(crate) fn send(fd: BorrowedFd, slices: &[Slice], flags: i32) -> io::Result<usize> {
    let mut vectors = vectors(slices);
    // SAFETY: all zero is a message without an address, vectors and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (vectors.as_mut_ptr(), vectors.len());
    // SAFETY: the message names vectors as above, and nothing else.
    count(unsafe { libc::sendmsg(fd.as_raw_fd(), &message, flags | libc::MSG_NOSIGNAL) })
}

/// Sends to the socket with this path.
pub(crate) fn send_to(fd: BorrowedFd, slices: &[Slice], path: &[u8], flags: i32) -> io::Result<usize> {
    // SAFETY: all zero is an address without a path.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    // A zero byte stays behind the path.
    if path.len() >= address.sun_path.len() {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    address.sun_path.iter_mut().zip(path).for_each(|(to, &from)| *to = from as libc::c_char);
    let mut vectors = vectors(slices);
    // SAFETY: as in `send`.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (vectors.as_mut_ptr(), vectors.len());
    message.msg_name = (&raw mut address).cast();
    message.msg_namelen = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the message names vectors as above, and an address that lives as long.
    count(unsafe { libc::sendmsg(fd.as_raw_fd(), &message, flags | libc::MSG_NOSIGNAL) })
}

/// Copies the first bytes of slices; gives how many there were.
pub(crate) fn copy_head(slices: &[Slice], to: &mut [u8]) -> usize {
    let mut done = 0;
    for slice in slices {
        if done == to.len() {
            break;
        }
        done += slice.copy_to(&mut to[done..]);
    }
    done
}

/// Bytes in all slices.
pub(crate) fn total(slices: &[Slice]) -> usize {
    slices.iter().map(|slice| slice.len()).sum()
}

/// What is left of slices behind `skip` bytes, and at most `len` bytes of that.
pub(crate) fn part<'a>(slices: &[Slice<'a>], mut skip: usize, mut len: usize) -> Vec<Slice<'a>> {
    let mut parts = Vec::with_capacity(slices.len());
    for slice in slices {
        let from = skip.min(slice.len());
        skip -= from;
        let here = (slice.len() - from).min(len);
        if here > 0
            && let Ok(part) = slice.subslice(from, here)
        {
            parts.push(part);
        }
        len -= here;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_go_across_slices() {
        let (mut one, mut other) = (*b"abcd", *b"efghi");
        let slices = [Slice::from(&mut one[..]), Slice::from(&mut other[..])];
        let text = |slices: &[Slice]| {
            let mut bytes = vec![0; 16];
            let len = copy_head(slices, &mut bytes);
            assert_eq!(len, total(slices));
            String::from_utf8(bytes[..len].to_vec()).unwrap()
        };
        assert_eq!(text(&slices), "abcdefghi");
        assert_eq!(text(&part(&slices, 2, 4)), "cdef");
        assert_eq!(text(&part(&slices, 4, 99)), "efghi");
        assert_eq!(text(&part(&slices, 9, 1)), "");
    }
}
