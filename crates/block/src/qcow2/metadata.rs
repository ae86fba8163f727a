//! Clusters of the file that hold the image's own structures. No guest gets there, whatever tables and refcounts say: with
//! the header, which names the backing file, it could reach the host's files.

use std::collections::BTreeMap;

use super::entry::Run;

/// What a cluster holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The header, or a table of another kind.
    Other,
    /// An L2 table.
    L2,
}

/// The clusters with structures.
#[derive(Debug)]
pub(super) struct Metadata {
    cluster_bits: u32,
    clusters: BTreeMap<u64, Kind>,
}

impl Metadata {
    /// Of an image that has a header only.
    pub(super) fn new(cluster_bits: u32) -> Self {
        Self { cluster_bits, clusters: BTreeMap::from([(0, Kind::Other)]) }
    }

    /// Notes a table that is not an L2 table.
    pub(super) fn add(&mut self, table: Run) {
        for cluster in table.clusters(self.cluster_bits) {
            self.clusters.insert(cluster, Kind::Other);
        }
    }

    /// Notes an L2 table, unless there is a structure of another kind.
    pub(super) fn add_l2(&mut self, offset: u64) {
        self.clusters.entry(offset >> self.cluster_bits).or_insert(Kind::L2);
    }

    /// Notes that a cluster holds nothing any more.
    pub(super) fn forget(&mut self, cluster: u64) {
        self.clusters.remove(&cluster);
    }

    /// Whether a cluster holds a structure.
    pub(super) fn has(&self, cluster: u64) -> bool {
        self.clusters.contains_key(&cluster)
    }

    /// Whether a structure has bytes of a run.
    pub(super) fn touches(&self, run: Run) -> bool {
        run.clusters(self.cluster_bits).any(|cluster| self.has(cluster))
    }

    /// Whether an L2 table can be at `offset`.
    pub(super) fn admits_l2(&self, offset: u64) -> bool {
        self.clusters.get(&(offset >> self.cluster_bits)) != Some(&Kind::Other)
    }
}
