//! What is behind a guest's disks: bytes in files.
//!
//! A [`Disk`] knows nothing of guests and their registers; whoever shows it to a guest knows nothing of files.

mod raw;
mod vectors;

use std::io;
use std::path::PathBuf;

pub use raw::RawDisk;
use vm_memory::VolatileSlice;

/// Memory that somebody else may change at any time, such as a guest's.
pub type Slice<'a> = VolatileSlice<'a, ()>;

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
    /// It is neither a file nor a block device.
    #[error("'{}' is neither a file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Someone uses it in a way that does not go with this one.
    #[error("'{}' is in use by another machine", .0.display())]
    InUse(PathBuf),
    /// There is nothing in it.
    #[error("'{}' has less than one sector of 512 bytes", .0.display())]
    Empty(PathBuf),
}
