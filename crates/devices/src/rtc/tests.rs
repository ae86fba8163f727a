//! The clock as guests read, set and hear it.

use super::*;
use crate::Effects;

const SECOND: u64 = 1_000_000_000;
/// 2024-02-29 23:59:58 UTC.
const LEAP: i64 = 1_709_251_198;

struct Rig {
    rtc: Rtc,
    now: u64,
    effects: Effects,
}

impl Rig {
    fn new() -> Self {
        let config = RtcConfig { unix_seconds: LEAP, low_memory: 3 << 30, high_memory: 5 << 30 };
        Self { rtc: Rtc::new(config), now: 0, effects: Effects::default() }
    }
    fn read(&mut self, register: u8) -> u8 {
        let mut data = [0];
        let mut access = Access { now: self.now, effects: &mut self.effects };
        self.rtc.write(&mut access, 0, &[register]);
        self.rtc.read(&mut access, 1, &mut data);
        data[0]
    }
    fn write(&mut self, register: u8, value: u8) {
        self.rtc.write(&mut Access { now: self.now, effects: &mut self.effects }, 0, &[register, value]);
    }
    fn time(&mut self) -> [u8; 8] {
        [0x32, 9, 8, 7, 6, 4, 2, 0].map(|r| self.read(r))
    }
    /// Runs to the next deadline and says when it was.
    fn run(&mut self) -> u64 {
        self.now = self.rtc.deadline().expect("a deadline");
        self.rtc.tick(&mut Access { now: self.now, effects: &mut self.effects });
        self.now
    }
    fn lines(&mut self) -> Vec<(u8, bool)> {
        std::mem::take(&mut self.effects.lines)
    }
}

#[test]
fn shows_the_time_in_every_mode() {
    let mut r = Rig::new();
    assert_eq!(r.time(), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
    r.now = 2 * SECOND;
    assert_eq!(r.time(), [0x20, 0x24, 0x03, 0x01, 6, 0, 0, 0]);
    r.write(0x0b, 0x04);
    assert_eq!(r.time(), [20, 24, 3, 1, 6, 12, 0, 0]);
    r.now += 13 * 3600 * SECOND;
    assert_eq!(r.time(), [20, 24, 3, 1, 6, 0x81, 0, 0]);
    assert_eq!(r.read(0x0d), 0x80);
}

#[test]
fn update_in_progress_comes_before_the_second() {
    let mut r = Rig::new();
    for (now, uip) in [(0, 0), (SECOND - 300_000, 0), (SECOND - 1, 0x80), (SECOND, 0)] {
        r.now = now;
        assert_eq!(r.read(0x0a), 0x26 | uip, "{now}");
    }
}

/// As Linux's `mc146818_set_time` does it: SET, divider reset, write, restore both.
#[test]
fn setting_the_time_starts_half_a_second_before_an_update() {
    let mut r = Rig::new();
    r.now = 5 * SECOND + 123;
    r.write(0x0b, 0x82);
    r.write(0x0a, 0x76);
    for (register, value) in [(9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x59), (0x32, 0x19)]
    {
        r.write(register, value);
    }
    r.now += 7 * SECOND;
    assert_eq!(r.time()[7], 0x59, "stands still");
    r.write(0x0b, 0x02);
    r.write(0x0a, 0x26);
    r.now += SECOND / 2 - 1;
    assert_eq!(r.time(), [0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x59]);
    r.now += 1;
    assert_eq!(r.time(), [0x20, 0, 1, 1, 7, 0, 0, 0]);
}

#[test]
fn set_alone_keeps_the_divider() {
    let mut r = Rig::new();
    r.now = SECOND / 4;
    r.write(0x0b, 0x82);
    r.write(0, 0x10);
    r.write(0x0b, 0x02);
    r.now = SECOND;
    assert_eq!(r.read(0), 0x11);
    r.write(0, 0x30);
    r.now = 2 * SECOND;
    assert_eq!(r.read(0), 0x31);
}

#[test]
fn periodic_interrupts_do_not_drift() {
    let mut r = Rig::new();
    r.write(0x0b, 0x42);
    let mut n = 0;
    while r.run() < SECOND {
        assert!(r.rtc.deadline().is_none(), "none until register C is read");
        assert_eq!(r.read(0x0c) & 0xc0, 0xc0);
        n += 1;
    }
    assert_eq!((n, r.now), (1023, SECOND));
    assert_eq!(r.lines().len(), 2 * 1023 + 1);
    assert_eq!(r.read(0x0c), 0xd0);
    assert_eq!(r.read(0x0c), 0);
    r.write(0x0a, 0x20);
    assert!(r.rtc.deadline().is_none());
}

#[test]
fn update_and_alarm_interrupts() {
    let mut r = Rig::new();
    r.write(0x0b, 0x12);
    assert_eq!(r.run(), SECOND);
    assert_eq!(r.lines(), [(8, true)]);
    assert_eq!(r.read(0x0c) & 0xb0, 0x90);
    for (register, value) in [(1, 0x30), (3, 0xff), (5, 0x01)] {
        r.write(register, value);
    }
    r.write(0x0b, 0x22);
    assert_eq!(r.run(), (2 + 3600 + 30) * SECOND);
    assert_eq!(r.read(0x0c) & 0xa0, 0xa0);
    assert_eq!(r.run(), (2 + 3600 + 90) * SECOND);
}

#[test]
fn flags_are_set_without_enables() {
    let mut r = Rig::new();
    r.now = 3 * SECOND;
    assert_eq!(r.read(0x0c), 0x70, "alarm 00:00:00 too");
    r.now += 1;
    assert_eq!(r.read(0x0c), 0);
    assert!(r.lines().is_empty());
}

#[test]
fn memory_sizes_and_both_banks() {
    let mut r = Rig::new();
    let word = |r: &mut Rig, at| u16::from_le_bytes([r.read(at), r.read(at + 1)]);
    assert_eq!((word(&mut r, 0x15), word(&mut r, 0x30)), (640, 0xffff));
    assert_eq!((word(&mut r, 0x34), word(&mut r, 0x5b)), ((3 << 14) - 256, 5 << 14));
    let mut access = Access { now: 0, effects: &mut Effects::default() };
    r.rtc.write(&mut access, 2, &[0x15, 0xab]);
    let mut data = [0; 4];
    r.rtc.read(&mut access, 0, &mut data);
    assert_eq!((data[2], data[3]), (0x15, 0xab));
    assert_eq!(word(&mut r, 0x15), 640);
}

#[test]
fn reset_keeps_time_and_memory() {
    let mut r = Rig::new();
    r.write(0x40, 0x77);
    r.write(0, 0x30);
    r.write(0x0b, 0x72);
    r.now = SECOND;
    r.rtc.reset(&mut Access { now: SECOND, effects: &mut r.effects });
    assert_eq!((r.read(0x40), r.read(0), r.read(0x0b), r.read(0x0c)), (0x77, 0x31, 0x02, 0));
}
