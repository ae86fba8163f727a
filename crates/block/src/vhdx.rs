//! VHDX images ([MS-VHDX] 3.0) without a parent.
//!
//! The table of blocks is changed in place, entry by entry, after the blocks are on stable storage; the log stays empty.
//! Each entry is in one sector, so that a failure leaves the old one or the new one.

use std::io;

use crate::blocks::{Block, BlockDisk, Layout, Tables};
use crate::file::HostFile;
use crate::{Format, Image};

const KIB_64: u64 = 64 << 10;
const MIB: u64 = 1 << 20;
/// Places of the two headers and the two region tables (2.2).
const HEADERS: [u64; 2] = [KIB_64, 2 * KIB_64];
const REGIONS: [u64; 2] = [3 * KIB_64, 4 * KIB_64];
const HEADER: usize = 4096;
const REGION_TABLE: usize = KIB_64 as usize;
/// Most entries of a table of regions or of metadata.
const MOST_ENTRIES: u32 = 2047;
const MOST_SIZE: u64 = 64 << 40;

/// What a new image has: places of the log, the metadata and the table of blocks, and bytes of a block.
const LOG: u64 = MIB;
const METADATA: u64 = 2 * MIB;
const TABLE: u64 = 3 * MIB;
const BLOCK_SIZE: u64 = 8 * MIB;
const SECTOR: u64 = 512;

/// States of a block (2.5.1.1).
mod block_state {
    pub(crate) const FULL: u64 = 6;
    pub(crate) const PARTIAL: u64 = 7;
}

/// A GUID as it is in a file.
const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> [u8; 16] {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}
const TABLE_GUID: [u8; 16] =
    guid(0x2dc2_7766, 0xf623, 0x4200, [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08]);
const METADATA_GUID: [u8; 16] =
    guid(0x8b7c_a206, 0x4790, 0x4b9a, [0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e]);
const PARAMETERS: [u8; 16] =
    guid(0xcaa1_6737, 0xfa36, 0x4d43, [0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b]);
const DISK_SIZE: [u8; 16] =
    guid(0x2fa5_4224, 0xcd1b, 0x4876, [0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8]);
const PAGE_83: [u8; 16] = guid(0xbeca_12ab, 0xb2e6, 0x4523, [0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46]);
const LOGICAL: [u8; 16] = guid(0x8141_bf1d, 0xa96f, 0x4709, [0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f]);
const PHYSICAL: [u8; 16] =
    guid(0xcda3_48c7, 0x445d, 0x4471, [0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56]);

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}
fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// CRC-32C.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}

/// Whether a structure with its checksum at 4 is whole.
fn is_valid(bytes: &[u8], signature: &[u8]) -> bool {
    let mut copy = bytes.to_vec();
    copy[4..8].fill(0);
    bytes.starts_with(signature) && crc(&copy) == le32(bytes, 4)
}

/// Puts the checksum of a structure where it belongs.
fn seal(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let sum = crc(bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// An image.
struct Vhdx {
    size: u64,
    block_size: u64,
    /// Blocks between two entries for bitmaps.
    chunk: u64,
    table: u64,
}

impl Vhdx {
    fn entry_at(&self, block: u64) -> u64 {
        self.table + (block + block / self.chunk) * 8
    }
    /// Entries of the table.
    fn entries(&self) -> u64 {
        let blocks = self.size.div_ceil(self.block_size);
        blocks + blocks.saturating_sub(1) / self.chunk
    }
}

impl Layout for Vhdx {
    const FORMAT: Format = Format::Vhdx;

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
        let entry = u64::from_le_bytes(tables.entry(self.entry_at(block))?);
        match (entry & 7, entry >> 20) {
            (block_state::FULL, 0) | (block_state::PARTIAL, _) => Err(io::ErrorKind::InvalidData.into()),
            (block_state::FULL, place) => Ok(Block::At(place << 20)),
            _ => Ok(Block::Absent),
        }
    }

    fn add(&self, file: &HostFile, end: u64) -> io::Result<(u64, u64)> {
        let new_end = end + self.block_size;
        file.zero(end, self.block_size, true)?;
        file.set_size(new_end)?;
        Ok((end, new_end))
    }

    fn publish(&self, tables: &mut Tables, block: u64, at: u64) -> io::Result<()> {
        tables.set_entry(self.entry_at(block), &(at | block_state::FULL).to_le_bytes())
    }
}

/// Opens an image, or says what is wrong with it.
pub(crate) fn open(file: HostFile) -> io::Result<Result<Box<dyn Image>, String>> {
    let refuse = |what: &str| Ok(Err(what.to_owned()));
    let headers: Vec<_> = HEADERS.iter().map(|&at| file.read_vec(at, HEADER)).collect::<io::Result<_>>()?;
    let valid = (0..).zip(headers).filter(|(_, bytes): &(usize, _)| is_valid(bytes, b"head"));
    let Some((which, header)) = valid.max_by_key(|(_, bytes)| le64(bytes, 8)) else {
        return refuse("its headers are damaged");
    };
    if header[66] != 1 || header[67] != 0 {
        return refuse("its version is not supported");
    }
    if header[48..64] != [0; 16] {
        return refuse("it was not closed, and its log has to be replayed; qemu-img check -r all does that");
    }
    let regions = match region_table(&file)? {
        Some(table) => table,
        None => return refuse("its table of regions is damaged"),
    };
    let layout = match read_layout(&file, &regions)? {
        Ok(layout) => layout,
        Err(what) => return refuse(what),
    };
    if !file.is_read_only() {
        announce_writer(&file, which, header)?;
    }
    let end = file.size()?.max(layout.table + layout.entries() * 8).next_multiple_of(MIB);
    Ok(Ok(Box::new(BlockDisk::new(file, layout, end))))
}

fn region_table(file: &HostFile) -> io::Result<Option<Vec<u8>>> {
    for at in REGIONS {
        let table = file.read_vec(at, REGION_TABLE)?;
        if is_valid(&table, b"regi") && le32(&table, 8) <= MOST_ENTRIES {
            return Ok(Some(table));
        }
    }
    Ok(None)
}

/// Finds an entry of 32 bytes by its GUID; entries begin at `from`.
fn find<'a>(table: &'a [u8], from: usize, count: u32, guid: &[u8; 16]) -> Option<&'a [u8]> {
    table.get(from..)?.chunks_exact(32).take(count as usize).find(|entry| entry.starts_with(guid))
}

fn read_layout(file: &HostFile, regions: &[u8]) -> io::Result<Result<Vhdx, &'static str>> {
    let region = |guid| {
        let entry = find(regions, 16, le32(regions, 8), guid)?;
        let (at, len) = (le64(entry, 16), u64::from(le32(entry, 24)));
        (at >= MIB && at.is_multiple_of(MIB) && at < 1 << 60).then_some((at, len))
    };
    let (Some((table, table_len)), Some((metadata, metadata_len))) =
        (region(&TABLE_GUID), region(&METADATA_GUID))
    else {
        return Ok(Err("a region is missing"));
    };
    let items = file.read_vec(metadata, REGION_TABLE)?;
    let count = u32::from(u16::from_le_bytes([items[10], items[11]]));
    if !items.starts_with(b"metadata") || count > MOST_ENTRIES {
        return Ok(Err("its metadata is damaged"));
    }
    let item = |guid| -> io::Result<Option<Vec<u8>>> {
        let Some(entry) = find(&items, 32, count, guid) else { return Ok(None) };
        let (at, len) = (u64::from(le32(entry, 16)), u64::from(le32(entry, 20)));
        if len < 4 || at < KIB_64 || at + len > metadata_len {
            return Ok(None);
        }
        file.read_vec(metadata + at, 8).map(Some)
    };
    let (Some(parameters), Some(size), Some(logical)) =
        (item(&PARAMETERS)?, item(&DISK_SIZE)?, item(&LOGICAL)?)
    else {
        return Ok(Err("its metadata is damaged"));
    };
    let (block_size, logical) = (u64::from(le32(&parameters, 0)), u64::from(le32(&logical, 0)));
    if le32(&parameters, 4) & 2 != 0 {
        return Ok(Err("differencing images are not supported"));
    }
    if !block_size.is_power_of_two()
        || !(MIB..=256 * MIB).contains(&block_size)
        || !matches!(logical, 512 | 4096)
    {
        return Ok(Err("blocks or sectors of an impossible size"));
    }
    let layout = Vhdx { size: le64(&size, 0), block_size, chunk: (logical << 23) / block_size, table };
    if layout.size > MOST_SIZE || !layout.size.is_multiple_of(SECTOR) || layout.entries() * 8 > table_len {
        return Ok(Err("its table of blocks is too short"));
    }
    Ok(Ok(layout))
}

/// Lets the header that is older say that the file is written from now on (2.2.2.1), and be the newer one.
fn announce_writer(file: &HostFile, newest: usize, mut header: Vec<u8>) -> io::Result<()> {
    let sequence = le64(&header, 8).wrapping_add(1);
    header[8..16].copy_from_slice(&sequence.to_le_bytes());
    header[16..32].copy_from_slice(&crate::random_id()?);
    header[32..48].copy_from_slice(&crate::random_id()?);
    seal(&mut header);
    file.write(HEADERS[1 - newest], &header)?;
    file.sync()
}

/// Makes an empty image in an empty file.
pub(crate) fn create(file: &HostFile, size: u64) -> io::Result<()> {
    if size > MOST_SIZE {
        return Err(io::Error::other("a VHDX image has at most 64 TiB"));
    }
    let size = size.next_multiple_of(SECTOR);
    let layout = Vhdx { size, block_size: BLOCK_SIZE, chunk: (SECTOR << 23) / BLOCK_SIZE, table: TABLE };
    let table_len = (layout.entries() * 8).max(1).next_multiple_of(MIB);
    let mut identifier = b"vhdxfile".to_vec();
    identifier.extend("Ruse".encode_utf16().flat_map(u16::to_le_bytes));
    file.write(0, &identifier)?;
    for (sequence, at) in (0u64..).zip(HEADERS) {
        file.write(at, &new_header(sequence)?)?;
    }
    let mut regions = vec![0; REGION_TABLE];
    regions[..4].copy_from_slice(b"regi");
    regions[8..12].copy_from_slice(&2u32.to_le_bytes());
    for (n, (guid, at, len)) in
        [(TABLE_GUID, TABLE, table_len), (METADATA_GUID, METADATA, MIB)].into_iter().enumerate()
    {
        let entry = &mut regions[16 + n * 32..48 + n * 32];
        entry[..16].copy_from_slice(&guid);
        entry[16..24].copy_from_slice(&at.to_le_bytes());
        entry[24..28].copy_from_slice(&(len as u32).to_le_bytes());
        entry[28] = 1;
    }
    seal(&mut regions);
    for at in REGIONS {
        file.write(at, &regions)?;
    }
    file.write(METADATA, &new_metadata(size)?)?;
    file.set_size(TABLE + table_len)
}

fn new_header(sequence: u64) -> io::Result<Vec<u8>> {
    let mut header = vec![0; HEADER];
    let mut put = |at: usize, field: &[u8]| header[at..at + field.len()].copy_from_slice(field);
    put(0, b"head");
    put(8, &sequence.to_le_bytes());
    put(16, &crate::random_id()?);
    put(32, &crate::random_id()?);
    put(66, &[1, 0]);
    put(68, &(MIB as u32).to_le_bytes());
    put(72, &LOG.to_le_bytes());
    seal(&mut header);
    Ok(header)
}

/// The table of metadata (2.6), and the items from 64 KiB on.
fn new_metadata(size: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; REGION_TABLE];
    bytes[..8].copy_from_slice(b"metadata");
    let parameters = BLOCK_SIZE.to_le_bytes();
    let id = crate::random_id()?;
    // Whether an item is the disk's, or the file's.
    let items: [([u8; 16], &[u8], bool); 5] = [
        (PARAMETERS, &parameters, false),
        (DISK_SIZE, &size.to_le_bytes(), true),
        (PAGE_83, &id, true),
        (LOGICAL, &(SECTOR as u32).to_le_bytes(), true),
        (PHYSICAL, &4096u32.to_le_bytes(), true),
    ];
    bytes[10] = items.len() as u8;
    for (n, (guid, item, of_disk)) in items.into_iter().enumerate() {
        let at = bytes.len() as u32;
        let entry = &mut bytes[32 + n * 32..64 + n * 32];
        entry[..16].copy_from_slice(&guid);
        entry[16..20].copy_from_slice(&at.to_le_bytes());
        entry[20..24].copy_from_slice(&(item.len() as u32).to_le_bytes());
        entry[24] = 4 | u8::from(of_disk) << 1;
        bytes.extend(item);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_standard() {
        assert_eq!(crc(b"123456789"), 0xe306_9283);
    }
}
