//! The pair of 8259A interrupt controllers of a PC, with the edge/level control registers of the PCI chipsets.
//!
//! Sections are those of the 8259A data sheet (Intel order number 231468). Each chip is a [`Chip`]; [`Pic`] wires
//! the second one's output to input 2 of the first.

mod chip;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::device::{Access, Device};
pub use chip::Chip;

/// Command port of the master.
pub const MASTER_COMMAND: u16 = 0x20;
/// Data port of the master.
pub const MASTER_DATA: u16 = 0x21;
/// Command port of the slave.
pub const SLAVE_COMMAND: u16 = 0xa0;
/// Data port of the slave.
pub const SLAVE_DATA: u16 = 0xa1;
/// Edge/level control register of the master.
pub const MASTER_ELCR: u16 = 0x4d0;
/// Edge/level control register of the slave.
pub const SLAVE_ELCR: u16 = 0x4d1;
/// Every port of the pair.
pub const PORTS: [u16; 6] = [MASTER_COMMAND, MASTER_DATA, SLAVE_COMMAND, SLAVE_DATA, MASTER_ELCR, SLAVE_ELCR];

/// Input of the master that the slave's output drives.
const CASCADE: u8 = 2;
/// Inputs that can be made level-triggered: not the timer, keyboard, cascade, RTC and x87 error (ICH data sheets,
/// ELCR1 and ELCR2).
const ELCR_MASK: [u8; 2] = [0xf8, 0xde];

/// The pair of chips; also its saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pic {
    master: Chip,
    slave: Chip,
}

impl Default for Pic {
    fn default() -> Self {
        Self::new()
    }
}

impl Pic {
    /// The pair after power-up: it makes no interrupts before it is initialised.
    pub fn new() -> Self {
        let mut pic = Self { master: Chip::default(), slave: Chip::default() };
        pic.cascade();
        pic
    }

    /// Back to the state after power-up. The inputs keep their levels, which others drive.
    pub fn reset(&mut self) {
        self.master.reset();
        self.slave.reset();
        self.cascade();
    }

    /// The state.
    pub fn state(&self) -> Self {
        self.clone()
    }

    /// Takes a saved state.
    pub fn restore(&mut self, state: &Self) {
        *self = state.clone();
        self.master.sanitize(ELCR_MASK[0]);
        self.slave.sanitize(ELCR_MASK[1]);
        self.cascade();
    }

    /// Sets the level of input 0 to 15; 2 is the cascade and has none of its own.
    pub fn set_irq(&mut self, irq: u8, level: bool) {
        match irq {
            CASCADE => {}
            0..=7 => self.master.set_input(irq, level),
            8..=15 => self.slave.set_input(irq - 8, level),
            _ => {}
        }
        self.cascade();
    }

    /// Carries the slave's output to the master.
    fn cascade(&mut self) {
        self.master.set_cascade(CASCADE, self.slave.intr());
    }

    /// The output to the CPU.
    pub fn intr(&self) -> bool {
        self.master.intr()
    }

    /// An interrupt acknowledge cycle: the vector. A request that has gone in the meantime gives input 7's vector
    /// of the chip in question without marking it in service ("spurious interrupt", Interrupt Sequence).
    pub fn acknowledge(&mut self) -> u8 {
        let irq = self.master.acknowledge();
        let vector = match irq {
            Some(CASCADE) => {
                let slave = self.slave.acknowledge();
                self.slave.vector(slave.unwrap_or(7))
            }
            _ => self.master.vector(irq.unwrap_or(7)),
        };
        self.cascade();
        vector
    }

    /// Reads a port. Not a pure read: in poll mode it acknowledges.
    pub fn read_port(&mut self, port: u16) -> u8 {
        let value = match port {
            MASTER_COMMAND => self.master.read_command(),
            MASTER_DATA => self.master.read_data(),
            SLAVE_COMMAND => self.slave.read_command(),
            SLAVE_DATA => self.slave.read_data(),
            MASTER_ELCR => self.master.elcr(),
            SLAVE_ELCR => self.slave.elcr(),
            _ => 0xff,
        };
        self.cascade();
        value
    }

    /// Writes a port.
    pub fn write_port(&mut self, port: u16, value: u8) {
        match port {
            MASTER_COMMAND => self.master.write_command(value),
            MASTER_DATA => self.master.write_data(value),
            SLAVE_COMMAND => self.slave.write_command(value),
            SLAVE_DATA => self.slave.write_data(value),
            MASTER_ELCR => self.master.set_elcr(value & ELCR_MASK[0]),
            SLAVE_ELCR => self.slave.set_elcr(value & ELCR_MASK[1]),
            _ => {}
        }
        self.cascade();
    }
}

/// The offset is the port number: the pair's ports are in three ranges. Wider accesses are split into bytes.
impl Device for Pic {
    fn read(&mut self, _access: &mut Access, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = port_at(offset, i).map_or(0xff, |port| self.read_port(port));
        }
    }
    fn write(&mut self, _access: &mut Access, offset: u64, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            if let Some(port) = port_at(offset, i) {
                self.write_port(port, *byte);
            }
        }
    }
    fn reset(&mut self, _access: &mut Access) {
        Pic::reset(self);
    }
}

/// The port of byte `i` of an access at `offset`.
fn port_at(offset: u64, i: usize) -> Option<u16> {
    u16::try_from(offset.checked_add(i as u64)?).ok()
}
