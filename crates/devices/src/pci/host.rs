//! The host bridge: configuration mechanism #1 (PCI 3.0, 3.2.2.3.2), the memory-mapped configuration space of PCI
//! Express, and the functions on bus 0.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{ConfigSpace, ConfigSpaceState, Identity, PciAddress, PciFunction, decode_ecam};
use crate::lanes::{read_dwords, write_dwords};
use crate::reset::ResetControl;
use crate::{Access, Device};

/// CONFIG_ADDRESS.
pub const CONFIG_ADDRESS_PORT: u16 = 0xcf8;
/// CONFIG_DATA.
pub const CONFIG_DATA_PORT: u16 = 0xcfc;
/// Where the memory-mapped configuration space lies in guest physical memory.
pub const ECAM_BASE: u64 = 0xe000_0000;

/// The bits of CONFIG_ADDRESS that exist: enable, bus, device, function, register.
const ADDRESS_BITS: u32 = 0x80ff_fffc;
const ADDRESS_ENABLE: u32 = 0x8000_0000;
/// Offset of the reset control register.
const RESET: u64 = 1;
/// Offset of CONFIG_DATA.
const DATA: u64 = 4;

/// There is a function already where one was to be put.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("PCI 00:{:02x}.{:x} is taken", .0.device, .0.function)]
pub struct SlotTaken(pub PciAddress);

/// The host bridge and the functions that are plugged in.
///
/// It has two ranges: the eight ports from [`CONFIG_ADDRESS_PORT`] at offset 0, and the memory-mapped space at offset
/// [`PciHost::ECAM`]. The reset control register (0xcf9) lies within CONFIG_ADDRESS, which takes double words only.
pub struct PciHost {
    address: u32,
    reset: ResetControl,
    bridge: ConfigSpace,
    functions: BTreeMap<u8, Box<dyn PciFunction>>,
    ecam_buses: u16,
}

/// Saved state of a [`PciHost`]; functions that are plugged in save theirs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciHostState {
    /// CONFIG_ADDRESS.
    pub address: u32,
    /// The reset control register.
    pub reset: ResetControl,
    /// Configuration space of 00:00.0.
    pub bridge: ConfigSpaceState,
}

impl std::fmt::Debug for PciHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let functions: Vec<_> = self.functions.keys().collect();
        f.debug_struct("PciHost").field("state", &self.state()).field("functions", &functions).finish()
    }
}

impl PciHost {
    /// Number of ports.
    pub const LEN: u64 = 8;
    /// Offset of the memory-mapped configuration space.
    pub const ECAM: u64 = 1 << 32;

    /// A bridge whose memory-mapped space covers `ecam_buses` buses (1 to 256), with nothing plugged in.
    ///
    /// It calls itself the generic PCI Express host bridge (1b36:0008), for which systems have no quirks.
    pub fn new(ecam_buses: u16) -> Self {
        let id = Identity { vendor: 0x1b36, device: 0x0008, class: 0x06_00_00, ..Identity::default() };
        Self {
            address: 0,
            reset: ResetControl::default(),
            bridge: ConfigSpace::new(id),
            functions: BTreeMap::new(),
            ecam_buses: ecam_buses.clamp(1, 256),
        }
    }

    /// Bytes of the memory-mapped configuration space.
    pub fn ecam_len(&self) -> u64 {
        u64::from(self.ecam_buses) << 20
    }

    /// Plugs in a function of bus 0. Systems look for functions 1 to 7 only where function 0 says that there are
    /// several (bit 7 of its header type).
    pub fn insert(&mut self, at: PciAddress, function: Box<dyn PciFunction>) -> Result<(), SlotTaken> {
        if at.bus != 0 || at.devfn() == 0 || self.functions.contains_key(&at.devfn()) {
            return Err(SlotTaken(at));
        }
        self.functions.insert(at.devfn(), function);
        Ok(())
    }

    /// Unplugs a function.
    pub fn remove(&mut self, at: PciAddress) -> Option<Box<dyn PciFunction>> {
        if at.bus == 0 { self.functions.remove(&at.devfn()) } else { None }
    }

    /// The state to save.
    pub fn state(&self) -> PciHostState {
        PciHostState { address: self.address, reset: self.reset.clone(), bridge: self.bridge.state() }
    }

    /// Takes a saved state.
    pub fn restore(&mut self, state: &PciHostState) {
        self.address = state.address & ADDRESS_BITS;
        self.reset = state.reset.clone();
        self.bridge.restore(&state.bridge);
    }

    /// Reads a double word of a function's configuration space, all ones where there is none.
    pub fn config_read(&mut self, access: &mut Access, at: PciAddress, register: u16) -> u32 {
        let register = register & 0xffc;
        match (at.bus, at.devfn()) {
            (0, 0) => self.bridge.read(register),
            (0, devfn) => self.functions.get_mut(&devfn).map_or(!0, |f| f.config_read(access, register)),
            _ => !0,
        }
    }

    /// Writes the enabled bytes of a double word of a function's configuration space.
    pub fn config_write(
        &mut self,
        access: &mut Access,
        at: PciAddress,
        register: u16,
        value: u32,
        enables: u8,
    ) {
        let register = register & 0xffc;
        match (at.bus, at.devfn()) {
            (0, 0) => self.bridge.write(register, value, enables),
            (0, devfn) => {
                if let Some(f) = self.functions.get_mut(&devfn) {
                    f.config_write(access, register, value, enables);
                }
            }
            _ => {}
        }
    }

    /// What CONFIG_DATA is of now, if anything.
    fn selected(&self) -> Option<(PciAddress, u16)> {
        let a = self.address;
        let at =
            PciAddress { bus: (a >> 16) as u8, device: (a >> 11) as u8 & 0x1f, function: (a >> 8) as u8 & 7 };
        (a & ADDRESS_ENABLE != 0).then_some((at, (a & 0xfc) as u16))
    }

    fn read_ecam(&mut self, access: &mut Access, offset: u64, data: &mut [u8]) {
        read_dwords(offset, data, |at| {
            if at >= self.ecam_len() {
                return !0;
            }
            let (function, register) = decode_ecam(at);
            self.config_read(access, function, register)
        });
    }

    fn write_ecam(&mut self, access: &mut Access, offset: u64, data: &[u8]) {
        write_dwords(offset, data, |at, value, enables| {
            if at < self.ecam_len() {
                let (function, register) = decode_ecam(at);
                self.config_write(access, function, register, value, enables);
            }
        });
    }
}

impl Device for PciHost {
    fn read(&mut self, access: &mut Access, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (Self::ECAM.., _) => self.read_ecam(access, offset - Self::ECAM, data),
            (0, 4) => data.copy_from_slice(&self.address.to_le_bytes()),
            (RESET, 1) => data[0] = self.reset.read(),
            _ => read_dwords(offset, data, |register| match (register, self.selected()) {
                (DATA, Some((at, register))) => self.config_read(access, at, register),
                _ => !0,
            }),
        }
    }

    fn write(&mut self, access: &mut Access, offset: u64, data: &[u8]) {
        match (offset, data) {
            (Self::ECAM.., _) => self.write_ecam(access, offset - Self::ECAM, data),
            (0, &[a, b, c, d]) => self.address = u32::from_le_bytes([a, b, c, d]) & ADDRESS_BITS,
            (RESET, &[value]) => {
                if let Some(power) = self.reset.write(value) {
                    access.effects.power = Some(power);
                }
            }
            _ => write_dwords(offset, data, |register, value, enables| {
                if let (DATA, Some((at, register))) = (register, self.selected()) {
                    self.config_write(access, at, register, value, enables);
                }
            }),
        }
    }

    /// Resets the functions that are plugged in too.
    fn reset(&mut self, access: &mut Access) {
        self.address = 0;
        self.reset = ResetControl::default();
        self.bridge.reset();
        for function in self.functions.values_mut() {
            function.reset(access);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Effects, Power};

    struct Dummy(ConfigSpace);
    impl PciFunction for Dummy {
        fn config_read(&mut self, _: &mut Access, register: u16) -> u32 {
            self.0.read(register)
        }
        fn config_write(&mut self, _: &mut Access, register: u16, value: u32, enables: u8) {
            self.0.write(register, value, enables);
        }
        fn reset(&mut self, _: &mut Access) {
            self.0.reset();
        }
    }

    fn host() -> PciHost {
        let mut host = PciHost::new(256);
        let id = Identity { vendor: 0x1af4, device: 0x1042, ..Identity::default() };
        host.insert(PciAddress::new(3, 0), Box::new(Dummy(ConfigSpace::new(id)))).unwrap();
        host
    }
    fn read<const N: usize>(host: &mut PciHost, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        host.read(&mut Access { now: 0, effects: &mut Effects::default() }, offset, &mut data);
        data
    }
    fn write(host: &mut PciHost, offset: u64, data: &[u8]) -> Option<Power> {
        let mut effects = Effects::default();
        host.write(&mut Access { now: 0, effects: &mut effects }, offset, data);
        effects.power
    }
    fn dword(host: &mut PciHost, address: u32) -> u32 {
        write(host, 0, &address.to_le_bytes());
        u32::from_le_bytes(read(host, 4))
    }

    /// The steps of Linux's `pci_check_type1` and `pci_sanity_check` (arch/x86/pci/direct.c).
    #[test]
    fn linux_finds_mechanism_1() {
        let mut host = host();
        write(&mut host, 3, &[1]);
        write(&mut host, 0, &0x8000_0000u32.to_le_bytes());
        assert_eq!(u32::from_le_bytes(read(&mut host, 0)), 0x8000_0000);
        assert_eq!(dword(&mut host, 0x8000_0008) >> 16, 0x0600);
        assert_eq!(dword(&mut host, 0x8000_1800), 0x1042_1af4);
        assert_eq!(dword(&mut host, 0x8000_1900), !0);
        assert_eq!(dword(&mut host, 0x8001_0000), !0);
        assert_eq!(dword(&mut host, 0x0000_0000), !0, "not enabled");
    }

    #[test]
    fn data_takes_bytes_and_words() {
        let mut host = host();
        dword(&mut host, 0x8000_1800);
        assert_eq!(read::<2>(&mut host, 6), [0x42, 0x10]);
        assert_eq!(read::<1>(&mut host, 5), [0x1a]);
        dword(&mut host, 0x8000_1804);
        write(&mut host, 5, &[0xff]);
        assert_eq!(read::<4>(&mut host, 4), [0, 4, 0, 0]);
        assert_eq!(read::<4>(&mut host, 2), [0xff, 0xff, 0, 4]);
    }

    #[test]
    fn the_reset_register_takes_bytes_only() {
        let mut host = host();
        assert_eq!(write(&mut host, 0, &[0, 6, 0, 0x80]), None);
        assert_eq!(write(&mut host, 1, &[6, 0]), None);
        assert_eq!(write(&mut host, 1, &[2]), None);
        assert_eq!(read::<1>(&mut host, 1), [2]);
        assert_eq!(write(&mut host, 1, &[6]), Some(Power::Reset));
        assert_eq!(read::<1>(&mut host, 0), [0xff]);
        assert_eq!(u32::from_le_bytes(read(&mut host, 0)), 0x8000_0600, "CONFIG_ADDRESS is untouched");
    }

    #[test]
    fn memory_mapped_space_reaches_the_same_functions() {
        let mut host = host();
        let at = PciHost::ECAM + (3 << 15);
        assert_eq!(read::<8>(&mut host, at), [0xf4, 0x1a, 0x42, 0x10, 0, 0, 0, 0]);
        write(&mut host, at + 4, &[7, 0]);
        assert_eq!(dword(&mut host, 0x8000_1804), 7);
        assert_eq!(read::<4>(&mut host, PciHost::ECAM + (1 << 20)), [0xff; 4]);
        assert_eq!(read::<4>(&mut host, PciHost::ECAM + (1 << 28) + (3 << 15)), [0xff; 4]);
        assert_eq!(decode_ecam(0x0ab1_9123), (PciAddress { bus: 0xab, device: 3, function: 1 }, 0x123));
    }

    #[test]
    fn slots_are_taken_once() {
        let mut host = host();
        for (device, taken) in [(0, true), (3, true), (4, false)] {
            let f = Box::new(Dummy(ConfigSpace::new(Identity::default())));
            assert_eq!(host.insert(PciAddress::new(device, 0), f).is_err(), taken);
        }
        assert!(host.remove(PciAddress::new(3, 0)).is_some());
        assert_eq!(dword(&mut host, 0x8000_1800), !0);
    }
}
