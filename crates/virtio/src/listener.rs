//! Unix sockets at which devices wait for the host's programs.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ruse_timer::OneShot;
use rustix::event::epoll;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// How long nobody is let in after somebody could not be, for want of files for instance.
const RETRY: Duration = Duration::from_millis(200);

/// Why nobody can listen there.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another machine, or program, listens there.
    #[error("'{0}' is in use")]
    InUse(PathBuf),
    /// The host refused.
    #[error("cannot listen at '{path}': {source}")]
    Host {
        /// The socket's path.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}

/// Makes a socket for the user's own programs. What a process has left behind that ended without removing it is replaced.
pub fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    let in_use = |error: &io::Error| error.kind() == io::ErrorKind::AddrInUse;
    let bound = match UnixListener::bind(path) {
        Err(error) if in_use(&error) && is_stale(path) => {
            fs::remove_file(path).and_then(|()| UnixListener::bind(path))
        }
        result => result,
    };
    let own = bound.and_then(|listener| {
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    own.map_err(|source| match in_use(&source) {
        true => ListenError::InUse(path.to_owned()),
        false => ListenError::Host { path: path.to_owned(), source },
    })
}

/// Whether this is a socket at which nobody listens.
fn is_stale(path: &Path) -> bool {
    let socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    socket && connect_to(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Connects without waiting: a program that takes no connections just now refuses this one.
pub fn connect_to(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// A listening socket for which a poll waits while others may connect.
pub(crate) struct Entrance {
    listener: UnixListener,
    poll: Arc<OwnedFd>,
    token: u64,
    open: bool,
    /// Readable when somebody may be let in again who could not be.
    retry: OneShot,
    /// The last one could not.
    failing: bool,
}

impl Entrance {
    /// Has `poll` wait for `listener`, with this token.
    pub(crate) fn new(listener: UnixListener, poll: Arc<OwnedFd>, token: u64) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let retry = OneShot::new()?;
        let entrance = Self { listener, poll, token, open: true, retry, failing: false };
        entrance.watch(&entrance.retry)?;
        entrance.watch(&entrance.listener)?;
        Ok(entrance)
    }

    fn watch(&self, file: impl AsFd) -> rustix::io::Result<()> {
        epoll::add(&*self.poll, file, epoll::EventData::new_u64(self.token), epoll::EventFlags::IN)
    }

    /// Lets somebody in who waits. If the host refuses, the poll waits for a while before it hears of them again.
    pub(crate) fn accept(&mut self) -> Option<UnixStream> {
        if self.retry.take() {
            self.open();
        }
        match self.listener.accept() {
            Ok((stream, _)) => {
                self.failing = false;
                Some(stream)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(%error, "a connection fails; it is tried again");
                }
                self.close();
                self.open_later();
                None
            }
        }
    }

    /// The poll waits for others from now on.
    pub(crate) fn open(&mut self) {
        if !self.open {
            self.open = self.watch(&self.listener).is_ok();
            if !self.open {
                self.open_later();
            }
        }
    }

    /// The poll does not wait for others until it is opened.
    pub(crate) fn close(&mut self) {
        self.open &= epoll::delete(&*self.poll, &self.listener).is_err();
        told(self.retry.stop());
    }

    fn open_later(&self) {
        told(self.retry.set(RETRY));
    }
}

/// Tells of a timer that fails.
fn told(set: io::Result<()>) {
    if let Err(error) = set {
        tracing::warn!(%error, "nobody can connect any more");
    }
}

#[cfg(test)]
mod tests {
    use std::mem::MaybeUninit;
    use std::os::fd::AsRawFd;

    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    use rustix::time::Timespec;

    use super::*;

    /// Whether a poll hears of something within so many seconds.
    fn is_heard(poll: &OwnedFd, seconds: i64) -> bool {
        let limit = Timespec { tv_sec: seconds, tv_nsec: 0 };
        epoll::wait(poll, &mut [MaybeUninit::uninit(); 1], Some(&limit)).unwrap().0.len() == 1
    }

    #[test]
    fn who_finds_no_file_is_let_in_later() {
        let dir = tempfile::tempdir().unwrap();
        let listener = listen(&dir.path().join("s")).unwrap();
        let poll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).unwrap());
        let mut entrance = Entrance::new(listener, poll.clone(), 0).unwrap();
        let _program = UnixStream::connect(dir.path().join("s")).unwrap();
        assert!(is_heard(&poll, 0));
        let next = poll.try_clone().unwrap().as_raw_fd();
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(next as u64), ..limit }).unwrap();
        let (first, heard) = (entrance.accept(), is_heard(&poll, 0));
        setrlimit(Resource::Nofile, limit).unwrap();
        assert!(first.is_none() && !heard, "the poll does not wake for what is in vain");
        assert!(is_heard(&poll, 20) && entrance.accept().is_some());
        assert!(!is_heard(&poll, 0), "nobody else waits, and nothing is to be tried again");
    }
}
