//! Disks without a file.

use std::io;

use crate::vectors::{fill, total};
use crate::{Disk, Slice};

/// A disk in memory that takes no writes.
#[derive(Debug)]
pub struct MemoryDisk(Vec<u8>);

impl MemoryDisk {
    /// A disk of these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl Disk for MemoryDisk {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }
    fn is_read_only(&self) -> bool {
        true
    }
    fn refresh_size(&self) -> io::Result<u64> {
        Ok(self.size())
    }

    fn read(&self, offset: u64, to: &[Slice]) -> io::Result<()> {
        let end = offset.checked_add(total(to)).ok_or(io::ErrorKind::InvalidInput)?;
        let bytes = self.0.get(offset as usize..end as usize).ok_or(io::ErrorKind::InvalidInput)?;
        fill(to, bytes);
        Ok(())
    }

    fn write(&self, _offset: u64, _from: &[Slice]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap_allowed: bool) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_as_what_it_was_made_of() {
        let disk = MemoryDisk::new((0..=255).collect());
        let mut bytes = [0; 100];
        let (a, b) = bytes.split_at_mut(30);
        disk.read(156, &[Slice::from(a), Slice::from(b)]).unwrap();
        assert!((156..=255).eq(bytes));
        assert!(disk.read(157, &[Slice::from(&mut bytes[..])]).is_err());
        assert!(disk.read(u64::MAX, &[Slice::from(&mut bytes[..])]).is_err());
        assert!(disk.write(0, &[Slice::from(&mut bytes[..])]).is_err());
        assert!(disk.is_read_only());
    }
}
