//! A root port of PCI Express with a slot for one device that can be plugged in while the machine runs (PCI Express
//! Base 3.0, 6.7 and 7.8).

use serde::{Deserialize, Serialize};

use super::{ConfigSpace, ConfigSpaceState, Identity, IntxPin, MsiCapability, PciAddress, PciFunction};
use crate::lanes::enabled_bits;
use crate::{Access, Effects, Ring};

/// Id of the PCI Express capability.
const ID: u8 = 0x10;

/// Registers of the capability, from its beginning.
mod register {
    pub const LINK_STATUS: u16 = 0x12;
    pub const SLOT_CONTROL: u16 = 0x18;
    pub const SLOT_STATUS: u16 = 0x1a;
    /// Bytes of all.
    pub const LEN: usize = 0x3c;
}

/// Slot control (7.8.10): what raises an interrupt.
const HOT_PLUG_INTERRUPT: u16 = 1 << 5;
/// Slot control: the power indicator, and that it is on or off; else it blinks.
const INDICATOR: u16 = 3 << 8;
const INDICATOR_ON: u16 = 1 << 8;
const INDICATOR_OFF: u16 = 3 << 8;
/// Slot status (7.8.11): the bits that software clears by writing ones; in slot control their enables.
const BUTTON_PRESSED: u16 = 1 << 0;
const PRESENCE_CHANGED: u16 = 1 << 3;
const LINK_CHANGED: u16 = 1 << 8;
const EVENTS: u16 = BUTTON_PRESSED | PRESENCE_CHANGED | LINK_CHANGED;
/// Slot control: the enable of [`LINK_CHANGED`] is not in its place.
const LINK_CHANGED_ENABLE: u16 = 1 << 12;
/// Slot status: something is in the slot.
const PRESENT: u16 = 1 << 6;
/// Link status (7.8.8): active, one lane, 2.5 GT/s.
const LINK_ACTIVE: u16 = 1 << 13;
const LINK_WIDTH_AND_SPEED: u16 = 0x11;

/// A root port.
#[derive(Debug)]
pub struct RootPort {
    space: ConfigSpace,
    msi: MsiCapability,
    /// The PCI Express capability.
    express: u16,
    pin: IntxPin,
    occupied: bool,
    /// The interrupt condition held after the last change: a message goes out when it begins to.
    raised: bool,
}

/// Saved state of a [`RootPort`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootPortState {
    space: ConfigSpaceState,
    occupied: bool,
    raised: bool,
}

impl RootPort {
    /// The root port at `at`, whose interrupt pin leads to line `gsi`, with the empty slot of this number (1 to 255).
    /// The slot's number is that of the bus behind it at power-up.
    pub fn new(at: PciAddress, gsi: u8, slot: u8) -> Self {
        let id = Identity {
            // The generic root port that Linux, Windows and firmware know from QEMU.
            vendor: 0x1b36,
            device: 0x000c,
            class: 0x06_04_00,
            interrupt_pin: 1,
            ..Identity::default()
        };
        let mut space = ConfigSpace::bridge(id);
        space.set_secondary_bus(slot);
        let express = space.add_capability(ID, &capability(slot), &writable()).into();
        let msi = MsiCapability::new(&mut space);
        let pin = IntxPin::new(at, gsi);
        let mut port = Self { space, msi, express, pin, occupied: false, raised: false };
        port.set_indicator();
        port
    }

    /// Who rings when the guest has switched the slot's power indicator on or off.
    pub fn indicator_ring(&self) -> Ring {
        Ring { source: self.pin.source(), number: 0 }
    }

    /// Whether what is in the slot may be taken out: the power indicator is off (6.7.1.1.2).
    pub fn is_released(&self) -> bool {
        self.indicator() == INDICATOR_OFF
    }

    /// Presses the attention button, by which the system is asked to let go of what is in the slot (6.7.1.5), if the
    /// indicator is on; says whether. While it blinks, the system has begun to use the slot, or to let go of it, in
    /// which case another press would have it stay; while it is off, it has let go.
    pub fn press_button(&mut self, access: &mut Access) -> bool {
        let on = self.indicator() == INDICATOR_ON;
        if on {
            self.set_word(register::SLOT_STATUS, self.word(register::SLOT_STATUS) | BUTTON_PRESSED);
            self.update_interrupt(access.effects);
        }
        on
    }

    fn indicator(&self) -> u16 {
        self.word(register::SLOT_CONTROL) & INDICATOR
    }

    /// At power-up the indicator is on where something is in the slot.
    fn set_indicator(&mut self) {
        let indicator = if self.occupied { INDICATOR_ON } else { INDICATOR_OFF };
        self.set_word(register::SLOT_CONTROL, self.word(register::SLOT_CONTROL) & !INDICATOR | indicator);
    }

    fn word(&self, register: u16) -> u16 {
        let at = self.express + register;
        (self.space.read(at) >> (8 * (at & 2))) as u16
    }

    fn set_word(&mut self, register: u16, value: u16) {
        let at = (self.express + register) as u8;
        let [low, high] = value.to_le_bytes();
        self.space.set_byte(at, low);
        self.space.set_byte(at + 1, high);
    }

    /// What is in the slot shows in the status of slot and link.
    fn show_occupied(&mut self) {
        let (present, link) =
            if self.occupied { (PRESENT, LINK_ACTIVE | LINK_WIDTH_AND_SPEED) } else { (0, 0) };
        self.set_word(register::SLOT_STATUS, self.word(register::SLOT_STATUS) & !PRESENT | present);
        self.set_word(register::LINK_STATUS, link);
    }

    /// Raises the interrupt where an event that is enabled is there (6.7.3.4).
    fn update_interrupt(&mut self, effects: &mut Effects) {
        let (control, status) = (self.word(register::SLOT_CONTROL), self.word(register::SLOT_STATUS));
        let link = status & LINK_CHANGED != 0 && control & LINK_CHANGED_ENABLE != 0;
        let others = status & control & (PRESENCE_CHANGED | BUTTON_PRESSED) != 0;
        let raised = control & HOT_PLUG_INTERRUPT != 0 && (link || others);
        if raised && !self.raised {
            self.msi.raise(effects, &mut self.space);
        }
        self.raised = raised;
        let by_pin = raised && !self.msi.is_enabled(&self.space);
        self.pin.set(effects, &self.space, by_pin);
    }

    /// The state to save.
    pub fn state(&self) -> RootPortState {
        RootPortState { space: self.space.state(), occupied: self.occupied, raised: self.raised }
    }

    /// Takes a saved state.
    pub fn restore(&mut self, access: &mut Access, state: &RootPortState) {
        self.space.restore(&state.space);
        (self.occupied, self.raised) = (state.occupied, state.raised);
        self.update_interrupt(access.effects);
    }
}

/// The registers of the capability after its header.
fn capability(slot: u8) -> [u8; register::LEN - 2] {
    let mut body = [0; register::LEN - 2];
    let mut put = |at: usize, value: u32| body[at - 2..at + 2].copy_from_slice(&value.to_le_bytes());
    // Device capabilities: role-based error reporting (7.8.3).
    put(0x04, 1 << 15);
    // Link: 2.5 GT/s, one lane, says whether it is active; the port's number.
    put(0x0c, 0x11 | 1 << 20 | u32::from(slot) << 24);
    // Slot: attention button, power indicator, surprise removal, hot-plug, no waiting for commands; its number.
    put(0x14, 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 18 | u32::from(slot) << 19);
    // Speeds: 2.5 GT/s.
    put(0x2c, 1 << 1);
    // Version 2, root port, with a slot.
    body[..2].copy_from_slice(&[0x42, 0x01]);
    body
}

/// Which bits of them are written as they are.
fn writable() -> [u8; register::LEN - 2] {
    let mut bits = [0; register::LEN - 2];
    for (at, value) in
        [(0x08, 0x7fffu16), (0x10, 0x0ffb), (0x18, 0x1fff), (0x1c, 0x001f), (0x28, 0x041f), (0x30, 0x000f)]
    {
        bits[at - 2..at].copy_from_slice(&value.to_le_bytes());
    }
    bits
}

impl PciFunction for RootPort {
    fn space(&self) -> &ConfigSpace {
        &self.space
    }

    fn space_mut(&mut self) -> &mut ConfigSpace {
        &mut self.space
    }

    fn config_write(&mut self, access: &mut Access, register: u16, value: u32, enables: u8) {
        let before = self.indicator();
        self.space.write(register, value, enables);
        if register == self.express + register::SLOT_CONTROL {
            if self.indicator() == 0 {
                // Reserved: it stays as it is.
                self.set_word(register::SLOT_CONTROL, self.word(register::SLOT_CONTROL) | before);
            }
            if self.indicator() != before && matches!(self.indicator(), INDICATOR_ON | INDICATOR_OFF) {
                access.effects.rings.push(self.indicator_ring());
            }
            let cleared = ((value & enabled_bits(enables)) >> 16) as u16 & EVENTS;
            self.set_word(register::SLOT_STATUS, self.word(register::SLOT_STATUS) & !cleared);
        }
        self.msi.changed(access.effects, &mut self.space);
        self.update_interrupt(access.effects);
    }

    /// Nobody behind the port answers, as when a device has been torn out. What such reads give is left to the machine but
    /// in configuration space (2.3.2), and machines mostly give ones. But Linux resets a virtio device also when it is
    /// gone, and waits until its status reads as zero, for ever if it does not (`vp_reset`).
    fn bar_read(&mut self, _access: &mut Access, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// Before the machine runs nobody hears of it; from then on the guest does by an interrupt.
    fn set_occupied(&mut self, access: &mut Access, occupied: bool) {
        if occupied != self.occupied {
            self.occupied = occupied;
            self.show_occupied();
            let changes = PRESENCE_CHANGED | LINK_CHANGED;
            self.set_word(register::SLOT_STATUS, self.word(register::SLOT_STATUS) | changes);
            self.update_interrupt(access.effects);
        }
    }

    fn reset(&mut self, access: &mut Access) {
        self.space.reset();
        self.show_occupied();
        self.set_indicator();
        self.raised = false;
        self.pin.set(access.effects, &self.space, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::Msi;
    use crate::pci::IntxLevel;

    const INDICATOR_BLINKS: u16 = 2 << 8;

    fn port() -> RootPort {
        RootPort::new(PciAddress::new(24, 0), 16, 3)
    }
    fn with(port: &mut RootPort, call: impl FnOnce(&mut RootPort, &mut Access)) -> Effects {
        let mut effects = Effects::default();
        call(port, &mut Access { now: 0, effects: &mut effects });
        effects
    }
    fn write(port: &mut RootPort, register: u16, value: u32, enables: u8) -> Effects {
        with(port, |port, access| port.config_write(access, register, value, enables))
    }
    const ENABLES: u32 =
        (HOT_PLUG_INTERRUPT | BUTTON_PRESSED | PRESENCE_CHANGED | LINK_CHANGED_ENABLE | INDICATOR_OFF) as u32;

    #[test]
    fn an_empty_slot_says_what_it_can_do() {
        let port = port();
        assert_eq!(port.space.read(0x18), 0x0003_0300, "the bus behind it has a number");
        assert_eq!(port.space.read(port.express) >> 16, 0x0142);
        assert_eq!(port.space.read(port.express + 0x14), 3 << 19 | 1 << 18 | 0x71);
        assert_eq!(port.space.read(port.express + 0x18), u32::from(INDICATOR_OFF));
    }

    #[test]
    fn what_is_plugged_in_interrupts_by_a_message() {
        let mut port = port();
        let (slot, msi) = (port.express + register::SLOT_CONTROL, port.express + register::LEN as u16);
        write(&mut port, msi + 4, 0xfee0_0000, 0xf);
        write(&mut port, msi + 12, 0x45, 0xf);
        write(&mut port, msi, 1 << 16, 0xf);
        write(&mut port, slot, ENABLES, 0x3);
        let effects = with(&mut port, |port, access| port.set_occupied(access, true));
        assert_eq!(effects.messages, [Msi { address: 0xfee0_0000, data: 0x45 }]);
        assert!(effects.intx.is_empty());
        assert_eq!(port.space.read(slot) >> 16, u32::from(PRESENT | PRESENCE_CHANGED | LINK_CHANGED));
        assert_eq!(port.word(register::LINK_STATUS), LINK_ACTIVE | LINK_WIDTH_AND_SPEED);
        write(&mut port, slot, u32::from(EVENTS) << 16, 0xc);
        assert_eq!(port.space.read(slot), u32::from(PRESENT) << 16 | ENABLES, "only the events are cleared");
        let effects = with(&mut port, |port, access| port.set_occupied(access, false));
        assert_eq!((effects.messages.len(), port.word(register::SLOT_STATUS) & PRESENT), (1, 0));
    }

    #[test]
    fn without_messages_the_pin_is_held_until_the_events_are_cleared() {
        let mut port = port();
        let slot = port.express + register::SLOT_CONTROL;
        with(&mut port, |port, access| port.set_occupied(access, true));
        let level = |level| [IntxLevel { source: 24 << 3, gsi: 16, level }];
        assert_eq!(write(&mut port, slot, ENABLES, 0x3).intx, level(true));
        assert_eq!(write(&mut port, 0x04, 0x400, 0x3).intx, level(false), "the pin is disabled");
        assert_eq!(write(&mut port, 0x04, 0, 0x3).intx, level(true));
        assert_eq!(write(&mut port, slot, u32::from(EVENTS) << 16, 0xc).intx, level(false));
    }

    #[test]
    fn the_guest_is_asked_by_the_button_and_answers_by_the_indicator() {
        let mut port = port();
        let slot = port.express + register::SLOT_CONTROL;
        with(&mut port, |port, access| port.set_occupied(access, true));
        let control = |indicator: u16| ENABLES & !u32::from(INDICATOR) | u32::from(indicator);
        write(&mut port, slot, control(INDICATOR_ON) | u32::from(EVENTS) << 16, 0xf);
        let press = |port: &mut RootPort| {
            with(port, |port, access| {
                port.press_button(access);
            })
        };
        assert!(press(&mut port).intx[0].level && port.word(register::SLOT_STATUS) & BUTTON_PRESSED != 0);
        assert!(write(&mut port, slot, control(INDICATOR_BLINKS) | 1 << 16, 0xf).rings.is_empty());
        press(&mut port);
        assert_eq!(port.word(register::SLOT_STATUS), PRESENT, "it is not asked twice");
        write(&mut port, slot, control(0), 0x3);
        assert_eq!(port.indicator(), INDICATOR_BLINKS, "a reserved value changes nothing");
        assert!(!port.is_released());
        assert_eq!(write(&mut port, slot, control(INDICATOR_OFF), 0x3).rings, [port.indicator_ring()]);
        assert!(port.is_released());
        assert!(write(&mut port, slot, control(INDICATOR_OFF), 0x3).rings.is_empty(), "it is told once");
        write(&mut port, slot, control(INDICATOR_BLINKS), 0x3);
        assert_eq!(write(&mut port, slot, control(INDICATOR_ON), 0x3).rings, [port.indicator_ring()]);
    }

    #[test]
    fn a_reset_leaves_what_is_plugged_in() {
        let mut port = port();
        let slot = port.express + register::SLOT_CONTROL;
        with(&mut port, |port, access| port.set_occupied(access, true));
        write(&mut port, slot, ENABLES, 0x3);
        let effects = with(&mut port, |port, access| port.reset(access));
        assert!(!effects.intx[0].level);
        assert_eq!(port.space.read(slot), u32::from(PRESENT) << 16 | u32::from(INDICATOR_ON));
        let saved = port.state();
        let mut other = self::port();
        with(&mut other, |port, access| port.restore(access, &saved));
        assert_eq!(other.state(), saved);
        write(&mut other, slot, ENABLES, 0x3);
        let events = with(&mut other, |port, access| port.set_occupied(access, false));
        let saved = other.state();
        let effects = with(&mut self::port(), |port, access| port.restore(access, &saved));
        assert_eq!(effects.intx, events.intx, "the pin is held again");
    }
}
