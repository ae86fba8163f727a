//! The 8254 interval timer of a PC with its gate and speaker port 0x61.
//!
//! Sections are those of the 8254 data sheet (Intel order number 231164). Nothing counts here: a channel remembers
//! when it was loaded, and everything else follows from the time. Channel 0 drives interrupt line 0.

mod channel;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::device::{Access, Device};
use crate::lapic::MIN_INTERVAL_NS;
pub use channel::Channel;

/// Input frequency of all channels in Hz.
pub const HZ: u64 = 1_193_182;
/// First port: the counter of channel 0.
pub const PORT: u16 = 0x40;
/// Number of ports from [`PORT`] on: three counters and the control word.
pub const PORTS: u16 = 4;
/// The port with channel 2's gate and output ("NMI status and control", system control port B).
pub const PORT_SPEAKER: u16 = 0x61;

/// The control word's port, relative to [`PORT`].
const CONTROL: u16 = 3;
/// Port 0x61: gate of channel 2.
const GATE_2: u8 = 1 << 0;
/// Port 0x61: what can be written: gate, speaker, and the two NMI masks that only have to be remembered.
const SPEAKER_WRITABLE: u8 = 0x0f;
/// Port 0x61: toggles with each refresh of the memory.
const REFRESH: u8 = 1 << 4;
/// Port 0x61: output of channel 2.
const OUT_2: u8 = 1 << 5;
/// Time between two refreshes: 18 counts of the input clock, as channel 1 makes them in the PC/AT.
const REFRESH_CLOCKS: u64 = 18;
/// Interrupt line of channel 0.
const IRQ: u8 = 0;

/// Control word: the read-back command in place of a channel (Read-Back Command).
const READ_BACK: u8 = 3;

/// Input clocks since the machine's start.
fn clocks(ns: u64) -> u64 {
    (u128::from(ns) * u128::from(HZ) / 1_000_000_000) as u64
}

/// When the clock counts `clock`, in nanoseconds, rounded up so that `clocks` of it is no less.
fn nanoseconds(clock: u64) -> u64 {
    let ns = (u128::from(clock) * 1_000_000_000).div_ceil(u128::from(HZ));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// The timer; also its saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pit {
    channels: [Channel; 3],
    speaker: u8,
    /// Level of interrupt line 0 as last told.
    line: bool,
    /// Edges of channel 0 up to this clock have been told.
    seen: u64,
    /// The next edge is told no sooner than this, in nanoseconds.
    not_before: u64,
}

impl Default for Pit {
    fn default() -> Self {
        Self::new()
    }
}

impl Pit {
    /// The timer after power-up: nothing counts, all outputs are low, the gate of channel 2 is closed.
    pub fn new() -> Self {
        let channels = [Channel::new(true), Channel::new(true), Channel::new(false)];
        Self { channels, speaker: 0, line: false, seen: 0, not_before: 0 }
    }

    /// The state.
    pub fn state(&self) -> Self {
        self.clone()
    }

    /// Takes a saved state.
    pub fn restore(&mut self, state: &Self) {
        *self = state.clone();
        self.speaker &= SPEAKER_WRITABLE;
        for channel in &mut self.channels {
            channel.sanitize();
        }
    }

    /// Reads a port (0x40 to 0x43 or 0x61); others read all ones. The control word cannot be read.
    pub fn read_port(&mut self, port: u16, now: u64) -> u8 {
        let clock = clocks(now);
        if port == PORT_SPEAKER {
            let refresh = if (clock / REFRESH_CLOCKS).is_multiple_of(2) { 0 } else { REFRESH };
            let out = if self.channels[2].out(clock) { OUT_2 } else { 0 };
            return self.speaker | refresh | out;
        }
        let channel = port.checked_sub(PORT).and_then(|n| self.channels.get_mut(usize::from(n)));
        channel.map_or(0xff, |channel| channel.read(clock))
    }

    /// Writes a port.
    pub fn write_port(&mut self, port: u16, value: u8, access: &mut Access) {
        self.sync(access);
        let clock = clocks(access.now);
        if port == PORT_SPEAKER {
            self.speaker = value & SPEAKER_WRITABLE;
            self.channels[2].set_gate(value & GATE_2 != 0, clock);
            return;
        }
        match port.checked_sub(PORT) {
            Some(CONTROL) => self.control(value, clock),
            Some(n) => {
                if let Some(channel) = self.channels.get_mut(usize::from(n)) {
                    channel.write(value, clock);
                }
            }
            None => {}
        }
        self.sync(access);
    }

    fn control(&mut self, value: u8, clock: u64) {
        let target = value >> 6;
        if target != READ_BACK {
            self.channels[usize::from(target)].control(value, clock);
            return;
        }
        for (n, channel) in self.channels.iter_mut().enumerate() {
            if value >> (n + 1) & 1 != 0 {
                channel.read_back(value, clock);
            }
        }
    }

    /// Brings interrupt line 0 up to date: rising edges since the last time make one, and the level is that of the
    /// output, except that the low phase of the periodic modes is left out (only its end, the edge, means anything).
    fn sync(&mut self, access: &mut Access) {
        let clock = clocks(access.now);
        let channel = &mut self.channels[0];
        if channel.next_edge(self.seen).is_some_and(|edge| edge <= clock) {
            if self.line {
                access.effects.line(IRQ, false);
            }
            access.effects.line(IRQ, true);
            self.line = true;
            self.not_before = access.now.saturating_add(MIN_INTERVAL_NS);
        }
        self.seen = self.seen.max(clock);
        channel.settle(clock);
        let level = channel.is_pulsed() || channel.out(clock);
        if level != self.line {
            self.line = level;
            access.effects.line(IRQ, level);
        }
    }
}

/// Offsets are relative to [`PORT`]; port 0x61 is offset 0x21. Wider accesses are split into bytes.
impl Device for Pit {
    fn read(&mut self, access: &mut Access, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = port_at(offset, i).map_or(0xff, |port| self.read_port(port, access.now));
        }
    }

    fn write(&mut self, access: &mut Access, offset: u64, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            if let Some(port) = port_at(offset, i) {
                self.write_port(port, *byte, access);
            }
        }
    }

    fn deadline(&self) -> Option<u64> {
        let edge = nanoseconds(self.channels[0].next_edge(self.seen)?);
        Some(edge.max(self.not_before))
    }

    fn tick(&mut self, access: &mut Access) {
        self.sync(access);
    }

    fn reset(&mut self, access: &mut Access) {
        if self.line {
            access.effects.line(IRQ, false);
        }
        *self = Self::new();
    }
}

/// The port of byte `i` of an access at `offset`.
fn port_at(offset: u64, i: usize) -> Option<u16> {
    let offset = u16::try_from(offset.checked_add(i as u64)?).ok()?;
    PORT.checked_add(offset)
}
