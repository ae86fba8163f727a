//! The virtio devices of a machine, and the threads that serve their queues.

mod balloon;
mod consoles;
mod disks;
mod gate;
mod mem;
#[cfg(test)]
mod mmio_tests;
mod nets;
mod pmem;
mod server;
mod shares;
mod slots;
mod sockets;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use ruse_devices::Ring;
use ruse_devices::pci::{PciAddress, SlotTaken};
use ruse_memory::GuestRam;
use ruse_virtio::entropy::{Entropy, EntropyHandler};
use ruse_virtio::{Device, Handler, Transport, VirtioMmio, VirtioPci};
use rustix::event::{EventfdFlags, eventfd};

pub(crate) use balloon::AttachedBalloon;
pub use balloon::BalloonInfo;
pub use consoles::ConsoleError;
pub(crate) use consoles::{AttachedConsole, Consoles};
pub(crate) use disks::{AttachedDisk, OpenDisk};
pub use disks::{DiskInfo, OpenDiskError};
pub(crate) use gate::Gate;
pub(crate) use mem::AttachedMem;
pub use mem::{MemoryInfo, ResizeMemoryError};
pub(crate) use nets::{AttachedNet, OpenNet};
pub use nets::{NetError, NetInfo};
pub(crate) use pmem::OpenPmem;
pub use pmem::PmemError;
use server::ServedQueue;
pub(crate) use server::Server;
pub use shares::OpenShareError;
pub(crate) use shares::{OpenShare, open_all as open_shares, plug_all as plug_shares};
pub use slots::{AttachError, DetachError, DeviceConfig};
pub(crate) use slots::{SlotKeeper, Slots};
pub(crate) use sockets::Sockets;

use crate::board::Board;
use crate::platform::lock;

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
/// queues, each of which has a handler.
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
    let queues = handlers.len() as u16;
    let servers = servers(board, ram, at, name, &(function.clone() as _), handlers)?;
    board.catch_doorbells(at, queues);
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
    let mut servers: Vec<(u16, Server)> = Vec::new();
    for (index, handler) in (0..).zip(handlers) {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        board.bells.add(Ring { source: at.id(), number: index }, event.try_clone()?);
        let queue = ServedQueue::new(index, event, handler);
        let thread = lock(function).core().thread(index);
        match servers.iter_mut().find(|(number, _)| *number == thread) {
            Some((_, server)) => server.queues.push(queue),
            None => {
                let (board, ram, function, gone) =
                    (board.clone(), ram.clone(), function.clone(), gone.clone());
                let name = format!("{name}.{thread}");
                servers.push((thread, Server::new(name, board, ram, function, gone, queue)));
            }
        }
    }
    Ok(servers.into_iter().map(|(_, server)| server).collect())
}
