//! What is behind a guest's disks: bytes in files.
//!
//! A [`Disk`] knows nothing of guests and their registers; whoever shows it to a guest knows nothing of files. Files are
//! [`Image`]s of some [`Format`]; [`open`] finds out which.

mod blocks;
mod cache;
mod copy;
mod file;
mod format;
mod guard;
mod image;
mod lane;
mod memory;
mod open;
mod qcow2;
mod raw;
mod vectors;
mod vhd;
mod vhdx;
mod vmdk;
mod window;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

pub use copy::{commit, copy, keep_content, known_zero};
pub use format::Format;
pub use image::{Backing, CheckReport, Image, ImageInfo, Repair, ResizeError, Snapshot};
pub use lane::{Lane, Place, Transfer};
pub use memory::MemoryDisk;
pub use open::{CreateOptions, OpenOptions, create, open, resolve};
pub use qcow2::Compression;
pub use raw::RawDisk;
pub use vectors::Way;
use vm_memory::VolatileSlice;

/// Memory that somebody else may change at any time, such as a guest's.
pub type Slice<'a> = VolatileSlice<'a, ()>;

/// Opens a file or block device whose bytes are used as they are, under the lock that it would have as a disk.
pub fn open_locked(path: &Path, read_only: bool) -> Result<File, DiskError> {
    Ok(file::HostFile::open(path, read_only)?.into_file())
}

/// A number that nothing else has: a UUID of version 4, the bytes in either order.
pub(crate) fn random_id() -> io::Result<[u8; 16]> {
    let mut id = [0; 16];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(id)
}

/// A disk: bytes from 0 to its size. Calls may come from several threads at a time; requests that overlap and are under
/// way together are done in any order.
pub trait Disk: Send + Sync {
    /// Bytes.
    fn size(&self) -> u64;
    /// Whether it takes no writes.
    fn is_read_only(&self) -> bool;
    /// Looks how large it is now, where that can change from outside.
    fn refresh_size(&self) -> io::Result<u64>;
    /// Fills all slices with what is at `offset` on.
    fn read(&self, offset: u64, to: &[Slice]) -> io::Result<()>;
    /// Writes all slices to `offset` on.
    fn write(&self, offset: u64, from: &[Slice]) -> io::Result<()>;
    /// All that was written is on stable storage when this returns.
    fn flush(&self) -> io::Result<()>;
    /// Nobody needs these bytes any more; what they read as is not said.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
    /// These bytes are zero; the storage behind them is given back if that is `allowed` and possible.
    fn write_zeroes(&self, offset: u64, len: u64, unmap_allowed: bool) -> io::Result<()>;
    /// What is at `offset`, and for how many bytes (at least one, at most `len`) it is sure to be the same.
    fn extent(&self, offset: u64, len: u64) -> io::Result<(Extent, u64)> {
        let _ = offset;
        Ok((Extent::Data, len))
    }
    /// Where in a file these bytes are, if a transfer there is all that it takes to read or write them.
    fn place(&self, way: Way, offset: u64, len: u64) -> io::Result<Option<Place<'_>>> {
        let _ = (way, offset, len);
        Ok(None)
    }
}

/// What a range of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Bytes of this image.
    Data,
    /// Zeros without storage.
    Zero,
    /// It is not in this image, but behind it.
    Backing,
}

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The host refuses the file.
    #[error("cannot open '{}': {source}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The host does not let it be made.
    #[error("cannot create '{}': {source}", .path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// It is neither a file nor a block device.
    #[error("'{}' is neither a file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Someone uses it in a way that does not go with this one.
    #[error("'{}' is in use by another machine", .0.display())]
    InUse(PathBuf),
    /// There is nothing in it.
    #[error("'{}' has less than one sector of 512 bytes", .0.display())]
    Empty(PathBuf),
    /// It is damaged, or of another format, or has something that is not supported.
    #[error("'{}': {what}", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The file behind it cannot be had.
    #[error("'{}' needs its backing file: {source}", .path.display())]
    Backing {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Box<DiskError>,
    },
    /// It is, directly or by others, its own backing file.
    #[error("'{}' is among its own backing files", .0.display())]
    Cycle(PathBuf),
}
