//! One 8259A (data sheet, Intel order number 231468).

use serde::{Deserialize, Serialize};

/// ICW1 is marked by this bit of a command.
const ICW1: u8 = 1 << 4;
/// ICW1: ICW4 follows.
const ICW1_IC4: u8 = 1 << 0;
/// ICW1: no cascade, no ICW3.
const ICW1_SINGLE: u8 = 1 << 1;
/// ICW4: automatic EOI.
const ICW4_AEOI: u8 = 1 << 1;
/// ICW4: special fully nested mode.
const ICW4_SFNM: u8 = 1 << 4;
/// OCW3 is marked by this bit of a command.
const OCW3: u8 = 1 << 3;
/// OCW3: poll command.
const OCW3_POLL: u8 = 1 << 2;
/// OCW3: the read-register command is valid; bit 0 then chooses the in-service register.
const OCW3_READ: u8 = 1 << 1;
/// OCW3: the special mask command is valid; bit 5 then sets it.
const OCW3_SPECIAL_MASK: u8 = 1 << 6;
/// A poll's answer: an interrupt was requested.
const POLL_REQUEST: u8 = 1 << 7;

/// Where the chip is in its initialisation sequence (data sheet, figure 6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Step {
    /// Never initialised.
    #[default]
    PowerUp,
    Icw2,
    Icw3,
    Icw4,
    Ready,
}

/// One chip; also its saved state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chip {
    step: Step,
    single: bool,
    wants_icw4: bool,
    /// Levels of the inputs.
    inputs: u8,
    /// Requests of edge-triggered inputs.
    latched: u8,
    in_service: u8,
    mask: u8,
    /// Inputs that are level-triggered.
    elcr: u8,
    /// Vector of input 0.
    base: u8,
    /// ICW3, which only has to be swallowed: the wiring is fixed.
    icw3: u8,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_fully_nested: bool,
    special_mask: bool,
    poll: bool,
    read_in_service: bool,
    /// The input of highest priority.
    first: u8,
    /// The input that a slave drives.
    cascade: Option<u8>,
}

impl Chip {
    /// Back to the state after power-up; the inputs keep their levels.
    pub(super) fn reset(&mut self) {
        *self = Self { inputs: self.inputs, cascade: self.cascade, ..Self::default() };
    }

    /// Reduces a restored state to what software could have brought about.
    pub(super) fn sanitize(&mut self, elcr: u8) {
        self.elcr &= elcr;
        self.first &= 7;
        self.base &= 0xf8;
        self.cascade = self.cascade.map(|irq| irq & 7);
    }

    pub(super) fn elcr(&self) -> u8 {
        self.elcr
    }
    pub(super) fn set_elcr(&mut self, value: u8) {
        self.elcr = value;
    }
    pub(super) fn vector(&self, irq: u8) -> u8 {
        self.base | (irq & 7)
    }

    /// Sets an input's level. A rising edge is latched until it is acknowledged: a short pulse is not lost, as it
    /// would be on the chip, since here a CPU may take long to answer.
    pub(super) fn set_input(&mut self, irq: u8, level: bool) {
        let bit = 1 << (irq & 7);
        if level && self.inputs & bit == 0 {
            self.latched |= bit;
        }
        if level {
            self.inputs |= bit;
        } else {
            self.inputs &= !bit;
        }
    }

    /// The output of the slave. Its requests follow the line: the slave's latches hold the edges.
    pub(super) fn set_cascade(&mut self, irq: u8, level: bool) {
        self.cascade = Some(irq & 7);
        let bit = 1 << (irq & 7);
        self.inputs = if level { self.inputs | bit } else { self.inputs & !bit };
    }

    /// The interrupt request register.
    fn requests(&self) -> u8 {
        let level = self.elcr | self.cascade.map_or(0, |irq| 1 << irq);
        (self.latched & !level) | (self.inputs & level)
    }

    /// The position of the highest priority among `bits`: 0 is the highest, 8 none.
    fn priority(&self, bits: u8) -> u8 {
        bits.rotate_right(u32::from(self.first)).trailing_zeros() as u8
    }

    /// The input to be served next, if nothing in service is of the same or a higher priority (Fully Nested Mode).
    fn next(&self) -> Option<u8> {
        if self.step != Step::Ready {
            return None;
        }
        let request = self.priority(self.requests() & !self.mask);
        let mut blocking = self.in_service;
        if self.special_mask {
            blocking &= !self.mask;
        }
        if self.special_fully_nested {
            // The slave in service does not lock out its own inputs of higher priority (Special Fully Nested Mode).
            blocking &= !self.cascade.map_or(0, |irq| 1 << irq);
        }
        (request < self.priority(blocking)).then_some((request + self.first) & 7)
    }

    pub(super) fn intr(&self) -> bool {
        self.next().is_some()
    }

    /// Takes the next input in service.
    pub(super) fn acknowledge(&mut self) -> Option<u8> {
        let irq = self.next()?;
        let bit = 1 << irq;
        self.latched &= !bit;
        if !self.auto_eoi {
            self.in_service |= bit;
        } else if self.rotate_on_auto_eoi {
            self.first = (irq + 1) & 7;
        }
        Some(irq)
    }

    pub(super) fn read_command(&mut self) -> u8 {
        if std::mem::take(&mut self.poll) {
            return self.answer_poll();
        }
        if self.read_in_service { self.in_service } else { self.requests() }
    }

    pub(super) fn read_data(&mut self) -> u8 {
        if std::mem::take(&mut self.poll) {
            return self.answer_poll();
        }
        self.mask
    }

    /// The read after a poll command is an interrupt acknowledge (Poll Command).
    fn answer_poll(&mut self) -> u8 {
        self.acknowledge().map_or(0, |irq| POLL_REQUEST | irq)
    }

    pub(super) fn write_command(&mut self, value: u8) {
        if value & ICW1 != 0 {
            self.initialise(value);
        } else if value & OCW3 != 0 {
            self.operate(value);
        } else {
            self.end(value >> 5, value & 7);
        }
    }

    /// ICW1: starts the initialisation (Initialization Command Words 1). Level mode (LTIM) is the ELCR's here.
    fn initialise(&mut self, value: u8) {
        *self = Self {
            step: Step::Icw2,
            single: value & ICW1_SINGLE != 0,
            wants_icw4: value & ICW1_IC4 != 0,
            inputs: self.inputs,
            elcr: self.elcr,
            base: self.base,
            cascade: self.cascade,
            ..Self::default()
        };
    }

    /// OCW3.
    fn operate(&mut self, value: u8) {
        if value & OCW3_SPECIAL_MASK != 0 {
            self.special_mask = value & 1 << 5 != 0;
        }
        // The poll command overrides the read-register command.
        if value & OCW3_POLL != 0 {
            self.poll = true;
        } else if value & OCW3_READ != 0 {
            self.read_in_service = value & 1 != 0;
        }
    }

    /// OCW2: rotate, specific, EOI in `command`, and the level that specific commands act on.
    fn end(&mut self, command: u8, level: u8) {
        match command {
            0b000 => self.rotate_on_auto_eoi = false,
            0b100 => self.rotate_on_auto_eoi = true,
            0b110 => self.first = (level + 1) & 7,
            0b001 => {
                self.end_highest();
            }
            0b101 => {
                if let Some(irq) = self.end_highest() {
                    self.first = (irq + 1) & 7;
                }
            }
            0b011 => self.in_service &= !(1 << level),
            0b111 => {
                self.in_service &= !(1 << level);
                self.first = (level + 1) & 7;
            }
            _ => {}
        }
    }

    /// Non-specific EOI. In special mask mode, masked inputs in service are not cleared by it (End of Interrupt).
    fn end_highest(&mut self) -> Option<u8> {
        let eligible = if self.special_mask { self.in_service & !self.mask } else { self.in_service };
        let position = self.priority(eligible);
        let irq = (position < 8).then_some((position + self.first) & 7)?;
        self.in_service &= !(1 << irq);
        Some(irq)
    }

    pub(super) fn write_data(&mut self, value: u8) {
        let after_icw3 = if self.wants_icw4 { Step::Icw4 } else { Step::Ready };
        match self.step {
            Step::PowerUp | Step::Ready => self.mask = value,
            Step::Icw2 => {
                self.base = value & 0xf8;
                self.step = if self.single { after_icw3 } else { Step::Icw3 };
            }
            Step::Icw3 => {
                self.icw3 = value;
                self.step = after_icw3;
            }
            Step::Icw4 => {
                self.auto_eoi = value & ICW4_AEOI != 0;
                self.special_fully_nested = value & ICW4_SFNM != 0;
                self.step = Step::Ready;
            }
        }
    }
}
