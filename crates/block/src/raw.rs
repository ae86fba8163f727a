//! A file or a block device whose bytes are the disk's.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::file::HostFile;
use crate::image::{Image, ImageInfo, ResizeError};
use crate::vectors::Way;
use crate::{Disk, DiskError, Extent, Format, Place, Slice};

/// The least that a guest can use.
const SECTOR: u64 = 512;

/// A disk in a file.
#[derive(Debug)]
pub struct RawDisk {
    file: HostFile,
    size: AtomicU64,
}

impl RawDisk {
    /// Opens a file or block device. One that is written is nobody else's meanwhile; several may read one.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let disk = Self::new(HostFile::open(path, read_only)?)?;
        match disk.size() {
            0..SECTOR => Err(DiskError::Empty(path.to_owned())),
            _ => Ok(disk),
        }
    }

    /// All of a file.
    pub(crate) fn new(file: HostFile) -> Result<Self, DiskError> {
        let size = file.size().map_err(|source| DiskError::Open { path: file.path().to_owned(), source })?;
        Ok(Self { file, size: AtomicU64::new(size) })
    }
}

impl Disk for RawDisk {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn is_read_only(&self) -> bool {
        self.file.is_read_only()
    }

    fn refresh_size(&self) -> io::Result<u64> {
        let size = self.file.size()?;
        self.size.store(size, Ordering::Relaxed);
        Ok(size)
    }

    fn read(&self, offset: u64, to: &[Slice]) -> io::Result<()> {
        self.file.transfer(Way::Read, offset, to)
    }

    fn write(&self, offset: u64, from: &[Slice]) -> io::Result<()> {
        self.file.transfer(Way::Write, offset, from)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap_allowed: bool) -> io::Result<()> {
        self.file.zero(offset, len, unmap_allowed)
    }

    fn extent(&self, offset: u64, len: u64) -> io::Result<(Extent, u64)> {
        let (data, len) = self.file.data_or_hole(offset, len)?;
        Ok((if data { Extent::Data } else { Extent::Zero }, len))
    }

    fn place(&self, way: Way, offset: u64, _len: u64) -> io::Result<Option<Place<'_>>> {
        Ok(self.file.place(way, offset))
    }
}

impl Image for RawDisk {
    fn info(&self) -> io::Result<ImageInfo> {
        ImageInfo::new(Format::Raw, self.size(), &self.file)
    }

    fn resize(&self, size: u64) -> Result<(), ResizeError> {
        self.file.set_size(size)?;
        self.refresh_size()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn disk(size: u64) -> (tempfile::NamedTempFile, RawDisk) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        let disk = RawDisk::open(file.path(), false).unwrap();
        (file, disk)
    }
    fn read(disk: &RawDisk, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0xaa; len];
        let (a, b) = bytes.split_at_mut(len / 3);
        disk.read(offset, &[Slice::from(a), Slice::from(b)]).unwrap();
        bytes
    }
    fn write(disk: &RawDisk, offset: u64, mut bytes: Vec<u8>) -> io::Result<()> {
        let (a, b) = bytes.split_at_mut(1);
        disk.write(offset, &[Slice::from(a), Slice::from(&mut [][..]), Slice::from(b)])
    }

    #[test]
    fn what_is_written_is_in_the_file_and_is_read() {
        let (file, disk) = disk(1 << 20);
        assert_eq!((disk.size(), disk.is_read_only()), (1 << 20, false));
        let bytes: Vec<u8> = (0..5000u32).map(|n| (n * 7) as u8).collect();
        write(&disk, 4096, bytes.clone()).unwrap();
        disk.flush().unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap()[4096..9096], bytes);
        assert_eq!(read(&disk, 4096, 5000), bytes);
    }

    #[test]
    fn many_small_buffers_are_one_transfer() {
        let (_file, disk) = disk(1 << 20);
        let mut bytes: Vec<u8> = (0..3000u32).map(|n| n as u8).collect();
        let expected = bytes.clone();
        let slices: Vec<_> = bytes.chunks_mut(1).map(Slice::from).collect();
        disk.write(512, &slices).unwrap();
        assert_eq!(read(&disk, 512, 3000), expected);
    }

    #[test]
    fn zeroed_and_discarded_ranges_read_as_zeros() {
        let (file, disk) = disk(1 << 20);
        for unmap in [false, true] {
            write(&disk, 0, vec![7; 1 << 20]).unwrap();
            disk.write_zeroes(1000, 200_000, unmap).unwrap();
            assert_eq!(read(&disk, 999, 1), [7]);
            assert_eq!(read(&disk, 1000, 200_000), vec![0; 200_000]);
            assert_eq!(read(&disk, 201_000, 1), [7]);
        }
        let blocks = file.as_file().metadata().unwrap().blocks();
        disk.discard(0, 1 << 20).unwrap();
        assert!(file.as_file().metadata().unwrap().blocks() < blocks);
        write(&disk, 0, vec![7; 100_000]).unwrap();
        disk.file.write_plain_zeros(10, 99_000).unwrap();
        assert_eq!(read(&disk, 0, 99_011).iter().map(|&b| u32::from(b)).sum::<u32>(), 77);
        assert_eq!(disk.refresh_size().unwrap(), 1 << 20);
    }

    #[test]
    fn a_file_that_was_cut_reads_as_zeros_there() {
        let (file, disk) = disk(8192);
        write(&disk, 0, vec![7; 8192]).unwrap();
        file.as_file().set_len(4096).unwrap();
        assert_eq!(read(&disk, 4000, 200), [[7; 96].as_slice(), &[0; 104]].concat());
        file.as_file().set_len(1 << 20).unwrap();
        assert_eq!((disk.size(), disk.refresh_size().unwrap()), (8192, 1 << 20));
    }

    #[test]
    fn one_writes_or_many_read() {
        let (file, disk) = disk(4096);
        let in_use = |read_only| matches!(RawDisk::open(file.path(), read_only), Err(DiskError::InUse(_)));
        assert!(in_use(false) && in_use(true));
        drop(disk);
        let readers = [(); 2].map(|()| RawDisk::open(file.path(), true).unwrap());
        assert!(in_use(false));
        assert!(write(&readers[0], 0, vec![1, 2]).is_err());
    }

    #[test]
    fn what_is_no_disk_is_refused_in_words() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = |path: &Path| RawDisk::open(path, true).unwrap_err().to_string();
        assert!(error(file.path()).ends_with("has less than one sector of 512 bytes"));
        assert!(error(Path::new("/dev/null")).ends_with("is neither a file nor a block device"));
        assert!(error(Path::new("/no/such/disk")).contains("No such file"));
    }
}
