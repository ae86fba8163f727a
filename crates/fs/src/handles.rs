//! What a guest has open.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, RawDir, SeekFrom, seek};
use rustix::io::Errno;

/// Bytes of entries that are read from a folder at once.
const ENTRIES: usize = 32 << 10;

/// Something open.
#[derive(Clone, Debug)]
pub enum Handle {
    /// A file.
    File(Arc<OwnedFd>),
    /// A folder, of which one reads at a time.
    Folder(Arc<Mutex<OwnedFd>>),
}

/// All of it, by the numbers that the guest was given.
#[derive(Debug, Default)]
pub struct Handles(Mutex<(u64, HashMap<u64, Handle>)>);

impl Handles {
    fn lock(&self) -> MutexGuard<'_, (u64, HashMap<u64, Handle>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps something open, and gives its number; not more than `most` things.
    pub fn add(&self, handle: Handle, most: usize) -> Result<u64, Errno> {
        let (last, all) = &mut *self.lock();
        if all.len() >= most {
            return Err(Errno::NFILE);
        }
        *last += 1;
        all.insert(*last, handle);
        Ok(*last)
    }

    /// Closes something.
    pub fn remove(&self, number: u64) {
        let handle = self.lock().1.remove(&number);
        drop(handle);
    }

    /// Closes everything.
    pub fn clear(&self) {
        let all = std::mem::take(&mut self.lock().1);
        drop(all);
    }

    /// An open file.
    pub fn file(&self, number: u64) -> Result<Arc<OwnedFd>, Errno> {
        match self.lock().1.get(&number) {
            Some(Handle::File(file)) => Ok(file.clone()),
            _ => Err(Errno::BADF),
        }
    }

    /// An open folder.
    pub fn folder(&self, number: u64) -> Result<Arc<Mutex<OwnedFd>>, Errno> {
        match self.lock().1.get(&number) {
            Some(Handle::Folder(folder)) => Ok(folder.clone()),
            _ => Err(Errno::BADF),
        }
    }
}

/// An entry of a folder.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name.
    pub name: CString,
    /// Its inode.
    pub ino: u64,
    /// Its type, as directories have it (`DT_REG` and so on).
    pub kind: u32,
    /// Where the next one is to be read.
    pub next: u64,
}

/// Entries from a position on: some, or none at the end.
pub fn read_folder(folder: &Mutex<OwnedFd>, position: u64) -> Result<Vec<Entry>, Errno> {
    let folder = folder.lock().unwrap_or_else(PoisonError::into_inner);
    let position = i64::try_from(position).map_err(|_| Errno::INVAL)?;
    seek(&*folder, SeekFrom::Start(position as u64))?;
    let mut space = Vec::with_capacity(ENTRIES);
    let mut entries = Vec::new();
    let mut raw = RawDir::new(&*folder, space.spare_capacity_mut());
    while let Some(entry) = raw.next() {
        let entry = entry?;
        entries.push(Entry {
            name: entry.file_name().to_owned(),
            ino: entry.ino(),
            kind: kind(entry.file_type()),
            next: entry.next_entry_cookie(),
        });
        if raw.is_buffer_empty() {
            break;
        }
    }
    Ok(entries)
}

/// As directories have it: the upper bits of the mode.
fn kind(file_type: FileType) -> u32 {
    match file_type {
        FileType::Unknown => 0,
        known => known.as_raw_mode() >> 12,
    }
}
