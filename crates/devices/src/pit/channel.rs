//! One counter of the 8254 (data sheet, Intel order number 231164, Mode Definitions).

use serde::{Deserialize, Serialize};

/// Control word: counter latch command in place of an access mode.
const LATCH: u8 = 0;
/// Access mode: low byte only.
const LOW: u8 = 1;
/// Access mode: high byte only.
const HIGH: u8 = 2;
/// Access mode: low byte, then high byte.
const BOTH: u8 = 3;
/// Read-back command: clear to latch the count.
const READ_BACK_NO_COUNT: u8 = 1 << 5;
/// Read-back command: clear to latch the status.
const READ_BACK_NO_STATUS: u8 = 1 << 4;
/// Status: level of the output.
const STATUS_OUT: u8 = 1 << 7;
/// Status: the count written is not in the counter yet.
const STATUS_NULL: u8 = 1 << 6;

/// A counter. Times are input clocks since the machine's start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Channel {
    mode: u8,
    bcd: bool,
    access: u8,
    /// The count that is being counted down, 1 to 65536; 0 before the first.
    count: u32,
    /// A count written that waits for a trigger or for the end of the period.
    next: Option<u32>,
    /// When `next` is due in the periodic modes.
    next_at: u64,
    /// When the count was loaded; it may be the coming clock.
    start: Option<u64>,
    /// Clocks counted when the gate closed.
    stopped: Option<u64>,
    gate: bool,
    /// First of two bytes written.
    low_byte: Option<u8>,
    /// The next byte read is the high one.
    read_high: bool,
    latched: Option<u16>,
    status: Option<u8>,
}

impl Channel {
    /// A counter that was never programmed: mode 0, not counting.
    pub(super) fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            bcd: false,
            access: BOTH,
            count: 0,
            next: None,
            next_at: 0,
            start: None,
            stopped: None,
            gate,
            low_byte: None,
            read_high: false,
            latched: None,
            status: None,
        }
    }

    /// Reduces a restored state to what software could have brought about.
    pub(super) fn sanitize(&mut self) {
        self.mode = self.mode.min(5);
        self.access = self.access.clamp(LOW, BOTH);
        self.count = self.count.min(self.modulus());
        self.next = self.next.map(|count| count.clamp(1, self.modulus()));
    }

    /// A control word for this counter.
    pub(super) fn control(&mut self, value: u8, clock: u64) {
        let access = value >> 4 & 3;
        if access == LATCH {
            return self.latch(clock);
        }
        let mode = value >> 1 & 7;
        // Modes 6 and 7 are 2 and 3 with a bit that does not matter.
        let mode = if mode > 5 { mode & 3 } else { mode };
        *self = Self { mode, access, bcd: value & 1 != 0, ..Self::new(self.gate) };
    }

    /// The read-back command, for this counter.
    pub(super) fn read_back(&mut self, value: u8, clock: u64) {
        if value & READ_BACK_NO_COUNT == 0 {
            self.latch(clock);
        }
        if value & READ_BACK_NO_STATUS == 0 && self.status.is_none() {
            self.settle(clock);
            let out = if self.out(clock) { STATUS_OUT } else { 0 };
            let null = self.next.is_some() || self.start.is_none_or(|start| clock < start);
            let null = if null { STATUS_NULL } else { 0 };
            self.status = Some(out | null | self.access << 4 | self.mode << 1 | u8::from(self.bcd));
        }
    }

    /// Latches the count; further commands are ignored until it is read (Counter Latch Command).
    fn latch(&mut self, clock: u64) {
        self.settle(clock);
        if self.latched.is_none() {
            self.latched = Some(self.value(clock));
        }
    }

    /// Reads a byte of the latched status, the latched count or the count.
    pub(super) fn read(&mut self, clock: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        self.settle(clock);
        let [low, high] = self.latched.unwrap_or_else(|| self.value(clock)).to_le_bytes();
        let (byte, last) = match self.access {
            LOW => (low, true),
            HIGH => (high, true),
            _ if self.read_high => (high, true),
            _ => (low, false),
        };
        self.read_high = !last;
        if last {
            self.latched = None;
        }
        byte
    }

    /// Writes a byte of the count.
    pub(super) fn write(&mut self, value: u8, clock: u64) {
        let raw = match (self.access, self.low_byte.take()) {
            (LOW, _) => u16::from(value),
            (HIGH, _) => u16::from(value) << 8,
            (_, Some(low)) => u16::from_le_bytes([low, value]),
            (_, None) => {
                self.low_byte = Some(value);
                if self.mode == 0 {
                    // The first of two bytes ends the counting and lowers the output (Mode 0).
                    (self.start, self.stopped) = (None, None);
                }
                return;
            }
        };
        self.settle(clock);
        self.load(self.decode(raw), clock);
    }

    /// A whole count has been written: when it takes effect depends on the mode.
    fn load(&mut self, count: u32, clock: u64) {
        match self.mode {
            1 | 5 => self.next = Some(count),
            2 | 3 if self.is_counting() => {
                self.next_at = self.next_edge(clock).unwrap_or(clock);
                self.next = Some(count);
            }
            _ => {
                self.next = None;
                self.count = count;
                self.start = Some(clock.saturating_add(1));
                self.stopped = (!self.gate).then_some(0);
            }
        }
    }

    /// Changes the gate (data sheet, figure 21: gate pin operations).
    pub(super) fn set_gate(&mut self, gate: bool, clock: u64) {
        self.settle(clock);
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match self.mode {
            1 | 5 if gate => self.trigger(clock),
            1 | 5 => {}
            2 | 3 if gate => self.trigger(clock),
            _ if gate => {
                if let Some(counted) = self.stopped.take() {
                    self.start = Some(clock.saturating_sub(counted));
                }
            }
            _ => self.stopped = self.start.map(|start| clock.saturating_sub(start)),
        }
    }

    /// Loads the counter from the count register.
    fn trigger(&mut self, clock: u64) {
        self.count = self.next.take().unwrap_or(self.count);
        self.stopped = None;
        self.start = (self.count != 0).then(|| clock.saturating_add(1));
    }

    /// Makes a count that waited for the end of the period the current one, if the end has come.
    pub(super) fn settle(&mut self, clock: u64) {
        if matches!(self.mode, 2 | 3)
            && self.is_counting()
            && clock >= self.next_at
            && let Some(count) = self.next.take()
        {
            self.count = count;
            self.start = Some(self.next_at);
        }
    }

    fn is_counting(&self) -> bool {
        self.start.is_some() && self.stopped.is_none()
    }

    /// Clocks counted; `None` before the first load.
    fn counted(&self, clock: u64) -> Option<u64> {
        let start = self.start?;
        Some(self.stopped.unwrap_or_else(|| clock.saturating_sub(start)))
    }

    /// Period in the periodic modes, where a count of 1 is illegal.
    fn period(&self) -> u64 {
        u64::from(self.count.max(2))
    }

    /// The output pin.
    pub(super) fn out(&self, clock: u64) -> bool {
        let Some(counted) = self.counted(clock) else { return self.mode != 0 };
        let count = u64::from(self.count);
        match self.mode {
            0 | 1 => counted >= count,
            2 => self.stopped.is_some() || counted % self.period() != self.period() - 1,
            3 => self.stopped.is_some() || counted % self.period() < self.period().div_ceil(2),
            _ => counted != count,
        }
    }

    /// Whether the output's low phases are pulses before an edge (modes 2 to 5), not a state that lasts.
    pub(super) fn is_pulsed(&self) -> bool {
        self.mode >= 2
    }

    /// The first rising edge of the output after clock `after`, as programmed now.
    pub(super) fn next_edge(&self, after: u64) -> Option<u64> {
        let start = self.start.filter(|_| self.is_counting())?;
        let count = u64::from(self.count);
        let edge = match self.mode {
            0 | 1 => start.saturating_add(count),
            2 | 3 => {
                let periods = after.saturating_sub(start) / self.period() + 1;
                start.saturating_add(periods.saturating_mul(self.period()))
            }
            _ => start.saturating_add(count + 1),
        };
        (edge > after).then_some(edge)
    }

    /// What the counter reads.
    fn value(&self, clock: u64) -> u16 {
        let Some(counted) = self.counted(clock) else { return 0 };
        let modulus = u64::from(self.modulus());
        let period = self.period();
        let value = match self.mode {
            2 => period - counted % period,
            3 => {
                // Counts by two, once through for each half of the output (Mode 3).
                let half = period.div_ceil(2);
                let position = counted % period;
                let position = if position < half { position } else { position - half };
                (period & !1).saturating_sub(2 * position)
            }
            _ => u64::from(self.count) + modulus - counted % modulus,
        };
        self.encode(value % modulus)
    }

    /// The counts that there are: 65536, or 10000 in BCD.
    fn modulus(&self) -> u32 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// The count that a value written stands for; zero is the largest. Nibbles over 9 in BCD are illegal, and count
    /// as what they are.
    fn decode(&self, raw: u16) -> u32 {
        let raw = u32::from(raw);
        let count = if self.bcd {
            [1000, 100, 10, 1]
                .iter()
                .zip([12, 8, 4, 0])
                .map(|(weight, shift)| (raw >> shift & 15) * weight)
                .sum()
        } else {
            raw
        };
        if count == 0 { self.modulus() } else { count.min(self.modulus()) }
    }

    /// How a value below the modulus reads.
    fn encode(&self, value: u64) -> u16 {
        let value = value as u16;
        if !self.bcd {
            return value;
        }
        (value / 1000 % 10) << 12 | (value / 100 % 10) << 8 | (value / 10 % 10) << 4 | (value % 10)
    }
}
