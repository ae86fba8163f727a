//! The header of a qcow2 image, with its extensions and the names that follow (docs/interop/qcow2.txt of QEMU).

use std::io;
use std::path::PathBuf;

use super::corrupt;
use crate::file::HostFile;
use crate::image::{Backing, Snapshot};

const MAGIC: u32 = 0x5146_49fb;
/// Bytes of the header of version 2, and of version 3 with the type of compression.
const V2_LEN: usize = 72;
const V3_LEN: usize = 112;
/// Sizes of clusters, as powers of two.
pub(super) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Most bytes of the L1 table, of the refcount table and of all snapshots.
const MOST_L1: u64 = 32 << 20;
const MOST_REFCOUNT_TABLE: u64 = 8 << 20;
const MOST_SNAPSHOT_BYTES: usize = 16 << 20;
const MOST_SNAPSHOTS: u32 = 65536;
/// Most bytes of all snapshots' L1 tables.
const MOST_SNAPSHOT_L1: u64 = 64 << 20;
const MOST_NAME: u32 = 1023;

/// Incompatible features.
pub(super) mod incompatible {
    pub(crate) const DIRTY: u64 = 1 << 0;
    pub(crate) const CORRUPT: u64 = 1 << 1;
    pub(crate) const DATA_FILE: u64 = 1 << 2;
    pub(crate) const COMPRESSION: u64 = 1 << 3;
    pub(crate) const EXTENDED_L2: u64 = 1 << 4;
}

/// Header extensions.
mod extension {
    pub(crate) const END: u32 = 0;
    pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(crate) const FEATURE_NAMES: u32 = 0x6803_f857;
    /// Persistent bitmaps, which end with the first write of someone who does not know them.
    pub(crate) const BITMAPS: u32 = 0x2385_2875;
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Deflate without a header.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// A header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) size: u64,
    pub(super) l1_size: u32,
    pub(super) l1_offset: u64,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u32,
    pub(super) snapshots: u32,
    pub(super) snapshots_offset: u64,
    pub(super) incompatible: u64,
    pub(super) compatible: u64,
    pub(super) autoclear: u64,
    pub(super) refcount_order: u32,
    pub(super) compression: Compression,
    pub(super) backing: Option<(String, Option<String>)>,
    /// Other extensions: kept as they are.
    pub(super) extensions: Vec<(u32, Vec<u8>)>,
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |field| u32::from_be_bytes(field.try_into().expect("four bytes")))
}
pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |field| u64::from_be_bytes(field.try_into().expect("eight bytes")))
}
fn be16(bytes: &[u8], at: usize) -> usize {
    bytes.get(at..at + 2).map_or(0, |field| usize::from(u16::from_be_bytes([field[0], field[1]])))
}

fn ensure(condition: bool, what: &str) -> Result<(), String> {
    if condition { Ok(()) } else { Err(what.to_owned()) }
}

impl Header {
    /// Reads a header, and refuses what Ruse cannot do.
    pub(super) fn read(file: &HostFile) -> io::Result<Result<Self, String>> {
        let start = file.read_vec(0, 1 << 9)?;
        let Some(bits) = Some(be32(&start, 20)).filter(|bits| CLUSTER_BITS.contains(bits)) else {
            return Ok(Err("clusters of an impossible size".to_owned()));
        };
        Ok(Self::parse(&file.read_vec(0, 1 << bits)?))
    }

    /// Reads the header in the first cluster of an image.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        ensure(be32(bytes, 0) == MAGIC, "it is no qcow2 image")?;
        let version = be32(bytes, 4);
        ensure(matches!(version, 2 | 3), &format!("qcow2 of version {version} is not supported"))?;
        ensure(be32(bytes, 32) == 0, "encrypted images are not supported")?;
        let mut header = Self {
            version,
            cluster_bits: be32(bytes, 20),
            size: be64(bytes, 24),
            l1_size: be32(bytes, 36),
            l1_offset: be64(bytes, 40),
            refcount_table_offset: be64(bytes, 48),
            refcount_table_clusters: be32(bytes, 56),
            snapshots: be32(bytes, 60),
            snapshots_offset: be64(bytes, 64),
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            compression: Compression::Zlib,
            backing: None,
            extensions: Vec::new(),
        };
        let mut len = V2_LEN;
        if version == 3 {
            header.incompatible = be64(bytes, 72);
            header.compatible = be64(bytes, 80);
            header.autoclear = be64(bytes, 88);
            header.refcount_order = be32(bytes, 96);
            len = be32(bytes, 100) as usize;
            ensure((104..=bytes.len()).contains(&len), "a header of an impossible length")?;
            header.compression = match if len > 104 { bytes[104] } else { 0 } {
                0 => Compression::Zlib,
                1 => Compression::Zstd,
                other => return Err(format!("compression of type {other} is not supported")),
            };
        }
        header.check()?;
        header.parse_names(bytes, len)?;
        Ok(header)
    }

    fn parse_names(&mut self, bytes: &[u8], len: usize) -> Result<(), String> {
        let (name_at, name_len) = (be64(bytes, 8), be32(bytes, 16));
        let mut format = None;
        let mut at = len;
        // Without a backing file, extensions go on to the end of the cluster.
        let end =
            if name_at == 0 { bytes.len() } else { bytes.len().min(usize::try_from(name_at).unwrap_or(0)) };
        while at + 8 <= end {
            let (kind, size) = (be32(bytes, at), be32(bytes, at + 4) as usize);
            if kind == extension::END {
                break;
            }
            let data =
                bytes.get(at + 8..(at + 8).saturating_add(size)).ok_or("a header extension is cut off")?;
            match kind {
                extension::BACKING_FORMAT => format = Some(String::from_utf8_lossy(data).into_owned()),
                extension::FEATURE_NAMES => {}
                _ => self.extensions.push((kind, data.to_vec())),
            }
            at += 8 + size.next_multiple_of(8);
        }
        if name_at != 0 {
            ensure(name_len <= MOST_NAME, "the name of the backing file is too long")?;
            let name = usize::try_from(name_at)
                .ok()
                .and_then(|at| bytes.get(at..at.checked_add(name_len as usize)?))
                .ok_or("the name of the backing file is outside of the header")?;
            let name = std::str::from_utf8(name).map_err(|_| "the name of the backing file is no text")?;
            if !name.is_empty() {
                self.backing = Some((name.to_owned(), format));
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        ensure(CLUSTER_BITS.contains(&self.cluster_bits), "clusters of an impossible size")?;
        ensure(self.refcount_order <= 6, "refcounts of an impossible width")?;
        let unknown = self.incompatible
            & !(incompatible::DIRTY
                | incompatible::CORRUPT
                | incompatible::COMPRESSION
                | incompatible::DATA_FILE
                | incompatible::EXTENDED_L2);
        ensure(
            self.incompatible & incompatible::DATA_FILE == 0,
            "images with a data file are not supported",
        )?;
        ensure(
            self.incompatible & incompatible::EXTENDED_L2 == 0,
            "images with subclusters are not supported",
        )?;
        ensure(unknown == 0, &format!("it has unknown features ({unknown:#x})"))?;
        let aligned = |at: u64| at.is_multiple_of(self.cluster_size()) && at < 1 << 56;
        let places = [self.l1_offset, self.refcount_table_offset, self.snapshots_offset];
        ensure(places.into_iter().all(aligned), "a table is in an impossible place")?;
        ensure(self.l1_offset != 0 || self.l1_size == 0, "it has no L1 table")?;
        ensure(u64::from(self.l1_size) * 8 <= MOST_L1, "the L1 table is too large")?;
        let refcount_table = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        ensure(refcount_table <= MOST_REFCOUNT_TABLE, "the refcount table is too large")?;
        ensure(
            self.refcount_table_clusters > 0 && self.refcount_table_offset > 0,
            "it has no refcount table",
        )?;
        ensure(self.snapshots <= MOST_SNAPSHOTS, "too many snapshots")?;
        ensure(self.size <= self.most_size(), "the disk is too large for its L1 table")?;
        Ok(())
    }

    /// Refuses tables that the file does not reach.
    pub(super) fn check_tables(&self, file_size: u64) -> io::Result<()> {
        let tables = [
            (self.l1_offset, u64::from(self.l1_size) * 8),
            (self.refcount_table_offset, u64::from(self.refcount_table_clusters) << self.cluster_bits),
        ];
        let end = file_size.next_multiple_of(self.cluster_size());
        match tables.into_iter().all(|(at, len)| len == 0 || at + len <= end) {
            true => Ok(()),
            false => Err(corrupt("a table is behind the end of the file")),
        }
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table, as a power of two.
    pub(super) fn l2_bits(&self) -> u32 {
        self.cluster_bits - 3
    }

    /// Entries of the L1 table for a disk of this size, if an image can have them.
    pub(super) fn l1_entries(&self, size: u64) -> Option<u32> {
        let entries = size.div_ceil(1 << (self.cluster_bits + self.l2_bits()));
        (entries * 8 <= MOST_L1 && size <= 1 << 62).then_some(entries as u32)
    }

    fn most_size(&self) -> u64 {
        u64::from(self.l1_size) << (self.cluster_bits + self.l2_bits())
    }

    /// The most bytes of the refcount table, in clusters.
    pub(super) fn most_refcount_table_clusters(&self) -> u64 {
        MOST_REFCOUNT_TABLE >> self.cluster_bits
    }

    /// The backing file, with a format if the header names one that Ruse knows.
    pub(super) fn backing(&self) -> Result<Option<Backing>, String> {
        let Some((name, format)) = &self.backing else { return Ok(None) };
        // QEMU writes such names for what is no plain file.
        ensure(!name.starts_with("json:") && !name.contains("://"), "its backing file is no file")?;
        let path = name.strip_prefix("file:").unwrap_or(name).into();
        let format = format.as_deref().map(str::parse).transpose()?;
        Ok(Some(Backing { path, format }))
    }

    /// The header as bytes, for the beginning of the first cluster.
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, &'static str> {
        let mut bytes = Vec::new();
        let put32 = |bytes: &mut Vec<u8>, value: u32| bytes.extend(value.to_be_bytes());
        let put64 = |bytes: &mut Vec<u8>, value: u64| bytes.extend(value.to_be_bytes());
        put32(&mut bytes, MAGIC);
        put32(&mut bytes, self.version);
        put64(&mut bytes, 0);
        put32(&mut bytes, 0);
        put32(&mut bytes, self.cluster_bits);
        put64(&mut bytes, self.size);
        put32(&mut bytes, 0);
        put32(&mut bytes, self.l1_size);
        put64(&mut bytes, self.l1_offset);
        put64(&mut bytes, self.refcount_table_offset);
        put32(&mut bytes, self.refcount_table_clusters);
        put32(&mut bytes, self.snapshots);
        put64(&mut bytes, self.snapshots_offset);
        if self.version == 3 {
            put64(&mut bytes, self.incompatible);
            put64(&mut bytes, self.compatible);
            put64(&mut bytes, self.autoclear);
            put32(&mut bytes, self.refcount_order);
            put32(&mut bytes, V3_LEN as u32);
            bytes.extend([(self.compression == Compression::Zstd).into(), 0, 0, 0, 0, 0, 0, 0]);
        }
        let mut extend = |kind: u32, data: &[u8]| {
            put32(&mut bytes, kind);
            put32(&mut bytes, data.len() as u32);
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        };
        if let Some((_, Some(format))) = &self.backing {
            extend(extension::BACKING_FORMAT, format.as_bytes());
        }
        self.extensions.iter().for_each(|(kind, data)| extend(*kind, data));
        extend(extension::END, &[]);
        if let Some((name, _)) = &self.backing {
            let at = bytes.len() as u64;
            bytes[8..16].copy_from_slice(&at.to_be_bytes());
            bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            bytes.extend(name.as_bytes());
            if name.len() > MOST_NAME as usize {
                return Err("the name of the backing file is too long");
            }
        }
        match bytes.len() as u64 <= self.cluster_size() {
            true => Ok(bytes),
            false => Err("the header does not fit into a cluster"),
        }
    }

    /// Makes the header true for someone who writes and knows of no autoclear features.
    pub(super) fn clear_unknown(&mut self) {
        self.autoclear = 0;
        self.extensions.retain(|(kind, _)| *kind != extension::BITMAPS);
    }
}

/// A snapshot, and where its L1 table is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SnapshotEntry {
    pub(super) snapshot: Snapshot,
    pub(super) l1_offset: u64,
    pub(super) l1_size: u32,
}

/// Reads the table of snapshots; gives the bytes that it takes as well.
pub(super) fn read_snapshots(file: &HostFile, header: &Header) -> io::Result<(Vec<SnapshotEntry>, u64)> {
    let broken = || corrupt("the table of snapshots is damaged");
    if header.snapshots == 0 {
        return Ok((Vec::new(), 0));
    }
    let rest = file.size()?.saturating_sub(header.snapshots_offset);
    let bytes = file.read_vec(header.snapshots_offset, MOST_SNAPSHOT_BYTES.min(rest as usize))?;
    let (mut entries, mut at, mut l1_bytes) = (Vec::new(), 0usize, 0);
    for _ in 0..header.snapshots {
        let head = bytes.get(at..at + 40).ok_or_else(broken)?;
        let (id_len, name_len, extra_len) = (be16(head, 12), be16(head, 14), be32(head, 36) as usize);
        let text = |from: usize, len: usize| {
            let text = bytes.get(from..from.checked_add(len)?)?;
            Some(String::from_utf8_lossy(text).into_owned())
        };
        let extra = at + 40;
        let id_at = extra.checked_add(extra_len).ok_or_else(broken)?;
        let disk_size = if extra_len >= 16 { be64(&bytes, extra + 8) } else { header.size };
        let state_size = if extra_len >= 8 { be64(&bytes, extra) } else { u64::from(be32(head, 32)) };
        let (l1_offset, l1_size) = (be64(head, 0), be32(head, 8));
        let impossible = !l1_offset.is_multiple_of(header.cluster_size()) || l1_offset >= 1 << 56;
        l1_bytes += u64::from(l1_size) * 8;
        if u64::from(l1_size) * 8 > MOST_L1 || l1_bytes > MOST_SNAPSHOT_L1 || impossible {
            return Err(broken());
        }
        let snapshot = Snapshot {
            id: text(id_at, id_len).ok_or_else(broken)?,
            name: text(id_at + id_len, name_len).ok_or_else(broken)?,
            seconds: be32(head, 16).into(),
            disk_size,
            state_size,
        };
        entries.push(SnapshotEntry { snapshot, l1_offset, l1_size });
        at = (id_at + id_len + name_len).next_multiple_of(8);
    }
    Ok((entries, at as u64))
}

/// A backing file as it is written into a header.
pub(super) fn backing_names(backing: &Backing) -> io::Result<(String, Option<String>)> {
    let path: &PathBuf = &backing.path;
    let name = path.to_str().ok_or_else(|| io::Error::other("the path of the backing file is no UTF-8"))?;
    // A colon would end a protocol's name.
    let plain = name.starts_with('/') || !name.contains(':');
    let name = if plain { name.to_owned() } else { format!("./{name}") };
    let format =
        backing.format.map(|format| if format == crate::Format::Vhd { "vpc" } else { format.name() });
    Ok((name, format.map(str::to_owned)))
}
