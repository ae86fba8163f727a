use ruse_random::Random;

use super::*;
use crate::device::Effects;

/// The time at which the input clock counts `clock`.
fn at(clock: u64) -> u64 {
    nanoseconds(clock)
}

fn write(pit: &mut Pit, port: u16, value: u8, now: u64) -> Vec<(u8, bool)> {
    let mut effects = Effects::default();
    pit.write_port(port, value, &mut Access { now, effects: &mut effects });
    effects.lines
}

fn program(pit: &mut Pit, channel: u8, mode: u8, count: u16, now: u64) {
    write(pit, 0x43, channel << 6 | 0x30 | mode << 1, now);
    write(pit, 0x40 + u16::from(channel), count as u8, now);
    write(pit, 0x40 + u16::from(channel), (count >> 8) as u8, now);
}

fn tick(pit: &mut Pit, now: u64) -> Vec<(u8, bool)> {
    let mut effects = Effects::default();
    pit.tick(&mut Access { now, effects: &mut effects });
    effects.lines
}

fn count(pit: &mut Pit, channel: u8, now: u64) -> u16 {
    write(pit, 0x43, channel << 6, now);
    let port = 0x40 + u16::from(channel);
    u16::from_le_bytes([pit.read_port(port, now), pit.read_port(port, now)])
}

fn status(pit: &mut Pit, channel: u8, now: u64) -> u8 {
    write(pit, 0x43, 0xe0 | 2 << channel, now);
    pit.read_port(0x40 + u16::from(channel), now)
}

fn out2(pit: &mut Pit, clock: u64) -> bool {
    pit.read_port(PORT_SPEAKER, at(clock)) & OUT_2 != 0
}

#[test]
fn clock_conversion_is_never_early() {
    for clock in (0..1 << 50).step_by((1 << 43) + 12345) {
        assert_eq!(clocks(nanoseconds(clock)), clock);
    }
}

#[test]
fn mode_0_interrupts_once() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 0, 100, at(0));
    assert_eq!(pit.deadline(), Some(at(101)));
    assert_eq!(tick(&mut pit, at(100)), []);
    assert_eq!(count(&mut pit, 0, at(51)), 50);
    assert_eq!(tick(&mut pit, at(101)), [(0, true)]);
    assert_eq!(pit.deadline(), None);
    assert_eq!(write(&mut pit, 0x43, 0x30, at(200)), [(0, false)], "programming lowers the output");
}

#[test]
fn mode_0_stops_between_the_bytes_of_a_new_count() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 0, 100, at(0));
    write(&mut pit, 0x40, 50, at(90));
    assert_eq!(pit.deadline(), None);
    assert_eq!(tick(&mut pit, at(200)), []);
    assert_eq!(write(&mut pit, 0x40, 0, at(200)), []);
    assert_eq!(pit.deadline(), Some(at(251)));
    assert_eq!(tick(&mut pit, at(251)), [(0, true)]);
    assert_eq!(write(&mut pit, 0x40, 50, at(300)), [(0, false)], "the first byte lowers the output");
}

#[test]
fn mode_2_is_periodic_and_coalesces() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 1000, at(0));
    tick(&mut pit, at(1));
    assert_eq!(pit.deadline(), Some(at(1001)));
    assert_eq!(tick(&mut pit, at(1001)), [(0, false), (0, true)]);
    assert_eq!(tick(&mut pit, at(1002)), []);
    assert_eq!(count(&mut pit, 0, at(1101)), 900);
    assert_eq!(tick(&mut pit, at(10_500)), [(0, false), (0, true)]);
    assert_eq!(pit.deadline(), Some(at(11_001)));
    // A new count waits for the end of the period.
    write(&mut pit, 0x40, 0xd0, at(10_600));
    write(&mut pit, 0x40, 0x07, at(10_600));
    assert_ne!(status(&mut pit, 0, at(10_700)) & 0x40, 0);
    assert_eq!(pit.deadline(), Some(at(11_001)));
    assert_eq!(tick(&mut pit, at(11_001)).len(), 2);
    assert_eq!(pit.deadline(), Some(at(13_001)));
}

#[test]
fn shortest_period_is_throttled() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 1, 0);
    tick(&mut pit, 1_000_000);
    assert!(pit.deadline().unwrap() >= 1_000_000 + MIN_INTERVAL_NS);
    tick(&mut pit, u64::MAX);
    pit.deadline();
}

#[test]
fn mode_3_is_a_square_wave() {
    let mut pit = Pit::new();
    write(&mut pit, PORT_SPEAKER, 1, 0);
    program(&mut pit, 2, 3, 10, 0);
    let wave: String = (1..21).map(|clock| if out2(&mut pit, clock) { '#' } else { '.' }).collect();
    assert_eq!(wave, "#####.....#####.....");
    program(&mut pit, 2, 3, 5, at(100));
    let wave: String = (101..111).map(|clock| if out2(&mut pit, clock) { '#' } else { '.' }).collect();
    assert_eq!(wave, "###..###..");
    program(&mut pit, 2, 3, 10, at(200));
    assert_eq!(
        (201..207).map(|clock| count(&mut pit, 2, at(clock))).collect::<Vec<_>>(),
        [10, 8, 6, 4, 2, 10]
    );
}

#[test]
fn gate_of_channel_2() {
    let mut pit = Pit::new();
    // Mode 0 stands still with the gate closed: how kernels measure the TSC.
    program(&mut pit, 2, 0, 100, at(0));
    assert_eq!(count(&mut pit, 2, at(50)), 100);
    write(&mut pit, PORT_SPEAKER, 1, at(60));
    assert_eq!(count(&mut pit, 2, at(70)), 90);
    write(&mut pit, PORT_SPEAKER, 0, at(80));
    assert_eq!(count(&mut pit, 2, at(500)), 80);
    write(&mut pit, PORT_SPEAKER, 1, at(600));
    assert!(!out2(&mut pit, 679));
    assert!(out2(&mut pit, 680));
}

#[test]
fn triggered_modes() {
    let mut pit = Pit::new();
    program(&mut pit, 2, 1, 10, at(0));
    assert!(out2(&mut pit, 5));
    write(&mut pit, PORT_SPEAKER, 1, at(10));
    assert!(!out2(&mut pit, 11) && !out2(&mut pit, 20) && out2(&mut pit, 21));
    write(&mut pit, PORT_SPEAKER, 0, at(30));
    program(&mut pit, 2, 5, 10, at(30));
    write(&mut pit, PORT_SPEAKER, 1, at(40));
    assert!(out2(&mut pit, 50) && !out2(&mut pit, 51) && out2(&mut pit, 52));
    program(&mut pit, 2, 4, 10, at(60));
    assert!(out2(&mut pit, 70) && !out2(&mut pit, 71) && out2(&mut pit, 72));
    program(&mut pit, 0, 4, 10, at(100));
    tick(&mut pit, at(100));
    assert_eq!(pit.deadline(), Some(at(112)));
    assert_eq!(tick(&mut pit, at(112)), [(0, false), (0, true)]);
    assert_eq!(pit.deadline(), None);
}

#[test]
fn latches_status_and_bcd() {
    let mut pit = Pit::new();
    write(&mut pit, 0x43, 0x35, 0); // channel 0, both bytes, mode 2, BCD
    assert_eq!(status(&mut pit, 0, 0), 0xf5);
    write(&mut pit, 0x40, 0x34, 0);
    write(&mut pit, 0x40, 0x12, 0);
    assert_eq!(count(&mut pit, 0, at(2)), 0x1233);
    assert_eq!(status(&mut pit, 0, at(2)), 0xb5);
    write(&mut pit, 0x43, 0xc2, at(11)); // read back count and status
    write(&mut pit, 0x43, 0x00, at(20)); // ignored: already latched
    let bytes: Vec<_> = (0..3).map(|_| pit.read_port(0x40, at(30))).collect();
    assert_eq!(bytes, [0xb5, 0x24, 0x12]);
    write(&mut pit, 0x43, 0x14, 0); // low byte only
    write(&mut pit, 0x40, 0x80, 0);
    assert_eq!((pit.read_port(0x40, at(2)), pit.read_port(0x40, at(3))), (0x7f, 0x7e));
    assert_eq!(pit.read_port(0x43, 0), 0xff);
}

#[test]
fn refresh_toggles() {
    let mut pit = Pit::new();
    let levels: Vec<_> = (0..4).map(|n| pit.read_port(PORT_SPEAKER, at(n * 18)) & REFRESH != 0).collect();
    assert_eq!(levels, [false, true, false, true]);
}

#[test]
fn save_restore_reset_and_anything() {
    let mut pit = Pit::new();
    let mut effects = Effects::default();
    let mut random = Random::new(0);
    for round in 0..200_000u64 {
        let word = random.word();
        let now = if word >> 63 != 0 { word } else { round * 1000 };
        let offset = [0, 1, 2, 3, 0x21, word][(word >> 32) as usize % 6];
        let mut data = (word >> 16).to_le_bytes();
        let width = 1 << (word >> 60 & 3);
        let mut access = Access { now, effects: &mut effects };
        match word >> 58 & 3 {
            0 => pit.read(&mut access, offset, &mut data[..width]),
            1 | 2 => Device::write(&mut pit, &mut access, offset, &data[..width]),
            _ => pit.tick(&mut access),
        }
        pit.deadline();
        effects.lines.clear();
    }
    let saved = pit.state();
    let mut other = Pit::new();
    other.restore(&saved);
    assert_eq!(other.state(), saved);
    other.reset(&mut Access { now: 5, effects: &mut effects });
    assert_eq!(other.state(), Pit::new());
}
