//! VMDK images (VMware Virtual Disk Format 5.0): monolithic sparse, flat, and, to be read, stream-optimized.

mod flat;

use std::io::{self, Read};
use std::sync::Arc;

use crate::blocks::{Block, BlockDisk, Layout, Tables};
use crate::file::HostFile;
use crate::{DiskError, Format, Image};

const SECTOR: u64 = 512;
const MAGIC: &[u8] = b"KDMV";
/// Entries of a grain table.
const TABLE_ENTRIES: u32 = 512;
/// Sectors of a grain of a new image, and of its descriptor.
const GRAIN: u64 = 128;
const DESCRIPTOR: u64 = 20;
/// Bytes of a descriptor at most.
const MOST_DESCRIPTOR: u64 = 1 << 20;
const MOST_SIZE: u64 = 2 << 40;
/// Flags of the header.
mod flag {
    pub(crate) const NEWLINES: u32 = 1;
    pub(crate) const REDUNDANT: u32 = 2;
    pub(crate) const ZEROED: u32 = 4;
    pub(crate) const COMPRESSED: u32 = 1 << 16;
}
/// The directory is at the end of the file.
const AT_END: u64 = u64::MAX;

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}
fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// A sparse image.
struct Sparse {
    size: u64,
    grain: u64,
    entries: u64,
    flags: u32,
    /// Where the directory is, and where its redundant copy.
    directory: u64,
    copy: Option<u64>,
}

impl Sparse {
    /// Where the entry of a grain is, by way of a directory.
    fn entry_at(&self, tables: &mut Tables, directory: u64, grain: u64) -> io::Result<Option<u64>> {
        let table = u32::from_le_bytes(tables.entry(directory + grain / self.entries * 4)?);
        Ok((table != 0).then(|| u64::from(table) * SECTOR + grain % self.entries * 4))
    }
}

impl Layout for Sparse {
    const FORMAT: Format = Format::Vmdk;

    fn variant(&self) -> String {
        let compressed = self.flags & flag::COMPRESSED != 0;
        if compressed { "streamOptimized" } else { "monolithicSparse" }.to_owned()
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn block_size(&self) -> u64 {
        self.grain
    }
    fn is_writable(&self) -> bool {
        self.flags & flag::COMPRESSED == 0
    }

    fn lookup(&self, tables: &mut Tables, block: u64) -> io::Result<Block> {
        let Some(at) = self.entry_at(tables, self.directory, block)? else { return Ok(Block::Absent) };
        let sector = u32::from_le_bytes(tables.entry(at)?);
        let place = u64::from(sector) * SECTOR;
        Ok(match sector {
            0 => Block::Absent,
            1 if self.flags & flag::ZEROED != 0 => Block::Absent,
            _ if self.flags & flag::COMPRESSED != 0 => Block::Packed(place),
            _ => Block::At(place),
        })
    }

    fn add(&self, file: &HostFile, end: u64) -> io::Result<(u64, u64)> {
        let new_end = end + self.grain;
        if new_end / SECTOR > u32::MAX.into() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        file.set_size(new_end)?;
        Ok((end, new_end))
    }

    fn publish(&self, tables: &mut Tables, block: u64, at: u64) -> io::Result<()> {
        for directory in [Some(self.directory), self.copy].into_iter().flatten() {
            let entry = self.entry_at(tables, directory, block)?.ok_or(io::ErrorKind::Unsupported)?;
            tables.set_entry(entry, &((at / SECTOR) as u32).to_le_bytes())?;
        }
        Ok(())
    }

    /// A compressed grain has its sector of the disk and its length before it.
    fn unpack(&self, file: &HostFile, at: u64) -> io::Result<Vec<u8>> {
        let len = le32(&file.read_vec(at, 12)?, 8);
        if u64::from(len) > self.grain * 2 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let packed = file.read_vec(at + 12, len as usize)?;
        let mut bytes = Vec::new();
        flate2::read::ZlibDecoder::new(&packed[..]).take(self.grain).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// Opens an image, or says what is wrong with it.
pub(crate) fn open(file: HostFile) -> Result<Arc<dyn Image>, DiskError> {
    let path = file.path().to_owned();
    let start =
        file.read_vec(0, SECTOR as usize).map_err(|source| DiskError::Open { path: path.clone(), source })?;
    if !start.starts_with(MAGIC) {
        return flat::open(&file);
    }
    match open_sparse(file, start) {
        Ok(Ok(image)) => Ok(image),
        Ok(Err(what)) => Err(DiskError::Format { path, what: what.to_owned() }),
        Err(source) => Err(DiskError::Open { path, source }),
    }
}

fn open_sparse(file: HostFile, mut header: Vec<u8>) -> io::Result<Result<Arc<dyn Image>, &'static str>> {
    let file_size = file.size()?;
    if le64(&header, 56) == AT_END {
        // The header before the last sector is the whole one.
        header = file.read_vec(file_size.saturating_sub(1024), SECTOR as usize)?;
        if !header.starts_with(MAGIC) {
            return Ok(Err("its footer is missing"));
        }
    }
    if !(1..=3).contains(&le32(&header, 4)) {
        return Ok(Err("its version is not supported"));
    }
    let (descriptor, sectors) = (le64(&header, 28), le64(&header, 36));
    if descriptor != 0 && has_parent(&file, descriptor, sectors)? {
        return Ok(Err("images with a parent are not supported"));
    }
    let flags = le32(&header, 8);
    let bytes = |at: usize| le64(&header, at).checked_mul(SECTOR).filter(|&bytes| bytes < 1 << 62);
    let (Some(size), Some(grain), Some(directory), Some(copy)) = (bytes(12), bytes(20), bytes(56), bytes(48))
    else {
        return Ok(Err("its header is damaged"));
    };
    let entries = u64::from(le32(&header, 44));
    let possible = grain.is_power_of_two()
        && (4096..=32 << 20).contains(&grain)
        && (1..=TABLE_ENTRIES.into()).contains(&entries)
        && size <= 64 << 40
        && directory != 0
        && directory.saturating_add(size.div_ceil(grain * entries) * 4) <= file_size;
    if !possible {
        return Ok(Err("its header is damaged"));
    }
    let copy = (flags & flag::REDUNDANT != 0 && copy != 0).then_some(copy);
    let end = file_size.next_multiple_of(SECTOR);
    let layout = Sparse { size, grain, entries, flags, directory, copy };
    Ok(Ok(Arc::new(BlockDisk::new(file, layout, end))))
}

/// Whether the descriptor in a sparse image says that there is another one behind it.
fn has_parent(file: &HostFile, sector: u64, sectors: u64) -> io::Result<bool> {
    let at = sector.checked_mul(SECTOR).filter(|&at| at < 1 << 62).ok_or(io::ErrorKind::InvalidData)?;
    let len = sectors.saturating_mul(SECTOR).min(MOST_DESCRIPTOR);
    let bytes = file.read_vec(at, len as usize)?;
    Ok(flat::has_parent(&String::from_utf8_lossy(&bytes)))
}

/// Makes an empty monolithic sparse image in an empty file.
pub(crate) fn create(file: &HostFile, size: u64) -> io::Result<()> {
    if size > MOST_SIZE {
        return Err(io::Error::other("a VMDK image has at most 2 TiB"));
    }
    let sectors = size.div_ceil(SECTOR);
    let tables = sectors.div_ceil(GRAIN * u64::from(TABLE_ENTRIES));
    let table_sectors = u64::from(TABLE_ENTRIES) * 4 / SECTOR;
    let directory_sectors = (tables * 4).div_ceil(SECTOR);
    let copy = 1 + DESCRIPTOR;
    let directory = copy + directory_sectors + tables * table_sectors;
    let overhead = (directory + directory_sectors + tables * table_sectors).next_multiple_of(GRAIN);
    let mut header = vec![0; SECTOR as usize];
    let mut put = |at: usize, field: &[u8]| header[at..at + field.len()].copy_from_slice(field);
    put(0, MAGIC);
    put(4, &1u32.to_le_bytes());
    put(8, &(flag::NEWLINES | flag::REDUNDANT).to_le_bytes());
    for (at, value) in
        [(12, sectors), (20, GRAIN), (28, 1), (36, DESCRIPTOR), (48, copy), (56, directory), (64, overhead)]
    {
        put(at, &value.to_le_bytes());
    }
    put(44, &TABLE_ENTRIES.to_le_bytes());
    // Whoever changes ends of lines breaks this.
    put(73, b"\n \r\n");
    file.set_size(overhead * SECTOR)?;
    for at in [copy, directory] {
        let first = at + directory_sectors;
        let entries: Vec<u8> =
            (0..tables).flat_map(|n| ((first + n * table_sectors) as u32).to_le_bytes()).collect();
        file.write(at * SECTOR, &entries)?;
    }
    file.write(SECTOR, flat::new_descriptor(file.path(), sectors)?.as_bytes())?;
    file.write(0, &header)
}
