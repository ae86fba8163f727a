//! Files of the host that hold disks: opened under a lock, read, written, zeroed.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::io::Errno;

use crate::vectors::{Way, transfer};
use crate::{DiskError, Place, Slice};

/// Bytes of zeros that are written at once where the file system has no other way.
const ZEROS: usize = 64 << 10;

/// A file or block device, under a lock: one that is written is nobody else's meanwhile; several may read one.
#[derive(Debug)]
pub(crate) struct HostFile {
    file: File,
    path: PathBuf,
    read_only: bool,
}

/// What makes two paths the same file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// Of the file at a path.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let found = std::fs::metadata(path)?;
        Ok(Self { device: found.dev(), inode: found.ino() })
    }
}

impl HostFile {
    /// Opens a file that is there.
    pub(crate) fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let failed = |source| DiskError::Open { path: path.to_owned(), source };
        // Opening a pipe would wait for its other end.
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind(path.to_owned()));
        }
        Self::lock(file, path, read_only)
    }

    /// Makes a file, which must not be there, or with `replace` empties the one that is.
    pub(crate) fn create(path: &Path, replace: bool) -> Result<Self, DiskError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .create_new(!replace)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .map_err(|source| DiskError::Create { path: path.to_owned(), source })?;
        let locked = Self::lock(file, path, false)?;
        let regular = locked.file.metadata().is_ok_and(|found| found.is_file());
        match regular {
            // Only now it is sure that no machine uses it.
            true => locked.file.set_len(0),
            false => Err(io::ErrorKind::AlreadyExists.into()),
        }
        .map_err(|source| DiskError::Create { path: path.to_owned(), source })?;
        Ok(locked)
    }

    fn lock(file: File, path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let lock = if read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        match flock(&file, lock) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(DiskError::InUse(path.to_owned())),
            Err(error) => tracing::warn!(%error, path = %path.display(), "the file system has no locks"),
        }
        Ok(Self { file, path: path.to_owned(), read_only })
    }

    /// The file itself, which has the lock.
    pub(crate) fn into_file(self) -> File {
        self.file
    }
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }
    /// The place of bytes of this file.
    pub(crate) fn place(&self, way: Way, offset: u64) -> Option<Place<'_>> {
        let refused = way == Way::Write && self.read_only;
        (!refused).then(|| Place { file: self.file.as_fd(), offset, pin: None })
    }
    /// Bytes of storage behind it.
    pub(crate) fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    /// Bytes. The size of a block device is only where its end is.
    pub(crate) fn size(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }
    pub(crate) fn set_size(&self, size: u64) -> io::Result<()> {
        self.file.set_len(size)
    }
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Moves all bytes of `slices`, from or to `offset` on.
    pub(crate) fn transfer(&self, way: Way, offset: u64, slices: &[Slice]) -> io::Result<()> {
        transfer(&self.file, way, offset, slices)
    }
    /// Reads bytes; what is behind the end is zero.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.transfer(Way::Read, offset, &[Slice::from(bytes)])
    }
    /// Reads `len` bytes; what is behind the end is zero.
    pub(crate) fn read_vec(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Frees the storage of a range, which then reads as zeros. What is behind the end stays there.
    pub(crate) fn punch(&self, offset: u64, len: u64) -> rustix::io::Result<()> {
        fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
    }

    /// Frees the storage of a range, if that is possible.
    pub(crate) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.punch(offset, len) {
            Err(error) if !is_unsupported(error) => Err(error.into()),
            // To keep the bytes is as right.
            _ => Ok(()),
        }
    }

    /// Makes a range zero.
    pub(crate) fn zero(&self, offset: u64, len: u64, unmap_allowed: bool) -> io::Result<()> {
        let zero_range = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let quick = match unmap_allowed {
            true => self.punch(offset, len),
            false => fallocate(&self.file, zero_range, offset, len),
        };
        match quick {
            Ok(()) => Ok(()),
            Err(error) if is_unsupported(error) => self.write_plain_zeros(offset, len),
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) fn write_plain_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeros = vec![0; ZEROS.min(len as usize)];
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let now = (end - at).min(zeros.len() as u64);
            self.write(at, &zeros[..now as usize])?;
            at += now;
        }
        Ok(())
    }

    /// Whether there are bytes in the file at `offset` or a hole, and how far that goes; `len` at most.
    pub(crate) fn data_or_hole(&self, offset: u64, len: u64) -> io::Result<(bool, u64)> {
        use rustix::fs::{SeekFrom, seek};
        let data = match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data,
            // There is none behind it.
            Err(Errno::NXIO) => return Ok((false, len)),
            Err(error) if is_unsupported(error) => return Ok((true, len)),
            Err(error) => return Err(error.into()),
        };
        if data > offset {
            return Ok((false, len.min(data - offset)));
        }
        let hole = seek(&self.file, SeekFrom::Hole(offset))?;
        Ok((true, len.min(hole.saturating_sub(offset).max(1))))
    }
}

/// The file system has no such operation.
fn is_unsupported(error: Errno) -> bool {
    matches!(error, Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV)
}
