//! Comparing refcounts with the references that there are, and mending them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::entry::{COPIED, Cluster, OFFSET, Run};
use super::header::{be64, incompatible};
use super::state::State;
use super::{Qcow2, corrupt};
use crate::Disk;
use crate::file::HostFile;
use crate::image::{CheckReport, Repair};

/// Clusters whose references are counted in one piece.
const PIECE: u64 = 64;

/// How often each cluster of the file is referenced. It takes memory only where there are references.
#[derive(Default)]
struct References {
    pieces: BTreeMap<u64, Box<[u32]>>,
}

impl References {
    fn add(&mut self, cluster: u64, times: u32) {
        let piece = self.pieces.entry(cluster / PIECE).or_insert_with(|| vec![0; PIECE as usize].into());
        let count = &mut piece[(cluster % PIECE) as usize];
        *count = count.saturating_add(times);
    }

    fn get(&self, cluster: u64) -> u64 {
        self.pieces.get(&(cluster / PIECE)).map_or(0, |piece| piece[(cluster % PIECE) as usize].into())
    }
}

/// An L2 table that is referenced.
#[derive(Clone, Copy, Default)]
struct L2Table {
    /// By how many L1 tables.
    times: u32,
    /// By that of the disk itself.
    active: bool,
}

/// A check under way.
struct Check<'a> {
    file: &'a HostFile,
    state: &'a mut State,
    references: References,
    /// L2 tables by their places. Each is looked at once, however often it is referenced.
    l2_tables: BTreeMap<u64, L2Table>,
    report: CheckReport,
    /// Clusters of the file.
    file_clusters: u64,
}

impl Qcow2 {
    pub(super) fn check_image(&self, repair: Repair) -> io::Result<CheckReport> {
        let mut state = self.lock();
        if !self.is_read_only() {
            for _ in 0..2 {
                state.commit(&self.file)?;
            }
        }
        let mut check = Check::new(&self.file, &mut state)?;
        check.count()?;
        check.report.total_clusters = self.size().div_ceil(self.cluster_size());
        check.compare(repair)?;
        check.check_copied(repair)?;
        let report = check.report;
        if repair != Repair::Nothing {
            state.commit(&self.file)?;
            if report.is_clean() {
                let flags = incompatible::DIRTY | incompatible::CORRUPT;
                if state.header.incompatible & flags != 0 {
                    state.header.incompatible &= !flags;
                    state.write_header(&self.file)?;
                }
            }
        }
        Ok(report)
    }

    /// Makes the refcounts right after someone who is lazy with them has failed.
    pub(super) fn repair_refcounts(&self) -> io::Result<()> {
        match self.check_image(Repair::All)?.is_clean() {
            true => Ok(()),
            false => Err(corrupt("the image was not closed, and cannot be mended")),
        }
    }
}

impl<'a> Check<'a> {
    fn new(file: &'a HostFile, state: &'a mut State) -> io::Result<Self> {
        let file_clusters = file.size()?.div_ceil(state.cluster_size());
        Ok(Self {
            file,
            state,
            references: References::default(),
            l2_tables: BTreeMap::new(),
            report: CheckReport::default(),
            file_clusters,
        })
    }

    /// Counts references to each cluster that has bytes of a run; `false` if it is nowhere in the file.
    fn add(&mut self, what: &str, run: Run, times: u32) -> bool {
        let clusters = run.clusters(self.state.header.cluster_bits);
        if clusters.end > self.file_clusters {
            self.report.error(|| format!("{what} at {:#x} is behind the end of the file", run.offset));
            return false;
        }
        clusters.for_each(|cluster| self.references.add(cluster, times));
        true
    }

    /// A table or cluster of the disk, which takes one cluster and begins with it.
    fn add_cluster(&mut self, what: &str, offset: u64, times: u32) -> bool {
        let len = self.state.cluster_size();
        if !offset.is_multiple_of(len) {
            self.report.error(|| format!("{what} at {offset:#x} is not aligned"));
            return false;
        }
        self.add(what, Run { offset, len }, times)
    }

    /// Whether a cluster is in a hole of the file: then it is a table without entries.
    fn is_hole(&self, offset: u64) -> io::Result<bool> {
        let len = self.state.cluster_size();
        Ok(self.file.data_or_hole(offset, len)? == (false, len))
    }

    /// Counts all references.
    fn count(&mut self) -> io::Result<()> {
        let header = self.state.header.clone();
        self.add("the header", Run { offset: 0, len: header.cluster_size() }, 1);
        let snapshots = Run { offset: header.snapshots_offset, len: self.state.snapshot_bytes };
        self.add("the table of snapshots", snapshots, 1);
        let (table, entries) = self.state.refcounts.table();
        let blocks: Vec<u64> = entries.iter().copied().filter(|&at| at != 0).collect();
        let table = Run { offset: table, len: entries.len() as u64 * 8 };
        self.add("the refcount table", table, 1);
        let mut seen = BTreeSet::new();
        for at in blocks {
            self.add_cluster("a refcount block", at, 1);
            if !seen.insert(at) {
                self.report.error(|| format!("the refcount block at {at:#x} is there twice"));
            }
        }
        let l1 = self.state.l1.clone();
        self.count_l1(header.l1_offset, &l1, true);
        for n in 0..self.state.snapshots.len() {
            let (offset, size) = (self.state.snapshots[n].l1_offset, self.state.snapshots[n].l1_size);
            let bytes = self.file.read_vec(offset, size as usize * 8)?;
            let l1: Vec<u64> = bytes.chunks_exact(8).map(|entry| be64(entry, 0)).collect();
            self.count_l1(offset, &l1, false);
        }
        let tables = self.l2_tables.clone();
        tables.into_iter().try_for_each(|(at, table)| self.count_l2(at, table))
    }

    fn count_l1(&mut self, offset: u64, l1: &[u64], active: bool) {
        self.add("an L1 table", Run { offset, len: l1.len() as u64 * 8 }, 1);
        let mut seen = BTreeSet::new();
        for at in l1.iter().map(|entry| entry & OFFSET).filter(|&at| at != 0) {
            if !seen.insert(at) {
                self.report.error(|| format!("the L2 table at {at:#x} is there twice"));
            } else if self.add_cluster("an L2 table", at, 1) {
                let table = self.l2_tables.entry(at).or_default();
                table.times = table.times.saturating_add(1);
                table.active |= active;
            }
        }
    }

    fn count_l2(&mut self, at: u64, table: L2Table) -> io::Result<()> {
        if self.is_hole(at)? {
            return Ok(());
        }
        let header = &self.state.header;
        let (bits, version) = (header.cluster_bits, header.version);
        let bytes = self.file.read_vec(at, 1 << bits)?;
        for entry in bytes.chunks_exact(8).map(|entry| be64(entry, 0)) {
            let cluster = Cluster::parse(entry, bits, version);
            match cluster {
                Cluster::Absent | Cluster::Zero(None) => continue,
                Cluster::Data { offset, .. } | Cluster::Zero(Some(offset)) => {
                    self.add_cluster("a cluster", offset, table.times);
                }
                Cluster::Compressed(run) => {
                    // The last of its sectors may be behind the end of the file.
                    let end = self.file_clusters << bits;
                    let len = run.len.min(end.saturating_sub(run.offset)).max(1);
                    self.add("a compressed cluster", Run { len, ..run }, table.times);
                }
            }
            self.report.allocated_clusters += u64::from(table.active);
        }
        Ok(())
    }

    /// Compares the refcounts with the references, and mends them.
    fn compare(&mut self, repair: Repair) -> io::Result<()> {
        // References to what cannot be there cannot be mended here.
        if repair == Repair::All {
            self.place_blocks()?;
        }
        for piece in self.pieces()? {
            for cluster in piece * PIECE..(piece + 1) * PIECE {
                let used = self.references.get(cluster);
                let counted = self.state.refcounts.has_block(cluster);
                let count = if counted { self.state.refcounts.get(self.file, cluster)? } else { 0 };
                if used != count {
                    self.mend(cluster, used, count, repair)?;
                }
            }
        }
        Ok(())
    }

    /// The pieces with clusters that are referenced, or that a refcount block with anything in it counts. Elsewhere there
    /// are neither references nor refcounts, however long the file is.
    fn pieces(&self) -> io::Result<BTreeSet<u64>> {
        let refcounts = &self.state.refcounts;
        let bits = refcounts.block_bits();
        let mut pieces: BTreeSet<_> = self.references.pieces.keys().copied().collect();
        let mut seen = BTreeSet::new();
        for (index, &at) in (0..).zip(refcounts.table().1) {
            let first = index << bits;
            if refcounts.has_block(first) && seen.insert(at) && !self.is_hole(at)? {
                pieces.extend(first / PIECE..=(first + (1 << bits) - 1) / PIECE);
            }
        }
        Ok(pieces)
    }

    fn mend(&mut self, cluster: u64, used: u64, count: u64, repair: Repair) -> io::Result<()> {
        let leak = count > used;
        let mended = repair == Repair::All || repair == Repair::Leaks && leak;
        if mended {
            if self.state.refcounts.is_full() {
                self.state.refcounts.write(self.file)?;
            }
            self.state.refcounts.set(self.file, cluster, used)?;
        }
        if leak {
            self.report.leaks += 1;
            self.report.repaired_leaks += u64::from(mended);
        } else {
            self.report.error(|| format!("cluster {cluster} is used {used} times and has refcount {count}"));
            self.report.repaired_errors += u64::from(mended);
        }
        Ok(())
    }

    /// Makes refcount blocks for clusters that are used and not counted, behind all that is used.
    fn place_blocks(&mut self) -> io::Result<()> {
        let used: Vec<u64> = (self.references.pieces.iter())
            .flat_map(|(piece, counts)| {
                counts
                    .iter()
                    .enumerate()
                    .filter(|(_, count)| **count > 0)
                    .map(move |(n, _)| piece * PIECE + n as u64)
            })
            .collect();
        let mut next = self.file_clusters;
        for cluster in used {
            let mut missing = cluster;
            while !self.state.refcounts.has_block(missing) {
                // Tables may be said to be behind the end of the file.
                while self.state.refcounts.metadata.has(next) {
                    next += 1;
                }
                let at = next << self.state.header.cluster_bits;
                self.state.refcounts.place_block(self.file, missing, at)?;
                self.references.add(next, 1);
                // The block is to be counted as well.
                missing = next;
                next += 1;
            }
        }
        Ok(())
    }

    /// Looks whether entries say rightly what may be written in place.
    fn check_copied(&mut self, repair: Repair) -> io::Result<()> {
        let l1 = self.state.l1.clone();
        let header = &self.state.header;
        let (bits, version, l1_offset) = (header.cluster_bits, header.version, header.l1_offset);
        let mut seen = BTreeSet::new();
        for (index, entry) in (0..).zip(l1) {
            let at = entry & OFFSET;
            // Of all others an error is known.
            if !self.l2_tables.contains_key(&at) || !seen.insert(at) {
                continue;
            }
            if let Some(right) = self.right_entry(entry, at) {
                self.mend_entry("an L2 table", l1_offset + index * 8, right, repair)?;
                if repair == Repair::All {
                    self.state.l1[index as usize] = right;
                }
            }
            if self.is_hole(at)? {
                continue;
            }
            let bytes = self.file.read_vec(at, 1 << bits)?;
            for (n, entry) in (0..).zip(bytes.chunks_exact(8).map(|entry| be64(entry, 0))) {
                if let Cluster::Data { offset, .. } | Cluster::Zero(Some(offset)) =
                    Cluster::parse(entry, bits, version)
                    && let Some(right) = self.right_entry(entry, offset)
                {
                    self.mend_entry("a cluster", at + n * 8, right, repair)?;
                }
            }
            if repair == Repair::All {
                self.state.forget_table(at);
            }
        }
        Ok(())
    }

    /// The entry as it should be, if it is not.
    fn right_entry(&self, entry: u64, offset: u64) -> Option<u64> {
        let once = self.references.get(offset >> self.state.header.cluster_bits) == 1;
        ((entry & COPIED != 0) != once).then_some(entry ^ COPIED)
    }

    fn mend_entry(&mut self, what: &str, at: u64, right: u64, repair: Repair) -> io::Result<()> {
        let wrong = if right & COPIED == 0 { "referenced by others too" } else { "referenced once" };
        self.report.error(|| format!("{what} is {wrong}, and its entry does not say so"));
        if repair == Repair::All {
            self.file.write(at, &right.to_be_bytes())?;
            self.report.repaired_errors += 1;
        }
        Ok(())
    }
}
