//! The I/O APIC: an 82093AA with the version-0x20 EOI register of the ICH chipsets.
//!
//! Sections are those of the 82093AA data sheet (Intel order number 290566). Messages for local APICs are returned
//! as [`Msi`]s, which is what they are on the bus (SDM volume 3, 10.11).

use serde::{Deserialize, Serialize};

use crate::fabric::Msi;

/// Where the registers are in memory.
pub const BASE: u64 = 0xfec0_0000;
/// Size of the register window.
pub const SIZE: u64 = 0x1000;
/// Interrupt input pins of a PC's.
pub const PINS: usize = 24;
/// The most interrupt input pins.
pub const MOST_PINS: usize = 64;

/// Offset of the register select register (3.1.1).
const IOREGSEL: u64 = 0x00;
/// Offset of the data window (3.1.2).
const IOWIN: u64 = 0x10;
/// Offset of the EOI register (ICH data sheets, "EOIR": exists from version 0x20 on).
const EOIR: u64 = 0x40;

/// Indirect register: ID (3.2.1).
const REG_ID: u8 = 0x00;
/// Indirect register: version (3.2.2).
const REG_VERSION: u8 = 0x01;
/// Indirect register: arbitration ID (3.2.3).
const REG_ARBITRATION: u8 = 0x02;
/// First indirect register of the redirection table (3.2.4).
const REG_TABLE: u8 = 0x10;
/// Version with an EOI register; the number of the last table entry is in the same register.
const VERSION: u32 = 0x20;
const LAST_ENTRY_SHIFT: u32 = 16;
/// The bits of the ID register that exist.
const ID_BITS: u32 = 0x0f00_0000;

/// Redirection entry: delivery mode (3.2.4).
const MODE: u64 = 7 << 8;
/// Redirection entry: logical destination.
const LOGICAL: u64 = 1 << 11;
/// Redirection entry: a local APIC has taken the level-triggered interrupt and not yet ended it.
const REMOTE_IRR: u64 = 1 << 14;
/// Redirection entry: level-triggered.
const LEVEL: u64 = 1 << 15;
/// Redirection entry: masked.
const MASKED: u64 = 1 << 16;
/// The bits of a redirection entry that software writes; delivery status and remote IRR are read-only.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// State of the I/O APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    /// ID register.
    pub id: u32,
    /// Register select register.
    pub select: u8,
    /// Redirection table.
    pub table: Vec<u64>,
    /// Pins that are asserted, bit n for pin n.
    pub lines: u64,
}

/// The I/O APIC.
///
/// A pin's level here means asserted or not; the polarity bit is kept but does not invert it. Lines of this machine
/// have no voltage, and so firmware tables and drivers cannot disagree with it.
#[derive(Clone, Debug)]
pub struct IoApic {
    state: IoApicState,
}

impl Default for IoApic {
    fn default() -> Self {
        Self::new(PINS)
    }
}

impl IoApic {
    /// An I/O APIC of so many pins (1 to [`MOST_PINS`]) after power-up: all of them masked.
    pub fn new(pins: usize) -> Self {
        let table = vec![MASKED; pins.clamp(1, MOST_PINS)];
        Self { state: IoApicState { id: 0, select: 0, table, lines: 0 } }
    }

    /// Back to the state after power-up. The pins keep their levels, which others drive.
    pub fn reset(&mut self) {
        let lines = self.state.lines;
        *self = Self::new(self.pins());
        self.state.lines = lines;
    }

    /// The state.
    pub fn state(&self) -> IoApicState {
        self.state.clone()
    }

    fn pins(&self) -> usize {
        self.state.table.len()
    }

    /// Takes a saved state, of an I/O APIC with as many pins.
    pub fn restore(&mut self, state: &IoApicState) {
        let pins = self.pins();
        self.state = state.clone();
        self.state.id &= ID_BITS;
        self.state.lines &= u64::MAX >> (MOST_PINS - pins);
        self.state.table.resize(pins, MASKED);
        for entry in &mut self.state.table {
            *entry &= WRITABLE | REMOTE_IRR;
        }
    }

    /// Sets the level of a pin; returns the message that this sends.
    ///
    /// An edge on a masked pin is ignored, neither sent nor held (3.2.4, interrupt mask); a level is seen when the
    /// pin is unmasked.
    pub fn set_pin(&mut self, pin: usize, level: bool) -> Option<Msi> {
        let entry = *self.state.table.get(pin)?;
        let bit = 1 << pin;
        let was = self.state.lines & bit != 0;
        if level {
            self.state.lines |= bit;
        } else {
            self.state.lines &= !bit;
        }
        if is_level(entry) {
            return self.service_level(pin);
        }
        (level && !was && entry & MASKED == 0).then(|| message(entry))
    }

    /// What each pin sends, for those that are level-triggered.
    pub fn level_messages(&self) -> Vec<Option<Msi>> {
        self.state.table.iter().map(|&entry| is_level(entry).then(|| message(entry))).collect()
    }

    /// A local APIC ended an interrupt of this vector; returns the messages of pins that are still asserted.
    pub fn end_of_interrupt(&mut self, vector: u8, mut send: impl FnMut(Msi)) {
        for pin in 0..self.pins() {
            let entry = &mut self.state.table[pin];
            if *entry as u8 == vector && *entry & (REMOTE_IRR | LEVEL) == REMOTE_IRR | LEVEL {
                *entry &= !REMOTE_IRR;
                if let Some(msi) = self.service_level(pin) {
                    send(msi);
                }
            }
        }
    }

    /// Reads `data.len()` bytes at `offset` into the window. Registers are 32 bits wide.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset & !3 {
            IOREGSEL => u32::from(self.state.select),
            IOWIN => self.read_indirect(self.state.select),
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get((offset & 3) as usize + i).copied().unwrap_or(0);
        }
    }

    /// Writes a register and sends the messages that this frees. Data narrower than 32 bits counts as extended with
    /// zeroes (the select register is a byte); unaligned writes are dropped.
    pub fn write(&mut self, offset: u64, data: &[u8], mut send: impl FnMut(Msi)) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        match offset {
            IOREGSEL => self.state.select = value as u8,
            IOWIN if data.len() >= 4 => {
                if let Some(msi) = self.write_indirect(self.state.select, value) {
                    send(msi);
                }
            }
            EOIR => self.end_of_interrupt(value as u8, send),
            _ => {}
        }
    }

    fn read_indirect(&self, register: u8) -> u32 {
        match register {
            REG_ID | REG_ARBITRATION => self.state.id,
            REG_VERSION => VERSION | (self.pins() as u32 - 1) << LAST_ENTRY_SHIFT,
            _ => match self.table_index(register) {
                Some((pin, high)) => (self.state.table[pin] >> if high { 32 } else { 0 }) as u32,
                None => u32::MAX,
            },
        }
    }

    fn write_indirect(&mut self, register: u8, value: u32) -> Option<Msi> {
        if register == REG_ID {
            self.state.id = value & ID_BITS;
        }
        let (pin, high) = self.table_index(register)?;
        let entry = &mut self.state.table[pin];
        let value = u64::from(value);
        let merged = if high { *entry & 0xffff_ffff | value << 32 } else { *entry & !0xffff_ffff | value };
        *entry = merged & WRITABLE | *entry & REMOTE_IRR;
        if !is_level(*entry) {
            // Remote IRR means nothing for an edge, and drivers clear it by switching to edge and back (Linux,
            // __eoi_ioapic_pin).
            *entry &= !REMOTE_IRR;
        }
        self.service_level(pin)
    }

    /// The pin and half that an indirect register of the table is.
    fn table_index(&self, register: u8) -> Option<(usize, bool)> {
        let index = usize::from(register.checked_sub(REG_TABLE)?);
        (index < 2 * self.pins()).then_some((index / 2, index % 2 == 1))
    }

    /// Sends a level-triggered pin's message if it is asserted, unmasked and not under way.
    fn service_level(&mut self, pin: usize) -> Option<Msi> {
        let asserted = self.state.lines >> pin & 1 != 0;
        let entry = &mut self.state.table[pin];
        if !asserted || !is_level(*entry) || *entry & (MASKED | REMOTE_IRR) != 0 {
            return None;
        }
        *entry |= REMOTE_IRR;
        Some(message(*entry))
    }
}

/// Whether the entry is level-triggered: only fixed and lowest-priority interrupts can be (3.2.4, delivery mode: the
/// others are treated as edges whatever the trigger bit says).
fn is_level(entry: u64) -> bool {
    entry & LEVEL != 0 && (entry & MODE) >> 8 <= 1
}

/// An entry's message, in the format of SDM volume 3, 10.11.
fn message(entry: u64) -> Msi {
    let destination = entry >> 56 & 0xff;
    let logical = if entry & LOGICAL != 0 { Msi::LOGICAL } else { 0 };
    let trigger = if is_level(entry) { Msi::DATA_LEVEL | Msi::DATA_ASSERT } else { 0 };
    Msi {
        address: Msi::ADDRESS | destination << Msi::DESTINATION_SHIFT | logical,
        data: (entry & (MODE | 0xff)) as u32 | trigger,
    }
}

#[cfg(test)]
mod tests;
