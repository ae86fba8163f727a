//! The virtio devices of a machine, and the threads that serve them: one for each queue.

mod balloon;
mod consoles;
mod disks;
mod gate;
mod mem;
#[cfg(test)]
mod mmio_tests;
mod nets;
mod pmem;
mod shares;
mod slots;
mod sockets;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};

use ruse_devices::Ring;
use ruse_devices::pci::{PciAddress, SlotTaken};
use ruse_engine::HaltPoll;
use ruse_memory::GuestRam;
use ruse_virtio::entropy::{Entropy, EntropyHandler};
use ruse_virtio::ring::RingError;
use ruse_virtio::{Device, Dma, Handler, Served, Transport, VirtioMmio, VirtioPci, Work};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

pub(crate) use balloon::AttachedBalloon;
pub use balloon::{BalloonInfo, BalloonSizes};
pub use consoles::ConsoleError;
pub(crate) use consoles::{AttachedConsole, Consoles};
pub(crate) use disks::{AttachedDisk, OpenDisk};
pub use disks::{DiskInfo, OpenDiskError};
pub(crate) use gate::Gate;
use gate::Pass;
pub(crate) use mem::AttachedMem;
pub use mem::{MemoryInfo, ResizeMemoryError};
pub(crate) use nets::{AttachedNet, OpenNet};
pub use nets::{NetError, NetInfo};
pub(crate) use pmem::OpenPmem;
pub use pmem::PmemError;
pub use shares::OpenShareError;
pub(crate) use shares::{OpenShare, open_all as open_shares, plug_all as plug_shares};
pub use slots::{AttachError, DetachError, DeviceConfig};
pub(crate) use slots::{SlotKeeper, Slots};
pub(crate) use sockets::Sockets;

use crate::board::Board;
use crate::lifecycle::Phase;
use crate::platform::lock;
use crate::report::Outcome;
use crate::threads::panic_text;

/// A device's registers, whatever the machine has for them.
type SharedTransport = Arc<Mutex<dyn Transport>>;

/// Why a device cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlugError {
    #[error(transparent)]
    Slot(#[from] SlotTaken),
    #[error(transparent)]
    Host(#[from] io::Error),
}

/// Plugs in what every machine has.
pub(crate) fn plug_entropy(
    board: &Arc<Board>,
    ram: &GuestRam,
    gsi: impl Fn(PciAddress) -> u8,
) -> Result<Vec<Server>, PlugError> {
    let at = PciAddress::new(crate::pci_slots::ENTROPY, 0);
    let (_, servers) =
        plug(board, ram, at, gsi(at), "rng", Box::new(Entropy), vec![Box::new(EntropyHandler)])?;
    Ok(servers)
}

/// Plugs in a device, whose place is `at` on PCI and follows from that elsewhere, and gives it with the servers of its
/// queues, one for each handler.
fn plug(
    board: &Arc<Board>,
    ram: &GuestRam,
    at: PciAddress,
    gsi: u8,
    name: &str,
    device: Box<dyn Device>,
    handlers: Vec<Box<dyn Handler>>,
) -> Result<(SharedTransport, Vec<Server>), PlugError> {
    if board.platform.has_pci() {
        let (function, servers) = prepare(board, ram, at, gsi, name, device, handlers)?;
        board.plug(at, function.clone())?;
        return Ok((function, servers));
    }
    let function = Arc::new(Mutex::new(VirtioMmio::new(at.id(), gsi, device)));
    board.platform.slots.plug(at, function.clone())?;
    let servers = servers(board, ram, at, name, &(function.clone() as _), handlers)?;
    board.catch_doorbells(at, servers.len() as u16);
    Ok((function, servers))
}

/// The same on PCI, before it is plugged in.
fn prepare(
    board: &Arc<Board>,
    ram: &GuestRam,
    at: PciAddress,
    gsi: u8,
    name: &str,
    device: Box<dyn Device>,
    handlers: Vec<Box<dyn Handler>>,
) -> io::Result<(Arc<Mutex<VirtioPci>>, Vec<Server>)> {
    let function = Arc::new(Mutex::new(VirtioPci::new(at, gsi, device)));
    let servers = servers(board, ram, at, name, &(function.clone() as _), handlers)?;
    Ok((function, servers))
}

/// The servers of a device's queues, with their doorbells.
fn servers(
    board: &Arc<Board>,
    ram: &GuestRam,
    at: PciAddress,
    name: &str,
    function: &SharedTransport,
    handlers: Vec<Box<dyn Handler>>,
) -> io::Result<Vec<Server>> {
    let gone = Arc::<AtomicBool>::default();
    let mut servers = Vec::new();
    for (queue, handler) in (0..).zip(handlers) {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        board.bells.add(Ring { source: at.id(), number: queue }, event.try_clone()?);
        let (board, ram, function, gone) = (board.clone(), ram.clone(), function.clone(), gone.clone());
        servers.push(Server {
            name: format!("{name}.{queue}"),
            board,
            ram,
            function,
            queue,
            event,
            handler,
            idle: true,
            outside: false,
            halt_poll: HaltPoll::default(),
            gone,
        });
    }
    Ok(servers)
}

/// Serves a queue.
pub(crate) struct Server {
    name: String,
    board: Arc<Board>,
    ram: GuestRam,
    function: SharedTransport,
    queue: u16,
    /// The queue's doorbell.
    event: OwnedFd,
    handler: Box<dyn Handler>,
    /// No driver has the queue running: the handler's own source of work does not count.
    idle: bool,
    /// Somebody outside may touch the queue's buffers.
    outside: bool,
    halt_poll: HaltPoll,
    /// The device has been taken out.
    gone: Arc<AtomicBool>,
}

impl Server {
    /// Starts the thread, which leaves when the machine has ended or the device is gone.
    pub(crate) fn spawn(mut self) -> io::Result<JoinHandle<()>> {
        Builder::new().name(self.name.clone()).spawn(move || {
            let failed = match catch_unwind(AssertUnwindSafe(|| self.run())) {
                Ok(Ok(())) => return,
                Ok(Err(error)) => format!("a device cannot go on: {error}"),
                Err(panic) => panic_text(&*panic),
            };
            self.board.lifecycle.end(Outcome::Failed { what: failed, vcpu: None });
            self.board.kick_all();
        })
    }

    fn run(&mut self) -> io::Result<()> {
        let board = self.board.clone();
        // Whoever waits for handlers waits for those outside as well.
        let mut kept: Option<Pass> = None;
        while !self.is_gone() {
            if kept.is_some() && board.lifecycle.phase() != Phase::Running {
                self.hold();
                kept = None;
            }
            // While the machine is held, what is to be done waits.
            let Some(pass) = kept.take().or_else(|| board.gate.enter(&board.lifecycle, &self.gone)) else {
                break;
            };
            let more = self.serve();
            kept = self.outside.then_some(pass);
            if !more {
                self.wait()?;
            }
        }
        if self.is_gone() {
            // No driver is told any more, but those outside are.
            let resets = lock(&self.function).resets();
            self.handler.idle(resets);
        }
        Ok(())
    }

    /// The machine is held: takes back what is outside, for good if a driver that is to come knows nothing of it.
    fn hold(&mut self) {
        let paused = self.board.lifecycle.phase() == Phase::Paused;
        let work = paused.then(|| lock(&self.function).begin(self.queue)).flatten();
        let Some(mut work) = work else { return self.put_down() };
        let result = self.handler.recall(&mut work, &Dma::new(&self.ram));
        self.give_back(work, result);
    }

    /// The queue is not served for now.
    fn put_down(&mut self) {
        let resets = lock(&self.function).resets();
        self.handler.idle(resets);
        if std::mem::take(&mut self.outside) {
            let queue = self.queue;
            self.board.access_function(&*self.function, |function, access| function.recalled(access, queue));
        }
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Waits for a notification, or for the handler's own source of work.
    fn wait(&mut self) -> io::Result<()> {
        let event = self.event.as_fd();
        let source = self.handler.source().filter(|_| !self.idle).unwrap_or(event);
        let look = |time: Option<&Timespec>| {
            poll(&mut [event, source].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)), time)
        };
        let ready = || look(Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) != Ok(0);
        match self.halt_poll.wait(ready, || look(None)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        match rustix::io::read(event, &mut [0; 8]) {
            Ok(_) | Err(Errno::INTR | Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Serves what waits for a while; says whether there is more.
    fn serve(&mut self) -> bool {
        let work = lock(&self.function).begin(self.queue);
        self.idle = work.is_none();
        let Some(mut work) = work else {
            self.put_down();
            return false;
        };
        let result = self.handler.serve(&mut work, &Dma::new(&self.ram));
        if self.handler.take_config_change() {
            self.board.access_function(&*self.function, |function, access| function.config_changed(access));
        }
        if let Some(fault) = self.handler.take_fault() {
            tracing::error!("{}: {fault}: the machine is paused; when this is mended, resume it", self.name);
            self.board.lifecycle.pause();
            self.board.kick_all();
        }
        self.give_back(work, result)
    }

    /// Gives the device its queue back; says whether there is more to be done.
    fn give_back(&mut self, work: Work, result: Result<Served, RingError>) -> bool {
        self.outside = result.as_ref().is_ok_and(|served| served.outside);
        self.board.access_function(&*self.function, |function, access| function.finish(access, work, result))
    }
}
