//! Names: looking them up, making, renaming and removing them; attributes.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, Stat, Timespec, Timestamps, Uid, chmodat, chownat,
    fstat, ftruncate, linkat, mkdirat, mknodat, openat, readlinkat, renameat_with, symlinkat, unlinkat,
    utimensat,
};
use rustix::io::Errno;

use crate::abi::{Answer, Fields, Header, set};
use crate::inodes::HOLD;
use crate::server::{Reply, Server};

/// "Now" and "as it is" for [`utimensat`].
const NOW: i64 = rustix::fs::UTIME_NOW;
const OMIT: i64 = rustix::fs::UTIME_OMIT;

impl Server {
    pub(crate) fn lookup(&self, folder: u64, fields: &mut Fields) -> Result<Reply, Errno> {
        let name = fields.name()?;
        let folder = self.inodes.get(folder)?;
        Ok(self.enter(hold(&folder, &name)?)?.into())
    }

    pub(crate) fn batch_forget(&self, fields: &mut Fields) -> Result<Reply, Errno> {
        let count = fields.word()?;
        fields.word()?;
        for _ in 0..count {
            self.inodes.forget(fields.long()?, fields.long()?);
        }
        Ok(Reply::None)
    }

    /// The guest is given a file: `struct fuse_entry_out`.
    pub(crate) fn enter(&self, file: OwnedFd) -> Result<Answer, Errno> {
        let stat = fstat(&file)?;
        let number = self.inodes.enter(file, &stat);
        let seconds = self.valid().as_secs();
        let answer = Answer::default().long(number).long(0).long(seconds).long(seconds).long(0);
        Ok(answer.attributes(&stat))
    }

    fn attributes(&self, stat: &Stat) -> Reply {
        Answer::default().long(self.valid().as_secs()).long(0).attributes(stat).into()
    }

    pub(crate) fn get_attributes(&self, node: u64) -> Result<Reply, Errno> {
        let file = self.inodes.get(node)?;
        Ok(self.attributes(&fstat(&*file)?))
    }

    pub(crate) fn set_attributes(&self, node: u64, fields: &mut Fields) -> Result<Reply, Errno> {
        let valid = fields.word()?;
        fields.word()?;
        let (handle, size, _owner) = (fields.long()?, fields.long()?, fields.long()?);
        let (accessed, modified, _changed) = (fields.long()?, fields.long()?, fields.long()?);
        let (accessed_ns, modified_ns, _) = (fields.word()?, fields.word()?, fields.word()?);
        let (mode, _, uid, gid) = (fields.word()?, fields.word()?, fields.word()?, fields.word()?);
        let file = self.inodes.get(node)?;
        let has = |bits: u32| valid & bits != 0;
        if has(set::UID | set::GID) {
            let uid = has(set::UID).then(|| valid_uid(uid)).transpose()?;
            let gid = has(set::GID).then(|| valid_gid(gid)).transpose()?;
            chownat(&*file, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if has(set::MODE) {
            self.set_mode(&file, mode)?;
        }
        if has(set::SIZE) {
            match has(set::HANDLE).then(|| self.handles.file(handle)) {
                Some(open) => ftruncate(&*open?, size)?,
                None => ftruncate(self.open_regular(&file, OFlags::WRONLY)?, size)?,
            }
        }
        if has(set::ATIME | set::MTIME) {
            let time = |given: u32, now: u32, seconds: u64, ns: u32| Timespec {
                tv_sec: seconds as i64,
                tv_nsec: if has(now) {
                    NOW
                } else if has(given) {
                    ns.into()
                } else {
                    OMIT
                },
            };
            let times = Timestamps {
                last_access: time(set::ATIME, set::ATIME_NOW, accessed, accessed_ns),
                last_modification: time(set::MTIME, set::MTIME_NOW, modified, modified_ns),
            };
            utimensat(&*file, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        Ok(self.attributes(&fstat(&*file)?))
    }

    /// A symbolic link has no mode of its own.
    fn set_mode(&self, file: &OwnedFd, mode: u32) -> Result<(), Errno> {
        if FileType::from_raw_mode(fstat(file)?.st_mode) == FileType::Symlink {
            return Err(Errno::OPNOTSUPP);
        }
        let mode = Mode::from_raw_mode(mode & 0o7777);
        chmodat(self.inodes.links(), file.as_raw_fd().to_string(), mode, AtFlags::empty())
    }

    pub(crate) fn read_link(&self, node: u64) -> Result<Reply, Errno> {
        let file = self.inodes.get(node)?;
        Ok(Reply::Bytes(readlinkat(&*file, c"", Vec::new())?.into_bytes()))
    }

    pub(crate) fn symlink(&self, header: &Header, fields: &mut Fields) -> Result<Reply, Errno> {
        let (name, target) = (fields.name()?, fields.string()?);
        let folder = self.inodes.get(header.node)?;
        symlinkat(&target, &*folder, &name)?;
        self.made(header, &folder, &name, 0)
    }

    pub(crate) fn make_node(&self, header: &Header, fields: &mut Fields) -> Result<Reply, Errno> {
        let (mode, _device, _umask, _) = (fields.word()?, fields.word()?, fields.word()?, fields.word()?);
        let name = fields.name()?;
        let kind = FileType::from_raw_mode(mode);
        // A device node would give the host's users what only root may give them.
        if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
            return Err(Errno::PERM);
        }
        let folder = self.inodes.get(header.node)?;
        mknodat(&*folder, &name, kind, Mode::from_raw_mode(mode & 0o7777), 0)?;
        self.made(header, &folder, &name, mode)
    }

    pub(crate) fn make_folder(&self, header: &Header, fields: &mut Fields) -> Result<Reply, Errno> {
        let (mode, _umask) = (fields.word()?, fields.word()?);
        let name = fields.name()?;
        let folder = self.inodes.get(header.node)?;
        mkdirat(&*folder, &name, Mode::from_raw_mode(mode & 0o7777))?;
        self.made(header, &folder, &name, mode)
    }

    /// A name was made: who owns it, and what it is.
    fn made(&self, header: &Header, folder: &OwnedFd, name: &CStr, mode: u32) -> Result<Reply, Errno> {
        let file = hold(folder, name)?;
        self.give(header, folder, &file, mode)?;
        Ok(self.enter(file)?.into())
    }

    /// Gives a new file to whom it was made for, if that is possible.
    pub(crate) fn give(
        &self,
        header: &Header,
        folder: &OwnedFd,
        file: &OwnedFd,
        mode: u32,
    ) -> Result<(), Errno> {
        if !self.privileged || (header.uid, header.gid) == (0, 0) {
            return Ok(());
        }
        // In some folders everything belongs to the folder's group.
        let inherits = Mode::from_raw_mode(fstat(folder)?.st_mode).contains(Mode::SGID);
        let gid = (!inherits).then(|| valid_gid(header.gid)).transpose()?;
        chownat(file, c"", Some(valid_uid(header.uid)?), gid, AtFlags::EMPTY_PATH)?;
        // Another owner takes these bits away.
        if mode & (Mode::SUID | Mode::SGID).as_raw_mode() != 0 {
            self.set_mode(file, mode)?;
        }
        Ok(())
    }

    pub(crate) fn unlink(&self, folder: u64, fields: &mut Fields, is_folder: bool) -> Result<Reply, Errno> {
        let flags = if is_folder { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        unlinkat(&*self.inodes.get(folder)?, fields.name()?, flags)?;
        Ok(Reply::Bytes(Vec::new()))
    }

    pub(crate) fn rename(&self, from: u64, fields: &mut Fields, with_flags: bool) -> Result<Reply, Errno> {
        let to = fields.long()?;
        let mut flags = RenameFlags::empty();
        if with_flags {
            // A whiteout is a device node.
            flags = RenameFlags::from_bits(fields.word()?).ok_or(Errno::INVAL)?;
            fields.word()?;
            if flags.contains(RenameFlags::WHITEOUT) {
                return Err(Errno::INVAL);
            }
        }
        let (old, new) = (fields.name()?, fields.name()?);
        renameat_with(&*self.inodes.get(from)?, &old, &*self.inodes.get(to)?, &new, flags)?;
        Ok(Reply::Bytes(Vec::new()))
    }

    pub(crate) fn link(&self, folder: u64, fields: &mut Fields) -> Result<Reply, Errno> {
        let file = self.inodes.get(fields.long()?)?;
        let (name, folder) = (fields.name()?, self.inodes.get(folder)?);
        // By its link, since only root may link what it has open.
        let link = file.as_raw_fd().to_string();
        linkat(self.inodes.links(), link, &*folder, &name, AtFlags::SYMLINK_FOLLOW)?;
        Ok(self.enter(hold(&folder, &name)?)?.into())
    }
}

/// Holds what a name in a folder stands for, without following it if it is a link.
fn hold(folder: &OwnedFd, name: &CStr) -> Result<OwnedFd, Errno> {
    openat(folder, name, HOLD, Mode::empty())
}

/// The last number is nobody's: it means "as it is".
fn valid_uid(raw: u32) -> Result<Uid, Errno> {
    if raw == u32::MAX { Err(Errno::INVAL) } else { Ok(Uid::from_raw(raw)) }
}

/// See [`valid_uid`].
fn valid_gid(raw: u32) -> Result<Gid, Errno> {
    if raw == u32::MAX { Err(Errno::INVAL) } else { Ok(Gid::from_raw(raw)) }
}
