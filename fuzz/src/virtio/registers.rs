//! The registers of a virtio device on either transport, as a driver writes them.

use std::sync::{Arc, Mutex};

use ruse_devices::pci::{PciAddress, PciFunction, lock};
use ruse_devices::{Access, Device, Effects, Ring};
use ruse_virtio::{Device as VirtioDevice, Transport, VirtioMmio, VirtioPci};

/// Registers that both transports have.
#[derive(Clone, Copy)]
pub(super) enum Register {
    FeaturesSelect,
    Features,
    DriverFeaturesSelect,
    DriverFeatures,
    Status,
    Queue,
    Size,
    Descriptors,
    Driver,
    Device,
    Enable,
    Reset,
}

impl Register {
    /// Offset and width in the common structure over PCI (virtio 1.2, 4.1.4.3).
    fn pci(self) -> (u64, usize) {
        match self {
            Self::FeaturesSelect => (0x00, 4),
            Self::Features => (0x04, 4),
            Self::DriverFeaturesSelect => (0x08, 4),
            Self::DriverFeatures => (0x0c, 4),
            Self::Status => (0x14, 1),
            Self::Queue => (0x16, 2),
            Self::Size => (0x18, 2),
            Self::Enable => (0x1c, 2),
            Self::Descriptors => (0x20, 8),
            Self::Driver => (0x28, 8),
            Self::Device => (0x30, 8),
            Self::Reset => (0x3a, 2),
        }
    }

    /// Offset without PCI (4.2.2), and bytes: twice 4 of an address.
    fn mmio(self) -> (u64, usize) {
        match self {
            Self::Features => (0x10, 4),
            Self::FeaturesSelect => (0x14, 4),
            Self::DriverFeatures => (0x20, 4),
            Self::DriverFeaturesSelect => (0x24, 4),
            Self::Queue => (0x30, 4),
            Self::Size => (0x38, 4),
            Self::Enable => (0x44, 4),
            Self::Status => (0x70, 4),
            Self::Descriptors => (0x80, 8),
            Self::Driver => (0x90, 8),
            Self::Device => (0xa0, 8),
            Self::Reset => (0xc0, 4),
        }
    }
}

/// Interrupt status without PCI.
const INTERRUPT_STATUS: u64 = 0x60;

/// A device behind its transport.
pub(super) enum Registers {
    Pci(Arc<Mutex<VirtioPci>>),
    Mmio { device: VirtioMmio, interrupt: bool },
}

impl Registers {
    /// A device without PCI.
    pub(super) fn mmio(at: PciAddress, device: Box<dyn VirtioDevice>) -> Self {
        Self::Mmio { device: VirtioMmio::new(at.id(), 16, device), interrupt: false }
    }

    /// Whoever serves it uses it.
    pub(super) fn with<R>(&mut self, call: impl FnOnce(&mut dyn Transport, &mut Access) -> R) -> R {
        let mut effects = Effects::default();
        let access = &mut Access { now: 0, effects: &mut effects };
        let result = match self {
            Self::Pci(function) => call(&mut *lock(function), access),
            Self::Mmio { device, .. } => call(device, access),
        };
        self.follow(effects);
        result
    }

    /// Without PCI, the interrupt is asserted as long as its status is not zero (4.2.3.4).
    fn follow(&mut self, effects: Effects) -> Vec<Ring> {
        if let Self::Mmio { device, interrupt } = self {
            effects.intx.iter().for_each(|pin| *interrupt = pin.level);
            let mut status = [0; 4];
            let mut access = Access { now: 0, effects: &mut Effects::default() };
            device.read(&mut access, INTERRUPT_STATUS, &mut status);
            assert_eq!(*interrupt, status != [0; 4]);
        }
        effects.rings
    }

    /// Writes at any offset; gives the doorbells that were rung.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Vec<Ring> {
        let mut effects = Effects::default();
        let mut access = Access { now: 0, effects: &mut effects };
        match self {
            Self::Pci(function) => lock(function).bar_write(&mut access, 0, offset, data),
            Self::Mmio { device, .. } => device.write(&mut access, offset, data),
        }
        self.follow(effects)
    }

    /// Reads at any offset.
    pub(super) fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut effects = Effects::default();
        let mut access = Access { now: 0, effects: &mut effects };
        match self {
            Self::Pci(function) => lock(function).bar_read(&mut access, 0, offset, data),
            Self::Mmio { device, .. } => device.read(&mut access, offset, data),
        }
        self.follow(effects);
    }

    /// Writes a register.
    pub(super) fn set(&mut self, register: Register, value: u64) {
        let bytes = value.to_le_bytes();
        match (&self, register.pci(), register.mmio()) {
            (Self::Pci(_), (offset, width), _) => drop(self.write(offset, &bytes[..width])),
            (Self::Mmio { .. }, _, (offset, width)) => {
                for (offset, half) in (offset..).step_by(4).zip(bytes[..width].chunks(4)) {
                    self.write(offset, half);
                }
            }
        }
    }

    /// Reads a register of at most four bytes.
    pub(super) fn get(&mut self, register: Register) -> u64 {
        let (offset, width) = match self {
            Self::Pci(_) => register.pci(),
            Self::Mmio { .. } => register.mmio(),
        };
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes[..width]);
        u64::from_le_bytes(bytes)
    }

    /// Notifies a queue.
    pub(super) fn notify(&mut self, queue: usize) -> Vec<Ring> {
        match self {
            Self::Pci(_) => self.write(0x3000 + 4 * queue as u64, &[0, 0]),
            Self::Mmio { .. } => self.write(VirtioMmio::NOTIFY, &(queue as u32).to_le_bytes()),
        }
    }

    /// The machine is reset. What is on PCI its host bridge resets.
    pub(super) fn reset(&mut self) {
        let mut effects = Effects::default();
        if let Self::Mmio { device, .. } = self {
            device.reset(&mut Access { now: 0, effects: &mut effects });
        }
        self.follow(effects);
    }

    /// Takes its own state again; says whether it has one.
    pub(super) fn save_and_restore(&mut self) -> bool {
        let mut effects = Effects::default();
        let mut access = Access { now: 0, effects: &mut effects };
        let saved = match self {
            Self::Pci(function) => {
                let mut function = lock(function);
                let state = function.state();
                state.iter().for_each(|state| function.restore(&mut access, state));
                assert_eq!(function.state(), state);
                state.is_some()
            }
            Self::Mmio { device, .. } => {
                let state = device.state();
                state.iter().for_each(|state| device.restore(&mut access, state));
                assert_eq!(device.state(), state);
                state.is_some()
            }
        };
        self.follow(effects);
        saved
    }
}
