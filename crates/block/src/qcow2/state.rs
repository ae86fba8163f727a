//! The tables of an image: which cluster of the disk is where, and the order in which changes reach the file.
//!
//! What is in the file is right at any time, for the host may fail, or Ruse may be killed. Changes stay in memory until
//! [`State::commit`] writes them: refcounts first, then, when these and the data are on stable storage, L2 tables, then
//! the L1 table. What nobody refers to any more is free only after that. So the worst that can be left is a cluster that
//! is counted and that nobody uses.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

use super::corrupt;
use super::entry::{COPIED, Cluster, OFFSET, Run};
use super::grace::Grace;
use super::header::{Header, SnapshotEntry, be64, incompatible, read_snapshots};
use super::metadata::Metadata;
use super::refcounts::Refcounts;
use crate::cache::TableCache;
use crate::file::HostFile;

/// Bytes of L2 tables in memory.
const CACHE: u64 = 8 << 20;

/// The tables of an image.
#[derive(Debug)]
pub(super) struct State {
    pub(super) header: Header,
    pub(super) l1: Vec<u64>,
    l1_dirty: Range<usize>,
    l2: TableCache,
    pub(super) refcounts: Refcounts,
    pub(super) snapshots: Vec<SnapshotEntry>,
    /// Bytes of the table of snapshots.
    pub(super) snapshot_bytes: u64,
    /// Clusters of the disk that someone is giving a place.
    pub(super) busy: BTreeSet<u64>,
    pub(super) grace: Grace,
    /// The end of the last compressed cluster, in a cluster of the file that has room left.
    pub(super) compressed_end: u64,
}

impl State {
    pub(super) fn read(file: &HostFile, header: Header) -> io::Result<Self> {
        header.check_tables(file.size()?)?;
        let mut refcounts = Refcounts::read(file, &header)?;
        let l1 = read_l1(file, header.l1_offset, header.l1_size, &mut refcounts.metadata)?;
        let (snapshots, snapshot_bytes) = read_snapshots(file, &header)?;
        refcounts.metadata.add(Run { offset: header.snapshots_offset, len: snapshot_bytes });
        for entry in &snapshots {
            read_l1(file, entry.l1_offset, entry.l1_size, &mut refcounts.metadata)?;
        }
        Ok(Self {
            l1,
            l1_dirty: 0..0,
            l2: TableCache::new(header.cluster_size(), CACHE),
            refcounts,
            snapshots,
            snapshot_bytes,
            busy: BTreeSet::new(),
            grace: Grace::default(),
            compressed_end: 0,
            header,
        })
    }

    pub(super) fn cluster_size(&self) -> u64 {
        self.header.cluster_size()
    }

    /// Where the L2 table for a cluster of the disk is, if there is one, and the place of its entry there.
    fn l2_place(&self, cluster: u64) -> io::Result<(Option<u64>, usize)> {
        let (l1_index, at) = self.indices(cluster);
        let table = self.l1.get(l1_index).copied().unwrap_or(0) & OFFSET;
        self.check_table(table)?;
        Ok(((table != 0).then_some(table), at))
    }

    fn check_table(&self, at: u64) -> io::Result<()> {
        let possible = at.is_multiple_of(self.cluster_size())
            && !self.refcounts.is_behind_end(at)
            && self.refcounts.metadata.admits_l2(at);
        match at == 0 || possible {
            true => Ok(()),
            false => Err(corrupt("an L2 table is where none can be")),
        }
    }

    /// The L2 table at `at` has changed in the file.
    pub(super) fn forget_table(&mut self, at: u64) {
        self.l2.forget(at);
    }

    fn indices(&self, cluster: u64) -> (usize, usize) {
        let bits = self.header.l2_bits();
        ((cluster >> bits) as usize, (cluster & ((1 << bits) - 1)) as usize * 8)
    }

    /// Clusters from `cluster` on for which there is no L2 table: at least as many.
    pub(super) fn clusters_without_table(&self, cluster: u64) -> io::Result<u64> {
        let per_table = 1 << self.header.l2_bits();
        Ok(if self.l2_place(cluster)?.0.is_none() { per_table - cluster % per_table } else { 0 })
    }

    fn entry(&mut self, file: &HostFile, cluster: u64) -> io::Result<u64> {
        let (Some(table), at) = self.l2_place(cluster)? else { return Ok(0) };
        Ok(be64(self.l2.get(file, table)?, at))
    }

    /// What a cluster of the disk is.
    pub(super) fn lookup(&mut self, file: &HostFile, cluster: u64) -> io::Result<Cluster> {
        let entry = self.entry(file, cluster)?;
        let found = Cluster::parse(entry, self.header.cluster_bits, self.header.version);
        let possible = match found {
            Cluster::Absent | Cluster::Zero(None) => true,
            Cluster::Data { offset, .. } | Cluster::Zero(Some(offset)) => {
                let metadata = &self.refcounts.metadata;
                offset.is_multiple_of(self.cluster_size())
                    && !metadata.has(offset >> self.header.cluster_bits)
            }
            Cluster::Compressed(run) => !self.refcounts.metadata.touches(run),
        };
        if possible { Ok(found) } else { Err(corrupt("a cluster is where none can be")) }
    }

    /// Where a cluster of the disk can be written in place, if it can.
    pub(super) fn own_place(&mut self, file: &HostFile, cluster: u64) -> io::Result<Option<u64>> {
        match self.lookup(file, cluster)? {
            Cluster::Data { offset, own: true } if self.refcounts.is_behind_end(offset) => {
                Err(corrupt("a cluster is behind the end of the file"))
            }
            Cluster::Data { offset, own: true } => Ok(Some(offset)),
            _ => Ok(None),
        }
    }

    /// Sets the entry of a cluster, and frees what it was before.
    pub(super) fn replace(&mut self, file: &HostFile, cluster: u64, entry: u64) -> io::Result<()> {
        let old = self.lookup(file, cluster)?;
        let table = self.own_table(file, cluster)?;
        let (_, at) = self.indices(cluster);
        self.l2.set(file, table, at, &entry.to_be_bytes())?;
        self.free(old);
        Ok(())
    }

    /// Nobody refers to what this was any more.
    fn free(&mut self, old: Cluster) {
        match old {
            Cluster::Data { offset, .. } | Cluster::Zero(Some(offset)) => {
                self.grace.free(Run { offset, len: self.cluster_size() });
            }
            Cluster::Compressed(run) => self.grace.free(run),
            Cluster::Absent | Cluster::Zero(None) => {}
        }
    }

    /// The L2 table for a cluster of the disk, which may be written: a new one, or a copy, if need be.
    fn own_table(&mut self, file: &HostFile, cluster: u64) -> io::Result<u64> {
        let (index, _) = self.indices(cluster);
        let old = *self.l1.get(index).ok_or_else(|| corrupt("the L1 table is too short"))?;
        let size = self.cluster_size();
        self.check_table(old & OFFSET)?;
        let bytes = match old & OFFSET {
            0 => vec![0; size as usize],
            at if old & COPIED != 0 => return Ok(at),
            at => self.l2.get(file, at)?.to_vec(),
        };
        let (at, _) = self.refcounts.allocate(file, 1)?;
        self.refcounts.use_fresh(at >> self.header.cluster_bits);
        self.refcounts.metadata.add_l2(at);
        self.l2.add(at, bytes);
        if old & OFFSET != 0 {
            self.grace.free(Run { offset: old & OFFSET, len: size });
        }
        self.set_l1(index, Cluster::data(at));
        Ok(at)
    }

    fn set_l1(&mut self, index: usize, entry: u64) {
        self.l1[index] = entry;
        self.l1_dirty = match self.l1_dirty.is_empty() {
            true => index..index + 1,
            false => self.l1_dirty.start.min(index)..self.l1_dirty.end.max(index + 1),
        };
    }

    /// Gives clusters back that nothing refers to yet.
    pub(super) fn give_back(&mut self, file: &HostFile, offset: u64, clusters: u64) -> io::Result<()> {
        let first = offset >> self.header.cluster_bits;
        (first..first + clusters).try_for_each(|cluster| self.refcounts.release(file, cluster))
    }

    /// Whether anything is not in the file yet.
    pub(super) fn is_dirty(&self) -> bool {
        self.l2.is_dirty() || self.refcounts.is_dirty() || !self.l1_dirty.is_empty() || !self.grace.is_empty()
    }

    /// Whether so much is in memory only that it should be written now.
    pub(super) fn is_full(&self) -> bool {
        self.l2.is_full() || self.refcounts.is_full() || self.grace.is_full()
    }

    /// Writes all changes, in their order.
    pub(super) fn commit(&mut self, file: &HostFile) -> io::Result<()> {
        // Others expect that a cluster is in the file as a whole, and no refcounts of what is behind its end.
        let end = self.refcounts.fresh_from() << self.header.cluster_bits;
        if file.size()? < end {
            file.set_size(end)?;
            file.sync()?;
        }
        if self.refcounts.is_dirty() {
            self.refcounts.write(file)?;
        }
        file.sync()?;
        if self.l2.is_dirty() {
            self.l2.write(file)?;
            file.sync()?;
        }
        if !self.l1_dirty.is_empty() {
            self.write_l1(file)?;
            file.sync()?;
        }
        self.release_gone(file)
    }

    fn write_l1(&mut self, file: &HostFile) -> io::Result<()> {
        let range = self.l1_dirty.clone();
        let bytes: Vec<u8> = self.l1[range.clone()].iter().flat_map(|entry| entry.to_be_bytes()).collect();
        file.write(self.header.l1_offset + range.start as u64 * 8, &bytes)?;
        self.l1_dirty = 0..0;
        Ok(())
    }

    /// Frees what nobody refers to, nor reads or writes, any more.
    fn release_gone(&mut self, file: &HostFile) -> io::Result<()> {
        let bits = self.header.cluster_bits;
        for run in self.grace.take() {
            for cluster in run.clusters(bits) {
                if self.refcounts.get(file, cluster)? == 1 {
                    self.l2.forget(cluster << bits);
                    if self.compressed_end >> bits == cluster {
                        self.compressed_end = 0;
                    }
                    file.discard(cluster << bits, 1 << bits)?;
                }
                self.refcounts.release(file, cluster)?;
            }
        }
        Ok(())
    }

    /// Writes the header anew.
    pub(super) fn write_header(&mut self, file: &HostFile) -> io::Result<()> {
        let (offset, entries) = self.refcounts.table();
        self.header.refcount_table_clusters = ((entries.len() as u64 * 8) >> self.header.cluster_bits) as u32;
        self.header.refcount_table_offset = offset;
        let bytes = self.header.to_bytes().map_err(io::Error::other)?;
        file.sync()?;
        file.write(0, &bytes)?;
        file.sync()
    }

    /// Notes in the header that the image is damaged, so that nobody writes to it.
    pub(super) fn mark_corrupt(&mut self, file: &HostFile) -> io::Result<()> {
        if self.header.version >= 3 && self.header.incompatible & incompatible::CORRUPT == 0 {
            self.header.incompatible |= incompatible::CORRUPT;
            self.write_header(file)?;
        }
        Ok(())
    }

    /// Makes room for the L1 table of a disk of this size.
    pub(super) fn grow_l1(&mut self, file: &HostFile, size: u64) -> io::Result<()> {
        let entries = self.header.l1_entries(size).ok_or(io::ErrorKind::FileTooLarge)?;
        if entries as usize <= self.l1.len() {
            return Ok(());
        }
        self.commit(file)?;
        let bits = self.header.cluster_bits;
        let clusters = |entries: u64| (entries * 8).div_ceil(1 << bits);
        let (count, old) =
            (clusters(entries.into()), (self.header.l1_offset, clusters(self.l1.len() as u64)));
        let at = self.refcounts.allocate_run(file, count)?;
        for cluster in at >> bits..(at >> bits) + count {
            self.refcounts.use_fresh(cluster);
        }
        self.refcounts.metadata.add(Run { offset: at, len: count << bits });
        let mut bytes: Vec<u8> = self.l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bytes.resize((count << bits) as usize, 0);
        file.write(at, &bytes)?;
        self.refcounts.write(file)?;
        self.l1.resize(entries as usize, 0);
        (self.header.l1_offset, self.header.l1_size) = (at, entries);
        self.write_header(file)?;
        if old.1 > 0 {
            self.give_back(file, old.0, old.1)?;
        }
        Ok(())
    }

    /// Makes all clusters absent.
    pub(super) fn clear(&mut self, file: &HostFile) -> io::Result<()> {
        let per_table = 1u64 << self.header.l2_bits();
        for index in 0..self.l1.len() {
            let Some(table) = self.l2_place(index as u64 * per_table)?.0 else { continue };
            // A snapshot that has the same table has references of its own to what is in it.
            for cluster in index as u64 * per_table..(index as u64 + 1) * per_table {
                let old = self.lookup(file, cluster)?;
                self.free(old);
            }
            self.grace.free(Run { offset: table, len: self.cluster_size() });
            self.set_l1(index, 0);
        }
        self.commit(file)
    }
}

/// Reads an L1 table, and notes where it and its L2 tables are.
fn read_l1(file: &HostFile, offset: u64, entries: u32, metadata: &mut Metadata) -> io::Result<Vec<u64>> {
    let bytes = file.read_vec(offset, entries as usize * 8)?;
    let l1: Vec<_> = bytes.chunks_exact(8).map(|entry| be64(entry, 0)).collect();
    metadata.add(Run { offset, len: bytes.len() as u64 });
    l1.iter().map(|entry| entry & OFFSET).filter(|&at| at != 0).for_each(|at| metadata.add_l2(at));
    Ok(l1)
}
