//! Open folders, and the names in them.

use std::sync::{Arc, Mutex};

use rustix::fs::{Mode, OFlags, fsync, openat};
use rustix::io::Errno;

use crate::Cache;
use crate::abi::{Answer, Fields, MOST_DATA, OPEN_CACHE_DIR, OPEN_KEEP_CACHE};
use crate::handles::{Entry, Handle, read_folder};
use crate::inodes::HOLD;
use crate::server::{Reply, Server};

/// How a folder is opened to be read.
const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY);
/// Bytes of `struct fuse_entry_out`, which stands before each entry of READDIRPLUS.
const ENTRY: usize = 128;

impl Server {
    pub(crate) fn open_folder(&self, node: u64) -> Result<Reply, Errno> {
        let folder = self.reopen(&*self.inodes.get(node)?, FOLDER)?;
        let handle = self.handles.add(Handle::Folder(Arc::new(Mutex::new(folder))), self.most_open)?;
        let flags = if self.options.cache == Cache::Always { OPEN_CACHE_DIR | OPEN_KEEP_CACHE } else { 0 };
        Ok(Answer::default().long(handle).word(flags).word(0).into())
    }

    pub(crate) fn sync_folder(&self, node: u64) -> Result<Reply, Errno> {
        fsync(self.reopen(&*self.inodes.get(node)?, FOLDER)?)?;
        Ok(Reply::Bytes(Vec::new()))
    }

    /// Entries from a position on; with `plus`, each with what looking it up would give.
    pub(crate) fn read_folder(&self, node: u64, fields: &mut Fields, plus: bool) -> Result<Reply, Errno> {
        let (handle, position, size) = (fields.long()?, fields.long()?, fields.word()?);
        let size = size.min(MOST_DATA) as usize;
        let handle = self.handles.folder(handle)?;
        let mut answer = Answer::default();
        for entry in read_folder(&handle, position)? {
            let len = (24 + entry.name.count_bytes()).next_multiple_of(8) + if plus { ENTRY } else { 0 };
            if !answer.has_room(len, size) {
                break;
            }
            if plus {
                // Without a number the entry is a name only: what it stood for has just gone.
                let known = self.entry(node, &entry).unwrap_or_else(|_| vec![0; ENTRY]);
                answer = answer.bytes(&known);
            }
            answer = answer.entry(entry.ino, entry.next, entry.kind, &entry.name);
        }
        Ok(answer.into())
    }

    fn entry(&self, folder: u64, entry: &Entry) -> Result<Vec<u8>, Errno> {
        if matches!(entry.name.to_bytes(), b"." | b"..") {
            return Err(Errno::INVAL);
        }
        let file = openat(&*self.inodes.get(folder)?, &entry.name, HOLD, Mode::empty())?;
        Ok(self.enter(file)?.into_bytes())
    }
}
