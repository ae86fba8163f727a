//! All connections of a device, and the files by which its two handlers are woken.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{EventfdFlags, epoll, eventfd};

use super::connection::{Connection, Input, Ports, ROOM, Stage};
use super::packet::{HEADER_LEN, HOST_CID, Header, STREAM, op, shutdown};
use crate::chain::Chain;
use crate::dma::Dma;
use crate::listener::{Entrance, ListenError, connect_to, listen};
use crate::ring::RingError;

/// Most connections at a time.
pub(super) const MOST_CONNECTIONS: usize = 1024;
/// Answers that wait for the guest's buffers, after which the guest is not heard further.
const MOST_REPLIES: usize = 1024;
/// Most bytes of one connection before others have their turn.
const TURN: usize = 64 << 10;
/// Ports of the host's programs begin here, beyond those that programs listen at.
const FIRST_PORT: u32 = 1 << 30;

/// What an event is about; connections have the numbers from [`token::FIRST`] on.
mod token {
    pub(super) const LISTENER: u64 = 0;
    pub(super) const WAKE: u64 = 1;
    pub(super) const FIRST: u64 = 2;
}

/// A packet that waits for buffers of the guest, and how much of its data has gone.
struct Staged {
    header: Header,
    len: usize,
    done: usize,
}

/// Everything that the handlers share.
pub(super) struct Hub {
    cid: u32,
    path: PathBuf,
    entrance: Entrance,
    /// What wakes the handler of the queue to the guest: sockets that can be read, and `wake_input`.
    pub(super) input: Arc<OwnedFd>,
    wake_input: OwnedFd,
    /// What wakes the other: sockets that can be written, and `wake_output`.
    pub(super) output: Arc<OwnedFd>,
    wake_output: OwnedFd,
    connections: BTreeMap<u64, Connection>,
    by_ports: HashMap<Ports, u64>,
    next_id: u64,
    next_port: u32,
    replies: VecDeque<Header>,
    /// The other handler waits until there are fewer replies.
    clogged: bool,
    /// Connections that may have bytes for the guest, in turn.
    ready: VecDeque<u64>,
    staged: Option<Staged>,
    /// The staged packet's data.
    data: Box<[u8]>,
    /// How often the device had been reset when all this began.
    resets: u64,
}

impl Hub {
    pub(super) fn listen(cid: u32, path: &Path) -> Result<Self, ListenError> {
        let host = |source| ListenError::Host { path: path.to_owned(), source };
        Self::new(cid, path, listen(path)?).map_err(host)
    }

    fn new(cid: u32, path: &Path, listener: UnixListener) -> io::Result<Self> {
        let poll = || epoll::create(epoll::CreateFlags::CLOEXEC).map(Arc::new);
        let wake = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let input = poll()?;
        let hub = Self {
            cid,
            path: path.to_owned(),
            entrance: Entrance::new(listener, input.clone(), token::LISTENER)?,
            input,
            wake_input: wake()?,
            output: poll()?,
            wake_output: wake()?,
            connections: BTreeMap::new(),
            by_ports: HashMap::new(),
            next_id: token::FIRST,
            next_port: FIRST_PORT,
            replies: VecDeque::new(),
            clogged: false,
            ready: VecDeque::new(),
            staged: None,
            data: vec![0; TURN].into(),
            resets: 0,
        };
        let watch = |poll: &OwnedFd, fd, token| {
            epoll::add(poll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN)
        };
        watch(&hub.input, hub.wake_input.as_fd(), token::WAKE)?;
        watch(&hub.output, hub.wake_output.as_fd(), token::WAKE)?;
        Ok(hub)
    }

    /// The device has been reset so often: what an earlier driver had is over.
    pub(super) fn follow(&mut self, resets: u64) {
        if resets != self.resets {
            self.resets = resets;
            self.connections.clear();
            self.by_ports.clear();
            self.replies.clear();
            self.ready.clear();
            self.staged = None;
            self.entrance.open();
        }
    }

    /// Looks what the host's programs have done.
    pub(super) fn take_input(&mut self) {
        for (token, gone) in events(&self.input) {
            match token {
                token::LISTENER => self.accept(),
                token::WAKE => quiet(&self.wake_input),
                id => self.readable(id, gone),
            }
        }
    }

    /// Writes to programs that have taken what they had.
    pub(super) fn take_output(&mut self) {
        for (token, _) in events(&self.output) {
            match token {
                token::WAKE => quiet(&self.wake_output),
                id => self.writable(id),
            }
        }
    }

    /// Whether too many answers wait. If so, the handler of the queue from the guest is woken when they do not any more.
    pub(super) fn is_clogged(&mut self) -> bool {
        self.clogged = self.replies.len() >= MOST_REPLIES;
        self.clogged
    }

    fn accept(&mut self) {
        while self.connections.len() < MOST_CONNECTIONS {
            let Some(stream) = self.entrance.accept() else { return };
            if let Some(id) = self.add(stream, Ports::default(), Stage::Greeting(Vec::new())) {
                self.arm_input(id, epoll::EventFlags::IN);
            }
        }
        // Until some connection ends.
        self.entrance.close();
    }

    /// Takes a connection in, of which nothing is waited for yet.
    fn add(&mut self, stream: UnixStream, ports: Ports, stage: Stage) -> Option<u64> {
        let id = self.next_id;
        let data = epoll::EventData::new_u64(id);
        let watched = stream.set_nonblocking(true).and_then(|()| {
            epoll::add(&*self.input, &stream, data, epoll::EventFlags::ONESHOT)?;
            Ok(epoll::add(&*self.output, &stream, data, epoll::EventFlags::ONESHOT)?)
        });
        if let Err(error) = watched {
            tracing::warn!(%error, "a connection of the socket device fails");
            return None;
        }
        self.next_id += 1;
        self.connections.insert(id, Connection::new(stream, ports, stage));
        Some(id)
    }

    /// Waits for an event of a connection, once. Without flags that is its end.
    fn arm_input(&self, id: u64, flags: epoll::EventFlags) {
        self.arm(&self.input, id, flags);
    }

    fn arm(&self, poll: &OwnedFd, id: u64, flags: epoll::EventFlags) {
        let Some(connection) = self.connections.get(&id) else { return };
        let flags = flags | epoll::EventFlags::ONESHOT;
        if let Err(error) = epoll::modify(poll, &connection.stream, epoll::EventData::new_u64(id), flags) {
            tracing::warn!(%error, "a connection of the socket device is not heard any more");
        }
    }

    /// Ends a connection on both sides.
    fn remove(&mut self, id: u64) {
        if let Some(connection) = self.connections.remove(&id) {
            self.unname(&connection.ports, id);
            self.entrance.open();
        }
    }

    fn unname(&mut self, ports: &Ports, id: u64) {
        if self.by_ports.get(ports) == Some(&id) {
            self.by_ports.remove(ports);
        }
    }

    /// Sends the guest a packet without data.
    fn reply(&mut self, id: u64, op: u16, flags: u32) {
        if let Some(connection) = self.connections.get_mut(&id) {
            self.replies.push_back(connection.header(self.cid, op, flags));
            wake(&self.wake_input);
        }
    }

    /// Tells the guest that there is no such connection, and ends it here.
    fn reset(&mut self, id: u64) {
        self.reply(id, op::RST, 0);
        self.remove(id);
    }

    /// The same of a connection of which only the ports are known.
    fn refuse(&mut self, header: &Header) {
        self.replies.push_back(Header {
            src_cid: HOST_CID,
            dst_cid: self.cid.into(),
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: STREAM,
            op: op::RST,
            ..Header::default()
        });
        wake(&self.wake_input);
    }
}

/// What the host's programs do.
impl Hub {
    fn readable(&mut self, id: u64, gone: bool) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match connection.stage {
            Stage::Greeting(_) => self.greet(id),
            // It was waited for its end only.
            Stage::Asked => self.reset(id),
            Stage::Open if connection.host_shut & shutdown::SEND == 0 => self.ready.push_back(id),
            Stage::Open if gone => {
                connection.host_shut = shutdown::BOTH;
                self.settle(id);
            }
            Stage::Open | Stage::Leaving => {}
        }
    }

    fn greet(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match connection.greeting() {
            Ok(Some(guest)) => {
                let ports = self.free_ports(guest);
                if let Some(connection) = self.connections.get_mut(&id) {
                    (connection.ports, connection.stage) = (ports, Stage::Asked);
                }
                self.by_ports.insert(ports, id);
                self.reply(id, op::REQUEST, 0);
                self.arm_input(id, epoll::EventFlags::empty());
            }
            Ok(None) => self.arm_input(id, epoll::EventFlags::IN),
            Err(error) => {
                tracing::debug!(%error, "a program does not say which port it wants");
                self.remove(id);
            }
        }
    }

    /// Ports for a connection to the guest's port; there are more than connections.
    fn free_ports(&mut self, guest: u32) -> Ports {
        loop {
            let ports = Ports { host: self.next_port, guest };
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_PORT);
            if !self.by_ports.contains_key(&ports) {
                return ports;
            }
        }
    }

    fn writable(&mut self, id: u64) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.write();
            self.settle(id);
        }
    }

    /// After a change of a connection: what follows from it.
    fn settle(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.pass_shutdown_on();
        let (waiting, leaving) = (connection.has_output(), connection.stage == Stage::Leaving);
        let over = !waiting && (leaving || connection.guest_shut == shutdown::BOTH);
        let (shut, news) = (connection.shutdown_to_tell(), connection.has_news());
        if waiting {
            self.arm(&self.output, id, epoll::EventFlags::OUT);
        }
        if let Some(shut) = shut.filter(|_| !leaving) {
            self.reply(id, op::SHUTDOWN, shut);
        }
        match over {
            true if leaving => self.remove(id),
            true => self.reset(id),
            false if news && !leaving => self.reply(id, op::CREDIT_UPDATE, 0),
            false => {}
        }
    }
}

/// What the guest does.
impl Hub {
    /// Takes a packet of the guest.
    pub(super) fn packet(&mut self, chain: &Chain, dma: &Dma) -> Result<(), RingError> {
        let mut bytes = [0; HEADER_LEN as usize];
        chain.read(dma, 0, &mut bytes)?;
        let header = Header::from_bytes(bytes);
        if (header.src_cid, header.dst_cid) != (self.cid.into(), HOST_CID) {
            return Ok(());
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        match self.by_ports.get(&ports).copied() {
            _ if header.kind != STREAM => self.refuse(&header),
            Some(id) => self.packet_of(id, &header, chain, dma)?,
            None if header.op == op::REQUEST => self.request(ports, &header),
            None if header.op == op::RST => {}
            None => self.refuse(&header),
        }
        Ok(())
    }

    /// The guest wants to connect to a port of the host.
    fn request(&mut self, ports: Ports, header: &Header) {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{}", ports.host));
        let stream = match self.connections.len() {
            0..MOST_CONNECTIONS => connect_to(Path::new(&path)),
            _ => Err(io::ErrorKind::ConnectionRefused.into()),
        };
        let added = stream.map(|stream| self.add(stream, ports, Stage::Open));
        match added {
            Ok(Some(id)) => {
                self.by_ports.insert(ports, id);
                self.connections.get_mut(&id).into_iter().for_each(|connection| connection.hear(header));
                self.reply(id, op::RESPONSE, 0);
                self.arm_input(id, epoll::EventFlags::IN);
            }
            Ok(None) => self.refuse(header),
            Err(error) => {
                tracing::debug!(%error, port = ports.host, "the guest is refused a connection");
                self.refuse(header);
            }
        }
    }

    fn packet_of(&mut self, id: u64, header: &Header, chain: &Chain, dma: &Dma) -> Result<(), RingError> {
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        connection.hear(header);
        if connection.waits_for_room && connection.guest_room() > 0 {
            connection.waits_for_room = false;
            self.ready.push_back(id);
            wake(&self.wake_input);
        }
        let may_send = connection.guest_shut & shutdown::SEND == 0;
        match (&connection.stage, header.op) {
            (Stage::Asked, op::RESPONSE) => match connection.welcome() {
                Ok(()) => self.arm_input(id, epoll::EventFlags::IN),
                Err(_) => self.reset(id),
            },
            (Stage::Open, op::RW) if may_send && header.len <= ROOM => {
                let mut bytes = vec![0; header.len as usize];
                chain.read(dma, HEADER_LEN, &mut bytes)?;
                match connection.accept(&bytes) {
                    true => self.settle(id),
                    false => self.reset(id),
                }
            }
            (Stage::Open, op::SHUTDOWN) => {
                connection.guest_shut |= header.flags & shutdown::BOTH;
                self.settle(id);
            }
            (Stage::Open, op::CREDIT_REQUEST) => self.reply(id, op::CREDIT_UPDATE, 0),
            (Stage::Open, op::CREDIT_UPDATE) => {}
            (_, op::RST) => self.leave(id),
            _ => self.reset(id),
        }
        Ok(())
    }

    /// The guest has ended a connection. What it had sent still reaches the host's program.
    fn leave(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.stage = Stage::Leaving;
        connection.guest_shut = shutdown::BOTH;
        let ports = connection.ports;
        self.unname(&ports, id);
        self.settle(id);
    }
}

/// What goes to the guest.
impl Hub {
    /// Finds the next packet for the guest, if there is one.
    pub(super) fn stage(&mut self) -> bool {
        while self.staged.is_none() {
            if let Some(header) = self.replies.pop_front() {
                self.staged = Some(Staged { header, len: 0, done: 0 });
                if self.clogged && self.replies.len() < MOST_REPLIES / 2 {
                    self.clogged = false;
                    wake(&self.wake_output);
                }
            } else if let Some(id) = self.ready.pop_front() {
                self.read(id);
            } else {
                return false;
            }
        }
        true
    }

    /// A connection has its turn to send.
    fn read(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.stage != Stage::Open {
            return;
        }
        match connection.read(&mut self.data) {
            Input::Bytes(len) => {
                let header = connection.header(self.cid, op::RW, 0);
                self.staged = Some(Staged { header, len, done: 0 });
                self.ready.push_back(id);
            }
            Input::Nothing => self.arm_input(id, epoll::EventFlags::IN),
            Input::NoRoom => self.reply(id, op::CREDIT_REQUEST, 0),
            Input::End => {
                connection.host_shut |= shutdown::SEND;
                self.settle(id);
                self.arm_input(id, epoll::EventFlags::empty());
            }
        }
    }

    /// Puts the staged packet, or as much of it as there is room for, into a buffer of the guest; gives the bytes written.
    pub(super) fn fill(&mut self, chain: &Chain, dma: &Dma) -> Result<u32, RingError> {
        let Some(staged) = &mut self.staged else { return Ok(0) };
        let room = chain.writable_len().saturating_sub(HEADER_LEN);
        let left = staged.len - staged.done;
        let here = left.min(usize::try_from(room).unwrap_or(usize::MAX));
        if here == 0 && left > 0 {
            return Err(RingError::Chain("a buffer without room for a packet"));
        }
        let header = Header { len: here as u32, ..staged.header };
        chain.write(dma, 0, &header.to_bytes())?;
        chain.write(dma, HEADER_LEN, &self.data[staged.done..staged.done + here])?;
        staged.done += here;
        if staged.done == staged.len {
            self.staged = None;
        }
        Ok(HEADER_LEN as u32 + here as u32)
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        // Somebody may have removed it before.
        let _ = fs::remove_file(&self.path);
    }
}

/// What has happened: tokens, and whether both directions have come to their end.
fn events(poll: &OwnedFd) -> Vec<(u64, bool)> {
    let mut space = [MaybeUninit::<epoll::Event>::uninit(); 64];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    // Interrupted, it is asked again: the file stays readable.
    let found = epoll::wait(poll, &mut space, Some(&now)).map_or(&mut [][..], |(events, _)| events);
    let ends = epoll::EventFlags::HUP | epoll::EventFlags::ERR;
    found.iter().map(|event| ({ event.data }.u64(), { event.flags }.intersects(ends))).collect()
}

fn wake(event: &OwnedFd) {
    // It can only fail because so many signals wait already.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

fn quiet(event: &OwnedFd) {
    let _ = rustix::io::read(event, &mut [0; 8]);
}
