//! The host bridge: configuration mechanism #1 (PCI 3.0, 3.2.2.3.2), the memory-mapped configuration space of PCI
//! Express, and the functions on bus 0 and behind its root ports.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::assign::Assignment;
use super::{
    BridgeWindows, ConfigSpace, ConfigSpaceState, Identity, PciAddress, PciRanges, PciWindows,
    SharedFunction, decode_ecam, lock,
};
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

/// No function can be put there: there is one already, or no root port leads there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nothing can be plugged in at PCI {0}")]
pub struct SlotTaken(pub PciAddress);

/// The host bridge and the functions that are plugged in.
///
/// It has two ranges: the eight ports from [`CONFIG_ADDRESS_PORT`] at offset 0, and the memory-mapped space at offset
/// [`PciHost::ECAM`]. The reset control register (0xcf9) lies within CONFIG_ADDRESS, which takes double words only.
pub struct PciHost {
    address: u32,
    reset: ResetControl,
    bridge: ConfigSpace,
    /// By their place at power-up, which is their name for ever: behind a root port, the bus is the port's at power-up.
    functions: BTreeMap<PciAddress, SharedFunction>,
    ecam_buses: u16,
    windows: PciWindows,
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
        let functions: Vec<_> = self.functions.keys().map(ToString::to_string).collect();
        f.debug_struct("PciHost").field("state", &self.state()).field("functions", &functions).finish()
    }
}

impl PciHost {
    /// Number of ports.
    pub const LEN: u64 = 8;
    /// Offset of the memory-mapped configuration space.
    pub const ECAM: u64 = 1 << 32;

    /// A bridge whose memory-mapped space covers `ecam_buses` buses (1 to 256), with nothing plugged in. Functions can
    /// answer in `windows`.
    ///
    /// It calls itself the generic PCI Express host bridge (1b36:0008), for which systems have no quirks.
    pub fn new(ecam_buses: u16, windows: PciWindows) -> Self {
        let id = Identity { vendor: 0x1b36, device: 0x0008, class: 0x06_00_00, ..Identity::default() };
        Self {
            address: 0,
            reset: ResetControl::default(),
            bridge: ConfigSpace::new(id),
            functions: BTreeMap::new(),
            ecam_buses: ecam_buses.clamp(1, 256),
            windows,
        }
    }

    /// Bytes of the memory-mapped configuration space.
    pub fn ecam_len(&self) -> u64 {
        u64::from(self.ecam_buses) << 20
    }

    /// Plugs in a function on bus 0 or behind a root port ([`PciAddress::behind`]). Systems look for functions 1 to 7 only
    /// where function 0 says that there are several (bit 7 of its header type).
    pub fn insert(
        &mut self,
        access: &mut Access,
        at: PciAddress,
        function: SharedFunction,
    ) -> Result<(), SlotTaken> {
        let possible = if at.bus == 0 { at.devfn() != 0 } else { at.devfn() == 0 };
        if !possible || self.functions.contains_key(&at) {
            return Err(SlotTaken(at));
        }
        if at.bus != 0 {
            lock(self.port_at_power_up(at.bus).ok_or(SlotTaken(at))?).set_occupied(access, true);
        }
        self.functions.insert(at, function);
        Ok(())
    }

    /// Unplugs a function, which lets go of its interrupt pin.
    pub fn remove(&mut self, access: &mut Access, at: PciAddress) -> Option<SharedFunction> {
        let function = self.functions.remove(&at)?;
        lock(&function).reset(access);
        if let Some(port) = self.port_at_power_up(at.bus).filter(|_| at.bus != 0) {
            lock(port).set_occupied(access, false);
        }
        access.effects.pci_ranges = Some(self.ranges());
        Some(function)
    }

    /// Gives all ranges their places, as firmware does at power-up.
    pub fn assign(&mut self) {
        let mut room = Assignment::new(&self.windows);
        for (at, function) in &self.functions {
            match (at.bus, self.port_at_power_up(at.bus)) {
                (0, _) => room.on_bus_0(lock(function).space_mut()),
                (_, Some(port)) => room.behind(lock(port).space_mut(), lock(function).space_mut()),
                (_, None) => {}
            }
        }
    }

    /// Root ports with what they forward now.
    fn ports(&self) -> impl Iterator<Item = (PciAddress, &SharedFunction, BridgeWindows)> {
        let on_bus_0 = self.functions.iter().filter(|(at, _)| at.bus == 0);
        on_bus_0.filter_map(|(at, function)| Some((*at, function, lock(function).space().windows()?)))
    }

    /// The root port whose bus was `bus` at power-up.
    fn port_at_power_up(&self, bus: u8) -> Option<&SharedFunction> {
        self.ports().map(|(_, port, _)| port).find(|port| lock(port).space().initial_secondary_bus() == bus)
    }

    /// The function that a guest reaches at `at` now.
    fn function(&self, at: PciAddress) -> Option<&SharedFunction> {
        if at.bus == 0 {
            return self.functions.get(&at);
        }
        let (_, port, _) = self.ports().find(|(_, _, windows)| windows.secondary == at.bus)?;
        let bus = lock(port).space().initial_secondary_bus();
        self.functions.get(&PciAddress { bus, ..at })
    }

    /// Where all functions answer now: of interest to whoever has given them saved states.
    pub fn ranges(&self) -> PciRanges {
        let mut ranges = PciRanges::default();
        for (&at, function) in &self.functions {
            let port = if at.bus == 0 { None } else { self.port_at_power_up(at.bus) };
            let forwarded = port.and_then(|port| lock(port).space().windows());
            ranges.add(at, function, |range| {
                self.windows.hold(range)
                    && (at.bus == 0 || forwarded.as_ref().is_some_and(|windows| windows.hold(range)))
            });
        }
        for (at, port, forwarded) in self.ports() {
            ranges.add_unclaimed(at, port, &forwarded, &self.windows);
        }
        ranges
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
            _ => self.function(at).map_or(!0, |function| lock(function).config_read(access, register)),
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
        if (at.bus, at.devfn()) == (0, 0) {
            self.bridge.write(register, value, enables);
            return;
        }
        let Some(function) = self.function(at) else { return };
        let mut locked = lock(function);
        let before = (locked.space().bars(), locked.space().windows());
        let was_resetting = locked.space().resets_bus();
        locked.config_write(access, register, value, enables);
        let moved = (locked.space().bars(), locked.space().windows()) != before;
        let reset =
            (locked.space().resets_bus() && !was_resetting).then(|| locked.space().initial_secondary_bus());
        drop(locked);
        if let Some(bus) = reset {
            let behind = self.functions.iter().filter(|(at, _)| at.bus == bus);
            behind.for_each(|(_, function)| lock(function).reset(access));
        }
        if moved || reset.is_some() {
            access.effects.pci_ranges = Some(self.ranges());
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

    /// Resets the functions that are plugged in too, and does firmware's part.
    fn reset(&mut self, access: &mut Access) {
        self.address = 0;
        self.reset = ResetControl::default();
        self.bridge.reset();
        for function in self.functions.values() {
            lock(function).reset(access);
        }
        self.assign();
        access.effects.pci_ranges = Some(self.ranges());
    }
}

#[cfg(test)]
mod tests;
