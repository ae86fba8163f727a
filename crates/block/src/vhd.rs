//! VHD images (Virtual Hard Disk Image Format Specification 1.0): fixed and dynamic.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::blocks::{Block, BlockDisk, Layout, Tables};
use crate::file::HostFile;
use crate::window::Window;
use crate::{Format, Image};

const SECTOR: u64 = 512;
const BLOCK_SIZE: u64 = 2 << 20;
/// Bytes of the header of a dynamic disk.
const HEADER: usize = 1024;
/// Most bytes of a disk: sectors are counted in 32 bits.
const MOST_SIZE: u64 = 2040 << 30;
const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
/// No block.
const NONE: u32 = u32::MAX;
/// 2000-01-01, from which times are counted.
const EPOCH: u64 = 946_684_800;

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}
fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The checksum of a structure with its checksum at `at`.
fn checksum(bytes: &[u8], at: usize) -> u32 {
    !(bytes.iter().enumerate())
        .filter(|(n, _)| !(at..at + 4).contains(n))
        .fold(0u32, |sum, (_, &byte)| sum.wrapping_add(byte.into()))
}

/// A dynamic disk.
struct Dynamic {
    size: u64,
    block_size: u64,
    table: u64,
    footer: Vec<u8>,
}

impl Dynamic {
    /// Bytes of the bitmap before each block.
    fn bitmap_size(&self) -> u64 {
        (self.block_size / SECTOR / 8).next_multiple_of(SECTOR)
    }
}

impl Layout for Dynamic {
    const FORMAT: Format = Format::Vhd;

    fn variant(&self) -> String {
        "dynamic".to_owned()
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn block_size(&self) -> u64 {
        self.block_size
    }

    fn lookup(&self, tables: &mut Tables, block: u64) -> io::Result<Block> {
        let sector = u32::from_be_bytes(tables.entry(self.table + block * 4)?);
        Ok(if sector == NONE {
            Block::Absent
        } else {
            Block::At(u64::from(sector) * SECTOR + self.bitmap_size())
        })
    }

    fn add(&self, file: &HostFile, end: u64) -> io::Result<(u64, u64)> {
        let at = end + self.bitmap_size();
        let new_end = at + self.block_size;
        if new_end / SECTOR >= NONE.into() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        // The footer is behind the last block at any time.
        file.write(new_end, &self.footer)?;
        file.zero(end, new_end - end, true)?;
        file.write(end, &vec![0xff; self.bitmap_size() as usize])?;
        Ok((at, new_end))
    }

    fn publish(&self, tables: &mut Tables, block: u64, at: u64) -> io::Result<()> {
        let sector = (at - self.bitmap_size()) / SECTOR;
        tables.set_entry(self.table + block * 4, &(sector as u32).to_be_bytes())
    }
}

/// Opens an image, or says what is wrong with it.
pub(crate) fn open(file: HostFile) -> io::Result<Result<Box<dyn Image>, String>> {
    let file_size = file.size()?;
    let Some(footer_at) = file_size.checked_sub(SECTOR) else { return Ok(Err("it is too short".to_owned())) };
    let valid = |bytes: &Vec<u8>| bytes.starts_with(b"conectix") && checksum(bytes, 64) == be32(bytes, 64);
    // There is a copy at the beginning of a dynamic disk.
    let at_end = file.read_vec(footer_at, SECTOR as usize)?;
    let footer = if valid(&at_end) { at_end } else { file.read_vec(0, SECTOR as usize)? };
    if !valid(&footer) {
        return Ok(Err("its footer is damaged".to_owned()));
    }
    let size = be64(&footer, 48) / SECTOR * SECTOR;
    match be32(&footer, 60) {
        FIXED if size <= footer_at => Ok(Ok(Box::new(Window::new(file, Format::Vhd, "fixed", size)))),
        FIXED => Ok(Err("it is shorter than its disk".to_owned())),
        DYNAMIC => open_dynamic(file, footer, size),
        4 => Ok(Err("differencing images are not supported".to_owned())),
        other => Ok(Err(format!("a disk of type {other} is not supported"))),
    }
}

fn open_dynamic(file: HostFile, footer: Vec<u8>, size: u64) -> io::Result<Result<Box<dyn Image>, String>> {
    let refuse = |what: &str| Ok(Err(what.to_owned()));
    let file_size = file.size()?;
    let at = be64(&footer, 16);
    if at > file_size {
        return refuse("its header is behind its end");
    }
    let header = file.read_vec(at, HEADER)?;
    if !header.starts_with(b"cxsparse") || checksum(&header, 36) != be32(&header, 36) {
        return refuse("its header is damaged");
    }
    let (table, entries, block_size) = (be64(&header, 16), be32(&header, 28), be32(&header, 32).into());
    if !u64::is_power_of_two(block_size) || !(SECTOR * 8..=256 << 20).contains(&block_size) {
        return refuse("blocks of an impossible size");
    }
    let table_end = table.checked_add(u64::from(entries) * 4);
    if size > MOST_SIZE
        || size.div_ceil(block_size) > entries.into()
        || table_end.is_none_or(|end| end > file_size)
        || !table.is_multiple_of(4)
    {
        return refuse("its table of blocks is damaged");
    }
    let layout = Dynamic { size, block_size, table, footer };
    let tables_end = table_end.unwrap_or(0).max(at + HEADER as u64);
    let end = last_block(&layout, &file, entries)?.max(tables_end).next_multiple_of(SECTOR);
    Ok(Ok(Box::new(BlockDisk::new(file, layout, end))))
}

/// The end of the last block in the file, 0 if there is none.
fn last_block(layout: &Dynamic, file: &HostFile, entries: u32) -> io::Result<u64> {
    let mut last = 0;
    let (mut at, end) = (layout.table, layout.table + u64::from(entries) * 4);
    while at < end {
        let piece = file.read_vec(at, (end - at).min(1 << 16) as usize)?;
        let sectors = piece.chunks_exact(4).map(|entry| be32(entry, 0)).filter(|&sector| sector != NONE);
        last = last.max(
            sectors
                .max()
                .map_or(0, |sector| u64::from(sector) * SECTOR + layout.bitmap_size() + layout.block_size),
        );
        at += piece.len() as u64;
    }
    Ok(last)
}

/// The geometry that old guests see, by the algorithm of the specification's appendix: cylinders, heads, sectors.
fn geometry(size: u64) -> [u8; 4] {
    let total = (size / SECTOR).min(65535 * 16 * 255);
    let (sectors, heads, tracks);
    if total >= 65535 * 16 * 63 {
        (sectors, heads) = (255, 16);
        tracks = total / sectors;
    } else {
        let mut try_tracks = total / 17;
        let (mut try_sectors, mut try_heads) = (17, try_tracks.div_ceil(1024).max(4));
        if try_tracks >= try_heads * 1024 || try_heads > 16 {
            (try_sectors, try_heads) = (31, 16);
            try_tracks = total / try_sectors;
        }
        if try_tracks >= try_heads * 1024 {
            (try_sectors, try_heads) = (63, 16);
            try_tracks = total / try_sectors;
        }
        (sectors, heads, tracks) = (try_sectors, try_heads, try_tracks);
    }
    let cylinders = (tracks / heads) as u16;
    [(cylinders >> 8) as u8, cylinders as u8, heads as u8, sectors as u8]
}

/// The footer of a new disk.
fn footer(size: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; SECTOR as usize];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(EPOCH, |time| time.as_secs());
    put(0, b"conectix");
    put(8, &2u32.to_be_bytes());
    put(12, &0x1_0000u32.to_be_bytes());
    put(16, &SECTOR.to_be_bytes());
    put(24, &(seconds.saturating_sub(EPOCH) as u32).to_be_bytes());
    // Of other creators, some programs take the size from the geometry.
    put(28, b"win ");
    put(32, &0x000a_0000u32.to_be_bytes());
    put(36, b"Wi2k");
    put(40, &size.to_be_bytes());
    put(48, &size.to_be_bytes());
    put(56, &geometry(size));
    put(60, &DYNAMIC.to_be_bytes());
    put(68, &crate::random_id()?);
    let sum = checksum(&bytes, 64);
    bytes[64..68].copy_from_slice(&sum.to_be_bytes());
    Ok(bytes)
}

/// Makes an empty dynamic disk in an empty file.
pub(crate) fn create(file: &HostFile, size: u64) -> io::Result<()> {
    if size > MOST_SIZE {
        return Err(io::Error::other("a VHD image has at most 2040 GiB"));
    }
    let size = size.next_multiple_of(SECTOR);
    let entries = size.div_ceil(BLOCK_SIZE).max(1);
    let mut header = vec![0; HEADER];
    let mut put = |at: usize, field: &[u8]| header[at..at + field.len()].copy_from_slice(field);
    put(0, b"cxsparse");
    put(8, &u64::MAX.to_be_bytes());
    let table = SECTOR + HEADER as u64;
    put(16, &table.to_be_bytes());
    put(24, &0x1_0000u32.to_be_bytes());
    put(28, &(entries as u32).to_be_bytes());
    put(32, &(BLOCK_SIZE as u32).to_be_bytes());
    let sum = checksum(&header, 36);
    header[36..40].copy_from_slice(&sum.to_be_bytes());
    let footer = footer(size)?;
    let table_size = (entries * 4).next_multiple_of(SECTOR);
    file.write(0, &footer)?;
    file.write(SECTOR, &header)?;
    file.write(table, &vec![0xff; table_size as usize])?;
    file.write(table + table_size, &footer)
}
