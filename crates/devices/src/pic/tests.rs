use ruse_random::Random;

use super::*;

/// As PCs set it up: vectors 0x20 and 0x28, ICW4 as given.
fn pic_with(icw4: u8) -> Pic {
    let mut pic = Pic::new();
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, icw4)] {
        pic.write_port(port, value);
    }
    for (port, value) in [(0xa0, 0x11), (0xa1, 0x28), (0xa1, 2), (0xa1, 1)] {
        pic.write_port(port, value);
    }
    pic
}

fn pic() -> Pic {
    pic_with(1)
}

#[test]
fn silent_before_initialisation() {
    let mut pic = Pic::new();
    pic.set_irq(0, true);
    assert!(!pic.intr());
    pic.write_port(0x20, 0x11);
    assert!(!pic.intr());
}

#[test]
fn priorities_and_ends() {
    let mut pic = pic();
    pic.set_irq(4, true);
    pic.set_irq(10, true);
    assert!(pic.intr());
    assert_eq!(pic.acknowledge(), 0x2a);
    assert!(!pic.intr(), "4 is lower than the cascade");
    pic.set_irq(8, true);
    assert!(!pic.intr(), "without special nesting the slave waits");
    pic.write_port(0xa0, 0x20);
    pic.write_port(0x20, 0x20);
    assert_eq!(pic.acknowledge(), 0x28);
    pic.write_port(0xa0, 0x60);
    pic.write_port(0x20, 0x62);
    assert_eq!(pic.acknowledge(), 0x24);
    pic.write_port(0x20, 0x0b);
    assert_eq!(pic.read_port(0x20), 0x10, "in service");
    pic.set_irq(1, true);
    assert_eq!(pic.acknowledge(), 0x21, "nests");
}

#[test]
fn mask_latches_and_level() {
    let mut pic = pic();
    pic.write_port(0x21, 0xff);
    pic.set_irq(3, true);
    pic.set_irq(3, false);
    assert!(!pic.intr());
    assert_eq!(pic.read_port(0x20), 8);
    pic.write_port(0x21, 0xf7);
    assert_eq!(pic.acknowledge(), 0x23);
    pic.write_port(0x20, 0x20);
    assert!(!pic.intr(), "an edge counts once");
    pic.write_port(0x4d0, 0xff);
    assert_eq!(pic.read_port(0x4d0), 0xf8);
    pic.set_irq(3, true);
    assert_eq!(pic.acknowledge(), 0x23);
    pic.write_port(0x20, 0x20);
    assert_eq!(pic.acknowledge(), 0x23, "a level goes on");
    pic.write_port(0x20, 0x20);
    pic.set_irq(3, false);
    assert!(!pic.intr());
}

#[test]
fn spurious() {
    let mut pic = pic();
    assert_eq!(pic.acknowledge(), 0x27);
    pic.write_port(0x20, 0x0b);
    assert_eq!(pic.read_port(0x20), 0);
}

#[test]
fn rotation() {
    let mut pic = pic();
    pic.write_port(0x20, 0xc3); // 3 is lowest, 4 highest
    pic.set_irq(4, true);
    pic.set_irq(0, true);
    assert_eq!(pic.acknowledge(), 0x24);
    pic.write_port(0x20, 0xa0); // rotate on EOI
    pic.set_irq(5, true);
    assert_eq!(pic.acknowledge(), 0x25);
    pic.write_port(0x20, 0xe5);
    assert_eq!(pic.acknowledge(), 0x20);
}

#[test]
fn automatic_end_and_special_modes() {
    let mut pic = pic_with(3);
    pic.set_irq(1, true);
    assert_eq!(pic.acknowledge(), 0x21);
    pic.set_irq(6, true);
    assert_eq!(pic.acknowledge(), 0x26);

    let mut pic = pic_with(0x11);
    pic.set_irq(12, true);
    assert_eq!(pic.acknowledge(), 0x2c);
    pic.set_irq(9, true);
    assert_eq!(pic.acknowledge(), 0x29, "special fully nested");

    let mut pic = self::pic();
    pic.set_irq(1, true);
    pic.acknowledge();
    pic.set_irq(5, true);
    assert!(!pic.intr());
    pic.write_port(0x21, 0x02);
    pic.write_port(0x20, 0x68);
    assert_eq!(pic.acknowledge(), 0x25, "special mask");
}

#[test]
fn poll() {
    let mut pic = pic();
    pic.set_irq(5, true);
    pic.write_port(0x20, 0x0c);
    assert_eq!(pic.read_port(0x20), 0x85);
    assert!(!pic.intr());
    pic.write_port(0x20, 0x0c);
    assert_eq!(pic.read_port(0x20), 0);
}

#[test]
fn save_restore_reset_and_anything() {
    let mut pic = pic();
    let mut random = Random::new(0);
    for _ in 0..200_000 {
        let word = random.word();
        let port = PORTS[(word >> 32) as usize % PORTS.len()];
        match word >> 60 & 3 {
            0 => drop(pic.read_port(port)),
            1 => pic.write_port(port, (word >> 40) as u8),
            2 => pic.set_irq((word >> 40) as u8 & 31, word >> 50 & 1 != 0),
            _ => drop(pic.intr() && pic.acknowledge() != 0),
        }
    }
    let saved = pic.state();
    let mut other = Pic::new();
    other.restore(&saved);
    assert_eq!(other.state(), saved);
    (0..16).for_each(|irq| other.set_irq(irq, false));
    other.reset();
    assert_eq!(other.state(), Pic::new());
    let mut effects = crate::Effects::default();
    let mut access = Access { now: 0, effects: &mut effects };
    Device::read(&mut other, &mut access, u64::MAX, &mut [0; 8]);
    Device::write(&mut other, &mut access, u64::MAX, &[0; 8]);
}
