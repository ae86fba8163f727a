//! What is at which PCI address, which never depends on what else there is.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use ruse_devices::pci::{PciAddress, RootPort, SlotTaken};
use ruse_loader::PciIntx;

use crate::board::Board;

/// Device number of the entropy device.
pub(crate) const ENTROPY: u8 = 1;
/// Device numbers of disks, in their order.
pub(crate) const DISKS: Range<u8> = 8..ROOT_PORT;
/// Device numbers of the root ports, whose slots take devices while the machine runs.
const ROOT_PORT: u8 = 24;

/// The interrupt line of a function's INTA#.
pub(crate) fn gsi(intx: PciIntx, at: PciAddress) -> u8 {
    intx.gsi(at.device, 0) as u8
}

/// Plugs in `slots` root ports with empty slots.
pub(crate) fn plug_root_ports(board: &Board, intx: PciIntx, slots: u8) -> Result<(), SlotTaken> {
    for slot in 1..=slots {
        let at = PciAddress::new(ROOT_PORT + slot - 1, 0);
        board.plug(at, Arc::new(Mutex::new(RootPort::new(at, gsi(intx, at), slot))))?;
    }
    Ok(())
}
