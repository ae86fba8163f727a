//! Descriptors of VMDK images, and the flat files that they name.

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::file::HostFile;
use crate::image::{Image, ImageInfo, ResizeError};
use crate::open::resolve;
use crate::vectors::{Way, clear, part, total};
use crate::{Disk, DiskError, Format, Slice};

const SECTOR: u64 = 512;
/// Files of an image at most.
const MOST_FILES: usize = 1024;

/// Whether a descriptor says that there is another image behind this one.
pub(super) fn has_parent(descriptor: &str) -> bool {
    descriptor.lines().filter_map(|line| line.split_once('=')).any(|(key, value)| {
        let (key, value) = (key.trim(), value.trim().trim_end_matches('\0'));
        key.eq_ignore_ascii_case("parentCID") && !value.eq_ignore_ascii_case("ffffffff")
    })
}

/// The descriptor of a new sparse image.
pub(super) fn new_descriptor(path: &Path, sectors: u64) -> io::Result<String> {
    let name =
        path.file_name().and_then(|name| name.to_str()).unwrap_or("disk.vmdk").replace(['"', '\n'], "_");
    let [a, b, c, d, ..] = crate::random_id()?;
    let id = u32::from_le_bytes([a, b, c, d]) & 0x7fff_ffff;
    let cylinders = (sectors / (16 * 63)).min(16383);
    Ok(format!(
        "# Disk DescriptorFile\nversion=1\nCID={id:08x}\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n\n\
         # Extent description\nRW {sectors} SPARSE \"{name}\"\n\n# The Disk Data Base\n#DDB\n\n\
         ddb.virtualHWVersion = \"4\"\nddb.geometry.cylinders = \"{cylinders}\"\nddb.geometry.heads = \"16\"\n\
         ddb.geometry.sectors = \"63\"\nddb.adapterType = \"ide\"\n"
    ))
}

/// A run of the disk.
struct Piece {
    begin: u64,
    len: u64,
    /// Its file and the offset there; zeros if there is none.
    at: Option<(HostFile, u64)>,
}

/// A disk in flat files.
struct FlatDisk {
    pieces: Vec<Piece>,
    size: u64,
    read_only: bool,
}

/// A line of a descriptor that is a run of the disk: its sectors, and the file and sector where they are.
type Line<'a> = (u64, Option<(&'a str, u64)>);

/// Reads a line, if it is such a one.
fn parse_extent(line: &str) -> Option<Result<Line<'_>, &'static str>> {
    let rest = line.trim().strip_prefix("RW ").or_else(|| line.trim().strip_prefix("RDONLY "))?;
    let (sectors, rest) = rest.trim_start().split_once(' ')?;
    let Ok(sectors) = sectors.parse::<u64>() else { return Some(Err("a line of its descriptor is damaged")) };
    let rest = rest.trim();
    if rest == "ZERO" {
        return Some(Ok((sectors, None)));
    }
    let flat = rest.strip_prefix("FLAT ").or_else(|| rest.strip_prefix("VMFS "));
    let Some(flat) = flat else {
        return Some(Err("of images in several files, only flat ones are supported"));
    };
    let mut parts = flat.splitn(3, '"').skip(1);
    let (Some(name), Some(offset)) = (parts.next(), parts.next()) else {
        return Some(Err("a line of its descriptor is damaged"));
    };
    let offset = offset.trim();
    let Ok(offset) = (if offset.is_empty() { Ok(0) } else { offset.parse::<u64>() }) else {
        return Some(Err("a line of its descriptor is damaged"));
    };
    // A descriptor may come from anywhere; it names no other files of the host.
    match name.is_empty() || name.contains('/') || name == ".." {
        true => Some(Err("it names files that are not beside it")),
        false => Some(Ok((sectors, Some((name, offset))))),
    }
}

/// Opens the files that a descriptor names.
pub(super) fn open(file: &HostFile) -> Result<Arc<dyn Image>, DiskError> {
    let path = file.path();
    let refuse = |what: &str| DiskError::Format { path: path.to_owned(), what: what.to_owned() };
    let failed = |source| DiskError::Open { path: path.to_owned(), source };
    let len = file.size().map_err(failed)?.min(super::MOST_DESCRIPTOR);
    let bytes = file.read_vec(0, len as usize).map_err(failed)?;
    let text = String::from_utf8_lossy(&bytes);
    if !text.starts_with("# Disk DescriptorFile") {
        return Err(refuse("it is no VMDK image"));
    }
    if has_parent(&text) {
        return Err(refuse("images with a parent are not supported"));
    }
    let (mut pieces, mut size) = (Vec::new(), 0u64);
    for line in text.lines().filter_map(parse_extent) {
        let (sectors, named) = line.map_err(refuse)?;
        let at = named.map(|(name, offset)| {
            let file = HostFile::open(&resolve(path, Path::new(name)), file.is_read_only())?;
            Ok((file, offset.saturating_mul(SECTOR)))
        });
        let len = sectors.saturating_mul(SECTOR);
        pieces.push(Piece { begin: size, len, at: at.transpose()? });
        size =
            size.checked_add(len).filter(|&size| size < 1 << 62).ok_or_else(|| refuse("it is too large"))?;
        if pieces.len() > MOST_FILES {
            return Err(refuse("it has too many files"));
        }
    }
    if size == 0 {
        return Err(refuse("its descriptor names no files"));
    }
    Ok(Arc::new(FlatDisk { pieces, size, read_only: file.is_read_only() }))
}

impl FlatDisk {
    /// Calls `each` for all pieces of a range, with the offset in the piece, that in the range, and a length.
    fn each(
        &self,
        offset: u64,
        len: u64,
        mut each: impl FnMut(&Piece, u64, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let end =
            offset.checked_add(len).filter(|&end| end <= self.size).ok_or(io::ErrorKind::InvalidInput)?;
        for piece in self.pieces.iter().filter(|piece| piece.begin < end && offset < piece.begin + piece.len)
        {
            let from = offset.max(piece.begin);
            let here = end.min(piece.begin + piece.len) - from;
            each(piece, from - piece.begin, from - offset, here)?;
        }
        Ok(())
    }
}

impl Disk for FlatDisk {
    fn size(&self) -> u64 {
        self.size
    }
    fn is_read_only(&self) -> bool {
        self.read_only
    }
    fn refresh_size(&self) -> io::Result<u64> {
        Ok(self.size)
    }
    fn read(&self, offset: u64, to: &[Slice]) -> io::Result<()> {
        self.each(offset, total(to), |piece, within, done, here| {
            let parts = part(to, done, here);
            match &piece.at {
                Some((file, at)) => file.transfer(Way::Read, at + within, &parts),
                None => {
                    clear(&parts);
                    Ok(())
                }
            }
        })
    }
    fn write(&self, offset: u64, from: &[Slice]) -> io::Result<()> {
        self.each(offset, total(from), |piece, within, done, here| match &piece.at {
            Some((file, at)) => file.transfer(Way::Write, at + within, &part(from, done, here)),
            None => Err(io::ErrorKind::Unsupported.into()),
        })
    }
    fn flush(&self) -> io::Result<()> {
        self.pieces.iter().filter_map(|piece| piece.at.as_ref()).try_for_each(|(file, _)| file.sync())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.each(offset, len, |piece, within, _, here| {
            piece.at.as_ref().map_or(Ok(()), |(file, at)| file.discard(at + within, here))
        })
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap_allowed: bool) -> io::Result<()> {
        self.each(offset, len, |piece, within, _, here| {
            piece.at.as_ref().map_or(Ok(()), |(file, at)| file.zero(at + within, here, unmap_allowed))
        })
    }
}

impl Image for FlatDisk {
    fn info(&self) -> io::Result<ImageInfo> {
        let files = || self.pieces.iter().filter_map(|piece| piece.at.as_ref());
        Ok(ImageInfo {
            variant: Some("flat".to_owned()),
            file_size: files().map(|(file, _)| file.size()).sum::<io::Result<_>>()?,
            allocated: files().map(|(file, _)| file.allocated()).sum::<io::Result<_>>()?,
            ..ImageInfo::empty(Format::Vmdk, self.size)
        })
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
