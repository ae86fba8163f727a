//! Open files, and what is in them.

use std::io;
use std::os::fd::OwnedFd;

use ruse_memory::vectored;
use rustix::fs::{
    FallocateFlags, FileType, Mode, OFlags, SeekFrom, copy_file_range, fallocate, fdatasync, fstat, fstatvfs,
    fsync, openat, seek, syncfs,
};
use rustix::io::Errno;
use vm_memory::VolatileSlice;

use crate::Cache;
use crate::abi::{Answer, FSYNC_DATA, Fields, Header, OPEN_DIRECT_IO, OPEN_KEEP_CACHE};
use crate::handles::Handle;
use crate::inodes::HOLD;
use crate::server::{Reply, Server};

/// LSEEK for these only; the others are the client's.
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

impl Server {
    /// The flags of a guest's that the host's file gets. Appending is the client's: it says where each write goes, also of
    /// pages that were mapped.
    fn flags(&self, flags: u32) -> Result<OFlags, Errno> {
        let kept = OFlags::ACCMODE | OFlags::SYNC | OFlags::DSYNC;
        let mut flags = OFlags::from_bits_retain(flags) & kept;
        let access = flags & OFlags::ACCMODE;
        if self.options.read_only && access != OFlags::RDONLY {
            return Err(Errno::ROFS);
        }
        // To write parts of pages, the client's cache reads them.
        if self.options.cache == Cache::Always && access == OFlags::WRONLY {
            flags = (flags - OFlags::ACCMODE) | OFlags::RDWR;
        }
        Ok(flags)
    }

    /// Opens a file that is held. Others than regular ones are opened by the guest's own kernel, not here.
    pub(crate) fn open_regular(&self, file: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        match FileType::from_raw_mode(fstat(file)?.st_mode) {
            FileType::RegularFile => self.reopen(file, flags),
            FileType::Directory => Err(Errno::ISDIR),
            _ => Err(Errno::NXIO),
        }
    }

    /// `struct fuse_open_out`.
    fn opened(&self, answer: Answer, file: OwnedFd) -> Result<Reply, Errno> {
        let handle = self.handles.add(Handle::File(file.into()), self.most_open)?;
        let flags = match self.options.cache {
            Cache::Never => OPEN_DIRECT_IO,
            Cache::Auto => 0,
            Cache::Always => OPEN_KEEP_CACHE,
        };
        Ok(answer.long(handle).word(flags).word(0).into())
    }

    pub(crate) fn open(&self, node: u64, fields: &mut Fields) -> Result<Reply, Errno> {
        let flags = self.flags(fields.word()?)?;
        let file = self.open_regular(&*self.inodes.get(node)?, flags)?;
        self.opened(Answer::default(), file)
    }

    pub(crate) fn create(&self, header: &Header, fields: &mut Fields) -> Result<Reply, Errno> {
        let (asked, mode, _umask, _) = (fields.word()?, fields.word()?, fields.word()?, fields.word()?);
        let (name, flags) = (fields.name()?, self.flags(asked)?);
        let folder = self.inodes.get(header.node)?;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        let fixed = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let new = openat(&*folder, &name, flags | fixed | OFlags::CREATE | OFlags::EXCL, mode);
        let (file, is_new) = match new {
            Ok(file) => (file, true),
            // Somebody on the host was faster.
            Err(Errno::EXIST) if asked & OFlags::EXCL.bits() == 0 => {
                (self.open_regular(&openat(&*folder, &name, HOLD, Mode::empty())?, flags)?, false)
            }
            Err(error) => return Err(error),
        };
        let held = self.reopen(&file, OFlags::PATH)?;
        if is_new {
            self.give(header, &folder, &held, mode.as_raw_mode())?;
        }
        self.opened(self.enter(held)?, file)
    }

    pub(crate) fn read(&self, fields: &mut Fields, to: &[VolatileSlice]) -> Result<Reply, Errno> {
        let (handle, offset, size) = (fields.long()?, fields.long()?, fields.word()?);
        let file = self.handles.file(handle)?;
        let to = first(to, size as usize);
        Ok(Reply::Filled(vectored::read_at(&*file, offset, &to).map_err(errno)?))
    }

    pub(crate) fn write(&self, fields: &mut Fields, data: &[VolatileSlice]) -> Result<Reply, Errno> {
        let (handle, offset, size) = (fields.long()?, fields.long()?, fields.word()?);
        let file = self.handles.file(handle)?;
        let data = first(data, size as usize);
        let written = vectored::write_at(&*file, offset, &data).map_err(errno)?;
        Ok(Answer::default().word(written as u32).word(0).into())
    }

    pub(crate) fn statfs(&self, node: u64) -> Result<Reply, Errno> {
        let stat = fstatvfs(&*self.inodes.get(node)?)?;
        let answer = Answer::default()
            .long(stat.f_blocks)
            .long(stat.f_bfree)
            .long(stat.f_bavail)
            .long(stat.f_files)
            .long(stat.f_ffree)
            .word(stat.f_bsize as u32)
            .word(stat.f_namemax as u32)
            .word(stat.f_frsize as u32);
        Ok(answer.bytes(&[0; 28]).into())
    }

    pub(crate) fn sync(&self, fields: &mut Fields) -> Result<Reply, Errno> {
        let (handle, flags) = (fields.long()?, fields.word()?);
        let file = self.handles.file(handle)?;
        if flags & FSYNC_DATA != 0 {
            fdatasync(&*file)?
        } else {
            fsync(&*file)?
        }
        Ok(Reply::Bytes(Vec::new()))
    }

    pub(crate) fn sync_all(&self, node: u64) -> Result<Reply, Errno> {
        let folder = OFlags::RDONLY | OFlags::DIRECTORY;
        syncfs(self.reopen(&*self.inodes.get(node)?, folder)?)?;
        Ok(Reply::Bytes(Vec::new()))
    }

    pub(crate) fn allocate(&self, fields: &mut Fields) -> Result<Reply, Errno> {
        let (handle, offset, len, mode) = (fields.long()?, fields.long()?, fields.long()?, fields.word()?);
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        fallocate(&*self.handles.file(handle)?, mode, offset, len)?;
        Ok(Reply::Bytes(Vec::new()))
    }

    pub(crate) fn seek(&self, fields: &mut Fields) -> Result<Reply, Errno> {
        let (handle, offset, whence) = (fields.long()?, fields.long()?, fields.word()?);
        let to = match whence {
            SEEK_DATA => SeekFrom::Data(offset),
            SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        Ok(Answer::default().long(seek(&*self.handles.file(handle)?, to)?).into())
    }

    pub(crate) fn copy(&self, fields: &mut Fields) -> Result<Reply, Errno> {
        let (from, mut from_at, _node) = (fields.long()?, fields.long()?, fields.long()?);
        let (to, mut to_at, len) = (fields.long()?, fields.long()?, fields.long()?);
        let (from, to) = (self.handles.file(from)?, self.handles.file(to)?);
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(i32::MAX as usize);
        let copied = copy_file_range(&*from, Some(&mut from_at), &*to, Some(&mut to_at), len)?;
        Ok(Answer::default().word(copied as u32).word(0).into())
    }
}

/// The first `len` bytes of slices.
fn first<'a>(slices: &[VolatileSlice<'a>], len: usize) -> Vec<VolatileSlice<'a>> {
    let mut left = len;
    let mut parts = Vec::with_capacity(slices.len());
    for slice in slices {
        let here = slice.len().min(left);
        parts.extend(slice.subslice(0, here).ok().filter(|part| !part.is_empty()));
        left -= here;
    }
    parts
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}
