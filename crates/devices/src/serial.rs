//! 16550A serial port (National Semiconductor PC16550D data sheet; section numbers are of its chapter 8).
//!
//! The line has no speed: what is written is out at once, and four character times (8.4, FIFO time-out) pass at once.
//! The divisor is kept, and does nothing.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::lanes::{read_bytes, write_bytes};
use crate::{Access, Device};

/// First ports of COM1 to COM4.
pub const COM_PORTS: [u16; 4] = [0x3f8, 0x2f8, 0x3e8, 0x2e8];
/// Interrupt lines of COM1 to COM4. Two ports share a line: the machine holds it high while either does.
pub const COM_IRQS: [u8; 4] = [4, 3, 4, 3];

/// Depth of the FIFOs.
const FIFO: usize = 16;
/// Bytes of output that may wait for [`Serial::take_output`].
const OUTPUT_LIMIT: usize = 4096;

/// IER (8.6): enables of received data, transmitter empty, line status and modem status.
mod ier {
    pub const RECEIVED: u8 = 1;
    pub const TRANSMIT: u8 = 2;
    pub const LINE: u8 = 4;
    pub const MODEM: u8 = 8;
}

/// IIR (8.5, table IV), without the FIFO bits.
mod iir {
    pub const MODEM: u8 = 0x0;
    pub const NONE: u8 = 0x1;
    pub const TRANSMIT: u8 = 0x2;
    pub const RECEIVED: u8 = 0x4;
    pub const LINE: u8 = 0x6;
    pub const TIMEOUT: u8 = 0xc;
    pub const FIFOS: u8 = 0xc0;
}

/// FCR (8.4).
mod fcr {
    pub const ENABLE: u8 = 1;
    pub const CLEAR_RECEIVE: u8 = 2;
    pub const KEPT: u8 = 0xc9;
}

/// LCR (8.1).
const LCR_DLAB: u8 = 0x80;

/// MCR (8.7).
mod mcr {
    pub const DTR: u8 = 1;
    pub const RTS: u8 = 2;
    pub const OUT1: u8 = 4;
    pub const OUT2: u8 = 8;
    pub const LOOP: u8 = 0x10;
}

/// LSR (8.3).
mod lsr {
    pub const READY: u8 = 1;
    pub const OVERRUN: u8 = 2;
    pub const EMPTY: u8 = 0x60;
}

/// MSR (8.8).
mod msr {
    pub const RING_ENDED: u8 = 4;
    pub const DELTAS: u8 = 0x0f;
    pub const CTS: u8 = 0x10;
    pub const DSR: u8 = 0x20;
    pub const RI: u8 = 0x40;
    pub const DCD: u8 = 0x80;
}

/// Registers of a serial port, as saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Interrupt enable register.
    pub ier: u8,
    /// FIFO control register: the bits that last.
    pub fcr: u8,
    /// Line control register.
    pub lcr: u8,
    /// Modem control register.
    pub mcr: u8,
    /// Line status register: the error bits.
    pub line_errors: u8,
    /// Modem status register: the bits that tell of changes.
    pub modem_deltas: u8,
    /// Scratch register.
    pub scr: u8,
    /// Divisor latch.
    pub divisor: u16,
    /// The transmitter became empty, and the guest has not seen it yet.
    pub transmit_pending: bool,
    /// Received bytes that the guest has not read.
    pub input: VecDeque<u8>,
    /// Sent bytes that the machine has not taken.
    pub output: Vec<u8>,
    /// Level of the interrupt line.
    pub line: bool,
}

impl Default for SerialState {
    /// After master reset (8.0, table II). The divisor is 9600 baud's.
    fn default() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            line_errors: 0,
            modem_deltas: 0,
            scr: 0,
            divisor: 12,
            transmit_pending: false,
            input: VecDeque::new(),
            output: Vec::new(),
            line: false,
        }
    }
}

/// A serial port.
#[derive(Debug)]
pub struct Serial {
    irq: u8,
    state: SerialState,
}

impl Serial {
    /// Number of ports.
    pub const LEN: u64 = 8;

    /// A port after reset that interrupts on line `irq`.
    pub fn new(irq: u8) -> Self {
        Self { irq, state: SerialState::default() }
    }

    /// The state to save.
    pub fn state(&self) -> SerialState {
        self.state.clone()
    }

    /// Takes a saved state.
    pub fn restore(&mut self, state: &SerialState) {
        self.state = state.clone();
        self.state.fcr &= fcr::KEPT;
        self.state.input.truncate(FIFO);
        self.state.output.truncate(OUTPUT_LIMIT);
    }

    /// How many bytes [`Serial::queue_input`] would take now.
    pub fn input_space(&self) -> usize {
        if self.state.mcr & mcr::LOOP != 0 { 0 } else { self.depth().saturating_sub(self.state.input.len()) }
    }

    /// Bytes arrive from the line. Takes as many as the receiver has room for, so that none is lost, and says how many.
    pub fn queue_input(&mut self, access: &mut Access, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.input_space());
        self.state.input.extend(&bytes[..taken]);
        self.update_line(access);
        taken
    }

    /// Whether there is output to take.
    pub fn has_output(&self) -> bool {
        !self.state.output.is_empty()
    }

    /// Takes what the guest has sent.
    pub fn take_output(&mut self, access: &mut Access) -> Vec<u8> {
        let was_full = !self.transmitter_empty();
        let bytes = std::mem::take(&mut self.state.output);
        if was_full {
            self.state.transmit_pending = true;
            self.update_line(access);
        }
        bytes
    }

    fn fifos(&self) -> bool {
        self.state.fcr & fcr::ENABLE != 0
    }

    fn depth(&self) -> usize {
        if self.fifos() { FIFO } else { 1 }
    }

    /// Whether the transmitter takes a whole FIFO: a driver that is told so does not look again before each byte.
    fn transmitter_empty(&self) -> bool {
        self.state.output.len() + FIFO <= OUTPUT_LIMIT
    }

    /// Bytes in the receive FIFO at which the interrupt comes (8.4).
    fn trigger(&self) -> usize {
        if self.fifos() { [1, 4, 8, 14][usize::from(self.state.fcr >> 6)] } else { 1 }
    }

    /// The interrupt of highest priority, as IIR tells it.
    fn interrupt(&self) -> u8 {
        let s = &self.state;
        if s.ier & ier::LINE != 0 && s.line_errors != 0 {
            iir::LINE
        } else if s.ier & ier::RECEIVED != 0 && s.input.len() >= self.trigger() {
            iir::RECEIVED
        } else if s.ier & ier::RECEIVED != 0 && !s.input.is_empty() {
            iir::TIMEOUT
        } else if s.ier & ier::TRANSMIT != 0 && s.transmit_pending {
            iir::TRANSMIT
        } else if s.ier & ier::MODEM != 0 && s.modem_deltas != 0 {
            iir::MODEM
        } else {
            iir::NONE
        }
    }

    /// The modem lines as MSR tells them: in loop-back those of MCR, else a terminal that is on line.
    fn modem_lines(&self) -> u8 {
        let m = self.state.mcr;
        if m & mcr::LOOP == 0 {
            return msr::CTS | msr::DSR | msr::DCD;
        }
        [(mcr::RTS, msr::CTS), (mcr::DTR, msr::DSR), (mcr::OUT1, msr::RI), (mcr::OUT2, msr::DCD)]
            .into_iter()
            .filter(|(from, _)| m & from != 0)
            .fold(0, |lines, (_, to)| lines | to)
    }

    /// Drives the interrupt line. A PC gates it by the OUT2 pin, which is inactive in loop-back (8.7).
    fn update_line(&mut self, access: &mut Access) {
        let open = self.state.mcr & (mcr::OUT2 | mcr::LOOP) == mcr::OUT2;
        let level = open && self.interrupt() != iir::NONE;
        if level != self.state.line {
            self.state.line = level;
            access.effects.line(self.irq, level);
        }
    }

    fn read_register(&mut self, register: u64) -> u8 {
        let dlab = self.state.lcr & LCR_DLAB != 0;
        match register {
            0 if dlab => self.state.divisor as u8,
            1 if dlab => (self.state.divisor >> 8) as u8,
            0 => self.state.input.pop_front().unwrap_or(0),
            1 => self.state.ier,
            2 => {
                let source = self.interrupt();
                if source == iir::TRANSMIT {
                    self.state.transmit_pending = false;
                }
                source | if self.fifos() { iir::FIFOS } else { 0 }
            }
            3 => self.state.lcr,
            4 => self.state.mcr,
            5 => {
                let ready = if self.state.input.is_empty() { 0 } else { lsr::READY };
                let empty = if self.transmitter_empty() { lsr::EMPTY } else { 0 };
                std::mem::take(&mut self.state.line_errors) | ready | empty
            }
            6 => self.modem_lines() | std::mem::take(&mut self.state.modem_deltas),
            7 => self.state.scr,
            _ => 0xff,
        }
    }

    fn write_register(&mut self, register: u64, value: u8) {
        let dlab = self.state.lcr & LCR_DLAB != 0;
        match register {
            0 if dlab => self.state.divisor = self.state.divisor & 0xff00 | u16::from(value),
            1 if dlab => self.state.divisor = self.state.divisor & 0x00ff | u16::from(value) << 8,
            0 => self.transmit(value),
            1 => self.write_ier(value & 0x0f),
            2 => self.write_fcr(value),
            3 => self.state.lcr = value,
            4 => self.write_mcr(value & 0x1f),
            7 => self.state.scr = value,
            _ => {}
        }
    }

    /// A byte goes out, or round in loop-back.
    fn transmit(&mut self, byte: u8) {
        if self.state.mcr & mcr::LOOP != 0 {
            self.receive_looped(byte);
        } else if self.state.output.len() < OUTPUT_LIMIT {
            self.state.output.push(byte);
        }
        self.state.transmit_pending = self.transmitter_empty();
    }

    /// A byte comes round in loop-back. Without room it is lost; without FIFOs it replaces the older one (8.3, OE).
    fn receive_looped(&mut self, byte: u8) {
        if self.state.input.len() < self.depth() {
            self.state.input.push_back(byte);
            return;
        }
        self.state.line_errors |= lsr::OVERRUN;
        if !self.fifos() {
            self.state.input.clear();
            self.state.input.push_back(byte);
        }
    }

    /// Enabling the transmitter's interrupt while it is empty raises it; Linux's `serial8250_do_startup` tests that
    /// it does so each time.
    fn write_ier(&mut self, value: u8) {
        if (self.state.ier ^ value) & ier::TRANSMIT != 0 {
            self.state.transmit_pending = value & ier::TRANSMIT != 0 && self.transmitter_empty();
        }
        self.state.ier = value;
    }

    /// A change of the enable bit clears the FIFOs; other bits count only with it (8.4).
    fn write_fcr(&mut self, value: u8) {
        let enabled = value & fcr::ENABLE != 0;
        if enabled != self.fifos() || enabled && value & fcr::CLEAR_RECEIVE != 0 {
            self.state.input.clear();
        }
        self.state.fcr = if enabled { value & fcr::KEPT } else { 0 };
    }

    fn write_mcr(&mut self, value: u8) {
        let before = self.modem_lines();
        self.state.mcr = value;
        let after = self.modem_lines();
        let mut deltas = (before ^ after) >> 4;
        if before & msr::RI == 0 || after & msr::RI != 0 {
            // Only the end of a ring counts (8.8, TERI).
            deltas &= !msr::RING_ENDED;
        }
        self.state.modem_deltas |= deltas & msr::DELTAS;
    }
}

impl Device for Serial {
    fn read(&mut self, access: &mut Access, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |register| self.read_register(register));
        self.update_line(access);
    }

    fn write(&mut self, access: &mut Access, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |register, value| self.write_register(register, value));
        self.update_line(access);
    }

    /// Output that the machine has not taken yet has left the port already and stays.
    fn reset(&mut self, access: &mut Access) {
        let line = self.state.line;
        let output = std::mem::take(&mut self.state.output);
        self.state = SerialState { line, output, ..SerialState::default() };
        self.update_line(access);
    }
}

#[cfg(test)]
#[path = "serial_tests.rs"]
mod tests;
