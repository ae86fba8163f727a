//! ACPI fixed hardware (ACPI 6.5, 4.8): PM1 event and control blocks, PM timer and general-purpose event block 0.
//!
//! There is no system management mode: the FADT's SMI_CMD is zero, the machine is always in ACPI mode, and SCI_EN
//! (4.8.3.2.1) reads as one.

use serde::{Deserialize, Serialize};

use crate::lanes::{read_bytes, write_bytes};
use crate::{Access, Device, Power};

/// First port of the block, where [`Pm`] is mapped.
pub const PM_BASE: u16 = 0x600;
/// PM1a_EVT_BLK: status and enable.
pub const PM1_EVENT_PORT: u16 = PM_BASE;
/// Length of PM1a_EVT_BLK.
pub const PM1_EVENT_LEN: u8 = 4;
/// PM1a_CNT_BLK.
pub const PM1_CONTROL_PORT: u16 = PM_BASE + 4;
/// Length of PM1a_CNT_BLK.
pub const PM1_CONTROL_LEN: u8 = 2;
/// PM_TMR_BLK; the counter has 32 bits (FADT flag TMR_VAL_EXT).
pub const PM_TIMER_PORT: u16 = PM_BASE + 8;
/// Length of PM_TMR_BLK.
pub const PM_TIMER_LEN: u8 = 4;
/// GPE0_BLK: two bytes of status, two of enables.
pub const GPE0_PORT: u16 = PM_BASE + 0x20;
/// Length of GPE0_BLK.
pub const GPE0_LEN: u8 = 4;
/// The system control interrupt's line, active high and level-triggered here.
pub const SCI_IRQ: u8 = 9;
/// SLP_TYPa of S5 in `\_S5`.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// Frequency of the PM timer (4.8.3.3).
pub const PM_TIMER_HZ: u64 = 3_579_545;

/// PM1 status and enable bits (4.8.3.1).
mod pm1 {
    pub const TIMER: u16 = 1 << 0;
    pub const GLOBAL: u16 = 1 << 5;
    pub const POWER_BUTTON: u16 = 1 << 8;
    pub const SLEEP_BUTTON: u16 = 1 << 9;
    pub const RTC: u16 = 1 << 10;
    /// Events that raise the SCI.
    pub const ENABLES: u16 = TIMER | GLOBAL | POWER_BUTTON | SLEEP_BUTTON | RTC;
}

/// PM1 control bits (4.8.3.2).
mod control {
    pub const SCI_EN: u16 = 1 << 0;
    pub const BM_RLD: u16 = 1 << 1;
    pub const SLP_TYP: u16 = 7 << 10;
    pub const SLP_EN: u16 = 1 << 13;
}

/// Registers of the block, as saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmState {
    /// PM1 status.
    pub status: u16,
    /// PM1 enable.
    pub enable: u16,
    /// PM1 control: the bits that last.
    pub control: u16,
    /// GPE0 status.
    pub gpe_status: u16,
    /// GPE0 enable.
    pub gpe_enable: u16,
    /// How often the timer's top bit has changed, as far as the status tells.
    pub timer_halves: u64,
    /// Level of the SCI line.
    pub line: bool,
}

/// The block of power-management registers.
#[derive(Debug, Default)]
pub struct Pm {
    state: PmState,
}

impl Pm {
    /// Number of ports from [`PM_BASE`].
    pub const LEN: u64 = 0x24;

    /// The block after power-up.
    pub fn new() -> Self {
        Self::default()
    }

    /// The state to save.
    pub fn state(&self) -> PmState {
        self.state.clone()
    }

    /// Takes a saved state.
    pub fn restore(&mut self, state: &PmState) {
        self.state = state.clone();
    }

    /// The power button is pressed (4.8.2.2.1.1): the guest's system is asked to shut down.
    pub fn press_power_button(&mut self, access: &mut Access) {
        self.state.status |= pm1::POWER_BUTTON;
        self.update_line(access);
    }

    /// General-purpose event `event` (0 to 15) happens.
    pub fn raise_gpe(&mut self, access: &mut Access, event: u8) {
        self.state.gpe_status |= 1u16.checked_shl(u32::from(event)).unwrap_or(0);
        self.update_line(access);
    }

    /// Notes that the timer's top bit changed (4.8.2.1).
    fn advance(&mut self, now: u64) {
        let halves = timer_ticks(now) >> 31;
        if halves > self.state.timer_halves {
            self.state.timer_halves = halves;
            self.state.status |= pm1::TIMER;
        }
    }

    fn update_line(&mut self, access: &mut Access) {
        let s = &self.state;
        let level = s.status & s.enable & pm1::ENABLES != 0 || s.gpe_status & s.gpe_enable != 0;
        if level != s.line {
            self.state.line = level;
            access.effects.line(SCI_IRQ, level);
        }
    }

    fn read_register(&self, now: u64, port: u64) -> u8 {
        let (register, byte) = match port {
            0x00..=0x01 => (self.state.status, port),
            0x02..=0x03 => (self.state.enable, port - 2),
            0x04..=0x05 => (self.state.control | control::SCI_EN, port - 4),
            0x08..=0x0b => return (timer_ticks(now) >> (8 * (port - 8))) as u8,
            0x20..=0x21 => (self.state.gpe_status, port - 0x20),
            0x22..=0x23 => (self.state.gpe_enable, port - 0x22),
            _ => return 0xff,
        };
        register.to_le_bytes()[byte as usize]
    }

    fn write_register(&mut self, access: &mut Access, port: u64, value: u8) {
        let s = &mut self.state;
        match port {
            0x00..=0x01 => s.status &= !lane(port, value),
            0x02..=0x03 => s.enable = with_lane(s.enable, port - 2, value) & pm1::ENABLES,
            0x04..=0x05 => {
                let written = with_lane(s.control, port - 4, value);
                s.control = written & (control::BM_RLD | control::SLP_TYP);
                if written & control::SLP_EN != 0 && sleep_type(written) == SLEEP_TYPE_OFF {
                    access.effects.power = Some(Power::Off);
                }
            }
            0x20..=0x21 => s.gpe_status &= !lane(port - 0x20, value),
            0x22..=0x23 => s.gpe_enable = with_lane(s.gpe_enable, port - 0x22, value),
            _ => {}
        }
    }
}

/// The timer's count at `now`, not cut to its 32 bits.
fn timer_ticks(now: u64) -> u64 {
    (u128::from(now) * u128::from(PM_TIMER_HZ) / 1_000_000_000) as u64
}

fn sleep_type(control: u16) -> u8 {
    ((control & control::SLP_TYP) >> 10) as u8
}

/// `value` as byte `byte` (0 or 1) of a word.
fn lane(byte: u64, value: u8) -> u16 {
    u16::from(value) << (8 * (byte & 1))
}

/// `word` with byte `byte` replaced.
fn with_lane(word: u16, byte: u64, value: u8) -> u16 {
    word & !lane(byte, 0xff) | lane(byte, value)
}

impl Device for Pm {
    fn read(&mut self, access: &mut Access, offset: u64, data: &mut [u8]) {
        self.advance(access.now);
        read_bytes(offset, data, |port| self.read_register(access.now, port));
        self.update_line(access);
    }

    fn write(&mut self, access: &mut Access, offset: u64, data: &[u8]) {
        self.advance(access.now);
        write_bytes(offset, data, |port, value| self.write_register(access, port, value));
        self.update_line(access);
    }

    fn deadline(&self) -> Option<u64> {
        let s = &self.state;
        if s.enable & !s.status & pm1::TIMER == 0 {
            return None;
        }
        let ticks = (u128::from(s.timer_halves) + 1) << 31;
        u64::try_from((ticks * 1_000_000_000).div_ceil(u128::from(PM_TIMER_HZ))).ok()
    }

    fn tick(&mut self, access: &mut Access) {
        self.advance(access.now);
        self.update_line(access);
    }

    fn reset(&mut self, access: &mut Access) {
        let (line, timer_halves) = (self.state.line, timer_ticks(access.now) >> 31);
        self.state = PmState { line, timer_halves, ..PmState::default() };
        self.update_line(access);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Effects;

    fn write(pm: &mut Pm, now: u64, port: u16, data: &[u8]) -> Effects {
        let mut effects = Effects::default();
        pm.write(&mut Access { now, effects: &mut effects }, u64::from(port - PM_BASE), data);
        effects
    }
    fn read(pm: &mut Pm, now: u64, port: u16) -> u32 {
        let mut data = [0; 4];
        let mut effects = Effects::default();
        pm.read(&mut Access { now, effects: &mut effects }, u64::from(port - PM_BASE), &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn soft_off() {
        let mut pm = Pm::new();
        assert_eq!(read(&mut pm, 0, PM1_CONTROL_PORT) as u16, 1);
        assert_eq!(write(&mut pm, 0, PM1_CONTROL_PORT, &[0x01, 0x14]).power, None, "SLP_TYP alone");
        assert_eq!(write(&mut pm, 0, PM1_CONTROL_PORT, &[0x01, 0x24]).power, None, "S1");
        assert_eq!(write(&mut pm, 0, PM1_CONTROL_PORT, &[0x01, 0x34]).power, Some(Power::Off));
        assert_eq!(read(&mut pm, 0, PM1_CONTROL_PORT) as u16, 0x1401);
    }

    #[test]
    fn the_power_button_raises_the_sci_if_enabled() {
        let mut pm = Pm::new();
        let mut effects = Effects::default();
        pm.press_power_button(&mut Access { now: 0, effects: &mut effects });
        assert!(effects.lines.is_empty());
        assert_eq!(read(&mut pm, 0, PM1_EVENT_PORT), 0x100);
        assert_eq!(write(&mut pm, 0, PM1_EVENT_PORT + 2, &[0, 1]).lines, [(9, true)]);
        assert_eq!(write(&mut pm, 0, PM1_EVENT_PORT, &[0, 1]).lines, [(9, false)]);
    }

    #[test]
    fn the_timer_counts_and_wraps() {
        let mut pm = Pm::new();
        assert_eq!(read(&mut pm, 1_000_000_000, PM_TIMER_PORT), 3_579_545);
        assert!(pm.deadline().is_none());
        write(&mut pm, 0, PM1_EVENT_PORT + 2, &[1, 0]);
        let at = pm.deadline().unwrap();
        assert_eq!(read(&mut pm, at - 1, PM_TIMER_PORT), 0x7fff_ffff);
        let mut effects = Effects::default();
        pm.tick(&mut Access { now: at, effects: &mut effects });
        assert_eq!(effects.lines, [(9, true)]);
        assert_eq!(read(&mut pm, at, PM_TIMER_PORT), 0x8000_0000);
        assert!(pm.deadline().is_none());
        assert_eq!(write(&mut pm, at, PM1_EVENT_PORT, &[1]).lines, [(9, false)]);
        assert_eq!(pm.deadline(), Some(at * 2));
        read(&mut pm, u64::MAX, PM_TIMER_PORT);
    }

    #[test]
    fn general_purpose_events() {
        let mut pm = Pm::new();
        write(&mut pm, 0, GPE0_PORT + 2, &[0x04, 0x80]);
        let mut effects = Effects::default();
        for event in [15, 3, 200] {
            pm.raise_gpe(&mut Access { now: 0, effects: &mut effects }, event);
        }
        assert_eq!(effects.lines, [(9, true)]);
        assert_eq!(read(&mut pm, 0, GPE0_PORT), 0x8004_8008);
        assert_eq!(write(&mut pm, 0, GPE0_PORT, &[0, 0x80]).lines, [(9, false)]);
    }
}
