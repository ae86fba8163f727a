//! Real-time clock and CMOS memory (Motorola MC146818A data sheet; PC/AT use of the memory).
//!
//! Time is not counted but computed: the clock shows a number of seconds since 1970 that began at a moment of the
//! machine's time. Events between two looks at the clock are found afterwards; only enabled interrupts need a deadline.

mod calendar;

use serde::{Deserialize, Serialize};

use self::calendar::{Alarm, DateTime, decode, decode_hour, encode, encode_hour};
use crate::lanes::{read_bytes, write_bytes};
use crate::{Access, Device};

/// First port: index and data of the memory, then of the second 128 bytes.
pub const RTC_PORT: u16 = 0x70;
/// Interrupt line.
pub const RTC_IRQ: u8 = 8;

const SECOND_NS: i128 = 1_000_000_000;
/// An update follows at least so long after UIP has become one (data sheet, figure 16: tBUC).
const UIP_NS: i128 = 244_000;
/// The divider's base frequency.
const BASE_HZ: i128 = 32_768;

/// Registers.
const SECONDS: usize = 0;
const MINUTES: usize = 2;
const HOURS: usize = 4;
const WEEKDAY: usize = 6;
const DAY: usize = 7;
const MONTH: usize = 8;
const YEAR: usize = 9;
const A: usize = 0x0a;
const B: usize = 0x0b;
const C: usize = 0x0c;
const D: usize = 0x0d;
/// Where PCs (FADT field CENTURY) have the century.
pub const CENTURY: u8 = 0x32;

const A_UIP: u8 = 0x80;
const B_SET: u8 = 0x80;
/// Periodic, alarm and update-ended: enables in register B, flags in register C.
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATE: u8 = 0x10;
const EVENTS: u8 = PERIODIC | ALARM | UPDATE;
const B_SQUARE_WAVE: u8 = 0x08;
const C_IRQ: u8 = 0x80;
const D_VALID: u8 = 0x80;

/// What the clock is born with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RtcConfig {
    /// Seconds since 1970 at the machine's start.
    pub unix_seconds: i64,
    /// Bytes of RAM below 4 GiB.
    pub low_memory: u64,
    /// Bytes of RAM from 4 GiB.
    pub high_memory: u64,
}

/// State of the clock, as saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// Index of the first bank.
    pub index: u8,
    /// Index of the second bank.
    pub extended_index: u8,
    /// The 128 bytes, time as of when the clock last stopped.
    pub cmos: Vec<u8>,
    /// The second 128 bytes.
    pub extended: Vec<u8>,
    /// Seconds since 1970 that the clock shows at `origin`.
    pub seconds: i64,
    /// The moment (nanoseconds since the machine's start) at which that second began.
    pub origin: i64,
    /// The moment up to which the flags of register C are right.
    pub seen: u64,
    /// Level of the interrupt line.
    pub line: bool,
}

/// The clock chip.
#[derive(Debug)]
pub struct Rtc {
    config: RtcConfig,
    state: RtcState,
}

impl Rtc {
    /// Number of ports.
    pub const LEN: u64 = 4;

    /// A clock that shows `config.unix_seconds` at the machine's start.
    pub fn new(config: RtcConfig) -> Self {
        let mut cmos = vec![0; 128];
        (cmos[A], cmos[B], cmos[D]) = (0x26, calendar::HOURS_24, D_VALID);
        put_memory_size(&mut cmos, &config);
        let state = RtcState {
            index: 0,
            extended_index: 0,
            cmos,
            extended: vec![0; 128],
            seconds: config.unix_seconds.clamp(-YEARS_9999, YEARS_9999),
            origin: 0,
            seen: 0,
            line: false,
        };
        Self { config, state }
    }

    /// The state to save.
    pub fn state(&self) -> RtcState {
        self.state.clone()
    }

    /// Takes a saved state.
    pub fn restore(&mut self, state: &RtcState) {
        self.state = state.clone();
        self.state.cmos.resize(128, 0);
        self.state.extended.resize(128, 0);
        self.state.seconds = state.seconds.clamp(-YEARS_9999, YEARS_9999);
    }

    /// Sets the clock to the host's after the machine has been still, for a guest that kept it so.
    pub fn set_time(&mut self, access: &mut Access, unix_seconds: i64) {
        self.advance(access.now);
        self.state.seconds = unix_seconds.clamp(-YEARS_9999, YEARS_9999);
        self.state.origin = self.now_signed();
        if !self.running() {
            self.store_time();
        }
    }

    /// A byte of the memory, as the board sees it.
    pub fn cmos(&self, register: u8) -> u8 {
        self.state.cmos[usize::from(register & 0x7f)]
    }

    /// The divider is held (register A, DV = 11x).
    fn divider_held(&self) -> bool {
        self.state.cmos[A] & 0x60 == 0x60
    }

    /// Updates take place.
    fn running(&self) -> bool {
        self.state.cmos[B] & B_SET == 0 && !self.divider_held()
    }

    fn now_signed(&self) -> i64 {
        i64::try_from(self.state.seen).unwrap_or(i64::MAX)
    }

    /// Nanoseconds since the origin.
    fn since_origin(&self, now: u64) -> i128 {
        i128::from(now) - i128::from(self.state.origin)
    }

    /// Seconds since 1970 that a running clock shows.
    fn unix(&self, now: u64) -> i64 {
        self.state.seconds.saturating_add(self.since_origin(now).div_euclid(SECOND_NS) as i64)
    }

    /// Base ticks per periodic interrupt as a power of two (table 5), if the rate is not none.
    fn period_shift(&self) -> Option<u32> {
        match self.state.cmos[A] & 0x0f {
            0 => None,
            // With the 32768 Hz base rates 1 and 2 are those of 8 and 9.
            rate @ 1..=2 => Some(u32::from(rate) + 6),
            rate => Some(u32::from(rate) - 1),
        }
    }

    /// Number of the period that `now` is in.
    fn period(&self, now: u64, shift: u32) -> i128 {
        (self.since_origin(now) * BASE_HZ).div_euclid(SECOND_NS) >> shift
    }

    fn alarm(&self) -> Alarm {
        let (c, mode) = (&self.state.cmos, self.state.cmos[B]);
        let field = |raw: u8, value: u8| (raw < 0xc0).then_some(value);
        let [s, m, h] = [c[SECONDS + 1], c[MINUTES + 1], c[HOURS + 1]];
        Alarm([field(s, decode(s, mode)), field(m, decode(m, mode)), field(h, decode_hour(h, mode))])
    }

    /// Sets the flags of what has happened since the last look.
    fn advance(&mut self, now: u64) {
        let (seen, now) = (self.state.seen, now.max(self.state.seen));
        self.state.seen = now;
        if self.divider_held() {
            return;
        }
        let mut flags = 0;
        if self.period_shift().is_some_and(|shift| self.period(now, shift) != self.period(seen, shift)) {
            flags |= PERIODIC;
        }
        if self.running() {
            let (before, after) = (self.unix(seen), self.unix(now));
            if after != before {
                flags |= UPDATE;
            }
            if after != before && self.alarm().next(before).is_some_and(|at| at <= after) {
                flags |= ALARM;
            }
        }
        self.state.cmos[C] |= flags;
    }

    fn update_line(&mut self, access: &mut Access) {
        let c = &mut self.state.cmos;
        let level = c[B] & c[C] & EVENTS != 0;
        c[C] = c[C] & EVENTS | if level { C_IRQ } else { 0 };
        if level != self.state.line {
            self.state.line = level;
            access.effects.line(RTC_IRQ, level);
        }
    }

    /// Writes the time shown into the registers.
    fn store_time(&mut self) {
        let t = DateTime::from_unix(self.unix(self.state.seen));
        let c = &mut self.state.cmos;
        let mode = c[B];
        for (register, value) in [
            (SECONDS, t.second),
            (MINUTES, t.minute),
            (WEEKDAY, t.weekday),
            (DAY, t.day),
            (MONTH, t.month),
            (YEAR, (t.year % 100) as u8),
            (usize::from(CENTURY), (t.year / 100) as u8),
        ] {
            c[register] = encode(value, mode);
        }
        c[HOURS] = encode_hour(t.hour, mode);
    }

    /// Takes the time shown from the registers; seconds go on from where in a second the divider is. The day of the
    /// week follows from the date.
    fn load_time(&mut self) {
        let (c, mode) = (&self.state.cmos, self.state.cmos[B]);
        let of = |register: usize| decode(c[register], mode);
        let t = DateTime {
            second: of(SECONDS),
            minute: of(MINUTES),
            hour: decode_hour(c[HOURS], mode),
            weekday: 1,
            day: of(DAY),
            month: of(MONTH),
            year: i64::from(of(usize::from(CENTURY))) * 100 + i64::from(of(YEAR)),
        };
        let into = self.since_origin(self.state.seen).rem_euclid(SECOND_NS) as i64;
        self.state.seconds = t.to_unix();
        self.state.origin = self.now_signed().saturating_sub(into);
    }

    fn read_cmos(&mut self, now: u64) -> u8 {
        let register = usize::from(self.state.index & 0x7f);
        match register {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | 0x32 if self.running() => {
                self.store_time();
                self.state.cmos[register]
            }
            A => self.state.cmos[A] | self.update_in_progress(now),
            C => std::mem::take(&mut self.state.cmos[C]),
            _ => self.state.cmos[register],
        }
    }

    fn update_in_progress(&self, now: u64) -> u8 {
        let into = self.since_origin(now).rem_euclid(SECOND_NS);
        if self.running() && into >= SECOND_NS - UIP_NS { A_UIP } else { 0 }
    }

    fn write_cmos(&mut self, value: u8) {
        let register = usize::from(self.state.index & 0x7f);
        match register {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | 0x32 => {
                let running = self.running();
                if running {
                    self.store_time();
                }
                self.state.cmos[register] = value;
                if running {
                    self.load_time();
                }
            }
            A => self.write_control(A, value & !A_UIP),
            // Setting SET clears the update interrupt's enable.
            B => self.write_control(B, if value & B_SET != 0 { value & !UPDATE } else { value }),
            C | D => {}
            _ => self.state.cmos[register] = value,
        }
    }

    /// Writes register A or B. A clock that stops keeps its time in the registers; one that starts takes it from
    /// there, half a second before the next update if the divider was held (data sheet, "Divider control").
    fn write_control(&mut self, register: usize, value: u8) {
        let (was_running, was_held) = (self.running(), self.divider_held());
        if was_running {
            self.store_time();
        }
        self.state.cmos[register] = value;
        if was_held && !self.divider_held() {
            self.state.origin = self.now_signed().saturating_sub((SECOND_NS / 2) as i64);
        }
        if !was_running && self.running() {
            self.load_time();
        }
    }
}

/// Seconds in 9999 years, about: no clock that people use is further from 1970.
const YEARS_9999: i64 = 9999 * 366 * 86400;

/// Memory sizes as a PC's firmware notes them: below 1 MiB, from 1 MiB, from 16 MiB and from 4 GiB.
fn put_memory_size(cmos: &mut [u8], config: &RtcConfig) {
    let units = |bytes: u64, unit: u64| (bytes / unit).min(0xffff) as u16;
    let base = units(config.low_memory.min(640 << 10), 1 << 10);
    let extended = units(config.low_memory.saturating_sub(1 << 20), 1 << 10);
    let above_16m = units(config.low_memory.saturating_sub(16 << 20), 64 << 10);
    for (at, value) in [(0x15, base), (0x17, extended), (0x30, extended), (0x34, above_16m)] {
        cmos[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    let high = (config.high_memory >> 16).min(0xff_ffff) as u32;
    cmos[0x5b..0x5e].copy_from_slice(&high.to_le_bytes()[..3]);
}

impl Device for Rtc {
    fn read(&mut self, access: &mut Access, offset: u64, data: &mut [u8]) {
        self.advance(access.now);
        read_bytes(offset, data, |port| match port {
            1 => self.read_cmos(access.now),
            2 => self.state.extended_index,
            3 => self.state.extended[usize::from(self.state.extended_index & 0x7f)],
            _ => 0xff,
        });
        self.update_line(access);
    }

    fn write(&mut self, access: &mut Access, offset: u64, data: &[u8]) {
        self.advance(access.now);
        write_bytes(offset, data, |port, value| match port {
            // Bit 7 masks NMIs, of which the board has none.
            0 => self.state.index = value,
            1 => self.write_cmos(value),
            2 => self.state.extended_index = value,
            3 => self.state.extended[usize::from(self.state.extended_index & 0x7f)] = value,
            _ => {}
        });
        self.update_line(access);
    }

    /// No event is waited for whose flag is set already: the line is high until the guest reads register C.
    fn deadline(&self) -> Option<u64> {
        let c = &self.state.cmos;
        let wanted = c[B] & !c[C] & EVENTS;
        if wanted == 0 || self.divider_held() {
            return None;
        }
        let seen = self.state.seen;
        let second_begins = |unix: i64| {
            (i128::from(unix) - i128::from(self.state.seconds)) * SECOND_NS + i128::from(self.state.origin)
        };
        let mut next: Option<i128> = None;
        let mut consider = |at: i128| next = Some(next.map_or(at, |n| n.min(at)));
        if let (true, Some(shift)) = (wanted & PERIODIC != 0, self.period_shift()) {
            let ticks = ((self.period(seen, shift) + 1) << shift) * SECOND_NS;
            // Rounded up: the period has begun by then.
            consider(-(-ticks).div_euclid(BASE_HZ) + i128::from(self.state.origin));
        }
        if self.running() && wanted & UPDATE != 0 {
            consider(second_begins(self.unix(seen).saturating_add(1)));
        }
        if let (true, Some(at)) = (self.running() && wanted & ALARM != 0, self.alarm().next(self.unix(seen)))
        {
            consider(second_begins(at));
        }
        next.and_then(|at| u64::try_from(at).ok())
    }

    fn tick(&mut self, access: &mut Access) {
        self.advance(access.now);
        self.update_line(access);
    }

    /// The battery keeps the time and the memory; RESET# clears interrupts, their enables and the square wave (data
    /// sheet, "RESET"), and the firmware that Ruse is writes memory sizes again and starts the clock.
    fn reset(&mut self, access: &mut Access) {
        self.advance(access.now);
        if !self.running() {
            self.state.cmos[A] = 0x26;
            self.state.cmos[B] &= !B_SET;
            self.load_time();
        }
        let c = &mut self.state.cmos;
        c[A] = 0x26;
        c[B] &= !(EVENTS | B_SQUARE_WAVE);
        c[C] = 0;
        put_memory_size(c, &self.config);
        (self.state.index, self.state.extended_index) = (0, 0);
        self.update_line(access);
    }
}

#[cfg(test)]
#[path = "rtc/tests.rs"]
mod tests;
