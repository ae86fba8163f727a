//! The devices of a machine and where the guest finds them. Each has its own lock.

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use ruse_devices::bus::{AddressMap, MapError};
use ruse_devices::debug_exit::{DEBUG_EXIT_PORT, DebugExit};
use ruse_devices::i8042::{I8042, I8042_COMMAND_PORT, I8042_DATA_PORT, PORT_92, Port92};
use ruse_devices::pci::{CONFIG_ADDRESS_PORT, ECAM_BASE, PciHost, PciRanges, PciWindows};
use ruse_devices::pit::{self, Pit};
use ruse_devices::pm::{PM_BASE, Pm};
use ruse_devices::post::{POST_PORT, Post};
use ruse_devices::rtc::{RTC_PORT, Rtc};
use ruse_devices::serial::{COM_IRQS, COM_PORTS, Serial};
use ruse_devices::{Device, ioapic, pic};

use crate::mmio_slots::{self, MmioSlots};

/// Buses that the memory-mapped configuration space covers.
const ECAM_BUSES: u16 = 256;
/// Ports that clear the x87 error line on a PC/AT.
const X87_PORTS: (u64, u64) = (0xf0, 2);

/// What answers at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The device of this number, behind its own lock.
    Device(usize),
    /// The 8259s; offsets are ports.
    Pic,
    /// The I/O APIC.
    IoApic,
    /// The latch of the x87 error line.
    X87,
    /// The PCI bus; offsets are ports.
    PciPorts,
    /// The PCI bus; offsets are guest physical addresses.
    PciMemory,
    /// The slots of a machine without PCI.
    MmioSlots,
}

/// A device by its number: its place in [`Platform`], in the alarm's deadlines and among the sources of an interrupt
/// line.
pub(crate) mod number {
    /// COM1; the other serial ports follow.
    pub(crate) const SERIAL: usize = 0;
    pub(crate) const PIT: usize = 4;
    pub(crate) const RTC: usize = 5;
    pub(crate) const I8042: usize = 6;
    pub(crate) const PORT_92: usize = 7;
    pub(crate) const PM: usize = 8;
    pub(crate) const PCI: usize = 9;
    pub(crate) const POST: usize = 10;
    pub(crate) const DEBUG_EXIT: usize = 11;
    /// How many there are.
    pub(crate) const COUNT: usize = 12;
}

/// The devices and the maps by which accesses find them.
pub(crate) struct Platform {
    serial: [Mutex<Serial>; 4],
    pit: Mutex<Pit>,
    rtc: Mutex<Rtc>,
    i8042: Mutex<I8042>,
    port_92: Mutex<Port92>,
    pm: Mutex<Pm>,
    /// The PCI bus of machines that have one.
    pci: Option<Mutex<PciHost>>,
    /// The virtio devices of those that have none.
    pub(crate) slots: MmioSlots,
    post: Mutex<Post>,
    debug_exit: Mutex<DebugExit>,
    /// I/O ports.
    pub(crate) ports: AddressMap<Target>,
    /// Guest physical addresses that are not RAM.
    pub(crate) memory: AddressMap<Target>,
    /// Where PCI functions answer. It is replaced under the host bridge's lock.
    pci_ranges: RwLock<Arc<PciRanges>>,
}

/// Takes a lock, also one that a panicking thread has left behind: a device survives any state.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Platform {
    /// The devices of a machine after power-up. Its PCI functions answer in `windows`; without, it has no PCI bus.
    pub(crate) fn new(rtc: Rtc, debug_exit: bool, windows: Option<PciWindows>) -> Result<Self, MapError> {
        let ports = port_map(debug_exit, windows.as_ref())?;
        let memory = memory_map(windows.as_ref())?;
        let pci = windows.map(|windows| Mutex::new(PciHost::new(ECAM_BUSES, windows)));
        Ok(Self {
            serial: COM_IRQS.map(|irq| Mutex::new(Serial::new(irq))),
            pit: Mutex::default(),
            rtc: Mutex::new(rtc),
            i8042: Mutex::default(),
            port_92: Mutex::default(),
            pm: Mutex::default(),
            pci,
            slots: MmioSlots::default(),
            post: Mutex::default(),
            debug_exit: Mutex::default(),
            ports,
            memory,
            pci_ranges: RwLock::default(),
        })
    }

    /// A serial port, COM1 first.
    pub(crate) fn serial(&self, index: usize) -> Option<MutexGuard<'_, Serial>> {
        self.serial.get(index).map(lock)
    }

    /// The power-management registers.
    pub(crate) fn pm(&self) -> MutexGuard<'_, Pm> {
        lock(&self.pm)
    }

    /// The PCI host bridge of a machine that has one.
    pub(crate) fn pci(&self) -> Option<MutexGuard<'_, PciHost>> {
        self.pci.as_ref().map(lock)
    }

    /// Whether there is a PCI bus.
    pub(crate) fn has_pci(&self) -> bool {
        self.pci.is_some()
    }

    /// Pins of the I/O APIC.
    pub(crate) fn io_apic_pins(&self) -> usize {
        if self.has_pci() { ioapic::PINS } else { mmio_slots::PINS }
    }

    /// Where PCI functions answer now.
    pub(crate) fn pci_ranges(&self) -> Arc<PciRanges> {
        self.pci_ranges.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// PCI functions answer elsewhere. The caller holds the host bridge's lock.
    pub(crate) fn set_pci_ranges(&self, ranges: PciRanges) {
        *self.pci_ranges.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ranges);
    }

    /// Calls `with` on a device under its lock.
    pub(crate) fn with<R>(&self, device: usize, with: impl FnOnce(&mut dyn Device) -> R) -> Option<R> {
        Some(match device {
            number::PIT => with(&mut *lock(&self.pit)),
            number::RTC => with(&mut *lock(&self.rtc)),
            number::I8042 => with(&mut *lock(&self.i8042)),
            number::PORT_92 => with(&mut *lock(&self.port_92)),
            number::PM => with(&mut *lock(&self.pm)),
            number::PCI => with(&mut *lock(self.pci.as_ref()?)),
            number::POST => with(&mut *lock(&self.post)),
            number::DEBUG_EXIT => with(&mut *lock(&self.debug_exit)),
            serial => with(&mut *lock(self.serial.get(serial)?)),
        })
    }
}

fn port_map(debug_exit: bool, pci: Option<&PciWindows>) -> Result<AddressMap<Target>, MapError> {
    let mut map = AddressMap::ports();
    for (n, port) in COM_PORTS.into_iter().enumerate() {
        map.insert(port.into(), Serial::LEN, Target::Device(number::SERIAL + n), 0)?;
    }
    let pit_61 = u64::from(pit::PORT_SPEAKER - pit::PORT);
    for (port, len, device, offset) in [
        (pit::PORT, u64::from(pit::PORTS), number::PIT, 0),
        (pit::PORT_SPEAKER, 1, number::PIT, pit_61),
        (RTC_PORT, Rtc::LEN, number::RTC, 0),
        (I8042_DATA_PORT, 1, number::I8042, 0),
        (I8042_COMMAND_PORT, 1, number::I8042, I8042::COMMAND),
        (PORT_92, Port92::LEN, number::PORT_92, 0),
        (PM_BASE, Pm::LEN, number::PM, 0),
        (POST_PORT, Post::LEN, number::POST, 0),
    ] {
        map.insert(port.into(), len, Target::Device(device), offset)?;
    }
    if debug_exit {
        map.insert(DEBUG_EXIT_PORT.into(), DebugExit::LEN, Target::Device(number::DEBUG_EXIT), 0)?;
    }
    for port in pic::PORTS {
        map.insert(port.into(), 1, Target::Pic, port.into())?;
    }
    map.insert(X87_PORTS.0, X87_PORTS.1, Target::X87, 0)?;
    if let Some(windows) = pci {
        map.insert(CONFIG_ADDRESS_PORT.into(), PciHost::LEN, Target::Device(number::PCI), 0)?;
        insert_window(&mut map, &windows.ports, Target::PciPorts)?;
    }
    Ok(map)
}

fn memory_map(pci: Option<&PciWindows>) -> Result<AddressMap<Target>, MapError> {
    let mut map = AddressMap::memory();
    map.insert(ioapic::BASE, ioapic::SIZE, Target::IoApic, 0)?;
    let Some(windows) = pci else {
        map.insert(mmio_slots::BASE, mmio_slots::LEN, Target::MmioSlots, 0)?;
        return Ok(map);
    };
    map.insert(ECAM_BASE, u64::from(ECAM_BUSES) << 20, Target::Device(number::PCI), PciHost::ECAM)?;
    for window in &windows.memory {
        insert_window(&mut map, window, Target::PciMemory)?;
    }
    Ok(map)
}

/// A window of the PCI bus, in which offsets are addresses.
fn insert_window(
    map: &mut AddressMap<Target>,
    window: &RangeInclusive<u64>,
    target: Target,
) -> Result<(), MapError> {
    map.insert(*window.start(), window.end() - window.start() + 1, target, *window.start())
}
