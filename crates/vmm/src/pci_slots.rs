//! What is at which PCI address, which never depends on what else there is.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use ruse_devices::pci::{PciAddress, RootPort, SlotTaken};
use ruse_devices::pvpanic::Pvpanic;
use ruse_loader::PciIntx;

use crate::board::Board;
use crate::config::MachineConfig;

/// Device number of the entropy device.
pub(crate) const ENTROPY: u8 = 1;
/// Device numbers of network devices, in their order.
pub(crate) const NETS: Range<u8> = 2..4;
/// Device number of the virtio console.
pub(crate) const CONSOLE: u8 = 4;
/// Device number of the socket device.
pub(crate) const VSOCK: u8 = 5;
/// Device number of the balloon.
pub(crate) const BALLOON: u8 = 6;
/// Device number of small devices: pvpanic is function 0.
pub(crate) const SMALL: u8 = 7;
/// The function of the small devices that is named ports.
pub(crate) const PORTS: u8 = 1;
/// The function of the small devices that is memory to be plugged in.
pub(crate) const MEM: u8 = 2;
/// The function of the small devices that is the watchdog.
pub(crate) const WATCHDOG: u8 = 3;
/// The functions of the small devices that are persistent memory, in their order.
pub(crate) const PMEMS: Range<u8> = 4..8;
/// Device numbers of disks, in their order.
pub(crate) const DISKS: Range<u8> = 8..20;
/// Device numbers of shared folders, in their order.
pub(crate) const SHARES: Range<u8> = 20..ROOT_PORT;
/// Device numbers of the root ports, whose slots take devices while the machine runs.
const ROOT_PORT: u8 = 24;

/// The interrupt line of a function's INTA#.
pub(crate) fn gsi(intx: PciIntx, at: PciAddress) -> u8 {
    intx.gsi(at.device, 0) as u8
}

/// Where the virtio devices of a configuration are, in this order.
pub(crate) fn virtio_devices(config: &MachineConfig) -> Vec<PciAddress> {
    let consoles = |named| config.consoles.iter().any(|console| console.name.is_some() == named);
    let disks = config.disks.len() + usize::from(config.seed.is_some());
    let devices = [
        (ENTROPY..NETS.start, 1),
        (NETS, config.nets.len()),
        (CONSOLE..VSOCK, consoles(false).into()),
        (VSOCK..BALLOON, config.vsock.is_some().into()),
        (BALLOON..SMALL, config.balloon.is_some().into()),
        (DISKS, disks),
        (SHARES, config.shares.len()),
    ];
    let functions = [
        (PORTS..MEM, consoles(true).into()),
        (MEM..WATCHDOG, config.pluggable_memory().is_some().into()),
        (PMEMS, config.pmems.len()),
    ];
    let first = |(range, count): (Range<u8>, usize)| range.take(count);
    let devices = devices.into_iter().flat_map(first).map(|device| PciAddress::new(device, 0));
    let functions = functions.into_iter().flat_map(first).map(|function| PciAddress::new(SMALL, function));
    devices.chain(functions).collect()
}

/// Plugs in what every PC has that is not virtio.
pub(crate) fn plug_pvpanic(board: &Board) -> Result<(), SlotTaken> {
    board.plug(PciAddress::new(SMALL, 0), Arc::new(Mutex::new(Pvpanic::default())))
}

/// A root port with a slot.
pub(crate) struct SlotPort {
    pub(crate) port: Arc<Mutex<RootPort>>,
    /// The line of its INTA#, which is also that of the device in its slot.
    pub(crate) gsi: u8,
}

/// Plugs in `slots` root ports with empty slots.
pub(crate) fn plug_root_ports(board: &Board, intx: PciIntx, slots: u8) -> Result<Vec<SlotPort>, SlotTaken> {
    let plug = |slot| {
        let at = PciAddress::new(ROOT_PORT + slot - 1, 0);
        let gsi = gsi(intx, at);
        let port = Arc::new(Mutex::new(RootPort::new(at, gsi, slot)));
        board.plug(at, port.clone())?;
        Ok(SlotPort { port, gsi })
    };
    (1..=slots).map(plug).collect()
}
