//! The registers of one function: bytes, and which bits of them the guest may write (PCI 3.0, 6.1).

use serde::{Deserialize, Serialize};

use crate::lanes::enabled_bits;

/// Bytes of the space that PCI knows.
const LEN: usize = 256;
/// First byte for capabilities.
const CAPABILITIES: usize = 0x40;
/// Status register: there is a list of capabilities.
const STATUS_CAPABILITIES: u8 = 0x10;

/// Who a function says it is (PCI 3.0, 6.2.1 and 6.2.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Base class, subclass and programming interface: 0xBBSSPP.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Interrupt pin, 1 for INTA#; zero for none.
    pub interrupt_pin: u8,
}

/// A base address register (PCI 3.0, 6.2.5.1). Sizes are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bar {
    /// I/O ports.
    Io(u32),
    /// Memory below 4 GiB.
    Memory32(u32),
    /// Memory anywhere; takes two registers.
    Memory64 {
        /// Bytes.
        size: u64,
        /// Reading has no side effects.
        prefetchable: bool,
    },
}

/// The configuration space of a function with a type 0 header. Beyond 256 bytes it reads as zero.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    writable: Vec<u8>,
    initial: Vec<u8>,
    next_capability: usize,
    last_link: usize,
}

/// Saved state of a [`ConfigSpace`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigSpaceState {
    /// The 256 bytes.
    pub bytes: Vec<u8>,
}

impl ConfigSpace {
    /// A space with a header and nothing else. Command (I/O, memory, bus master, INTx disable), cache line size and
    /// interrupt line are writable.
    pub fn new(id: Identity) -> Self {
        let mut space = Self {
            bytes: vec![0; LEN],
            writable: vec![0; LEN],
            initial: Vec::new(),
            next_capability: CAPABILITIES,
            last_link: 0x34,
        };
        space.bytes[0..2].copy_from_slice(&id.vendor.to_le_bytes());
        space.bytes[2..4].copy_from_slice(&id.device.to_le_bytes());
        space.bytes[8] = id.revision;
        space.bytes[9..12].copy_from_slice(&id.class.to_le_bytes()[..3]);
        space.bytes[0x2c..0x2e].copy_from_slice(&id.subsystem_vendor.to_le_bytes());
        space.bytes[0x2e..0x30].copy_from_slice(&id.subsystem.to_le_bytes());
        space.bytes[0x3d] = id.interrupt_pin;
        space.writable[0x04..0x06].copy_from_slice(&[0x07, 0x04]);
        space.writable[0x0c] = 0xff;
        space.writable[0x3c] = 0xff;
        space.initial = space.bytes.clone();
        space
    }

    /// Adds base address register `index` (0 to 5).
    ///
    /// # Panics
    /// If there is no such register or the size is not a power of two: mistakes of the device's author.
    pub fn set_bar(&mut self, index: usize, bar: Bar) {
        let (size, flags, wide) = match bar {
            Bar::Io(size) => (u64::from(size), 1, false),
            Bar::Memory32(size) => (u64::from(size), 0, false),
            Bar::Memory64 { size, prefetchable } => (size, 4 | u32::from(prefetchable) << 3, true),
        };
        let fits = index + usize::from(wide) < 6;
        assert!(
            fits && size.is_power_of_two() && size >= 16,
            "base address register {index} of {size} bytes"
        );
        let at = 0x10 + 4 * index;
        let mask = !(size - 1);
        self.initial[at] = flags as u8;
        self.writable[at..at + 4].copy_from_slice(&(mask as u32).to_le_bytes());
        if wide {
            self.writable[at + 4..at + 8].copy_from_slice(&((mask >> 32) as u32).to_le_bytes());
        }
        self.bytes.clone_from(&self.initial);
    }

    /// Adds a capability (PCI 3.0, 6.7) with `body` after its two header bytes, and a mask of the bits of the body
    /// that the guest may write. Returns its offset.
    ///
    /// # Panics
    /// If there is no room: a mistake of the device's author.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let at = self.next_capability;
        let end = at + 2 + body.len();
        assert!(end <= LEN && writable.len() <= body.len(), "capability {id:#x} of {} bytes", body.len());
        self.initial[self.last_link] = at as u8;
        self.initial[at] = id;
        self.initial[at + 2..end].copy_from_slice(body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.initial[0x06] |= STATUS_CAPABILITIES;
        self.last_link = at + 1;
        self.next_capability = end.next_multiple_of(4);
        self.bytes.clone_from(&self.initial);
        at as u8
    }

    /// Marks bits of the byte at `register` as writable by the guest.
    pub fn allow_writes(&mut self, register: u8, mask: u8) {
        self.writable[usize::from(register)] |= mask;
    }

    /// Reads the double word at `register`.
    pub fn read(&self, register: u16) -> u32 {
        let at = usize::from(register & !3);
        self.bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    /// Writes the writable bits of the enabled bytes of the double word at `register`.
    pub fn write(&mut self, register: u16, value: u32, enables: u8) {
        let at = usize::from(register & !3);
        if at >= LEN {
            return;
        }
        let old = self.read(register);
        let w = &self.writable[at..at + 4];
        let mask = u32::from_le_bytes([w[0], w[1], w[2], w[3]]) & enabled_bits(enables);
        self.bytes[at..at + 4].copy_from_slice(&(old & !mask | value & mask).to_le_bytes());
    }

    /// Changes a byte from the device's side, whether the guest may write it or not.
    pub fn set_byte(&mut self, register: u8, value: u8) {
        self.bytes[usize::from(register)] = value;
    }

    /// Where base address register `index` puts its range, if the guest has placed it and enabled such accesses.
    pub fn bar(&self, index: usize) -> Option<u64> {
        if index >= 6 {
            return None;
        }
        let register = 0x10 + 4 * index as u16;
        let low = self.read(register);
        let command = self.bytes[4];
        let address = match low & 7 {
            0 | 2 => u64::from(low & !0xf),
            4 | 6 if index < 5 => u64::from(low & !0xf) | u64::from(self.read(register + 4)) << 32,
            l if l & 1 != 0 => return (command & 1 != 0 && low & !3 != 0).then_some(u64::from(low & !3)),
            _ => return None,
        };
        (command & 2 != 0 && address != 0).then_some(address)
    }

    /// Back to the state after power-up.
    pub fn reset(&mut self) {
        self.bytes.clone_from(&self.initial);
    }

    /// The state to save.
    pub fn state(&self) -> ConfigSpaceState {
        ConfigSpaceState { bytes: self.bytes.clone() }
    }

    /// Takes a saved state.
    pub fn restore(&mut self, state: &ConfigSpaceState) {
        self.bytes.clone_from(&state.bytes);
        self.bytes.resize(LEN, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity { vendor: 0x1af4, device: 0x1041, ..Identity::default() });
        space.set_bar(0, Bar::Memory32(0x1000));
        space.set_bar(2, Bar::Memory64 { size: 1 << 33, prefetchable: true });
        space.set_bar(5, Bar::Io(32));
        space
    }

    #[test]
    fn bars_tell_their_size() {
        let mut space = space();
        for register in [0x10, 0x14, 0x18, 0x1c, 0x24] {
            space.write(register, u32::MAX, 0xf);
        }
        assert_eq!(space.read(0x10), 0xffff_f000);
        assert_eq!(space.read(0x14), 0);
        assert_eq!((space.read(0x18), space.read(0x1c)), (0x0000_000c, 0xffff_fffe));
        assert_eq!(space.read(0x24), 0xffff_ffe1);
    }

    #[test]
    fn bars_are_where_the_guest_puts_them() {
        let mut space = space();
        space.write(0x10, 0xc000_0000, 0xf);
        space.write(0x1c, 0x12, 0xf);
        assert_eq!(space.bar(0), None, "memory is not enabled");
        space.write(0x04, 0xffff_ffff, 0xf);
        assert_eq!(space.read(0x04), 0x0407);
        assert_eq!((space.bar(0), space.bar(2)), (Some(0xc000_0000), Some(0x12_0000_0000)));
        assert_eq!((space.bar(5), space.bar(6)), (None, None));
    }

    #[test]
    fn capabilities_are_linked() {
        let mut space = space();
        assert_eq!(space.add_capability(0x11, &[1, 2, 3], &[0, 0xf0]), 0x40);
        assert_eq!(space.add_capability(0x09, &[9], &[]), 0x48);
        assert_eq!((space.read(0x34), space.read(0x40)), (0x40, 0x0201_4811));
        assert_eq!(space.read(0x48), 0x0009_0009);
        assert_eq!(space.read(0x04) >> 16, 0x10);
        space.write(0x40, u32::MAX, 0b1000);
        assert_eq!(space.read(0x40), 0xf201_4811);
        assert_eq!(space.read(0x100), 0);
        space.reset();
        assert_eq!(space.read(0x40), 0x0201_4811);
    }
}
