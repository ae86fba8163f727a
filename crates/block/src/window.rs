//! A disk that is a part of a file, with something before or behind it.

use std::io;

use crate::file::HostFile;
use crate::image::{Image, ImageInfo, ResizeError};
use crate::vectors::Way;
use crate::{Disk, Extent, Format, Place, Slice};

/// The first bytes of a file.
pub(crate) struct Window {
    file: HostFile,
    format: Format,
    variant: &'static str,
    size: u64,
}

impl Window {
    pub(crate) fn new(file: HostFile, format: Format, variant: &'static str, size: u64) -> Self {
        Self { file, format, variant, size }
    }

    /// Nothing reaches what is behind the disk.
    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len).is_some_and(|end| end <= self.size) {
            true => Ok(()),
            false => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl Disk for Window {
    fn size(&self) -> u64 {
        self.size
    }
    fn is_read_only(&self) -> bool {
        self.file.is_read_only()
    }
    fn refresh_size(&self) -> io::Result<u64> {
        Ok(self.size)
    }
    fn read(&self, offset: u64, to: &[Slice]) -> io::Result<()> {
        self.file.transfer(Way::Read, offset, to)
    }
    fn write(&self, offset: u64, from: &[Slice]) -> io::Result<()> {
        self.check(offset, crate::vectors::total(from))?;
        self.file.transfer(Way::Write, offset, from)
    }
    fn flush(&self) -> io::Result<()> {
        self.file.sync()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        self.file.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap_allowed: bool) -> io::Result<()> {
        self.check(offset, len)?;
        self.file.zero(offset, len, unmap_allowed)
    }
    fn extent(&self, offset: u64, len: u64) -> io::Result<(Extent, u64)> {
        let (data, len) = self.file.data_or_hole(offset, len)?;
        Ok((if data { Extent::Data } else { Extent::Zero }, len))
    }
    fn place(&self, way: Way, offset: u64, len: u64) -> io::Result<Option<Place<'_>>> {
        self.check(offset, len)?;
        Ok(self.file.place(way, offset))
    }
}

impl Image for Window {
    fn info(&self) -> io::Result<ImageInfo> {
        let info = ImageInfo::new(self.format, self.size, &self.file)?;
        Ok(ImageInfo { variant: Some(self.variant.to_owned()), ..info })
    }
    fn resize(&self, size: u64) -> Result<(), ResizeError> {
        match size == self.size {
            true => Ok(()),
            false => Err(ResizeError::Format(
                "the size of such an image is fixed; ruse disk convert makes another",
            )),
        }
    }
}
