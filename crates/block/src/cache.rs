//! Tables of an image in memory, or pieces of tables, all of one size.

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use crate::file::HostFile;

/// A table.
#[derive(Debug)]
struct Table {
    bytes: Box<[u8]>,
    /// What differs from the file.
    dirty: Range<usize>,
    used: u64,
}

/// Tables by their place in the file. Those that were changed stay until they are written.
#[derive(Debug)]
pub(crate) struct TableCache {
    tables: HashMap<u64, Table>,
    table_size: usize,
    most: usize,
    clock: u64,
    dirty: usize,
}

impl TableCache {
    /// Tables of `table_size` bytes, of which `most_bytes` are kept.
    pub(crate) fn new(table_size: u64, most_bytes: u64) -> Self {
        let most = (most_bytes / table_size).max(16) as usize;
        Self { tables: HashMap::new(), table_size: table_size as usize, most, clock: 0, dirty: 0 }
    }

    /// The table at `at`.
    pub(crate) fn get(&mut self, file: &HostFile, at: u64) -> io::Result<&[u8]> {
        self.clock += 1;
        if !self.tables.contains_key(&at) {
            let bytes = file.read_vec(at, self.table_size)?;
            self.insert(at, bytes, 0..0);
        }
        let table = self.tables.get_mut(&at).ok_or(io::ErrorKind::NotFound)?;
        table.used = self.clock;
        Ok(&table.bytes)
    }

    /// Changes bytes of the table at `at`.
    pub(crate) fn set(&mut self, file: &HostFile, at: u64, offset: usize, bytes: &[u8]) -> io::Result<()> {
        self.get(file, at)?;
        let table = self.tables.get_mut(&at).ok_or(io::ErrorKind::NotFound)?;
        let range = offset..offset + bytes.len();
        table.bytes[range.clone()].copy_from_slice(bytes);
        if table.dirty.is_empty() {
            self.dirty += 1;
            table.dirty = range;
        } else {
            table.dirty = table.dirty.start.min(range.start)..table.dirty.end.max(range.end);
        }
        Ok(())
    }

    /// The bytes at `at`, which are within one piece; pieces begin at multiples of their size.
    pub(crate) fn entry<const N: usize>(&mut self, file: &HostFile, at: u64) -> io::Result<[u8; N]> {
        let within = (at % self.table_size as u64) as usize;
        let piece = self.get(file, at - within as u64)?;
        let bytes = piece.get(within..within + N).ok_or(io::ErrorKind::InvalidData)?;
        Ok(bytes.try_into().expect("as many bytes"))
    }

    /// Changes the bytes at `at`, which are within one piece.
    pub(crate) fn set_entry(&mut self, file: &HostFile, at: u64, bytes: &[u8]) -> io::Result<()> {
        let within = at % self.table_size as u64;
        self.set(file, at - within, within as usize, bytes)
    }

    /// A new table, all of which is to be written.
    pub(crate) fn add(&mut self, at: u64, bytes: Vec<u8>) {
        self.forget(at);
        self.dirty += 1;
        let all = 0..bytes.len();
        self.insert(at, bytes, all);
    }

    fn insert(&mut self, at: u64, bytes: Vec<u8>, dirty: Range<usize>) {
        if self.tables.len() >= self.most {
            let oldest = self.tables.iter().filter(|(_, table)| table.dirty.is_empty());
            if let Some(at) = oldest.min_by_key(|(_, table)| table.used).map(|(&at, _)| at) {
                self.tables.remove(&at);
            }
        }
        self.tables.insert(at, Table { bytes: bytes.into(), dirty, used: self.clock });
    }

    /// What is at `at` is no table any more.
    pub(crate) fn forget(&mut self, at: u64) {
        if self.tables.remove(&at).is_some_and(|table| !table.dirty.is_empty()) {
            self.dirty -= 1;
        }
    }

    /// Whether anything is to be written.
    pub(crate) fn is_dirty(&self) -> bool {
        self.dirty > 0
    }

    /// Whether so much is to be written that it should be done now.
    pub(crate) fn is_full(&self) -> bool {
        self.dirty >= self.most / 2
    }

    /// Writes all that was changed.
    pub(crate) fn write(&mut self, file: &HostFile) -> io::Result<()> {
        for (at, table) in self.tables.iter_mut().filter(|(_, table)| !table.dirty.is_empty()) {
            file.write(at + table.dirty.start as u64, &table.bytes[table.dirty.clone()])?;
            table.dirty = 0..0;
            self.dirty -= 1;
        }
        Ok(())
    }
}
