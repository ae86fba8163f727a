//! A raw disk whose format was found by its content: its guest must not make another format of it.
//!
//! What the guest writes to the first sector decides what the file is taken for next time, and some formats name other
//! files of the host. So what looks like a header is not written to the first sector, nor to the last one.

use std::io;

use vm_memory::Bytes;

use crate::format::{Format, PROBE};
use crate::image::{Image, ImageInfo, ResizeError};
use crate::vectors::{part, total};
use crate::{Disk, Extent, Place, RawDisk, Slice, Way};

const SECTOR: u64 = PROBE as u64;

/// A raw disk that stays one.
#[derive(Debug)]
pub(crate) struct GuardedDisk(pub(crate) RawDisk);

impl GuardedDisk {
    /// Writes the bytes of a request that are in the sector at `sector`, if they leave the file what it is.
    fn write_guarded(&self, sector: u64, offset: u64, from: &[Slice]) -> io::Result<()> {
        let mut bytes = [0; PROBE];
        self.0.read(sector, &[Slice::from(&mut bytes[..])])?;
        let begin = offset.max(sector);
        let end = (offset + total(from)).min(sector + SECTOR);
        let mut at = (begin - sector) as usize;
        // A copy: a guest could change its memory after it was looked at.
        for slice in part(from, begin - offset, end - begin) {
            let len = slice.len();
            slice.read_slice(&mut bytes[at..at + len], 0).map_err(io::Error::other)?;
            at += len;
        }
        let found = if sector == 0 { Format::of_start(&bytes) } else { Format::of_end(&bytes) };
        match found {
            Some(format) => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("the guest writes a header of {format}; with format=raw it may"),
            )),
            None => {
                let (begin, end) = ((begin - sector) as usize, (end - sector) as usize);
                self.0.write(sector + begin as u64, &[Slice::from(&mut bytes[begin..end])])
            }
        }
    }
}

impl Disk for GuardedDisk {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn is_read_only(&self) -> bool {
        self.0.is_read_only()
    }
    fn refresh_size(&self) -> io::Result<u64> {
        self.0.refresh_size()
    }
    fn read(&self, offset: u64, to: &[Slice]) -> io::Result<()> {
        self.0.read(offset, to)
    }

    fn write(&self, offset: u64, from: &[Slice]) -> io::Result<()> {
        let last = self.size().saturating_sub(SECTOR);
        let len = total(from);
        let (mut first_plain, mut end_plain) = (offset, offset + len);
        if offset < SECTOR && len > 0 {
            self.write_guarded(0, offset, from)?;
            first_plain = SECTOR;
        }
        if end_plain > last && last >= SECTOR && len > 0 {
            self.write_guarded(last, offset, from)?;
            end_plain = last;
        }
        if first_plain >= end_plain {
            return Ok(());
        }
        if (first_plain, end_plain) == (offset, offset + len) {
            return self.0.write(offset, from);
        }
        self.0.write(first_plain, &part(from, first_plain - offset, end_plain - first_plain))
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap_allowed: bool) -> io::Result<()> {
        self.0.write_zeroes(offset, len, unmap_allowed)
    }
    fn extent(&self, offset: u64, len: u64) -> io::Result<(Extent, u64)> {
        self.0.extent(offset, len)
    }
    fn place(&self, way: Way, offset: u64, len: u64) -> io::Result<Option<Place<'_>>> {
        let last = self.size().saturating_sub(SECTOR);
        match way == Way::Write && (offset < SECTOR || offset + len > last) {
            true => Ok(None),
            false => self.0.place(way, offset, len),
        }
    }
}

impl Image for GuardedDisk {
    fn info(&self) -> io::Result<ImageInfo> {
        self.0.info()
    }
    fn resize(&self, size: u64) -> Result<(), ResizeError> {
        self.0.resize(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OpenOptions;

    #[test]
    fn a_guest_cannot_make_a_header() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let disk = crate::open(file.path(), &OpenOptions::default()).unwrap();
        let write = |offset, mut bytes: Vec<u8>| disk.write(offset, &[Slice::from(&mut bytes[..])]);
        for (at, text) in [
            (0, &b"QFI\xfb"[..]),
            (0, b"# Disk DescriptorFile"),
            (0, b"KDMV"),
            (0, b"vhdxfile"),
            (0, b"conectix"),
            (3584, b"conectix"),
        ] {
            let mut bytes = vec![1; 512];
            bytes[..text.len()].copy_from_slice(text);
            assert_eq!(write(at, bytes).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            // In two parts it is the same.
            write(at, text[..2].to_vec()).unwrap();
            assert!(write(at + 2, text[2..].to_vec()).is_err());
        }
        let bytes: Vec<u8> = (0..4096).map(|n| (n / 7) as u8).collect();
        write(0, bytes.clone()).unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), bytes);
        write(512, b"QFI\xfb".to_vec()).unwrap();
        write(400, vec![9; 3600]).unwrap();
        assert_eq!(
            std::fs::read(file.path()).unwrap()[399..4001],
            [&bytes[399..400], &[9; 3600], &bytes[4000..4001]].concat()
        );
        drop(disk);
        let named = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
        let disk = crate::open(file.path(), &named).unwrap();
        disk.write(0, &[Slice::from(&mut b"QFI\xfb".to_vec()[..])]).unwrap();
    }
}
