//! Disks in blocks that are somewhere in a file, each where an entry of a table says: what VHD, VHDX and VMDK have in
//! common.
//!
//! A block that gets its first bytes is put at the end of the file. Entries that lead to it stay in memory until a flush
//! has brought the blocks to stable storage; so the file is right at any time.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::cache::TableCache;
use crate::file::HostFile;
use crate::image::{Image, ImageInfo, ResizeError};
use crate::vectors::{Way, clear, fill, part, total};
use crate::{Disk, Extent, Format, Place, Slice};

/// Bytes of a piece of a table, and of all pieces that are kept.
const PIECE: u64 = 4096;
const CACHE: u64 = 4 << 20;

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    /// It is not there, and zero.
    Absent,
    /// At this offset of the file.
    At(u64),
    /// Compressed; how is a matter of the format.
    Packed(u64),
}

/// A file, and pieces of its tables.
pub(crate) struct Tables<'a> {
    pub(crate) file: &'a HostFile,
    pub(crate) cache: &'a mut TableCache,
}

impl Tables<'_> {
    pub(crate) fn entry<const N: usize>(&mut self, at: u64) -> io::Result<[u8; N]> {
        self.cache.entry(self.file, at)
    }
    pub(crate) fn set_entry(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.cache.set_entry(self.file, at, bytes)
    }
}

/// What a format has of its own.
pub(crate) trait Layout: Send + Sync {
    /// Which it is.
    const FORMAT: Format;
    /// The kind within it.
    fn variant(&self) -> String;
    /// Bytes of the disk.
    fn size(&self) -> u64;
    /// Bytes of a block.
    fn block_size(&self) -> u64;
    /// Whether Ruse can write this kind.
    fn is_writable(&self) -> bool {
        true
    }
    /// Where a block is.
    fn lookup(&self, tables: &mut Tables, block: u64) -> io::Result<Block>;
    /// Makes room for a block at `end` of the file; gives the offset of its bytes, and the end then. All bytes are zero.
    fn add(&self, file: &HostFile, end: u64) -> io::Result<(u64, u64)>;
    /// Lets the entry of a block lead to its bytes.
    fn publish(&self, tables: &mut Tables, block: u64, at: u64) -> io::Result<()>;
    /// The bytes of a compressed block.
    fn unpack(&self, _file: &HostFile, _at: u64) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::InvalidData.into())
    }
}

/// A disk of blocks.
pub(crate) struct BlockDisk<L> {
    file: HostFile,
    layout: L,
    state: Mutex<State>,
}

struct State {
    cache: TableCache,
    /// Behind the last block.
    end: u64,
    /// The compressed block that was read last.
    unpacked: Option<(u64, Vec<u8>)>,
}

impl<L: Layout> BlockDisk<L> {
    /// A disk whose next block will be put at `end` of its file.
    pub(crate) fn new(file: HostFile, layout: L, end: u64) -> Self {
        Self {
            file,
            layout,
            state: Mutex::new(State { cache: TableCache::new(PIECE, CACHE), end, unpacked: None }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lookup(&self, state: &mut State, block: u64) -> io::Result<Block> {
        self.layout.lookup(&mut Tables { file: &self.file, cache: &mut state.cache }, block)
    }

    /// The block at `offset`, the offset in it, and how many of `len` bytes are in it.
    fn split(&self, offset: u64, len: u64) -> (u64, u64, u64) {
        let size = self.layout.block_size();
        (offset / size, offset % size, len.min(size - offset % size))
    }

    fn commit(&self, state: &mut State) -> io::Result<()> {
        if state.cache.is_dirty() {
            self.file.sync()?;
            state.cache.write(&self.file)?;
        }
        self.file.sync()
    }

    /// Calls `each` for each block of a range that is there: with the offset in the file, that in the range, and a length.
    fn each_there(
        &self,
        offset: u64,
        len: u64,
        mut each: impl FnMut(u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let (block, within, here) = self.split(offset + done, len - done);
            let found = self.lookup(&mut self.lock(), block)?;
            if let Block::At(at) = found {
                each(at + within, here)?;
            }
            done += here;
        }
        Ok(())
    }

    fn check_writable(&self) -> io::Result<()> {
        match self.is_read_only() {
            true => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            false => Ok(()),
        }
    }

    /// Writes into a block that is not there, unless it has come meanwhile.
    fn write_new(&self, block: u64, within: u64, from: &[Slice]) -> io::Result<()> {
        let mut state = self.lock();
        if state.cache.is_full() {
            self.commit(&mut state)?;
        }
        if let Block::At(at) = self.lookup(&mut state, block)? {
            return self.file.transfer(Way::Write, at + within, from);
        }
        let (at, end) = self.layout.add(&self.file, state.end)?;
        state.end = end;
        self.file.transfer(Way::Write, at + within, from)?;
        self.layout.publish(&mut Tables { file: &self.file, cache: &mut state.cache }, block, at)
    }

    fn read_packed(&self, at: u64, within: u64, to: &[Slice]) -> io::Result<()> {
        let mut state = self.lock();
        if state.unpacked.as_ref().is_none_or(|(last, _)| *last != at) {
            let mut bytes = self.layout.unpack(&self.file, at)?;
            bytes.resize(self.layout.block_size() as usize, 0);
            state.unpacked = Some((at, bytes));
        }
        let (_, bytes) = state.unpacked.as_ref().ok_or(io::ErrorKind::NotFound)?;
        fill(to, &bytes[within as usize..(within + total(to)) as usize]);
        Ok(())
    }
}

impl<L: Layout> Disk for BlockDisk<L> {
    fn size(&self) -> u64 {
        self.layout.size()
    }
    fn is_read_only(&self) -> bool {
        self.file.is_read_only() || !self.layout.is_writable()
    }
    fn refresh_size(&self) -> io::Result<u64> {
        Ok(self.size())
    }

    fn read(&self, offset: u64, to: &[Slice]) -> io::Result<()> {
        let (len, mut done) = (total(to), 0);
        while done < len {
            let (block, within, here) = self.split(offset + done, len - done);
            let parts = part(to, done, here);
            let found = self.lookup(&mut self.lock(), block)?;
            match found {
                Block::Absent => clear(&parts),
                Block::At(at) => self.file.transfer(Way::Read, at + within, &parts)?,
                Block::Packed(at) => self.read_packed(at, within, &parts)?,
            }
            done += here;
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[Slice]) -> io::Result<()> {
        self.check_writable()?;
        let (len, mut done) = (total(from), 0);
        while done < len {
            let (block, within, here) = self.split(offset + done, len - done);
            let parts = part(from, done, here);
            let found = self.lookup(&mut self.lock(), block)?;
            match found {
                Block::At(at) => self.file.transfer(Way::Write, at + within, &parts)?,
                Block::Absent => self.write_new(block, within, &parts)?,
                Block::Packed(_) => return Err(io::ErrorKind::Unsupported.into()),
            }
            done += here;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync()?;
        let mut state = self.lock();
        if state.cache.is_dirty() { self.commit(&mut state) } else { Ok(()) }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_writable()?;
        // A block keeps its place, and the file gets a hole there.
        self.each_there(offset, len, |at, len| self.file.discard(at, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap_allowed: bool) -> io::Result<()> {
        self.check_writable()?;
        self.each_there(offset, len, |at, len| self.file.zero(at, len, unmap_allowed))
    }

    fn extent(&self, offset: u64, len: u64) -> io::Result<(Extent, u64)> {
        let (block, within, here) = self.split(offset, len);
        match self.lookup(&mut self.lock(), block)? {
            Block::Absent => Ok((Extent::Zero, here)),
            Block::Packed(_) => Ok((Extent::Data, here)),
            Block::At(at) => {
                let (data, len) = self.file.data_or_hole(at + within, here)?;
                Ok((if data { Extent::Data } else { Extent::Zero }, len))
            }
        }
    }

    fn place(&self, way: Way, offset: u64, len: u64) -> io::Result<Option<Place<'_>>> {
        let (block, within, here) = self.split(offset, len);
        match self.lookup(&mut self.lock(), block)? {
            Block::At(at) if here == len => Ok(self.file.place(way, at + within)),
            _ => Ok(None),
        }
    }
}

impl<L: Layout> Image for BlockDisk<L> {
    fn info(&self) -> io::Result<ImageInfo> {
        Ok(ImageInfo {
            cluster_size: Some(self.layout.block_size()),
            variant: Some(self.layout.variant()),
            ..ImageInfo::new(L::FORMAT, self.size(), &self.file)?
        })
    }

    fn resize(&self, size: u64) -> Result<(), ResizeError> {
        match size == self.size() {
            true => Ok(()),
            false => Err(ResizeError::Format(
                "the size of such an image is fixed; ruse disk convert makes another",
            )),
        }
    }
}

impl<L> Drop for BlockDisk<L> {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !state.cache.is_dirty() {
            return;
        }
        if let Err(error) = self.file.sync().and_then(|()| state.cache.write(&self.file)) {
            tracing::error!(path = %self.file.path().display(), %error, "an image could not be closed");
        }
    }
}
