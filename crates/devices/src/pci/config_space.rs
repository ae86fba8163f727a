//! The registers of one function: bytes, and which bits of them the guest may write (PCI 3.0, 6.1; bridges: PCI-to-PCI
//! Bridge Architecture 1.2, 3.2).

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::lanes::enabled_bits;

/// Bytes of the space that PCI knows.
const LEN: usize = 256;
/// First byte for capabilities.
const CAPABILITIES: usize = 0x40;
/// Status register: there is a list of capabilities.
const STATUS_CAPABILITIES: u8 = 0x10;
/// Command register: answer I/O, answer memory; in its second byte: do not assert the interrupt pin.
const COMMAND_IO: u8 = 1;
const COMMAND_MEMORY: u8 = 2;
const COMMAND_INTX_DISABLE: u8 = 4;
/// Header type of a bridge, and its registers.
const HEADER_BRIDGE: u8 = 1;
/// The bit of the header type that says that there are other functions.
const HEADER_MULTIFUNCTION: u8 = 0x80;
const SECONDARY_BUS: usize = 0x19;
const IO_BASE: usize = 0x1c;
const MEMORY_BASE: usize = 0x20;
const PREFETCHABLE_BASE: usize = 0x24;
const BRIDGE_CONTROL: usize = 0x3e;
/// Bridge control: the bus behind the bridge is reset.
const BUS_RESET: u8 = 1 << 6;

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

/// A space of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// I/O ports.
    Io,
    /// Memory.
    Memory,
}

/// A range that a function answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarRange {
    /// The base address register.
    pub bar: u8,
    /// Whose addresses these are.
    pub space: Space,
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

/// What a bridge forwards to the bus behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BridgeWindows {
    /// Number of the bus behind it.
    pub secondary: u8,
    /// Ports.
    pub ports: Option<RangeInclusive<u64>>,
    /// Memory, and memory without side effects.
    pub memory: [Option<RangeInclusive<u64>>; 2],
}

impl BridgeWindows {
    /// Whether a range is forwarded as a whole.
    pub fn hold(&self, range: &BarRange) -> bool {
        let within = |window: &RangeInclusive<u64>| {
            window.contains(&range.base) && window.contains(&(range.base + (range.size - 1)))
        };
        match range.space {
            Space::Io => self.ports.iter().any(within),
            Space::Memory => self.memory.iter().flatten().any(within),
        }
    }
}

/// The configuration space of a function. Beyond 256 bytes it reads as zero.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bars: [Option<Bar>; 6],
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
            bars: [None; 6],
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

    /// A bridge's space, with the windows closed and no bus behind it.
    pub fn bridge(id: Identity) -> Self {
        let mut space = Self::new(id);
        space.bytes[0x0e] = HEADER_BRIDGE;
        // A bridge has other registers where a function has its subsystem's ids.
        space.bytes[0x2c..0x30].fill(0);
        space.writable[0x18..0x1b].fill(0xff);
        for at in [IO_BASE, IO_BASE + 1] {
            space.writable[at] = 0xf0;
        }
        for at in [MEMORY_BASE, MEMORY_BASE + 2, PREFETCHABLE_BASE, PREFETCHABLE_BASE + 2] {
            space.writable[at..at + 2].copy_from_slice(&[0xf0, 0xff]);
        }
        space.writable[0x28..0x30].fill(0xff);
        space.writable[BRIDGE_CONTROL] = BUS_RESET;
        space.bytes[IO_BASE] = 0xf0;
        space.bytes[MEMORY_BASE..MEMORY_BASE + 2].copy_from_slice(&[0xf0, 0xff]);
        // The prefetchable window has 64-bit addresses.
        space.bytes[PREFETCHABLE_BASE..PREFETCHABLE_BASE + 4].copy_from_slice(&[0xf1, 0xff, 0x01, 0]);
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
        self.bars[index] = Some(bar);
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

    /// The function is the first of several of its device (PCI 3.0, 6.2.1).
    pub fn set_multifunction(&mut self) {
        self.bytes[0x0e] |= HEADER_MULTIFUNCTION;
        self.initial[0x0e] |= HEADER_MULTIFUNCTION;
    }

    /// Changes a byte from the device's side, whether the guest may write it or not.
    pub fn set_byte(&mut self, register: u8, value: u8) {
        self.bytes[usize::from(register)] = value;
    }

    /// Whether the function may not assert its interrupt pin.
    pub fn intx_disabled(&self) -> bool {
        self.bytes[5] & COMMAND_INTX_DISABLE != 0
    }

    fn word(&self, at: usize) -> u64 {
        u64::from(u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]]))
    }

    /// The base address registers that there are.
    pub fn declared_bars(&self) -> impl Iterator<Item = (u8, Bar)> {
        (0..).zip(self.bars).filter_map(|(index, bar)| Some((index, bar?)))
    }

    /// The ranges that the guest has placed and enabled.
    pub fn bars(&self) -> Vec<BarRange> {
        self.declared_bars().filter_map(|(index, bar)| self.range(index, bar)).collect()
    }

    fn range(&self, index: u8, bar: Bar) -> Option<BarRange> {
        let register = 0x10 + 4 * u16::from(index);
        let low = u64::from(self.read(register));
        let (space, enable, base, size) = match bar {
            Bar::Io(size) => (Space::Io, COMMAND_IO, low & !3, size.into()),
            Bar::Memory32(size) => (Space::Memory, COMMAND_MEMORY, low & !0xf, size.into()),
            Bar::Memory64 { size, .. } => {
                (Space::Memory, COMMAND_MEMORY, low & !0xf | u64::from(self.read(register + 4)) << 32, size)
            }
        };
        (self.bytes[4] & enable != 0 && base != 0).then_some(BarRange { bar: index, space, base, size })
    }

    /// Places base address register `index`, as firmware does.
    pub(super) fn place_bar(&mut self, index: u8, base: u64) {
        let Some(bar) = self.bars[usize::from(index)] else { return };
        let register = 0x10 + 4 * u16::from(index);
        self.write(register, base as u32, 0xf);
        if matches!(bar, Bar::Memory64 { .. }) {
            self.write(register + 4, (base >> 32) as u32, 0xf);
        }
    }

    /// What a bridge forwards; `None` if this is not a bridge.
    pub fn windows(&self) -> Option<BridgeWindows> {
        if !self.is_bridge() {
            return None;
        }
        let window = |enable: u8, base: u64, limit: u64| {
            (self.bytes[4] & enable != 0 && base <= limit).then_some(base..=limit)
        };
        let memory = |at: usize, high: [u64; 2]| {
            let base = (self.word(at) & 0xfff0) << 16 | high[0] << 32;
            let limit = (self.word(at + 2) & 0xfff0) << 16 | 0xf_ffff | high[1] << 32;
            window(COMMAND_MEMORY, base, limit)
        };
        let [io, io_limit] = [IO_BASE, IO_BASE + 1].map(|at| u64::from(self.bytes[at] & 0xf0) << 8);
        let high = [0x28, 0x2c].map(|register| u64::from(self.read(register)));
        Some(BridgeWindows {
            secondary: self.bytes[SECONDARY_BUS],
            ports: window(COMMAND_IO, io, io_limit | 0xfff),
            memory: [memory(MEMORY_BASE, [0, 0]), memory(PREFETCHABLE_BASE, high)],
        })
    }

    /// Whether a bridge holds the bus behind it in reset (PCI-to-PCI Bridge 1.2, 3.2.5.18).
    pub(super) fn resets_bus(&self) -> bool {
        self.is_bridge() && self.bytes[BRIDGE_CONTROL] & BUS_RESET != 0
    }

    fn is_bridge(&self) -> bool {
        self.bytes[0x0e] & 0x7f == HEADER_BRIDGE
    }

    /// Gives a bridge the number of the bus behind it, at power-up.
    pub(super) fn set_secondary_bus(&mut self, bus: u8) {
        self.initial[SECONDARY_BUS] = bus;
        self.initial[SECONDARY_BUS + 1] = bus;
        self.bytes.clone_from(&self.initial);
    }

    /// The number of the bus behind a bridge at power-up.
    pub(super) fn initial_secondary_bus(&self) -> u8 {
        self.initial[SECONDARY_BUS]
    }

    /// Opens a bridge's memory window below 4 GiB, from `first` to `last`, in whole MiB, as firmware does.
    pub(super) fn open_memory(&mut self, first: u64, last: u64) {
        let [base, limit] = [first, last].map(|at| (at >> 16) as u16 & 0xfff0);
        self.write(MEMORY_BASE as u16, u32::from(limit) << 16 | u32::from(base), 0xf);
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
        space.write(0x24, 0xc041, 0xf);
        assert_eq!(space.bars(), [], "nothing is enabled");
        let range = |bar, space, base, size| BarRange { bar, space, base, size };
        space.write(0x04, 1, 1);
        assert_eq!(space.bars(), [range(5, Space::Io, 0xc040, 32)]);
        space.write(0x04, 0xffff_fffe, 0xf);
        assert_eq!(space.read(0x04), 0x0406);
        let memory =
            [range(0, Space::Memory, 0xc000_0000, 0x1000), range(2, Space::Memory, 0x12_0000_0000, 1 << 33)];
        assert_eq!(space.bars(), memory);
        space.write(0x10, 0, 0xf);
        assert_eq!(space.bars(), memory[1..], "nobody is at address zero");
    }

    #[test]
    fn a_bridge_forwards_what_its_windows_hold() {
        let mut space = ConfigSpace::bridge(Identity::default());
        assert_eq!(ConfigSpace::new(Identity::default()).windows(), None);
        space.write(0x04, 3, 1);
        let closed = space.windows().unwrap();
        assert_eq!((closed.ports, closed.memory), (None, [None, None]));
        space.write(0x18, 0x0005_0400, 0xf);
        space.write(0x1c, 0xffff_2f1f, 0xf);
        space.write(0x20, 0xc01f_c01f, 0xf);
        space.write(0x24, 0x0010_0000, 0xf);
        space.write(0x28, 2, 0xf);
        space.write(0x2c, 2, 0xf);
        let windows = space.windows().unwrap();
        assert_eq!((windows.secondary, windows.ports.clone()), (4, Some(0x1000..=0x2fff)));
        assert_eq!(windows.memory, [Some(0xc010_0000..=0xc01f_ffff), Some(0x2_0000_0000..=0x2_001f_ffff)]);
        let range = |base| BarRange { bar: 0, space: Space::Memory, base, size: 0x8000 };
        let held =
            [0xc010_0000, 0xc01f_8000, 0xc01f_8001, 0x2_0000_0000].map(|base| windows.hold(&range(base)));
        assert_eq!(held, [true, true, false, true]);
        space.reset();
        assert_eq!(space.windows().unwrap().secondary, 0);
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
