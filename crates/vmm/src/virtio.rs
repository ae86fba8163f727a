//! The virtio devices of a machine, and the threads that serve them: one for each queue.

mod disks;
mod gate;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};

use ruse_devices::Ring;
use ruse_devices::pci::{PciAddress, SlotTaken};
use ruse_memory::GuestRam;
use ruse_virtio::entropy::{Entropy, EntropyHandler};
use ruse_virtio::{Device, Dma, Handler, VirtioPci};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

pub(crate) use disks::AttachedDisk;
pub use disks::DiskInfo;
pub(crate) use gate::Gate;

use crate::board::Board;
use crate::platform::lock;
use crate::report::Outcome;
use crate::threads::panic_text;

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

/// Plugs in a device, and gives it with the servers of its queues, one for each handler.
fn plug(
    board: &Arc<Board>,
    ram: &GuestRam,
    at: PciAddress,
    gsi: u8,
    name: &str,
    device: Box<dyn Device>,
    handlers: Vec<Box<dyn Handler>>,
) -> Result<(Arc<Mutex<VirtioPci>>, Vec<Server>), PlugError> {
    let function = Arc::new(Mutex::new(VirtioPci::new(at, gsi, device)));
    board.plug(at, function.clone())?;
    let mut servers = Vec::new();
    for (queue, handler) in (0..).zip(handlers) {
        let event = eventfd(0, EventfdFlags::CLOEXEC).map_err(io::Error::from)?;
        board.bells.add(Ring { source: at.id(), number: queue }, event.try_clone()?);
        let (board, ram, function) = (board.clone(), ram.clone(), function.clone());
        servers.push(Server { name: format!("{name}.{queue}"), board, ram, function, queue, event, handler });
    }
    Ok((function, servers))
}

/// Serves a queue.
pub(crate) struct Server {
    name: String,
    board: Arc<Board>,
    ram: GuestRam,
    function: Arc<Mutex<VirtioPci>>,
    queue: u16,
    /// The queue's doorbell.
    event: OwnedFd,
    handler: Box<dyn Handler>,
}

impl Server {
    /// Starts the thread, which leaves when the machine has ended.
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
        loop {
            // While the machine is held, what is to be done waits.
            while let Some(_pass) = board.gate.enter(&board.lifecycle) {
                if !self.serve() {
                    break;
                }
            }
            if board.lifecycle.has_ended() {
                return Ok(());
            }
            match rustix::io::read(&self.event, &mut [0; 8]) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Serves what waits for a while; says whether there is more.
    fn serve(&mut self) -> bool {
        let Some(mut work) = lock(&self.function).begin(self.queue) else { return false };
        let result = self.handler.serve(&mut work, &Dma::new(&self.ram));
        self.board.access_function(&*self.function, |function, access| function.finish(access, work, result))
    }
}
