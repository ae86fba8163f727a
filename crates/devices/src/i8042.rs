//! Keyboard controller (Intel 8042 as in the IBM PC/AT Technical Reference, "Keyboard Controller") with no keyboard
//! and no mouse, and system control port A (PS/2 and later) at 0x92.
//!
//! The A20 gate is always open: no CPU that Ruse runs has the pin. The bits that would close it are remembered.

use serde::{Deserialize, Serialize};

use crate::lanes::{read_bytes, write_bytes};
use crate::{Access, Device, Power};

/// The data port, offset 0 of the device.
pub const I8042_DATA_PORT: u16 = 0x60;
/// The status and command port, offset [`I8042::COMMAND`] of the device.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// System control port A.
pub const PORT_92: u16 = 0x92;
/// Interrupt line of the keyboard.
const KEYBOARD_IRQ: u8 = 1;

/// Status register.
mod status {
    pub const OUTPUT_FULL: u8 = 0x01;
    pub const SYSTEM: u8 = 0x04;
    pub const COMMAND: u8 = 0x08;
    pub const UNLOCKED: u8 = 0x10;
    pub const TIMEOUT: u8 = 0x40;
}

/// Command byte.
mod control {
    pub const KEYBOARD_IRQ: u8 = 0x01;
    pub const SYSTEM: u8 = 0x04;
    pub const KEYBOARD_OFF: u8 = 0x10;
    pub const MOUSE_OFF: u8 = 0x20;
}

/// Output port: bit 0 low resets the CPU, bit 1 opens A20.
const OUTPUT_RUN: u8 = 0x01;
const OUTPUT_A20: u8 = 0x02;

/// Registers of the keyboard controller, as saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// The command byte (commands 0x20 and 0x60).
    pub control: u8,
    /// The output buffer.
    pub data: u8,
    /// The output buffer is full.
    pub full: bool,
    /// What is in the buffer tells that the keyboard did not answer.
    pub timeout: bool,
    /// The last write was a command.
    pub command_last: bool,
    /// A command that waits for its data byte, zero for none.
    pub awaiting: u8,
    /// The output port.
    pub output_port: u8,
    /// Level of the keyboard's interrupt line.
    pub line: bool,
}

impl Default for I8042State {
    fn default() -> Self {
        Self {
            control: control::KEYBOARD_OFF | control::MOUSE_OFF,
            data: 0,
            full: false,
            timeout: false,
            command_last: false,
            awaiting: 0,
            output_port: 0xcf,
            line: false,
        }
    }
}

/// The keyboard controller.
#[derive(Debug, Default)]
pub struct I8042 {
    state: I8042State,
}

impl I8042 {
    /// Offset of the status and command port.
    pub const COMMAND: u64 = 4;
    /// Number of ports from the first to the last. Ports between the two are not the device's.
    pub const LEN: u64 = 5;

    /// The controller after power-up.
    pub fn new() -> Self {
        Self::default()
    }
    /// The state to save.
    pub fn state(&self) -> I8042State {
        self.state.clone()
    }
    /// Takes a saved state.
    pub fn restore(&mut self, state: &I8042State) {
        self.state = state.clone();
    }

    fn status(&self) -> u8 {
        let s = &self.state;
        let mut value = status::UNLOCKED | s.control & status::SYSTEM;
        for (set, bit) in [
            (s.full, status::OUTPUT_FULL),
            (s.command_last, status::COMMAND),
            (s.full && s.timeout, status::TIMEOUT),
        ] {
            value |= if set { bit } else { 0 };
        }
        value
    }

    fn answer(&mut self, data: u8) {
        (self.state.data, self.state.full, self.state.timeout) = (data, true, false);
    }

    fn command(&mut self, access: &mut Access, command: u8) {
        self.state.command_last = true;
        self.state.awaiting = 0;
        match command {
            0x20 => self.answer(self.state.control),
            0x60 | 0xd1..=0xd4 => self.state.awaiting = command,
            0xa7 => self.state.control |= control::MOUSE_OFF,
            // Enabling the mouse port: there is none, and the bit stays.
            0xa8 => {}
            // Interface tests: the mouse's clock line is stuck low, the keyboard's lines are well.
            0xa9 => self.answer(0x01),
            0xaa => {
                self.state.control |= control::SYSTEM;
                self.answer(0x55);
            }
            0xab => self.answer(0x00),
            0xad => self.state.control |= control::KEYBOARD_OFF,
            0xae => self.state.control &= !control::KEYBOARD_OFF,
            0xc0 => self.answer(0x80),
            0xd0 => self.answer(self.state.output_port),
            0xdd => self.state.output_port &= !OUTPUT_A20,
            0xdf => self.state.output_port |= OUTPUT_A20,
            // Pulses the bits of the output port that are zero in the command.
            0xf0..=0xff if command & OUTPUT_RUN == 0 => access.effects.power = Some(Power::Reset),
            _ => {}
        }
    }

    fn data(&mut self, access: &mut Access, value: u8) {
        self.state.command_last = false;
        match std::mem::take(&mut self.state.awaiting) {
            0x60 => self.state.control = value & 0x7f | control::MOUSE_OFF,
            0xd1 => {
                self.state.output_port = value;
                if value & OUTPUT_RUN == 0 {
                    access.effects.power = Some(Power::Reset);
                }
            }
            // Without a mouse port its loop-back answers as the keyboard's: Linux's i8042_check_aux sees at once
            // that there is none.
            0xd2 | 0xd3 => self.answer(value),
            // Nothing is attached: the controller reports that the device did not answer.
            _ => {
                self.state.control &= !control::KEYBOARD_OFF;
                self.answer(0xfe);
                self.state.timeout = true;
            }
        }
    }

    fn update_line(&mut self, access: &mut Access) {
        let level = self.state.full && self.state.control & control::KEYBOARD_IRQ != 0;
        if level != self.state.line {
            self.state.line = level;
            access.effects.line(KEYBOARD_IRQ, level);
        }
    }
}

impl Device for I8042 {
    fn read(&mut self, access: &mut Access, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |port| match port {
            0 => {
                self.state.full = false;
                self.state.data
            }
            Self::COMMAND => self.status(),
            _ => 0xff,
        });
        self.update_line(access);
    }

    fn write(&mut self, access: &mut Access, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |port, value| match port {
            0 => self.data(access, value),
            Self::COMMAND => self.command(access, value),
            _ => {}
        });
        self.update_line(access);
    }

    fn reset(&mut self, access: &mut Access) {
        self.state = I8042State { line: self.state.line, ..I8042State::default() };
        self.update_line(access);
    }
}

/// System control port A: fast reset and A20.
#[derive(Debug)]
pub struct Port92 {
    state: Port92State,
}

/// Saved state of [`Port92`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port92State {
    /// The register.
    pub value: u8,
}

impl Port92 {
    /// Number of ports.
    pub const LEN: u64 = 1;

    /// The port after power-up.
    pub fn new() -> Self {
        Self { state: Port92State { value: 0x02 } }
    }
    /// The state to save.
    pub fn state(&self) -> Port92State {
        self.state.clone()
    }
    /// Takes a saved state.
    pub fn restore(&mut self, state: &Port92State) {
        self.state = state.clone();
    }
}

impl Default for Port92 {
    fn default() -> Self {
        Self::new()
    }
}

impl Device for Port92 {
    fn read(&mut self, _access: &mut Access, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |port| if port == 0 { self.state.value } else { 0xff });
    }

    /// Bit 0 resets when it becomes one.
    fn write(&mut self, access: &mut Access, offset: u64, data: &[u8]) {
        if let (0, Some(&value)) = (offset, data.first()) {
            if value & !self.state.value & 1 != 0 {
                access.effects.power = Some(Power::Reset);
            }
            self.state.value = value;
        }
    }

    fn reset(&mut self, _access: &mut Access) {
        *self = Self::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Effects;

    fn write(device: &mut dyn Device, offset: u64, value: u8) -> Effects {
        let mut effects = Effects::default();
        device.write(&mut Access { now: 0, effects: &mut effects }, offset, &[value]);
        effects
    }
    fn read(device: &mut dyn Device, offset: u64) -> u8 {
        let mut data = [0];
        device.read(&mut Access { now: 0, effects: &mut Effects::default() }, offset, &mut data);
        data[0]
    }

    #[test]
    fn pulses_reset() {
        let mut d = I8042::new();
        assert_eq!(write(&mut d, 4, 0xfe).power, Some(Power::Reset));
        assert_eq!(write(&mut d, 4, 0xff).power, None);
        write(&mut d, 4, 0xd1);
        assert_eq!(write(&mut d, 0, 0xce).power, Some(Power::Reset));
        let mut p = Port92::new();
        assert_eq!(write(&mut p, 0, 0x02).power, None);
        assert_eq!(write(&mut p, 0, 0x03).power, Some(Power::Reset));
    }

    /// What Linux's i8042 driver asks on its way (drivers/input/serio/i8042.c).
    #[test]
    fn linux_finds_a_controller_without_devices() {
        let mut d = I8042::new();
        assert_eq!(read(&mut d, 4) & 1, 0, "i8042_flush");
        write(&mut d, 4, 0xaa);
        assert_eq!((read(&mut d, 4) & 1, read(&mut d, 0)), (1, 0x55));
        write(&mut d, 4, 0x60);
        write(&mut d, 0, 0x34);
        write(&mut d, 4, 0x20);
        assert_eq!(read(&mut d, 0), 0x34);
        write(&mut d, 4, 0xd3);
        write(&mut d, 0, 0x5a);
        assert_eq!((read(&mut d, 4) & 0x21, read(&mut d, 0)), (1, 0x5a), "no mouse data");
        write(&mut d, 4, 0xa9);
        assert_eq!(read(&mut d, 0), 1);
    }

    #[test]
    fn a_missing_keyboard_times_out() {
        let mut d = I8042::new();
        write(&mut d, 4, 0x60);
        write(&mut d, 0, 0x65);
        assert_eq!(write(&mut d, 0, 0xf2).lines, [(1, true)]);
        assert_eq!(read(&mut d, 4) & 0x41, 0x41);
        let mut effects = Effects::default();
        d.read(&mut Access { now: 0, effects: &mut effects }, 0, &mut [0]);
        assert_eq!(effects.lines, [(1, false)]);
        assert_eq!(read(&mut d, 4) & 0x41, 0);
    }

    #[test]
    fn a20_is_remembered() {
        let mut d = I8042::new();
        for (command, bit) in [(0xdd, 0), (0xdf, 2)] {
            write(&mut d, 4, command);
            write(&mut d, 4, 0xd0);
            assert_eq!(read(&mut d, 0) & 2, bit);
        }
    }
}
