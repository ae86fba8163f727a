//! The virtio devices of a machine without PCI: where their registers are, and which interrupt they have. That never depends
//! on what else there is.

use std::sync::{Arc, Mutex, OnceLock};

use ruse_devices::ioapic;
use ruse_devices::pci::{PciAddress, SlotTaken};
use ruse_engine::{Doorbell, DoorbellValue, IoAddress};
use ruse_loader::acpi::VirtioMmioPlace;
use ruse_virtio::VirtioMmio;

use crate::config::MachineConfig;
use crate::pci_slots;

/// How many slots there are: one for each device number on PCI.
const COUNT: usize = 32;
/// Bytes from one slot to the next: a page, so that a guest can give each to a driver of its own.
const STEP: u64 = 0x1000;
/// Where the first slot is, below the I/O APIC.
pub(crate) const BASE: u64 = 0xfeb0_0000;
/// Bytes of all slots.
pub(crate) const LEN: u64 = COUNT as u64 * STEP;
/// The slot of function 0 of [`pci_slots::SMALL`], whose other functions have the slots that are the root ports' on PCI.
const SMALL: u8 = 24;
/// Pins of the I/O APIC: a PC's, and one for each slot.
pub(crate) const PINS: usize = ioapic::PINS + COUNT;

/// The slot of the device that would be at `at` on PCI.
fn slot(at: PciAddress) -> u8 {
    if at.device == pci_slots::SMALL { SMALL + at.function } else { at.device }
}

fn base(at: PciAddress) -> u64 {
    BASE + u64::from(slot(at)) * STEP
}

/// The interrupt line of a device.
pub(crate) fn gsi(at: PciAddress) -> u8 {
    ioapic::PINS as u8 + slot(at)
}

/// The doorbell of a device's queue.
pub(crate) fn doorbell(at: PciAddress, queue: u16) -> Doorbell {
    let only = Some(DoorbellValue { width: 4, value: queue.into() });
    Doorbell { at: IoAddress::Memory(base(at) + VirtioMmio::NOTIFY), only }
}

/// What the tables say of the devices of a configuration.
pub(crate) fn places(config: &MachineConfig) -> Vec<VirtioMmioPlace> {
    let place =
        |at| VirtioMmioPlace { base: base(at) as u32, size: VirtioMmio::LEN as u32, gsi: gsi(at).into() };
    pci_slots::virtio_devices(config).into_iter().map(place).collect()
}

/// The slots and what is in them. Devices stay there.
#[derive(Default)]
pub(crate) struct MmioSlots([OnceLock<Arc<Mutex<VirtioMmio>>>; COUNT]);

impl MmioSlots {
    /// Puts a device into its slot.
    pub(crate) fn plug(&self, at: PciAddress, device: Arc<Mutex<VirtioMmio>>) -> Result<(), SlotTaken> {
        self.0[usize::from(slot(at))].set(device).map_err(|_| SlotTaken(at))
    }

    /// The device with registers at `offset` of all slots, and the offset in them.
    pub(crate) fn find(&self, offset: u64) -> Option<(&Mutex<VirtioMmio>, u64)> {
        let device = self.0.get((offset / STEP) as usize)?.get()?;
        (offset % STEP < VirtioMmio::LEN).then_some((device, offset % STEP))
    }

    /// All devices.
    pub(crate) fn devices(&self) -> impl Iterator<Item = &Mutex<VirtioMmio>> {
        self.0.iter().filter_map(OnceLock::get).map(|device| &**device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_devices_share_a_slot() {
        let small = (1..8).map(|function| PciAddress::new(pci_slots::SMALL, function));
        let others = (1..24).filter(|&device| device != pci_slots::SMALL);
        let all: Vec<_> = others.map(|device| PciAddress::new(device, 0)).chain(small).collect();
        let mut slots: Vec<_> = all.iter().map(|&at| slot(at)).collect();
        slots.sort_unstable();
        slots.dedup();
        assert_eq!(slots.len(), all.len());
        assert!(all.iter().all(|&at| usize::from(gsi(at)) < PINS));
        const { assert!(BASE + LEN <= ioapic::BASE && PINS <= ioapic::MOST_PINS) };
    }
}
