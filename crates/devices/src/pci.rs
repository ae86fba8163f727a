//! The PCI bus: functions, their configuration space, and the host bridge by which the guest reaches it.

mod config_space;
mod host;

pub use config_space::{Bar, ConfigSpace, ConfigSpaceState, Identity};
pub use host::{CONFIG_ADDRESS_PORT, CONFIG_DATA_PORT, ECAM_BASE, PciHost, PciHostState, SlotTaken};

use std::sync::{Arc, Mutex, PoisonError};

use crate::Access;

/// Where a function sits (PCI 3.0, 3.2.2.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Bus, 0 to 255.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl PciAddress {
    /// Function `function` of device `device` on bus 0; both are cut to their fields.
    pub fn new(device: u8, function: u8) -> Self {
        Self { bus: 0, device: device & 0x1f, function: function & 7 }
    }

    /// Device and function in one byte.
    pub fn devfn(self) -> u8 {
        (self.device & 0x1f) << 3 | self.function & 7
    }
}

/// Splits an offset into the memory-mapped configuration space (PCI Express Base 3.0, 7.2.2): the function, and the
/// offset in its 4096 bytes. Bits above the 256 MiB are ignored.
pub fn decode_ecam(offset: u64) -> (PciAddress, u16) {
    let address = PciAddress {
        bus: (offset >> 20) as u8,
        device: (offset >> 15) as u8 & 0x1f,
        function: (offset >> 12) as u8 & 7,
    };
    (address, offset as u16 & 0xfff)
}

/// What answers configuration accesses to one function.
pub trait PciFunction: Send {
    /// Reads the double word at `register`, a multiple of 4 below 4096. What is not there reads as zero.
    fn config_read(&mut self, access: &mut Access, register: u16) -> u32;
    /// Writes those bytes of the double word at `register` whose bit in `enables` (0 to 3) is set.
    fn config_write(&mut self, access: &mut Access, register: u16, value: u32, enables: u8);
    /// Back to the state after power-up.
    fn reset(&mut self, access: &mut Access);
}

/// A function that the machine reaches in other ways too. Its lock is taken inside the host bridge's and nothing is
/// locked inside it.
impl<F: PciFunction + ?Sized> PciFunction for Arc<Mutex<F>> {
    fn config_read(&mut self, access: &mut Access, register: u16) -> u32 {
        self.lock().unwrap_or_else(PoisonError::into_inner).config_read(access, register)
    }
    fn config_write(&mut self, access: &mut Access, register: u16, value: u32, enables: u8) {
        self.lock().unwrap_or_else(PoisonError::into_inner).config_write(access, register, value, enables);
    }
    fn reset(&mut self, access: &mut Access) {
        self.lock().unwrap_or_else(PoisonError::into_inner).reset(access);
    }
}
