//! The protocol of FUSE, version 7.38 (Linux, include/uapi/linux/fuse.h): all numbers are little-endian here.

use std::ffi::{CStr, CString};

use rustix::fs::Stat;
use rustix::io::Errno;

/// The version of the protocol.
pub const MAJOR: u32 = 7;
/// The newest minor version known.
pub const MINOR: u32 = 38;
/// The oldest that virtio's clients have (Linux 5.4).
pub const OLDEST_MINOR: u32 = 31;
/// Bytes before each request, and before each answer.
pub const IN_HEADER: usize = 40;
/// See [`IN_HEADER`].
pub const OUT_HEADER: usize = 16;
/// The root of the file system.
pub const ROOT: u64 = 1;
/// Most bytes of one read or write.
pub const MOST_DATA: u32 = 1 << 20;

/// What is asked for.
pub mod opcode {
    #![allow(missing_docs)]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
}

/// What client and server agree on at first.
pub mod init {
    #![allow(missing_docs)]
    pub const ASYNC_READ: u32 = 1 << 0;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub const ASYNC_DIO: u32 = 1 << 15;
    pub const WRITEBACK_CACHE: u32 = 1 << 16;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const MAX_PAGES: u32 = 1 << 22;
}

/// What is to be set by SETATTR.
pub mod set {
    #![allow(missing_docs)]
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const HANDLE: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
}

/// Answers to OPEN: reads and writes go past the client's page cache.
pub const OPEN_DIRECT_IO: u32 = 1 << 0;
/// Answers to OPEN: what the client has cached of the file is still right.
pub const OPEN_KEEP_CACHE: u32 = 1 << 1;
/// Answers to OPENDIR: the client may cache the directory.
pub const OPEN_CACHE_DIR: u32 = 1 << 3;
/// Of FSYNC: the data only.
pub const FSYNC_DATA: u32 = 1 << 0;

/// What stands before each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the whole request.
    pub len: u32,
    /// What is asked for.
    pub opcode: u32,
    /// To be given back with the answer.
    pub unique: u64,
    /// The inode that it is about.
    pub node: u64,
    /// For whom.
    pub uid: u32,
    /// For which group.
    pub gid: u32,
}

impl Header {
    /// Reads a header.
    pub fn parse(bytes: &[u8; IN_HEADER]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self { len: word(0), opcode: word(4), unique: long(8), node: long(16), uid: word(24), gid: word(28) }
    }
}

/// Takes a request's fields one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// From the first byte behind the header on.
    pub fn new(body: &'a [u8]) -> Self {
        Self(body)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Errno> {
        let (here, rest) = self.0.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(here)
    }

    /// The next 32 bits.
    pub fn word(&mut self) -> Result<u32, Errno> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("four bytes")))
    }

    /// The next 64 bits.
    pub fn long(&mut self) -> Result<u64, Errno> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().expect("eight bytes")))
    }

    /// Passes over bytes.
    pub fn skip(&mut self, len: usize) -> Result<(), Errno> {
        self.take(len).map(drop)
    }

    /// The next string, which ends with a zero.
    pub fn string(&mut self) -> Result<CString, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = &self.0[text.count_bytes() + 1..];
        Ok(text.to_owned())
    }

    /// The next string, as a name within a directory: it leads nowhere else.
    pub fn name(&mut self) -> Result<CString, Errno> {
        let name = self.string()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            _ => Ok(name),
        }
    }
}

/// Puts an answer together.
#[derive(Debug, Default)]
pub struct Answer(Vec<u8>);

impl Answer {
    /// 32 bits.
    pub fn word(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    /// 64 bits.
    pub fn long(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    /// Bytes as they are.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// Zeros up to a multiple of eight bytes.
    pub fn padded(mut self) -> Self {
        self.0.resize(self.0.len().next_multiple_of(8), 0);
        self
    }

    /// `struct fuse_attr`.
    pub fn attributes(self, stat: &Stat) -> Self {
        let device = |dev: u64| {
            let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
            minor & 0xff | major << 8 | (minor & !0xff) << 12
        };
        self.long(stat.st_ino)
            .long(stat.st_size as u64)
            .long(stat.st_blocks as u64)
            .long(stat.st_atime as u64)
            .long(stat.st_mtime as u64)
            .long(stat.st_ctime as u64)
            .word(stat.st_atime_nsec as u32)
            .word(stat.st_mtime_nsec as u32)
            .word(stat.st_ctime_nsec as u32)
            .word(stat.st_mode)
            .word(stat.st_nlink as u32)
            .word(stat.st_uid)
            .word(stat.st_gid)
            .word(device(stat.st_rdev))
            .word(stat.st_blksize as u32)
            .word(0)
    }

    /// `struct fuse_dirent`.
    pub fn entry(self, ino: u64, next: u64, kind: u32, name: &CStr) -> Self {
        let head = self.long(ino).long(next).word(name.count_bytes() as u32).word(kind);
        head.bytes(name.to_bytes()).padded()
    }

    /// Whether `more` bytes make it no longer than `most`.
    pub fn has_room(&self, more: usize, most: usize) -> bool {
        self.0.len() + more <= most
    }

    /// The bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}
