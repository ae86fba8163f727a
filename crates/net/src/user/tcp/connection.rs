//! One connection: a socket of the host on one side, the guest's TCP on the other.
//!
//! Bytes from the guest go into the socket; what it does not take waits here, and makes the window smaller. Bytes from the
//! socket stay here until the guest has acknowledged them. The way to the guest loses nothing but what its own system
//! drops, so there is no control of congestion; what is lost is sent again, all from there on.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::{Errno, readv};
use rustix::net::{Shutdown, sockopt};

use super::segment::{ACK, FIN, RST, SYN, Segment};
use crate::user::addresses::peer;
use crate::user::ring::Ring;
use crate::user::wire::Mac;
use crate::{Slice, vectors};

/// Bytes that wait in each direction at most. The window of the guest is never larger.
const ROOM: usize = 256 << 10;
/// By how many bits our windows are shifted.
const SHIFT: u8 = 7;
/// How long an acknowledgement may take; twice as long after each try.
const PATIENCE: Duration = Duration::from_millis(500);
/// Tries until the guest is given up, and until it takes no longer from one to the next.
const MOST_TRIES: u32 = 10;
const SLOWEST: u32 = 6;
/// How long a connection of which one side has ended may be silent. Routers have to give it four minutes (RFC 5382, REQ-5).
pub(in crate::user) const HALF_CLOSED: Duration = Duration::from_secs(900);
/// Acknowledgements of the same byte that mean that what follows it is lost (RFC 5681, 3.2).
const DUPLICATES: u8 = 3;
/// The segment of those who do not say (RFC 9293, 3.7.1), and the least that is believed.
const DEFAULT_MSS: u16 = 536;
const LEAST_MSS: u16 = 64;
/// Ports for peers whose own is in use.
const OTHER_PORTS: std::ops::RangeInclusive<u16> = 49152..=65535;

/// Who talks to whom, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::user) struct Flow {
    pub(in crate::user) guest: SocketAddr,
    pub(in crate::user) remote: SocketAddr,
}

impl Flow {
    /// That of a peer of the host's which comes to a published port, if one `is_free`: with the peer's own port, unless
    /// another has the same that looks the same to the guest.
    pub(in crate::user) fn to_guest(
        guest: SocketAddr,
        from: SocketAddr,
        is_free: impl Fn(&Self) -> bool,
    ) -> Option<Self> {
        let ports = std::iter::once(from.port()).chain(OTHER_PORTS);
        let seen = peer(from.ip());
        ports.map(|port| Self { guest, remote: SocketAddr::new(seen, port) }).find(is_free)
    }
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest has called; the host connects.
    Connecting,
    /// The host has connected; the guest has to hear of it.
    Answering,
    /// The host's peer has called; the guest has to answer.
    Calling,
    /// Bytes flow.
    Open,
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Alive,
    /// It is over, and the guest knows.
    Done,
    /// It is over, and the guest does not know.
    Reset,
    /// The host could not connect.
    Failed(Errno),
}

/// A segment to be sent: its header, and which bytes of those that wait.
pub(super) struct Outgoing {
    pub(super) segment: Segment,
    pub(super) offset: usize,
    pub(super) len: usize,
}

pub(super) struct Connection {
    pub(super) flow: Flow,
    pub(super) mac: Mac,
    socket: OwnedFd,
    phase: Phase,
    /// It is in the list of those that may have something to send.
    pub(super) queued: bool,
    /// What the socket was last heard to be.
    readable: bool,
    writable: bool,

    /// What the guest has not acknowledged, from the sequence number `first` on.
    to_guest: Ring,
    first: u32,
    /// What is sent next, and the furthest that was sent.
    next: u32,
    furthest: u32,
    window: u32,
    shift: u8,
    pub(super) mss: u16,
    /// The host's peer sends no more.
    ended: bool,
    end_acknowledged: bool,
    duplicates: u8,
    /// When what was sent has to be acknowledged.
    pub(super) deadline: Option<Instant>,
    tries: u32,
    /// One side has ended: when the connection does, if nothing happens until then.
    expiry: Option<Instant>,
    /// A byte is to be sent though the window is closed.
    probe: bool,

    /// What the socket has not taken.
    to_host: Ring,
    expected: u32,
    guest_ended: bool,
    shut: bool,
    scaled: bool,
    /// The window that the guest knows.
    told: usize,
    acknowledge: bool,
}

impl Connection {
    fn new(flow: Flow, mac: Mac, socket: OwnedFd, phase: Phase, start: u32) -> Self {
        Self {
            flow,
            mac,
            socket,
            phase,
            queued: false,
            readable: false,
            writable: false,
            to_guest: Ring::new(ROOM),
            first: start,
            next: start,
            furthest: start,
            window: 0,
            shift: 0,
            mss: DEFAULT_MSS,
            ended: false,
            end_acknowledged: false,
            duplicates: 0,
            deadline: None,
            tries: 0,
            expiry: None,
            probe: false,
            to_host: Ring::new(ROOM),
            expected: 0,
            guest_ended: false,
            shut: false,
            scaled: true,
            told: 0,
            acknowledge: false,
        }
    }

    /// The guest has called, and the host's socket connects. `start` is our first sequence number.
    pub(super) fn from_guest(
        flow: Flow,
        mac: Mac,
        socket: OwnedFd,
        call: &Segment,
        start: u32,
        most: u16,
    ) -> Self {
        let mut connection = Self::new(flow, mac, socket, Phase::Connecting, start);
        connection.meet(call, most);
        connection
    }

    /// The host's peer has called, and the guest has to be.
    pub(super) fn to_guest(flow: Flow, mac: Mac, socket: OwnedFd, start: u32) -> Self {
        Self::new(flow, mac, socket, Phase::Calling, start)
    }

    /// Takes what a SYN says.
    fn meet(&mut self, call: &Segment, most: u16) {
        self.expected = call.seq.wrapping_add(1);
        self.mss = call.mss.unwrap_or(DEFAULT_MSS).clamp(LEAST_MSS, most);
        self.shift = call.shift.unwrap_or(0);
        self.scaled = call.shift.is_some();
        // Windows of a SYN are not shifted (RFC 7323, 2.2).
        self.window = call.window.into();
    }

    /// The socket, to be watched.
    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// The socket is to end with a reset when it is closed.
    pub(super) fn abort(&self) {
        if let Err(error) = sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO)) {
            tracing::debug!(%error, "a connection ends without a reset");
        }
    }

    /// Something has happened to the socket.
    pub(super) fn host_event(&mut self, readable: bool, writable: bool) -> Fate {
        (self.readable, self.writable) = (self.readable | readable, self.writable | writable);
        if self.phase == Phase::Connecting {
            return match sockopt::socket_error(&self.socket) {
                Ok(Ok(())) if writable => {
                    self.phase = Phase::Answering;
                    Fate::Alive
                }
                Ok(Ok(())) => Fate::Alive,
                Ok(Err(error)) | Err(error) => Fate::Failed(error),
            };
        }
        if writable { self.drain() } else { Fate::Alive }
    }

    /// A segment of the guest, with its payload. `most` is the largest segment that goes through.
    pub(super) fn guest_segment(&mut self, segment: &Segment, payload: &[Slice], most: u16) -> Fate {
        if segment.has(RST) {
            return self.guest_reset(segment);
        }
        match self.phase {
            Phase::Connecting => Fate::Alive,
            Phase::Calling => {
                if segment.flags & (SYN | ACK) == SYN | ACK && segment.ack == self.furthest {
                    self.meet(segment, most);
                    self.open(segment.ack);
                    self.acknowledge = true;
                }
                Fate::Alive
            }
            Phase::Answering | Phase::Open if segment.has(SYN) => {
                // The guest has not heard the answer, or means another connection, of which it hears then.
                (self.next, self.acknowledge) = (self.first, true);
                Fate::Alive
            }
            Phase::Answering | Phase::Open if !segment.has(ACK) => Fate::Alive,
            Phase::Answering | Phase::Open => {
                self.acknowledged(segment, vectors::total(payload));
                if self.phase == Phase::Open { self.take(segment, payload) } else { Fate::Alive }
            }
        }
    }

    /// Refuses a segment by which the guest takes our call for a part of a connection of the same ends that it still
    /// remembers (RFC 9293, 3.10.7.3): whether a reset is to be sent for it, behind which we call again.
    pub(super) fn refuses(&mut self, segment: &Segment) -> bool {
        let answers = segment.has(ACK) && !segment.has(RST);
        let refused = self.phase == Phase::Calling && answers && segment.ack != self.furthest;
        if refused {
            self.next = self.first;
        }
        refused
    }

    /// Resets that do not fit may be anybody's (RFC 5961, 3.2).
    fn guest_reset(&mut self, segment: &Segment) -> Fate {
        let fits = match self.phase {
            Phase::Connecting => true,
            Phase::Calling => segment.has(ACK) && segment.ack == self.furthest,
            Phase::Answering | Phase::Open => segment.seq == self.expected,
        };
        if fits {
            self.abort();
            return Fate::Done;
        }
        self.acknowledge = self.phase != Phase::Calling;
        Fate::Alive
    }

    /// The guest has acknowledged our SYN.
    fn open(&mut self, first: u32) {
        self.phase = Phase::Open;
        (self.first, self.next, self.furthest) = (first, first, first);
        (self.deadline, self.tries) = (None, 0);
        (self.readable, self.writable) = (true, true);
    }

    fn acknowledged(&mut self, segment: &Segment, len: usize) {
        let (count, sent) = (segment.ack.wrapping_sub(self.first), self.furthest.wrapping_sub(self.first));
        if count > sent {
            // What was never sent is told what was; what was acknowledged long ago is nothing new.
            self.acknowledge |= (count as i32) > 0;
            return;
        }
        let window = u32::from(segment.window) << self.shift;
        if self.phase == Phase::Answering {
            if count == 0 {
                return;
            }
            self.open(segment.ack);
        } else if count > 0 {
            let bytes = (count as usize).min(self.to_guest.len());
            self.to_guest.consume(bytes);
            self.end_acknowledged |= count as usize > bytes;
            self.first = segment.ack;
            if (self.next.wrapping_sub(self.first) as i32) < 0 {
                self.next = self.first;
            }
            (self.duplicates, self.tries) = (0, 0);
            self.deadline = (self.next != self.first).then(|| Instant::now() + PATIENCE);
        } else if len == 0 && !segment.has(FIN) && window == self.window && self.next != self.first {
            self.duplicates = self.duplicates.saturating_add(1);
            if self.duplicates == DUPLICATES {
                self.next = self.first;
            }
        }
        self.window = window;
    }

    /// Takes payload and the end.
    fn take(&mut self, segment: &Segment, payload: &[Slice]) -> Fate {
        let (len, end) = (vectors::total(payload), segment.has(FIN));
        if len == 0 && !end {
            // An empty segment before what is expected asks whether somebody is there (RFC 9293, 3.8.4 and 3.10.7.4).
            self.acknowledge |= (segment.seq.wrapping_sub(self.expected) as i32) < 0;
            return Fate::Alive;
        }
        self.acknowledge = true;
        let skip = self.expected.wrapping_sub(segment.seq) as usize;
        if skip > len || self.guest_ended {
            return Fate::Alive;
        }
        let rest = len - skip;
        let taken = match self.pass_on(&vectors::part(payload, skip, rest)) {
            Ok(taken) => taken,
            Err(error) => {
                tracing::debug!(%error, "a connection has broken");
                return Fate::Reset;
            }
        };
        self.expected = self.expected.wrapping_add(taken as u32);
        if end && taken == rest {
            self.expected = self.expected.wrapping_add(1);
            self.guest_ended = true;
            self.shut_down();
        }
        Fate::Alive
    }

    /// Brings bytes into the socket, or keeps them if there is room.
    fn pass_on(&mut self, payload: &[Slice]) -> io::Result<usize> {
        let len = vectors::total(payload).min(self.to_host.free());
        let mut sent = 0;
        if len > 0 && self.to_host.is_empty() && self.writable {
            match vectors::send(self.socket.as_fd(), &vectors::part(payload, 0, len), libc::MSG_DONTWAIT) {
                Ok(count) => sent = count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            self.writable = sent == len;
        }
        if sent < len {
            sent += self.to_host.append(&vectors::part(payload, sent, len - sent));
        }
        Ok(sent)
    }

    /// Brings what waits into the socket.
    fn drain(&mut self) -> Fate {
        while !self.to_host.is_empty() {
            match rustix::io::writev(&self.socket, &self.to_host.all()) {
                Ok(count) => self.to_host.consume(count),
                Err(Errno::AGAIN) => {
                    self.writable = false;
                    break;
                }
                Err(Errno::INTR) => {}
                Err(_) => return Fate::Reset,
            }
        }
        // The guest waits until it hears of a window that has opened.
        self.acknowledge |= self.told < ROOM / 2 && self.to_host.free() >= ROOM / 2;
        self.shut_down();
        Fate::Alive
    }

    /// Passes the guest's end on, behind all its bytes.
    fn shut_down(&mut self) {
        if self.guest_ended && self.to_host.is_empty() && !self.shut {
            self.shut = true;
            if let Err(error) = rustix::net::shutdown(&self.socket, Shutdown::Write) {
                tracing::debug!(%error, "a connection has broken");
            }
        }
    }

    /// Reads what the host's peer has sent, if less than `enough` waits to be sent.
    fn fill(&mut self, enough: usize) -> Result<(), Errno> {
        let sent = self.next.wrapping_sub(self.first) as usize;
        while self.readable && !self.ended && self.to_guest.free() > 0 && self.to_guest.len() < sent + enough
        {
            match readv(&self.socket, &mut self.to_guest.room()) {
                Ok(0) => self.ended = true,
                Ok(count) => self.to_guest.commit(count),
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What is to be sent next; `most` bytes of payload at most.
    pub(super) fn outgoing(&mut self, most: usize, own_mss: u16) -> Result<Option<Outgoing>, Fate> {
        match self.phase {
            Phase::Connecting => return Ok(None),
            Phase::Answering | Phase::Calling => {
                return Ok((self.next == self.first).then(|| self.call(own_mss)));
            }
            Phase::Open => {}
        }
        self.fill(most).map_err(|_| Fate::Reset)?;
        let sent = self.next.wrapping_sub(self.first) as usize;
        let waiting = self.to_guest.len().saturating_sub(sent);
        let open = (self.window as usize).saturating_sub(sent);
        let len = waiting.min(open).min(most);
        // Few bytes are worth a segment if they are all, or if nobody knows when there will be more room.
        let worth = len > 0 && (len == waiting || len >= usize::from(self.mss) || sent == 0);
        let end = self.ended && len == waiting && !self.end_acknowledged && sent <= self.to_guest.len();
        let flags = ACK | if end { FIN } else { 0 };
        if worth || end {
            return Ok(Some(self.segment(flags, sent, len)));
        }
        if waiting > 0 && open == 0 {
            if self.probe {
                return Ok(Some(self.segment(ACK, sent, 1)));
            }
            self.deadline.get_or_insert_with(|| Instant::now() + PATIENCE);
        }
        Ok(self.acknowledge.then(|| self.segment(ACK, sent, 0)))
    }

    fn ports(&self) -> Segment {
        let Flow { guest, remote } = self.flow;
        Segment { from_port: remote.port(), to_port: guest.port(), seq: self.next, ..Segment::default() }
    }

    /// Our SYN, with the acknowledgement of the guest's if there was one.
    fn call(&self, own_mss: u16) -> Outgoing {
        let flags = if self.phase == Phase::Answering { SYN | ACK } else { SYN };
        let segment = Segment {
            flags,
            ack: self.expected,
            window: self.to_host.free().min(0xffff) as u16,
            mss: Some(own_mss),
            shift: self.scaled.then_some(SHIFT),
            ..self.ports()
        };
        Outgoing { segment, offset: 0, len: 0 }
    }

    fn segment(&self, flags: u8, offset: usize, len: usize) -> Outgoing {
        let free = self.to_host.free();
        let window = if self.scaled { free >> SHIFT } else { free }.min(0xffff) as u16;
        Outgoing { segment: Segment { flags, ack: self.expected, window, ..self.ports() }, offset, len }
    }

    /// The reset of this connection.
    pub(super) fn reset(&self) -> Segment {
        Segment { flags: RST | ACK, ack: self.expected, seq: self.furthest, ..self.ports() }
    }

    /// The bytes of a segment.
    pub(super) fn payload(&self, outgoing: &Outgoing) -> [&[u8]; 2] {
        self.to_guest.range(outgoing.offset, outgoing.len)
    }

    /// A segment is on its way.
    pub(super) fn sent(&mut self, outgoing: &Outgoing) {
        let ends = outgoing.segment.flags & (SYN | FIN) != 0;
        self.next = self.next.wrapping_add(outgoing.len as u32 + u32::from(ends));
        if (self.next.wrapping_sub(self.furthest) as i32) > 0 {
            self.furthest = self.next;
        }
        (self.acknowledge, self.probe) = (false, false);
        self.told = usize::from(outgoing.segment.window) << if self.scaled { SHIFT } else { 0 };
        if self.next != self.first {
            self.deadline.get_or_insert_with(|| Instant::now() + PATIENCE);
        }
    }

    /// Nothing is to be sent for now. If one side has ended, it is not waited for the other for ever.
    pub(super) fn rest(&mut self) {
        let half_closed = self.guest_ended || self.ended;
        self.expiry = half_closed.then(|| Instant::now() + HALF_CLOSED);
    }

    /// When something has to be done if nothing happens.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadline.into_iter().chain(self.expiry).min()
    }

    /// A deadline has passed: what was sent is sent again, or a closed window is tried.
    pub(super) fn late(&mut self, now: Instant) -> Fate {
        if self.expiry.is_some_and(|at| at <= now) {
            return Fate::Reset;
        }
        if self.deadline.is_none_or(|at| at > now) {
            return Fate::Alive;
        }
        self.tries += 1;
        if self.phase == Phase::Open && self.window == 0 {
            // A guest that answers may keep its window closed for ever.
            (self.probe, self.tries) = (true, self.tries.min(SLOWEST));
        }
        if self.tries > MOST_TRIES {
            self.abort();
            return Fate::Reset;
        }
        self.next = self.first;
        self.deadline = Some(now + PATIENCE * (1 << self.tries.min(SLOWEST)));
        Fate::Alive
    }

    /// Both sides have ended, and both know.
    pub(super) fn is_over(&self) -> bool {
        self.end_acknowledged && self.shut && !self.acknowledge
    }
}
