//! A port: where it leads in the host, and the handlers of its two queues.

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;

use super::control::Control;
use crate::chain::Chain;
use crate::core::Work;
use crate::device::{Handler, Served, serve_while};
use crate::dma::Dma;
use crate::listener::Entrance;
use crate::ring::RingError;

/// Bytes that are read from the host at a time.
const CHUNK: usize = 4096;
/// Most bytes of one chain. Drivers send a few pages.
const MOST: u64 = 1 << 20;

/// Where a port leads in the host.
#[derive(Debug)]
pub enum End {
    /// Nowhere: what the guest sends is lost.
    Nowhere,
    /// What the guest sends goes into a file, or a pipe that does not block.
    File(File),
    /// Both ways through a socket.
    Stream(UnixStream),
    /// Whoever connects, one at a time.
    Listener(UnixListener),
}

pub(super) type SharedPort = Arc<Mutex<Port>>;

/// Takes a lock, also one that a panicking thread has left behind: all survives any state.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn wake(event: &OwnedFd) {
    // It can only fail because so many signals wait already.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

pub(super) fn quiet(event: &OwnedFd) {
    let _ = rustix::io::read(event, &mut [0; 8]);
}

/// What both handlers of a port have in common.
pub(super) struct Port {
    file: Option<File>,
    entrance: Option<Entrance>,
    stream: Option<UnixStream>,
    /// Readable when there may be something for the guest: the stream where it is `watched`, else the listener; and `wake`.
    input: Arc<OwnedFd>,
    wake: OwnedFd,
    watched: bool,
    /// Readable when the stream has room for what is pending.
    output: Arc<OwnedFd>,
    /// From the guest, not written yet.
    pending: Vec<u8>,
    /// For the guest, not sent yet.
    staged: Vec<u8>,
    /// A program of the guest has it open; a console always is.
    guest_open: bool,
    /// Its number, and who tells the driver of it, if it is not a console.
    number: Option<(u32, Arc<Mutex<Control>>)>,
    resets: u64,
}

impl Port {
    pub(super) fn new(end: End, number: Option<(u32, Arc<Mutex<Control>>)>) -> io::Result<SharedPort> {
        let poll = || epoll::create(epoll::CreateFlags::CLOEXEC).map(Arc::new);
        let mut port = Self {
            file: None,
            entrance: None,
            stream: None,
            input: poll()?,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            watched: false,
            output: poll()?,
            pending: Vec::new(),
            staged: Vec::new(),
            guest_open: number.is_none(),
            number,
            resets: 0,
        };
        watch(&port.input, port.wake.as_fd())?;
        match end {
            End::Nowhere => port.tell(true),
            End::File(file) => {
                match await_room(&port.output, file.as_fd()) {
                    // A regular file always has room.
                    Ok(()) | Err(Errno::PERM) => port.file = Some(file),
                    Err(error) => return Err(error.into()),
                }
                port.tell(true);
            }
            End::Stream(stream) => port.attach(stream)?,
            End::Listener(listener) => {
                port.entrance = Some(Entrance::new(listener, port.input.clone(), 0)?);
            }
        }
        Ok(Arc::new(Mutex::new(port)))
    }

    /// The handlers of the queue to the guest and of that from it.
    pub(super) fn handlers(port: SharedPort) -> (Box<dyn Handler>, Box<dyn Handler>) {
        let input = lock(&port).input.clone();
        let output = lock(&port).output.clone();
        let receive = Receive { port: port.clone(), input, starved: false };
        (Box::new(receive), Box::new(Transmit { port, output }))
    }

    /// The device has been reset so often: an earlier driver's programs have closed the port.
    fn follow(&mut self, resets: u64) {
        if resets != self.resets {
            self.resets = resets;
            self.guest_open = self.number.is_none();
            self.staged.clear();
            wake(&self.wake);
        }
    }

    /// A program of the guest has opened or closed it.
    pub(super) fn set_guest_open(&mut self, resets: u64, open: bool) {
        self.follow(resets);
        self.guest_open = open;
        wake(&self.wake);
    }

    /// Tells the driver whether there is anybody.
    fn tell(&self, open: bool) {
        if let Some((number, control)) = &self.number {
            lock(control).set_open(*number, open);
        }
    }

    fn attach(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        await_room(&self.output, stream.as_fd())?;
        // The next has to wait.
        self.entrance.iter_mut().for_each(Entrance::close);
        self.stream = Some(stream);
        self.tell(true);
        Ok(())
    }

    /// The program at the other end has left.
    fn detach(&mut self) {
        self.stream = None;
        self.watched = false;
        self.pending.clear();
        self.tell(false);
        self.entrance.iter_mut().for_each(Entrance::open);
    }

    /// Lets somebody in, and waits for what they send if the guest wants it.
    fn take_input(&mut self) {
        quiet(&self.wake);
        if let (None, Some(entrance)) = (&self.stream, &mut self.entrance)
            && let Some(stream) = entrance.accept()
            && let Err(error) = self.attach(stream)
        {
            tracing::warn!(%error, "a connection to a port fails");
        }
        let Some(stream) = &self.stream else { return };
        let changed = match (self.watched, self.guest_open) {
            (false, true) => watch(&self.input, stream.as_fd()),
            (true, false) => epoll::delete(&*self.input, stream).map_err(io::Error::from),
            _ => Ok(()),
        };
        match changed {
            Ok(()) => self.watched = self.guest_open,
            Err(error) => tracing::warn!(%error, "a port is not heard any more"),
        }
    }

    /// Reads what is next for the guest, if anything is there.
    fn stage(&mut self) -> bool {
        if !self.staged.is_empty() {
            return true;
        }
        let Some(mut stream) = self.stream.as_ref().filter(|_| self.watched) else { return false };
        let mut bytes = [0; CHUNK];
        match stream.read(&mut bytes) {
            Ok(count @ 1..) => self.staged.extend(&bytes[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Ok(0) | Err(_) => self.detach(),
        }
        !self.staged.is_empty()
    }

    /// Gives the guest of what is staged what a buffer has room for; says how much.
    fn fill(&mut self, chain: &Chain, dma: &Dma) -> Result<u32, RingError> {
        let count = chain.writable_len().min(self.staged.len() as u64) as usize;
        chain.write(dma, 0, &self.staged[..count])?;
        self.staged.drain(..count);
        Ok(count as u32)
    }

    /// Takes what the guest has sent.
    fn accept(&mut self, chain: &Chain, dma: &Dma) -> Result<(), RingError> {
        let len = chain.readable_len();
        if len > MOST {
            return Err(RingError::Chain("more than a port takes at once"));
        }
        self.pending.resize(len as usize, 0);
        chain.read(dma, 0, &mut self.pending)?;
        self.write();
        Ok(())
    }

    /// Writes what is pending, as far as there is room. What nobody takes is lost.
    fn write(&mut self) {
        while !self.pending.is_empty() {
            let result = match (&mut self.file, &self.stream) {
                (Some(file), _) => file.write(&self.pending),
                (None, Some(stream)) => (&*stream).write(&self.pending),
                (None, None) => Ok(self.pending.len()),
            };
            match result {
                Ok(count) => drop(self.pending.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return self.wait_for_room(),
                Err(error) => {
                    tracing::warn!(%error, "nobody takes a port's output any more");
                    self.pending.clear();
                    // That they have left is read at the end of what they had sent.
                    self.file = None;
                }
            }
        }
    }

    fn wait_for_room(&mut self) {
        let target = self.file.as_ref().map(AsFd::as_fd).or(self.stream.as_ref().map(AsFd::as_fd));
        let Some(target) = target else { return };
        let flags = epoll::EventFlags::OUT | epoll::EventFlags::ONESHOT;
        if let Err(error) = epoll::modify(&*self.output, target, epoll::EventData::new_u64(0), flags) {
            tracing::warn!(%error, "a port's output is lost");
            self.pending.clear();
        }
    }
}

fn watch(poll: &OwnedFd, fd: BorrowedFd) -> io::Result<()> {
    Ok(epoll::add(poll, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?)
}

/// Prepares a poll to wait for room, which it does not do yet.
fn await_room(poll: &OwnedFd, fd: BorrowedFd) -> rustix::io::Result<()> {
    epoll::add(poll, fd, epoll::EventData::new_u64(0), epoll::EventFlags::ONESHOT)
}

/// Serves the queue to the guest.
struct Receive {
    port: SharedPort,
    input: Arc<OwnedFd>,
    /// There are bytes, but no buffers for them.
    starved: bool,
}

impl Handler for Receive {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        let mut port = lock(&self.port);
        port.follow(work.resets);
        port.take_input();
        let (served, starved) =
            serve_while(&mut work.queue, dma, &mut *port, Port::stage, |port, chain| port.fill(chain, dma))?;
        self.starved = starved;
        Ok(served)
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        (!self.starved).then(|| self.input.as_fd())
    }

    fn idle(&mut self, resets: u64) {
        lock(&self.port).follow(resets);
    }
}

/// Serves the queue from the guest.
struct Transmit {
    port: SharedPort,
    output: Arc<OwnedFd>,
}

impl Handler for Transmit {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        let mut port = lock(&self.port);
        port.follow(work.resets);
        // What there is to hear is only that there is room.
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = epoll::wait(&*self.output, &mut [MaybeUninit::uninit(); 1], Some(&now));
        port.write();
        let (served, _) = serve_while(
            &mut work.queue,
            dma,
            &mut *port,
            |port| port.pending.is_empty(),
            |port, chain| port.accept(chain, dma).map(|()| 0),
        )?;
        Ok(served)
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.output.as_fd())
    }

    fn idle(&mut self, resets: u64) {
        lock(&self.port).follow(resets);
    }
}
