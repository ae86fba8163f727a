//! Entries of L1 and L2 tables.

use std::ops::Range;

/// The cluster (or L2 table) is referenced once, here: it can be written in place.
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// All bytes read as zero (version 3).
const ZERO: u64 = 1;
/// Bits of an offset.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What an entry of an L2 table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    /// It is not in this image.
    Absent,
    /// All zeros; there may be a cluster for it.
    Zero(Option<u64>),
    /// At this offset of the file.
    Data {
        offset: u64,
        /// It may be written in place.
        own: bool,
    },
    /// Compressed, in these bytes of the file.
    Compressed(Run),
}

/// Bytes of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Run {
    /// The clusters of the file that have bytes of it.
    pub(super) fn clusters(self, cluster_bits: u32) -> Range<u64> {
        self.offset >> cluster_bits..(self.offset + self.len).div_ceil(1 << cluster_bits)
    }
}

/// Bits of the offset of a compressed cluster.
fn compressed_offset_bits(cluster_bits: u32) -> u32 {
    62 - (cluster_bits - 8)
}

impl Cluster {
    /// Reads an entry.
    pub(super) fn parse(entry: u64, cluster_bits: u32, version: u32) -> Self {
        if entry & COMPRESSED != 0 {
            let bits = compressed_offset_bits(cluster_bits);
            let offset = entry & ((1 << bits) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> bits;
            return Self::Compressed(Run { offset, len: (sectors + 1) * 512 - offset % 512 });
        }
        let offset = entry & OFFSET;
        match entry & ZERO != 0 && version >= 3 {
            true => Self::Zero((offset != 0).then_some(offset)),
            false if offset == 0 => Self::Absent,
            false => Self::Data { offset, own: entry & COPIED != 0 },
        }
    }

    /// The entry of a cluster that is nobody else's.
    pub(super) fn data(offset: u64) -> u64 {
        offset | COPIED
    }

    /// The entry of zeros without a cluster (version 3).
    pub(super) const ZEROS: u64 = ZERO;

    /// The entry of compressed bytes, if they can be where they are.
    pub(super) fn compressed(run: Run, cluster_bits: u32) -> Option<u64> {
        let bits = compressed_offset_bits(cluster_bits);
        let sectors = (run.offset + run.len - 1) / 512 - run.offset / 512;
        let fits = run.len > 0 && run.offset < 1 << bits && sectors < 1 << (cluster_bits - 8);
        fits.then_some(COMPRESSED | sectors << bits | run.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_entries_say_what_they_were_made_of() {
        for bits in [9, 12, 16, 21] {
            for (offset, len) in [(1 << 20, 1), ((1 << 20) + 511, 2), ((1 << 20) + 100, (1 << bits) - 300)] {
                let Some(entry) = Cluster::compressed(Run { offset, len }, bits) else { continue };
                let Cluster::Compressed(run) = Cluster::parse(entry, bits, 3) else { panic!() };
                assert_eq!(run.offset, offset);
                assert!(run.len >= len && run.len < len + 512);
            }
            assert_eq!(Cluster::compressed(Run { offset: 1 << 20, len: (2 << bits) + 1 }, bits), None);
        }
    }
}
