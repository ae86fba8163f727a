//! Which device answers at an address: a map from ranges of ports or guest physical addresses to targets.
//!
//! The map holds no devices. Its targets are whatever the machine finds a device by, so that each can have its own lock.

/// A range that cannot be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Another range is there already.
    #[error("{base:#x} (length {len:#x}) overlaps the range at {other:#x}")]
    Overlap {
        /// First address asked for.
        base: u64,
        /// Length asked for.
        len: u64,
        /// First address of the range in the way.
        other: u64,
    },
    /// The range is empty or goes beyond the address space.
    #[error("{base:#x} (length {len:#x}) is not a range of the address space")]
    Range {
        /// First address asked for.
        base: u64,
        /// Length asked for.
        len: u64,
    },
}

/// One mapped range.
#[derive(Clone, Debug)]
struct Entry<T> {
    first: u64,
    last: u64,
    offset: u64,
    target: T,
}

/// Ranges that do not overlap, each with a target and the offset at which it begins in that target.
#[derive(Clone, Debug)]
pub struct AddressMap<T> {
    /// Ascending.
    entries: Vec<Entry<T>>,
    /// Last address of the space.
    limit: u64,
}

impl<T> AddressMap<T> {
    /// An empty map of the 65536 I/O ports.
    pub const fn ports() -> Self {
        Self { entries: Vec::new(), limit: 0xffff }
    }

    /// An empty map of guest physical addresses.
    pub const fn memory() -> Self {
        Self { entries: Vec::new(), limit: u64::MAX }
    }

    /// Maps `len` addresses from `base` to `target`, whose offsets there begin at `offset`. A device with two ranges
    /// is mapped twice, at two offsets.
    pub fn insert(&mut self, base: u64, len: u64, target: T, offset: u64) -> Result<(), MapError> {
        let last = len.checked_sub(1).and_then(|n| base.checked_add(n)).filter(|&last| last <= self.limit);
        let fits = len.checked_sub(1).and_then(|n| offset.checked_add(n)).is_some();
        let (Some(last), true) = (last, fits) else { return Err(MapError::Range { base, len }) };
        let at = self.entries.partition_point(|e| e.last < base);
        if let Some(other) = self.entries.get(at).filter(|e| e.first <= last) {
            return Err(MapError::Overlap { base, len, other: other.first });
        }
        self.entries.insert(at, Entry { first: base, last, offset, target });
        Ok(())
    }

    /// Unmaps the range that begins at `base`.
    pub fn remove(&mut self, base: u64) -> Option<T> {
        let at = self.entries.binary_search_by_key(&base, |e| e.first).ok()?;
        Some(self.entries.remove(at).target)
    }

    /// The target at an address, and the offset in it.
    pub fn lookup(&self, address: u64) -> Option<(&T, u64)> {
        let entry = self.entries.get(self.entries.partition_point(|e| e.last < address))?;
        let into = address.checked_sub(entry.first)?;
        Some((&entry.target, entry.offset + into))
    }

    /// The ranges in ascending order: first address, last address, target.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64, &T)> {
        self.entries.iter().map(|e| (e.first, e.last, &e.target))
    }

    /// Reads through the map: calls `read` with target, offset and bytes, once for an access within one range. An
    /// access over the edge of a range is split there, as a bus splits it; addresses where nothing is read as all ones.
    pub fn read(&self, address: u64, data: &mut [u8], mut read: impl FnMut(&T, u64, &mut [u8])) {
        let mut done = 0;
        while done < data.len() {
            let piece = self.piece(address, done, data.len());
            let bytes = &mut data[done..done + piece.len];
            match piece.target {
                Some((target, offset)) => read(target, offset, bytes),
                None => bytes.fill(0xff),
            }
            done += piece.len;
        }
    }

    /// Writes through the map, split like [`AddressMap::read`]; what is written where nothing is, is dropped.
    pub fn write(&self, address: u64, data: &[u8], mut write: impl FnMut(&T, u64, &[u8])) {
        let mut done = 0;
        while done < data.len() {
            let piece = self.piece(address, done, data.len());
            if let Some((target, offset)) = piece.target {
                write(target, offset, &data[done..done + piece.len]);
            }
            done += piece.len;
        }
    }

    /// The next part of an access of `len` bytes of which `done` are done.
    fn piece(&self, address: u64, done: usize, len: usize) -> Piece<'_, T> {
        let rest = len - done;
        let Some(at) = address.checked_add(done as u64).filter(|&at| at <= self.limit) else {
            return Piece { target: None, len: rest };
        };
        match self.entries.get(self.entries.partition_point(|e| e.last < at)) {
            Some(e) if e.first <= at => {
                let within = (e.last - at).saturating_add(1).min(rest as u64) as usize;
                let len = if done == 0 && within == len { len } else { width(at, within) };
                Piece { target: Some((&e.target, e.offset + (at - e.first))), len }
            }
            Some(e) => Piece { target: None, len: (e.first - at).min(rest as u64) as usize },
            None => Piece { target: None, len: rest },
        }
    }
}

/// A part of an access that one target answers, or nothing.
struct Piece<'a, T> {
    target: Option<(&'a T, u64)>,
    len: usize,
}

/// The widest naturally aligned access that begins at `at` and has at most `most` bytes.
fn width(at: u64, most: usize) -> usize {
    [8, 4, 2].into_iter().find(|&w| w <= most && at.is_multiple_of(w as u64)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> AddressMap<char> {
        let mut map = AddressMap::ports();
        map.insert(0x60, 1, 'k', 0).unwrap();
        map.insert(0x64, 1, 'k', 4).unwrap();
        map.insert(0x61, 1, 's', 0).unwrap();
        map.insert(0x3f8, 8, 'c', 0).unwrap();
        map
    }

    #[test]
    fn overlap_and_bad_ranges_are_refused() {
        let mut map = map();
        for (base, len) in [(0x3f8, 8), (0x3ff, 1), (0x3f0, 9), (0x300, 0x200), (0, 0x10000)] {
            assert!(matches!(map.insert(base, len, 'x', 0), Err(MapError::Overlap { .. })), "{base:#x}");
        }
        for (base, len) in [(0x10000, 1), (0xffff, 2), (5, 0), (u64::MAX, 2)] {
            assert!(matches!(map.insert(base, len, 'x', 0), Err(MapError::Range { .. })), "{base:#x}");
        }
        map.insert(0x3f0, 8, 'f', 0).unwrap();
        map.insert(0xffff, 1, 'l', 0).unwrap();
        let mut all = AddressMap::memory();
        all.insert(0, u64::MAX, 'a', 0).unwrap();
        all.insert(u64::MAX, 1, 'b', 0).unwrap();
        assert_eq!(all.lookup(u64::MAX), Some((&'b', 0)));
    }

    #[test]
    fn lookups_find_the_offset() {
        let mut map = map();
        assert_eq!(map.lookup(0x64), Some((&'k', 4)));
        assert_eq!(map.lookup(0x3fe), Some((&'c', 6)));
        assert_eq!(map.lookup(0x400), None);
        assert_eq!(map.lookup(0x63), None);
        assert_eq!(map.remove(0x64), Some('k'));
        assert_eq!(map.lookup(0x64), None);
        assert_eq!(map.remove(0x3f9), None);
    }

    #[test]
    fn accesses_split_at_edges() {
        let map = map();
        let mut seen = Vec::new();
        let mut data = [0; 4];
        map.read(0x5f, &mut data, |&t, offset, bytes| {
            seen.push((t, offset, bytes.len()));
            bytes.fill(0x11);
        });
        assert_eq!(seen, [('k', 0, 1), ('s', 0, 1)]);
        assert_eq!(data, [0xff, 0x11, 0x11, 0xff]);
        seen.clear();
        map.write(0x3fd, &data, |&t, offset, bytes| seen.push((t, offset, bytes.len())));
        assert_eq!(seen, [('c', 5, 1), ('c', 6, 2)]);
        seen.clear();
        map.write(0x3f9, &data, |&t, offset, bytes| seen.push((t, offset, bytes.len())));
        assert_eq!(seen, [('c', 1, 4)]);
    }

    #[test]
    fn the_end_of_the_space_reads_ones() {
        let mut map = AddressMap::memory();
        map.insert(u64::MAX, 1, 'e', 7).unwrap();
        let mut data = [0; 8];
        map.read(u64::MAX, &mut data, |_, offset, bytes| bytes.fill(offset as u8));
        assert_eq!(data, [7, 255, 255, 255, 255, 255, 255, 255]);
        let ports: AddressMap<()> = AddressMap::ports();
        ports.read(0xffff, &mut data, |(), _, _| unreachable!());
        assert_eq!(data, [255; 8]);
    }
}
