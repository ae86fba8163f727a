//! Refcounts: how often each cluster of the file is referenced, and which are free.

use std::io;

use super::corrupt;
use super::entry::{OFFSET, Run};
use super::header::{Header, be64};
use super::metadata::Metadata;
use crate::cache::TableCache;
use crate::file::HostFile;

/// Bytes of refcount blocks in memory.
const CACHE: u64 = 4 << 20;

/// The refcounts of an image.
#[derive(Debug)]
pub(super) struct Refcounts {
    cluster_bits: u32,
    /// Bits of a refcount, as a power of two.
    order: u32,
    /// Where the blocks are.
    table: Vec<u64>,
    table_offset: u64,
    most_table_clusters: u64,
    blocks: TableCache,
    /// What is never handed out, even if it seems to be free.
    pub(super) metadata: Metadata,
    /// No cluster before it is free.
    hint: u64,
    /// Clusters from here on are not in use.
    end: u64,
    /// Clusters from here on were never used: they read as zeros.
    fresh_from: u64,
}

impl Refcounts {
    pub(super) fn read(file: &HostFile, header: &Header) -> io::Result<Self> {
        let len = (header.refcount_table_clusters as usize) << header.cluster_bits;
        let bytes = file.read_vec(header.refcount_table_offset, len)?;
        let end = file.size()?.div_ceil(header.cluster_size());
        let table: Vec<_> = bytes.chunks_exact(8).map(|entry| be64(entry, 0) & OFFSET).collect();
        let mut metadata = Metadata::new(header.cluster_bits);
        metadata.add(Run { offset: header.refcount_table_offset, len: len as u64 });
        for &offset in table.iter().filter(|&&offset| offset != 0) {
            metadata.add(Run { offset, len: header.cluster_size() });
        }
        Ok(Self {
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            table,
            table_offset: header.refcount_table_offset,
            most_table_clusters: header.most_refcount_table_clusters(),
            blocks: TableCache::new(header.cluster_size(), CACHE),
            metadata,
            hint: 0,
            end,
            fresh_from: end,
        })
    }

    /// Where the table is, and its entries.
    pub(super) fn table(&self) -> (u64, &[u64]) {
        (self.table_offset, &self.table)
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether the file does not reach as far as the cluster at `offset`.
    pub(super) fn is_behind_end(&self, offset: u64) -> bool {
        offset >> self.cluster_bits >= self.end
    }

    /// Refcounts in a block, as a power of two.
    pub(super) fn block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.order
    }

    /// The largest refcount.
    pub(super) fn most(&self) -> u64 {
        u64::MAX >> (64 - (1 << self.order))
    }

    /// Where the block with the refcount of a cluster is, and which of its refcounts that is.
    fn place(&self, cluster: u64) -> io::Result<(Option<u64>, u64)> {
        let index = cluster & ((1 << self.block_bits()) - 1);
        match self.table.get((cluster >> self.block_bits()) as usize) {
            Some(&at) if !at.is_multiple_of(self.cluster_size()) => {
                Err(corrupt("a refcount block is not aligned"))
            }
            Some(&at) if self.is_behind_end(at) => {
                Err(corrupt("a refcount block is behind the end of the file"))
            }
            Some(&at) if at != 0 => Ok((Some(at), index)),
            _ => Ok((None, index)),
        }
    }

    /// The refcount of a cluster.
    pub(super) fn get(&mut self, file: &HostFile, cluster: u64) -> io::Result<u64> {
        let (Some(block), index) = self.place(cluster)? else { return Ok(0) };
        let bytes = self.blocks.get(file, block)?;
        Ok(match self.order {
            0..=2 => {
                let bit = index << self.order;
                u64::from(bytes[(bit / 8) as usize] >> (bit % 8)) & ((1 << (1 << self.order)) - 1)
            }
            _ => {
                let width = 1 << (self.order - 3);
                let at = index as usize * width;
                bytes[at..at + width].iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
            }
        })
    }

    /// Sets the refcount of a cluster whose block is there.
    fn put(&mut self, file: &HostFile, cluster: u64, value: u64) -> io::Result<()> {
        let (Some(block), index) = self.place(cluster)? else {
            return Err(corrupt("a refcount block is missing"));
        };
        match self.order {
            0..=2 => {
                let bit = index << self.order;
                let at = (bit / 8) as usize;
                let mask = ((1u8 << (1 << self.order)) - 1) << (bit % 8);
                let old = self.blocks.get(file, block)?[at];
                self.blocks.set(file, block, at, &[old & !mask | (value as u8) << (bit % 8)])
            }
            _ => {
                let width = 1 << (self.order - 3);
                self.blocks.set(file, block, index as usize * width, &value.to_be_bytes()[8 - width..])
            }
        }
    }

    /// Sets the refcount of a cluster.
    pub(super) fn set(&mut self, file: &HostFile, cluster: u64, value: u64) -> io::Result<()> {
        if value > self.most() {
            return Err(io::Error::other("a refcount is too large for its width"));
        }
        if value > 0 {
            self.ensure_block(file, cluster)?;
        } else if self.place(cluster)?.0.is_none() {
            return Ok(());
        }
        self.put(file, cluster, value)?;
        if value == 0 {
            self.hint = self.hint.min(cluster);
        }
        Ok(())
    }

    /// One reference less.
    pub(super) fn release(&mut self, file: &HostFile, cluster: u64) -> io::Result<()> {
        let count = self.get(file, cluster)?;
        let left = count.checked_sub(1).ok_or_else(|| corrupt("a cluster in use has no refcount"))?;
        if left == 0 {
            self.metadata.forget(cluster);
        }
        self.set(file, cluster, left)
    }

    /// Takes free clusters in a row, at most `most`, each with one reference; gives the offset of the first and how many.
    pub(super) fn allocate(&mut self, file: &HostFile, most: u64) -> io::Result<(u64, u64)> {
        let mut first = self.hint;
        while !self.is_free(file, first)? {
            first += 1;
        }
        let mut end = first + 1;
        self.put(file, first, 1)?;
        while end - first < most && self.is_free(file, end)? {
            self.put(file, end, 1)?;
            end += 1;
        }
        self.hint = end;
        self.end = self.end.max(end);
        Ok((first << self.cluster_bits, end - first))
    }

    /// Takes exactly `count` clusters in a row, behind all that are in use.
    pub(super) fn allocate_run(&mut self, file: &HostFile, count: u64) -> io::Result<u64> {
        let (mut first, mut end) = (self.end, self.end);
        while end - first < count {
            end += 1;
            if !self.is_free(file, end - 1)? {
                first = end;
            }
        }
        for cluster in first..end {
            self.put(file, cluster, 1)?;
        }
        self.end = end;
        Ok(first << self.cluster_bits)
    }

    /// Whether a cluster can be taken; the block that counts it is there then.
    fn is_free(&mut self, file: &HostFile, cluster: u64) -> io::Result<bool> {
        if cluster >= 1 << (55 - self.cluster_bits) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.ensure_block(file, cluster)?;
        let free = self.get(file, cluster)? == 0;
        if free && self.metadata.has(cluster) {
            return Err(corrupt("a table has no refcount"));
        }
        match free || cluster < self.end {
            true => Ok(free),
            false => Err(corrupt("a cluster behind the end of the file has a refcount")),
        }
    }

    /// Notes that a cluster is used from now on; says whether it reads as zeros.
    pub(super) fn use_fresh(&mut self, cluster: u64) -> bool {
        let fresh = cluster >= self.fresh_from;
        self.fresh_from = self.fresh_from.max(cluster + 1);
        fresh
    }

    /// Makes the block with the refcount of a cluster if there is none. It is in the first of the clusters that it counts,
    /// all of which are free. This happens once in two GiB or so, so that it can be on stable storage at once: first the
    /// block, then what leads to it.
    fn ensure_block(&mut self, file: &HostFile, cluster: u64) -> io::Result<()> {
        if self.place(cluster)?.0.is_some() {
            return Ok(());
        }
        let index = cluster >> self.block_bits();
        let first = index << self.block_bits();
        let grows = index >= self.table.len() as u64;
        let table_clusters = if grows { self.grown_table_clusters(index)? } else { 0 };
        let at = first << self.cluster_bits;
        let new = Run { offset: at, len: (1 + table_clusters) << self.cluster_bits };
        if self.metadata.touches(new) {
            return Err(corrupt("a refcount block is missing"));
        }
        let mut count_bytes = vec![0; self.cluster_size() as usize];
        file.write(at, &count_bytes)?;
        self.metadata.add(new);
        self.end = self.end.max(first + table_clusters + 1);
        self.fresh_from = self.fresh_from.max(self.end);
        let old_table = (self.table_offset, (self.table.len() as u64 * 8) >> self.cluster_bits);
        if grows {
            self.table.resize((table_clusters << self.cluster_bits) as usize / 8, 0);
            self.table_offset = at + self.cluster_size();
        }
        self.table[index as usize] = at;
        for used in first..=first + table_clusters {
            self.put(file, used, 1)?;
        }
        count_bytes.copy_from_slice(self.blocks.get(file, at)?);
        file.write(at, &count_bytes)?;
        if grows {
            let bytes: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            file.write(self.table_offset, &bytes)?;
            file.sync()?;
            self.tell_header(file, table_clusters as u32)?;
            for cluster in 0..old_table.1 {
                self.release(file, (old_table.0 >> self.cluster_bits) + cluster)?;
            }
        } else {
            file.sync()?;
            file.write(self.table_offset + index * 8, &at.to_be_bytes())?;
            file.sync()?;
        }
        Ok(())
    }

    /// Clusters of a larger table, with room for block `index` and then some.
    fn grown_table_clusters(&self, index: u64) -> io::Result<u64> {
        let needed = (index + 1) * 8;
        let clusters = (needed + needed / 2).div_ceil(self.cluster_size());
        let fits = clusters <= self.most_table_clusters && clusters < 1 << self.block_bits();
        fits.then_some(clusters).ok_or_else(|| io::ErrorKind::StorageFull.into())
    }

    /// Tells the header where the table is (offsets 48 and 56 of it).
    fn tell_header(&self, file: &HostFile, clusters: u32) -> io::Result<()> {
        let mut bytes = self.table_offset.to_be_bytes().to_vec();
        bytes.extend(clusters.to_be_bytes());
        file.write(48, &bytes)?;
        file.sync()
    }

    /// Uses the cluster at `at` for the block that counts `cluster`, which is missing. For repairs, when it is known
    /// which clusters are free; the refcounts in the block are all zero.
    pub(super) fn place_block(&mut self, file: &HostFile, cluster: u64, at: u64) -> io::Result<()> {
        let index = cluster >> self.block_bits();
        let entry = self.table.get_mut(index as usize).ok_or(io::ErrorKind::StorageFull)?;
        *entry = at;
        self.metadata.add(Run { offset: at, len: 1 << self.cluster_bits });
        self.end = self.end.max((at >> self.cluster_bits) + 1);
        self.blocks.forget(at);
        file.write(at, &vec![0; 1 << self.cluster_bits])?;
        file.sync()?;
        file.write(self.table_offset + index * 8, &at.to_be_bytes())
    }

    /// Whether a block counts a cluster.
    pub(super) fn has_block(&self, cluster: u64) -> bool {
        self.place(cluster).is_ok_and(|(block, _)| block.is_some())
    }

    /// Clusters from here on read as zeros.
    pub(super) fn fresh_from(&self) -> u64 {
        self.fresh_from
    }
    pub(super) fn is_dirty(&self) -> bool {
        self.blocks.is_dirty()
    }
    pub(super) fn is_full(&self) -> bool {
        self.blocks.is_full()
    }
    pub(super) fn write(&mut self, file: &HostFile) -> io::Result<()> {
        self.blocks.write(file)
    }
}
