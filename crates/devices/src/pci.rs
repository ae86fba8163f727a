//! The PCI bus: functions, their configuration space, and the host bridge by which the guest reaches it.
//!
//! The host bridge ([`PciHost`]) has the functions. Where a guest places their base address registers is a value,
//! [`PciRanges`], which the machine routes accesses by; it is made anew when that changes.

mod assign;
mod config_space;
mod function;
mod host;
mod msi;
mod msix;
mod ranges;
mod root_port;
#[cfg(test)]
pub(crate) mod testing;

pub use config_space::{Bar, BarRange, BridgeWindows, ConfigSpace, ConfigSpaceState, Identity, Space};
pub use function::{BarDoorbell, IntxLevel, IntxPin, PciFunction, SharedFunction, lock};
pub use host::{CONFIG_ADDRESS_PORT, CONFIG_DATA_PORT, ECAM_BASE, PciHost, PciHostState, SlotTaken};
pub use msi::MsiCapability;
pub use msix::{Msix, MsixState};
pub use ranges::{BarTarget, PciDoorbell, PciRanges, PciWindows, UNCLAIMED};
pub use root_port::{RootPort, RootPortState};

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

    /// The one device that can be behind the root port whose bus is `bus` at power-up.
    pub fn behind(bus: u8) -> Self {
        Self { bus, device: 0, function: 0 }
    }

    /// Device and function in one byte.
    pub fn devfn(self) -> u8 {
        (self.device & 0x1f) << 3 | self.function & 7
    }

    /// Bus, device and function in one number.
    pub fn id(self) -> u16 {
        u16::from(self.bus) << 8 | u16::from(self.devfn())
    }
}

impl std::fmt::Display for PciAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02x}:{:02x}.{:x}", self.bus, self.device, self.function)
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
