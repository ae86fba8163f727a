//! Devices that come and go while the machine runs, in the slots of root ports.
//!
//! The keeper of the slots asks the guest to let go of a device by the slot's attention button. When it has, which it says by
//! the slot's power indicator, the keeper takes the device out. By force, it does so at once and presses no button.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};

use ruse_devices::pci::{PciAddress, RootPort, SlotTaken};
use ruse_memory::GuestRam;
use ruse_virtio::VirtioPci;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::{AttachedDisk, AttachedNet, DiskInfo, NetError, OpenDisk, OpenDiskError, OpenNet, Server};
use crate::board::Board;
use crate::config::{DiskConfig, MAX_NETS, NetConfig};
use crate::pci_slots::SlotPort;
use crate::platform::lock;

/// A device to be attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceConfig {
    /// A disk.
    Disk(DiskConfig),
    /// A network device.
    Net(NetConfig),
}

/// Why a device is not attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// All slots have a device, or there are none.
    #[error("no slot is free: the machine has {slots} (ruse run --slots N gives it some)")]
    NoSlot {
        /// How many there are.
        slots: usize,
    },
    /// A disk cannot be had.
    #[error(transparent)]
    Disk(#[from] OpenDiskError),
    /// A network cannot be had.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The host refused.
    #[error("cannot start the device: {0}")]
    Host(#[from] io::Error),
    /// The slot is in use; a bug.
    #[error(transparent)]
    Slot(#[from] SlotTaken),
}

/// There is nothing in a slot of this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{}' is no device that was attached (ruse info tells which there are)", .0.escape_debug())]
pub struct DetachError(pub String);

/// A function and who serves it, before it is plugged in.
pub(super) type Prepared = (Arc<Mutex<VirtioPci>>, Vec<Server>);

/// Where the device in a slot is.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlotAddress {
    number: u8,
    pub(super) at: PciAddress,
    /// Where its interrupt pin leads.
    pub(super) gsi: u8,
}

impl SlotAddress {
    /// What the device is called.
    pub(super) fn id(&self) -> String {
        format!("slot{}", self.number)
    }
}

/// What kind of device is in a slot.
enum Kind {
    Disk(AttachedDisk),
    Net(AttachedNet),
}

/// A device in a slot.
struct Occupant {
    kind: Kind,
    /// Tells its threads to leave.
    gone: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    leaving: Leaving,
}

/// Whether a device is to be taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    No,
    /// The guest is to be asked as soon as it can be.
    Wanted,
    /// As soon as the guest, which has been asked, lets go of it.
    Asked,
    /// At once.
    Forced,
    /// It is being taken out.
    Going,
}

struct Slot {
    address: SlotAddress,
    port: Arc<Mutex<RootPort>>,
    occupant: Mutex<Option<Occupant>>,
}

impl Slot {
    /// If the device is to leave, asks the guest; if it may, gives what tells its threads so, and the threads.
    fn begin_leaving(&self, board: &Board) -> Option<(Arc<AtomicBool>, Vec<JoinHandle<()>>)> {
        let mut occupant = lock(&self.occupant);
        let occupant = occupant.as_mut()?;
        let may_go = match occupant.leaving {
            Leaving::No | Leaving::Going => false,
            Leaving::Wanted | Leaving::Asked if lock(&self.port).is_released() => true,
            Leaving::Wanted => {
                if board.access_function(&*self.port, RootPort::press_button) {
                    occupant.leaving = Leaving::Asked;
                }
                false
            }
            Leaving::Asked => false,
            Leaving::Forced => true,
        };
        may_go.then(|| {
            occupant.leaving = Leaving::Going;
            (occupant.gone.clone(), std::mem::take(&mut occupant.threads))
        })
    }
}

/// All slots of a machine.
pub(crate) struct Slots {
    board: Arc<Board>,
    ram: GuestRam,
    machine: String,
    cpus: u64,
    slots: Vec<Slot>,
    /// Wakes the keeper.
    event: OwnedFd,
}

impl Slots {
    /// The slots of these ports, in their order.
    pub(crate) fn new(
        board: &Arc<Board>,
        ram: &GuestRam,
        machine: &str,
        cpus: u64,
        ports: Vec<SlotPort>,
    ) -> io::Result<Arc<Self>> {
        let event = eventfd(0, EventfdFlags::CLOEXEC)?;
        for SlotPort { port, .. } in &ports {
            board.bells.add(lock(port).indicator_ring(), event.try_clone()?);
        }
        let slot = |(number, SlotPort { port, gsi })| {
            let address = SlotAddress { number, at: PciAddress::behind(number), gsi };
            Slot { address, port, occupant: Mutex::default() }
        };
        let slots = (1..).zip(ports).map(slot).collect();
        Ok(Arc::new(Self {
            board: board.clone(),
            ram: ram.clone(),
            machine: machine.into(),
            cpus,
            slots,
            event,
        }))
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Puts a device into the first free slot; gives its name.
    pub(crate) fn attach(&self, device: DeviceConfig) -> Result<String, AttachError> {
        for slot in &self.slots {
            let mut occupant = lock(&slot.occupant);
            if occupant.is_none() {
                *occupant = Some(self.fill(slot, device)?);
                return Ok(slot.address.id());
            }
        }
        Err(AttachError::NoSlot { slots: self.slots.len() })
    }

    fn fill(&self, slot: &Slot, device: DeviceConfig) -> Result<Occupant, AttachError> {
        let (board, ram, address) = (&self.board, &self.ram, &slot.address);
        let (kind, (function, servers)) = match device {
            DeviceConfig::Disk(config) => {
                let open = OpenDisk::open(&config, self.cpus)?;
                let (disk, prepared) = AttachedDisk::prepare(board, ram, address, self.cpus, (config, open))?;
                (Kind::Disk(disk), prepared)
            }
            DeviceConfig::Net(config) => {
                let number = MAX_NETS + usize::from(address.number);
                let net = OpenNet::open(&self.machine, number, &config)?;
                let (net, prepared) = net.prepare(board, ram, address)?;
                (Kind::Net(net), prepared)
            }
        };
        let gone = servers.first().map(|server| server.gone.clone()).unwrap_or_default();
        let (mut threads, mut result) = (Vec::new(), Ok(()));
        for server in servers {
            match server.spawn() {
                Ok(thread) => threads.push(thread),
                Err(error) => result = Err(AttachError::Host(error)),
            }
        }
        match result.and_then(|()| Ok(board.plug(address.at, function)?)) {
            Ok(()) => Ok(Occupant { kind, gone, threads, leaving: Leaving::No }),
            Err(error) => {
                self.dismiss(slot, &gone, threads);
                Err(error)
            }
        }
    }

    /// Has a device taken out: when the guest has let go of it, or by force. This does not wait for it.
    pub(crate) fn detach(&self, id: &str, force: bool) -> Result<(), DetachError> {
        let slot = self.slots.iter().find(|slot| slot.address.id() == id);
        let missing = || DetachError(id.to_owned());
        let slot = slot.ok_or_else(missing)?;
        match &mut lock(&slot.occupant).as_mut().ok_or_else(missing)?.leaving {
            Leaving::Going => return Ok(()),
            leaving => *leaving = if force { Leaving::Forced } else { Leaving::Wanted },
        }
        let keeper = lock(&slot.port).indicator_ring();
        self.board.bells.ring(keeper);
        Ok(())
    }

    /// Looks how large the disks in slots are now, tells the guest where that has changed, and gives what they are.
    pub(crate) fn refresh_disks(&self) -> io::Result<Vec<DiskInfo>> {
        let disk = |slot: &Slot| match &*lock(&slot.occupant) {
            Some(Occupant { kind: Kind::Disk(disk), .. }) => Some(disk.refresh(&self.board)),
            _ => None,
        };
        self.slots.iter().filter_map(disk).collect()
    }

    /// Calls `call` with each network device in a slot.
    pub(crate) fn for_each_net(&self, mut call: impl FnMut(&AttachedNet)) {
        for slot in &self.slots {
            if let Some(Occupant { kind: Kind::Net(net), .. }) = &*lock(&slot.occupant) {
                call(net);
            }
        }
    }

    /// Takes devices out that may be.
    fn look(&self) {
        for slot in &self.slots {
            let Some((gone, threads)) = slot.begin_leaving(&self.board) else { continue };
            self.board.unplug(slot.address.at);
            self.dismiss(slot, &gone, threads);
            *lock(&slot.occupant) = None;
        }
    }

    /// Sends away those who serve a device, which is not plugged in.
    fn dismiss(&self, slot: &Slot, gone: &AtomicBool, threads: Vec<JoinHandle<()>>) {
        self.board.lifecycle.dismiss(gone);
        self.board.bells.remove(slot.address.at.id());
        join(threads);
    }

    fn run(&self) -> io::Result<()> {
        while !self.board.lifecycle.has_ended() {
            self.look();
            match rustix::io::read(&self.event, &mut [0; 8]) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn join(threads: Vec<JoinHandle<()>>) {
    for thread in threads {
        // A thread that panics reports that itself.
        let _ = thread.join();
    }
}

/// Takes devices out of slots.
pub(crate) struct SlotKeeper(pub(crate) Arc<Slots>);

impl SlotKeeper {
    /// Starts the thread, which leaves when the machine has ended and so have those that serve devices in slots.
    pub(crate) fn spawn(self) -> io::Result<JoinHandle<()>> {
        Builder::new().name("slots".into()).spawn(move || {
            if let Err(error) = self.0.run() {
                tracing::error!(%error, "no device leaves its slot any more");
                self.0.board.lifecycle.wait_outcome();
            }
            for slot in &self.0.slots {
                lock(&slot.occupant).iter_mut().for_each(|device| join(std::mem::take(&mut device.threads)));
            }
        })
    }
}

#[cfg(test)]
mod tests;
