//! Interfaces of the host: taps, also at a bridge, and macvtaps. Frames pass between them and the guest with what is left
//! to be done of them.

mod control;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::epoll;
use rustix::io::Errno;

use crate::frame::LARGEST;
use crate::netns;
use crate::{Driver, Network, Offer, Offloads, Port, Received, Receiver, Sender, Slice, vectors};
use control::Interface;

/// Most pairs of queues.
pub const MOST_PAIRS: u16 = 16;

/// Which interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TapKind {
    /// A tap that is there already.
    Tap(String),
    /// A new tap at a bridge that is there already; it goes with the machine.
    Bridge(String),
    /// A macvtap that is there already.
    Macvtap(String),
}

/// An interface, and how it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapConfig {
    /// Which one.
    pub kind: TapKind,
    /// Pairs of queues.
    pub pairs: u16,
    /// The network namespace that it is in, by path or name; without one, that of the process.
    pub namespace: Option<PathBuf>,
    /// The largest packet, if not the interface's own.
    pub mtu: Option<u16>,
}

/// Why there is no interface.
#[derive(Debug, thiserror::Error)]
#[error("--net: cannot use {what}: {source}")]
pub struct TapError {
    what: String,
    source: io::Error,
}

/// A queue of an interface.
struct Queue {
    file: File,
    /// What the receiver waits for: the file, while the queue is in use.
    epoll: OwnedFd,
}

/// An interface of the host.
pub struct Tap {
    queues: Vec<Queue>,
    /// Queues in use.
    active: Mutex<u16>,
    mtu: u16,
    mac: Option<[u8; 6]>,
    uso: bool,
    complained: AtomicBool,
    /// The interface has been deleted.
    gone: AtomicBool,
}

impl Tap {
    /// Opens an interface.
    pub fn open(config: &TapConfig) -> Result<(Arc<Self>, Vec<Port>), TapError> {
        let what = || match &config.kind {
            TapKind::Tap(name) => format!("tap '{name}'"),
            TapKind::Bridge(name) => format!("bridge '{name}'"),
            TapKind::Macvtap(name) => format!("macvtap '{name}'"),
        };
        let error = |source| TapError { what: what(), source };
        let opened = netns::within(config.namespace.as_deref(), || control::open(&config.kind, config.pairs));
        let Interface { files, mtu, mac } = opened.map_err(error)?;
        let mut queues = Vec::new();
        for file in files {
            let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|errno| error(errno.into()))?;
            queues.push(Queue { file, epoll });
        }
        let uso = control::set_offloads(&queues[0].file, Offloads::CHECKSUM | Offloads::USO).is_ok();
        let active = Mutex::new(queues.len() as u16);
        let mtu = config.mtu.unwrap_or(mtu);
        let [complained, gone] = [false; 2].map(AtomicBool::new);
        let tap = Arc::new(Self { queues, active, mtu, mac, uso, complained, gone });
        for queue in &tap.queues {
            queue.watch().map_err(error)?;
        }
        let port = |number| Port {
            sender: Box::new(TapSender { tap: tap.clone(), number }),
            receiver: Box::new(TapReceiver { tap: tap.clone(), number, buffer: vec![0; LARGEST], held: 0 }),
        };
        Ok((tap.clone(), (0..tap.queues.len()).map(port).collect()))
    }

    /// The Ethernet address that the guest has to have for frames to come through, if there is one.
    pub fn mac(&self) -> Option<[u8; 6]> {
        self.mac
    }

    /// The file of its first queue, by which the kernel can pass frames itself.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.queues[0].file.as_fd()
    }

    fn complain(&self, error: &dyn std::fmt::Display) {
        if !self.complained.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, "an interface of the host fails; more of its errors are not told");
        }
    }

    /// A queue is in a bad state: it is not in use, or there is no interface any more.
    fn look_at_bad(&self, number: usize) {
        let active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        if number >= usize::from(*active) {
            return;
        }
        // Its file would be readable for ever.
        if let Err(error) = epoll::delete(&self.queues[number].epoll, &self.queues[number].file) {
            tracing::debug!(%error, "a queue is not waited for already");
        }
        if !self.gone.swap(true, Ordering::AcqRel) {
            tracing::warn!("an interface of the host has been deleted: the guest's link is down");
        }
    }
}

impl Queue {
    fn watch(&self) -> io::Result<()> {
        let data = epoll::EventData::new_u64(0);
        Ok(epoll::add(&self.epoll, &self.file, data, epoll::EventFlags::IN)?)
    }

    /// Has the interface use the queue, or not.
    fn set_active(&self, on: bool) -> io::Result<()> {
        if on {
            control::attach(&self.file, true)?;
            self.watch()
        } else {
            epoll::delete(&self.epoll, &self.file)?;
            control::attach(&self.file, false)
        }
    }
}

impl Network for Tap {
    fn offer(&self) -> Offer {
        let tso = Offloads::CHECKSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN;
        let all = if self.uso { tso | Offloads::USO } else { tso };
        Offer { takes: all, gives: all, mtu: Some(self.mtu) }
    }

    fn start(&self, driver: Driver) {
        self.set_offloads(driver.offloads);
    }

    fn set_offloads(&self, offloads: Offloads) {
        if let Err(error) = control::set_offloads(&self.queues[0].file, offloads) {
            self.complain(&error);
        }
    }

    fn set_pairs(&self, pairs: u16) {
        let mut active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_connected() {
            return;
        }
        for number in pairs.min(*active)..pairs.max(*active) {
            let queue = self.queues.get(usize::from(number));
            if let Some(Err(error)) = queue.map(|queue| queue.set_active(number < pairs)) {
                self.complain(&error);
            }
        }
        *active = pairs;
    }

    fn is_connected(&self) -> bool {
        !self.gone.load(Ordering::Acquire)
    }
}

struct TapSender {
    tap: Arc<Tap>,
    number: usize,
}

impl Sender for TapSender {
    fn send(&mut self, frame: &[Slice]) {
        if let Err(error) = vectors::write(self.tap.queues[self.number].file.as_fd(), frame)
            && error.kind() != io::ErrorKind::WouldBlock
            // What makes no sense is the guest's affair.
            && error.kind() != io::ErrorKind::InvalidInput
            && self.tap.is_connected()
        {
            self.tap.complain(&error);
        }
    }
}

struct TapReceiver {
    tap: Arc<Tap>,
    number: usize,
    buffer: Vec<u8>,
    /// Bytes of a frame in it that nobody has taken.
    held: usize,
}

impl Receiver for TapReceiver {
    fn source(&self) -> BorrowedFd<'_> {
        self.tap.queues[self.number].epoll.as_fd()
    }

    fn receive(&mut self, take: &mut dyn FnMut(&[&[u8]]) -> bool) -> Received {
        while self.held == 0 {
            match rustix::io::read(&self.tap.queues[self.number].file, &mut self.buffer[..]) {
                Ok(len) => self.held = len,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Received::Nothing,
                Err(Errno::BADFD) => {
                    self.tap.look_at_bad(self.number);
                    return Received::Nothing;
                }
                Err(error) => {
                    self.tap.complain(&error);
                    return Received::Nothing;
                }
            }
        }
        if !take(&[&self.buffer[..self.held]]) {
            return Received::Refused;
        }
        self.held = 0;
        Received::Taken
    }
}
