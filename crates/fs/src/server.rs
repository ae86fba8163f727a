//! Takes requests and answers them.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags, open, openat};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use vm_memory::VolatileSlice;

use crate::abi::{self, Answer, Fields, Header, init, opcode};
use crate::handles::Handles;
use crate::inodes::Inodes;
use crate::{Cache, Options, ShareError};

/// Files that a process may have open though nothing said so, and those that other parts of the machine need.
const FEW_FILES: u64 = 1024;
const OTHER_FILES: u64 = 256;
/// Folders of a machine at most.
const SHARES: u64 = 4;
/// Requests of a client's that may wait here, not counting those that someone waits for.
const BACKGROUND: u32 = 64;

/// A request.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// What stands before it.
    pub header: Header,
    /// What follows, without the data of a write.
    pub body: &'a [u8],
    /// The data of a write.
    pub data: &'a [VolatileSlice<'a>],
}

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// There is none to such requests.
    None,
    /// These bytes.
    Bytes(Vec<u8>),
    /// So many bytes, which are where the answer is to be.
    Filled(usize),
}

impl From<Answer> for Reply {
    fn from(answer: Answer) -> Self {
        Self::Bytes(answer.into_bytes())
    }
}

/// Serves one folder to one guest. Calls may come from several threads at a time.
#[derive(Debug)]
pub struct Server {
    pub(crate) inodes: Inodes,
    pub(crate) handles: Handles,
    pub(crate) options: Options,
    /// Most files that are open to be read and written.
    pub(crate) most_open: usize,
    /// What the guest makes can be given to others.
    pub(crate) privileged: bool,
}

impl Server {
    /// Serves the folder at `path`.
    pub fn new(path: &Path, options: Options) -> Result<Self, ShareError> {
        let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, path, folder, Mode::empty())
            .map_err(|error| ShareError::Open { path: path.to_owned(), source: error.into() })?;
        let links =
            open("/proc/self/fd", folder, Mode::empty()).map_err(|error| ShareError::Proc(error.into()))?;
        let most_open = most_open();
        Ok(Self {
            inodes: Inodes::new(root, links, most_open),
            most_open,
            handles: Handles::default(),
            options,
            privileged: rustix::process::geteuid().is_root(),
        })
    }

    /// The guest begins anew: all that it knew and had open is forgotten.
    pub fn reset(&self) {
        self.handles.clear();
        self.inodes.clear();
    }

    /// Does what a request asks for. Data that are read go to `to`, behind the answer's header.
    pub fn serve(&self, request: &Request, to: &[VolatileSlice]) -> Result<Reply, Errno> {
        let mut fields = Fields::new(request.body);
        let (fields, node) = (&mut fields, request.header.node);
        if self.options.read_only && changes(request.header.opcode) {
            return Err(Errno::ROFS);
        }
        match request.header.opcode {
            opcode::INIT => self.init(fields),
            opcode::DESTROY => {
                self.reset();
                Ok(Reply::Bytes(Vec::new()))
            }
            opcode::LOOKUP => self.lookup(node, fields),
            opcode::FORGET => {
                self.inodes.forget(node, fields.long()?);
                Ok(Reply::None)
            }
            opcode::BATCH_FORGET => self.batch_forget(fields),
            opcode::GETATTR => self.get_attributes(node),
            opcode::SETATTR => self.set_attributes(node, fields),
            opcode::READLINK => self.read_link(node),
            opcode::SYMLINK => self.symlink(&request.header, fields),
            opcode::MKNOD => self.make_node(&request.header, fields),
            opcode::MKDIR => self.make_folder(&request.header, fields),
            opcode::UNLINK => self.unlink(node, fields, false),
            opcode::RMDIR => self.unlink(node, fields, true),
            opcode::RENAME => self.rename(node, fields, false),
            opcode::RENAME2 => self.rename(node, fields, true),
            opcode::LINK => self.link(node, fields),
            opcode::CREATE => self.create(&request.header, fields),
            opcode::OPEN => self.open(node, fields),
            opcode::READ => self.read(fields, to),
            opcode::WRITE => self.write(fields, request.data),
            opcode::STATFS => self.statfs(node),
            opcode::RELEASE | opcode::RELEASEDIR => {
                self.handles.remove(fields.long()?);
                Ok(Reply::Bytes(Vec::new()))
            }
            opcode::FSYNC => self.sync(fields),
            opcode::FSYNCDIR => self.sync_folder(node),
            opcode::SYNCFS => self.sync_all(node),
            opcode::FALLOCATE => self.allocate(fields),
            opcode::LSEEK => self.seek(fields),
            opcode::COPY_FILE_RANGE => self.copy(fields),
            opcode::OPENDIR => self.open_folder(node),
            opcode::READDIR => self.read_folder(node, fields, false),
            opcode::READDIRPLUS => self.read_folder(node, fields, true),
            _ => Err(Errno::NOSYS),
        }
    }

    fn init(&self, fields: &mut Fields) -> Result<Reply, Errno> {
        let (major, minor) = (fields.word()?, fields.word()?);
        if major > abi::MAJOR {
            // The client asks again with this one.
            return Ok(Answer::default().word(abi::MAJOR).word(abi::MINOR).bytes(&[0; 56]).into());
        }
        if major < abi::MAJOR || minor < abi::OLDEST_MINOR {
            return Err(Errno::PROTO);
        }
        self.reset();
        let (read_ahead, offered) = (fields.word()?, fields.word()?);
        let write_back = if self.options.cache == Cache::Always { init::WRITEBACK_CACHE } else { 0 };
        let wanted = init::ASYNC_READ
            | init::BIG_WRITES
            | init::AUTO_INVAL_DATA
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | write_back;
        let pages = abi::MOST_DATA / 4096;
        let answer = Answer::default()
            .word(abi::MAJOR)
            .word(minor.min(abi::MINOR))
            .word(read_ahead)
            .word(offered & wanted)
            .word(BACKGROUND | (BACKGROUND * 3 / 4) << 16)
            .word(abi::MOST_DATA)
            .word(1)
            .word(pages)
            .bytes(&[0; 32]);
        Ok(answer.into())
    }

    /// How long a name or attributes are right.
    pub(crate) fn valid(&self) -> Duration {
        match self.options.cache {
            Cache::Never => Duration::ZERO,
            Cache::Auto => Duration::from_secs(1),
            Cache::Always => Duration::from_secs(24 * 3600),
        }
    }

    /// Opens a file that is held, for other things.
    pub(crate) fn reopen(&self, file: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        use std::os::fd::AsRawFd;
        openat(self.inodes.links(), file.as_raw_fd().to_string(), flags | OFlags::CLOEXEC, Mode::empty())
    }
}

/// Whether a request changes something. Opening a file to write it is refused where it is opened.
fn changes(opcode: u32) -> bool {
    use opcode::{COPY_FILE_RANGE, CREATE, FALLOCATE, LINK, MKDIR, MKNOD, SETATTR, SYMLINK, WRITE};
    use opcode::{RENAME, RENAME2, RMDIR, UNLINK};
    let made = [COPY_FILE_RANGE, CREATE, FALLOCATE, LINK, MKDIR, MKNOD, SETATTR, SYMLINK, WRITE];
    made.contains(&opcode) || [RENAME, RENAME2, RMDIR, UNLINK].contains(&opcode)
}

/// How many files may be held open, and as many opened besides: the process may serve several folders.
fn most_open() -> usize {
    let files = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20).max(FEW_FILES);
    ((files - OTHER_FILES) / (2 * SHARES)) as usize
}
