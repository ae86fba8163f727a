//! One suite over every device: any access survives, reset is the initial state, and saving and restoring loses nothing.

use std::fmt::Debug;

use ruse_random::Random;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Access, Device, Effects};

/// How the suite treats a device.
struct Subject<D, S> {
    make: fn() -> D,
    state: fn(&D) -> S,
    restore: fn(&mut D, &S),
    /// The state without what the device keeps over a reset on purpose.
    volatile: fn(S) -> S,
    /// Length of the device's range.
    len: u64,
}

/// An operation at random: mostly in the range, sometimes anywhere; time mostly moves a little, sometimes a lot.
fn step(
    random: &mut Random,
    now: &mut u64,
    len: u64,
    device: &mut dyn Device,
) -> (Vec<u8>, Effects, Option<u64>) {
    let r = random.word();
    *now = now.saturating_add(match r & 0x3ff {
        0 => random.word() >> 8,
        1..=0x0f => random.word() % 10_000_000_000,
        _ => random.word() % 100_000,
    });
    let offset = match r >> 10 & 0xf {
        0 => random.word(),
        1 => len.wrapping_sub(4).wrapping_add(random.word() % 8),
        2 => u64::MAX - random.word() % 8,
        _ => random.word() % len,
    };
    let width = 1usize << (r >> 14 & 3);
    let mut data = random.word().to_le_bytes();
    if r >> 16 & 1 == 0 {
        // Small values reach more registers and modes.
        data[0] &= 0x1f;
    }
    let mut effects = Effects::default();
    let mut access = Access { now: *now, effects: &mut effects };
    match r >> 17 & 7 {
        0 => device.tick(&mut access),
        1..=4 => device.write(&mut access, offset, &data[..width]),
        _ => device.read(&mut access, offset, &mut data[..width]),
    }
    (data.to_vec(), effects, device.deadline())
}

fn suite<D: Device, S: Clone + Debug + PartialEq + Serialize + DeserializeOwned>(subject: &Subject<D, S>) {
    let mut random = Random::new(0);
    let mut now = 0;
    let mut device = (subject.make)();
    let initial = (subject.volatile)((subject.state)(&device));
    for i in 0..10_000 {
        step(&mut random, &mut now, subject.len, &mut device);
        if i % 100 == 0 {
            saved_is_restored(subject, &mut device, &mut random, now);
        }
        if i % 1000 == 999 {
            device.reset(&mut Access { now, effects: &mut Effects::default() });
            assert_eq!((subject.volatile)((subject.state)(&device)), initial, "reset");
        }
    }
}

/// Restores `device`'s state in another, and has both do the same for a while.
fn saved_is_restored<D: Device, S: Clone + Debug + PartialEq + Serialize + DeserializeOwned>(
    subject: &Subject<D, S>,
    device: &mut D,
    random: &mut Random,
    now: u64,
) {
    let saved = (subject.state)(device);
    let text = serde_json::to_string(&saved).expect("state as text");
    let read: S = serde_json::from_str(&text).expect("state from text");
    assert_eq!(read, saved);
    let mut other = (subject.make)();
    (subject.restore)(&mut other, &read);
    assert_eq!((subject.state)(&other), saved, "restored");
    let (seed, mut now, mut other_now) = (random.word() | 1, now, now);
    let (mut a, mut b) = (Random::new(seed), Random::new(seed));
    for _ in 0..20 {
        let (data, effects, deadline) = step(&mut a, &mut now, subject.len, device);
        let (other_data, other_effects, other_deadline) =
            step(&mut b, &mut other_now, subject.len, &mut other);
        assert_eq!(
            (data, effects.lines, effects.messages),
            (other_data, other_effects.lines, other_effects.messages)
        );
        assert_eq!((effects.power, deadline), (other_effects.power, other_deadline));
    }
    assert_eq!((subject.state)(device), (subject.state)(&other));
}

/// A test per device: its name, how to make it, the length of its range, what of its state to ignore after a reset.
macro_rules! suites {
    ($($name:ident: $make:expr, $len:expr, $volatile:expr;)*) => {$(
        #[test]
        fn $name() {
            suite(&Subject {
                make: || $make,
                state: |d| d.state(),
                restore: |d, s| d.restore(s),
                volatile: $volatile,
                len: $len,
            });
        }
    )*};
}

suites! {
    serial: crate::serial::Serial::new(4), crate::serial::Serial::LEN, |s| crate::serial::SerialState {
        output: Vec::new(), ..s
    };
    i8042: crate::i8042::I8042::new(), crate::i8042::I8042::LEN, |s| s;
    port92: crate::i8042::Port92::new(), crate::i8042::Port92::LEN, |s| s;
    pm: crate::pm::Pm::new(), crate::pm::Pm::LEN, |s| crate::pm::PmState { timer_halves: 0, ..s };
    rtc: crate::rtc::Rtc::new(crate::rtc::RtcConfig::default()), crate::rtc::Rtc::LEN, |s| crate::rtc::RtcState {
        // What the battery keeps, and the moments by which the clock tells time.
        cmos: vec![s.cmos[10], s.cmos[11] & 0x78, s.cmos[12], s.cmos[13]],
        extended: Vec::new(), seconds: 0, origin: 0, seen: 0, ..s
    };
    pci_ports: crate::pci::PciHost::new(256, crate::pci::testing::windows()), crate::pci::PciHost::LEN, |s| s;
    pci_memory: crate::pci::PciHost::new(1, crate::pci::testing::windows()), crate::pci::PciHost::ECAM + (2 << 20), |s| s;
    debug_exit: crate::debug_exit::DebugExit::new(), crate::debug_exit::DebugExit::LEN, |s| s;
    post: crate::post::Post::new(), crate::post::Post::LEN, |s| s;
    pit: crate::pit::Pit::new(), 0x22, |s| s;
    pic: crate::pic::Pic::new(), 0x4d2, |s| s;
}
