//! Carries chains between the guest's ring and the one that a backend serves.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ruse_memory::GuestRam;
use ruse_virtio::ring::{Queue, RingError};
use ruse_virtio::{Chain, Dma, Handler, Served, Work};
use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};

use crate::backend::BackendError;
use crate::device::{Link, Status};
use crate::shadow::Shadow;

/// What the relay waits for.
const CALL: u64 = 0;
const LIFE: u64 = 1;
const RETRY: u64 = 2;
/// How long a backend may take to finish what it has, before it is asked to stop all the same.
const DRAIN: Duration = Duration::from_secs(2);

/// A chain that the backend has, or had.
struct Sent {
    chain: Chain,
    /// When it was made available, in the order of all of its ring.
    order: u64,
}

/// Serves one queue of the guest by way of a ring of its own.
pub(crate) struct Relay {
    link: Arc<Link>,
    index: u16,
    ram: GuestRam,
    shadow: Shadow,
    kick: OwnedFd,
    call: OwnedFd,
    source: OwnedFd,
    /// What the backend has, by the number in the ring.
    sent: Vec<Option<Sent>>,
    under_way: usize,
    order: u64,
    /// To be given back to the guest.
    done: Vec<(Chain, u32)>,
    /// For which driver: [`Work::resets`].
    resets: Option<u64>,
    /// Under which connection the backend serves the ring.
    started: Option<u64>,
}

impl Relay {
    pub(crate) fn new(link: Arc<Link>, index: u16, ram: GuestRam) -> io::Result<Self> {
        let shadow = Shadow::new(link.area.clone(), index);
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let (kick, call) = (event()?, event()?);
        link.wakes(call.try_clone()?);
        let source = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let watch = |file: BorrowedFd, number| {
            epoll::add(&source, file, epoll::EventData::new_u64(number), epoll::EventFlags::IN)
        };
        watch(call.as_fd(), CALL)?;
        watch(link.retry.as_fd(), RETRY)?;
        let sent = (0..link.entries).map(|_| None).collect();
        Ok(Self {
            link,
            index,
            ram,
            shadow,
            kick,
            call,
            source,
            sent,
            under_way: 0,
            order: 0,
            done: Vec::new(),
            resets: None,
            started: None,
        })
    }

    /// Looks what has happened outside. Whether the backend has ended is said.
    fn look(&self) -> Result<bool, BackendError> {
        let mut events = Vec::with_capacity(3);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        epoll::wait(&self.source, spare_capacity(&mut events), Some(&now)).map_err(io::Error::from)?;
        let mut ended = false;
        for event in events {
            match event.data.u64() {
                CALL => drop(rustix::io::read(&self.call, &mut [0; 8])),
                LIFE => ended = true,
                _ => self.link.retry(self.resets.unwrap_or_default()),
            }
        }
        Ok(ended)
    }

    /// Has the backend serve the ring, if it does not yet. `false` while there is none.
    fn start(&mut self, work: &mut Work) -> Result<bool, BackendError> {
        if self.resets != Some(work.resets) {
            self.forget();
            self.resets = Some(work.resets);
        }
        let connection = match self.link.status(work.resets) {
            Status::Connected(connection) => connection,
            Status::Away => {
                self.withdraw(&mut work.queue, None);
                return Ok(false);
            }
            Status::Broken => return Err(BackendError::Closed),
        };
        if self.started == Some(connection) {
            return Ok(true);
        }
        self.withdraw(&mut work.queue, None);
        self.started = Some(connection);
        let indirect = self.link.has_tables();
        self.shadow.reset(indirect)?;
        // Of the one before.
        let _ = rustix::io::read(&self.kick, &mut [0; 8]);
        let setup = self.shadow.setup(self.kick.as_fd(), self.call.as_fd());
        self.link.start(connection, self.index, &setup, work, &self.ram, |life| {
            let data = epoll::EventData::new_u64(LIFE);
            match epoll::add(&self.source, life, data, epoll::EventFlags::RDHUP) {
                // Known from before: the ring was stopped meanwhile.
                Err(rustix::io::Errno::EXIST) => Ok(()),
                result => Ok(result.map_err(io::Error::from)?),
            }
        })?;
        Ok(true)
    }

    /// Takes what the backend gives back. Its buffers were written, which is noted before the guest hears of it.
    fn collect(&mut self) -> Result<(), BackendError> {
        while let Some((head, len)) = self.shadow.take_used()? {
            let sent = &mut self.sent[usize::from(head)];
            if sent.as_ref().is_some_and(|sent| u64::from(len) > sent.chain.writable_len()) {
                return Err(BackendError::Nonsense("it has written more than there is room for"));
            }
            let Some(Sent { chain, .. }) = sent.take() else {
                return Err(BackendError::Nonsense("it gives back a chain that it does not have"));
            };
            self.under_way -= 1;
            self.note_written(&chain);
            self.done.push((chain, len));
        }
        Ok(())
    }

    /// The backend may have written to any byte of these buffers.
    fn note_written(&self, chain: &Chain) {
        Dma::new(&self.ram).written(chain.writable());
    }

    /// Makes chains available to the backend, and gives back what it has answered.
    fn carry(&mut self, queue: &mut Queue, dma: &Dma) -> Result<(), Failure> {
        self.collect()?;
        self.give_back(queue, dma)?;
        queue.disable_notifications(dma)?;
        let before = self.order;
        loop {
            match queue.pop(dma)? {
                Some(chain) => match self.send(chain, dma)? {
                    None => {}
                    Some(chain) => {
                        // What comes back makes room.
                        queue.put_back(chain);
                        break;
                    }
                },
                None if queue.enable_notifications(dma)? => {}
                None => break,
            }
        }
        if self.order != before && self.shadow.publish().map_err(BackendError::Host)? {
            // It can only fail because so many wait already.
            let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
        }
        // A chain without buffers is answered at once.
        self.give_back(queue, dma)?;
        Ok(())
    }

    /// Gives the guest all at once what was answered: a frame may be in several chains.
    fn give_back(&mut self, queue: &mut Queue, dma: &Dma) -> Result<(), RingError> {
        if !self.done.is_empty() {
            let done: Vec<_> = self.done.iter().map(|(chain, len)| (chain, *len)).collect();
            queue.push_together(dma, &done)?;
        }
        self.done.clear();
        Ok(())
    }

    /// Makes a chain available to the backend; gives it back while there is no room.
    fn send(&mut self, chain: Chain, dma: &Dma) -> Result<Option<Chain>, Failure> {
        let parts = [(chain.readable(), false), (chain.writable(), true)];
        let buffers =
            parts.iter().flat_map(|(buffers, write)| buffers.iter().map(|buffer| (*buffer, *write)));
        // Some backends take no empty ones.
        let buffers: Vec<_> = buffers.filter(|(buffer, _)| buffer.len > 0).collect();
        for &(buffer, write) in &buffers {
            dma.check_buffer(buffer, write)?;
        }
        if buffers.is_empty() {
            self.done.push((chain, 0));
            return Ok(None);
        }
        let Some(head) = self.shadow.add(&buffers).map_err(BackendError::Host)? else {
            return Ok(Some(chain));
        };
        self.sent[usize::from(head)] = Some(Sent { chain, order: self.order });
        self.under_way += 1;
        self.order += 1;
        Ok(None)
    }

    /// The backend serves the ring no more. What it has not answered is in the queue again, in the order of before.
    fn withdraw(&mut self, queue: &mut Queue, drain: Option<Duration>) {
        self.stop(drain).into_iter().rev().for_each(|chain| queue.put_back(chain));
    }

    /// The backend serves the ring no more. Gives what it has not answered; `drain`: it gets some time for that.
    fn stop(&mut self, drain: Option<Duration>) -> Vec<Chain> {
        if let Some(connection) = self.started.take() {
            let limit = Instant::now() + drain.unwrap_or_default();
            while self.under_way > 0 && self.wait_call(limit) {
                if let Err(error) = self.collect() {
                    self.link.fail(connection, &error, self.resets.unwrap_or_default());
                    break;
                }
            }
            self.link.stop(connection, self.index, self.resets.unwrap_or_default());
            // What it says at last counts as well, unless it has no sense.
            let _ = self.collect();
        }
        let mut kept: Vec<_> = self.sent.iter_mut().filter_map(Option::take).collect();
        self.under_way = 0;
        kept.sort_by_key(|sent| sent.order);
        let kept: Vec<_> = kept.into_iter().map(|sent| sent.chain).collect();
        kept.iter().for_each(|chain| self.note_written(chain));
        kept
    }

    /// Waits for the backend to answer something; `false` when the time is over.
    fn wait_call(&self, limit: Instant) -> bool {
        let left = limit.saturating_duration_since(Instant::now());
        let wait = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut files = [PollFd::new(&self.call, PollFlags::IN)];
        let called = !left.is_zero() && poll(&mut files, Some(&wait)).is_ok_and(|count| count > 0);
        let _ = rustix::io::read(&self.call, &mut [0; 8]);
        called
    }

    /// Nothing of the driver's is known any more.
    fn forget(&mut self) {
        drop(self.stop(None));
        self.done.clear();
    }

    /// Carries chains between the guest and the backend, if there is one.
    fn relay(&mut self, work: &mut Work, dma: &Dma) -> Result<(), Failure> {
        if self.look()? {
            return Err(BackendError::Closed.into());
        }
        if self.start(work)? { self.carry(&mut work.queue, dma) } else { Ok(()) }
    }

    /// The backend has failed: the next one goes on, or the device needs a reset.
    fn failed(&mut self, error: &BackendError, work: &mut Work) -> Result<(), RingError> {
        if let Some(connection) = self.started.or_else(|| self.link.connection()) {
            self.link.fail(connection, error, work.resets);
        }
        self.withdraw(&mut work.queue, None);
        match self.link.status(work.resets) {
            Status::Broken => Err(RingError::Backend),
            _ => Ok(()),
        }
    }

    /// Gives back what was answered at last; `more`: it is to be looked whether another backend is there.
    fn served(&mut self, work: &mut Work, dma: &Dma, more: bool) -> Result<Served, RingError> {
        self.give_back(&mut work.queue, dma)?;
        let interrupt = work.queue.needs_interrupt(dma)?;
        Ok(Served { interrupt, more, outside: self.started.is_some() })
    }
}

/// Why chains are carried no further.
enum Failure {
    Ring(RingError),
    Backend(BackendError),
}

impl From<RingError> for Failure {
    fn from(error: RingError) -> Self {
        Self::Ring(error)
    }
}

impl From<BackendError> for Failure {
    fn from(error: BackendError) -> Self {
        Self::Backend(error)
    }
}

impl Handler for Relay {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        let served = match self.relay(work, dma) {
            Ok(()) => self.served(work, dma, false),
            Err(Failure::Backend(error)) => {
                self.failed(&error, work).and_then(|()| self.served(work, dma, true))
            }
            Err(Failure::Ring(error)) => Err(error),
        };
        if served.is_err() {
            self.forget();
        }
        served
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.source.as_fd())
    }

    fn idle(&mut self, _resets: u64) {
        self.forget();
    }

    fn recall(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        self.withdraw(&mut work.queue, self.link.drains.then_some(DRAIN));
        self.served(work, dma, false)
    }
}
