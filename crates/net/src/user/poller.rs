//! What the stack waits for: sockets and time.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use ruse_timer::OneShot;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::time::Timespec;

use super::slab::Id;

/// Most events that are taken at once.
const EVENTS: usize = 64;

/// Who an event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Timer,
    Tcp(Id),
    Udp(Id),
    Echo(Id),
    /// A published port, by its place in the list.
    Listener(u32),
}

impl Token {
    fn bits(self) -> u64 {
        let (kind, rest) = match self {
            Self::Timer => (0, 0),
            Self::Tcp(id) => (1, id.bits()),
            Self::Udp(id) => (2, id.bits()),
            Self::Echo(id) => (3, id.bits()),
            Self::Listener(number) => (4, number.into()),
        };
        kind << 56 | rest
    }

    fn from_bits(bits: u64) -> Self {
        let id = Id::from_bits(bits & ((1 << 56) - 1));
        match bits >> 56 {
            0 => Self::Timer,
            1 => Self::Tcp(id),
            2 => Self::Udp(id),
            3 => Self::Echo(id),
            _ => Self::Listener(bits as u32),
        }
    }
}

/// What has happened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Happened {
    pub(super) token: Token,
    pub(super) readable: bool,
    pub(super) writable: bool,
}

pub(super) struct Poller {
    epoll: OwnedFd,
    timer: OneShot,
    /// What the timer is set to.
    armed: Option<Instant>,
}

impl Poller {
    pub(super) fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = OneShot::new()?;
        epoll::add(&epoll, &timer, EventData::new_u64(Token::Timer.bits()), EventFlags::IN)?;
        Ok(Self { epoll, timer, armed: None })
    }

    /// Readable when anything has happened.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Waits for a flow's socket from now on: each change is told once.
    pub(super) fn watch(&self, socket: impl AsFd, token: Token) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        Ok(epoll::add(&self.epoll, socket, EventData::new_u64(token.bits()), flags)?)
    }

    /// Waits for a listening socket from now on, as long as there is something to be had.
    pub(super) fn listen(&self, socket: impl AsFd, token: Token) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, socket, EventData::new_u64(token.bits()), EventFlags::IN)?)
    }

    /// Does not wait for a listening socket any more.
    pub(super) fn ignore(&self, socket: impl AsFd) {
        if let Err(error) = epoll::delete(&self.epoll, socket) {
            tracing::debug!(%error, "a listening socket was not waited for");
        }
    }

    /// Makes [`Poller::fd`] readable at a time, or at an earlier one that was asked for.
    pub(super) fn arm(&mut self, at: Instant) {
        if self.armed.is_some_and(|armed| armed <= at) {
            return;
        }
        match self.timer.set(at.saturating_duration_since(Instant::now())) {
            Ok(()) => self.armed = Some(at),
            Err(error) => tracing::warn!(%error, "a timer cannot be set"),
        }
    }

    /// What has happened; nothing if nothing has.
    pub(super) fn poll(&mut self) -> Vec<Happened> {
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        if let Err(error) = epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&none)) {
            tracing::debug!(%error, "no events");
        }
        let mut all = Vec::with_capacity(events.len());
        for event in &events {
            let token = Token::from_bits(event.data.u64());
            if token == Token::Timer {
                self.armed = None;
                self.timer.take();
            }
            let flags = event.flags;
            let failed = flags.intersects(EventFlags::ERR | EventFlags::HUP);
            let readable = failed || flags.intersects(EventFlags::IN | EventFlags::RDHUP);
            all.push(Happened { token, readable, writable: failed || flags.contains(EventFlags::OUT) });
        }
        all
    }
}
