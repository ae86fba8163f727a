use ruse_random::Random;

use super::*;

fn write(chip: &mut IoApic, register: u8, value: u32) -> Vec<Msi> {
    let mut sent = Vec::new();
    chip.write(IOREGSEL, &u32::from(register).to_le_bytes(), |_| panic!("selecting sends nothing"));
    chip.write(IOWIN, &value.to_le_bytes(), |msi| sent.push(msi));
    sent
}

fn read(chip: &mut IoApic, register: u8) -> u32 {
    chip.write(IOREGSEL, &[register], |_| {});
    let mut data = [0; 4];
    chip.read(IOWIN, &mut data);
    u32::from_le_bytes(data)
}

fn eoi(chip: &mut IoApic, vector: u8) -> Vec<Msi> {
    let mut sent = Vec::new();
    chip.end_of_interrupt(vector, |msi| sent.push(msi));
    sent
}

#[test]
fn registers() {
    let mut chip = IoApic::default();
    assert_eq!(read(&mut chip, REG_VERSION), 0x0017_0020);
    write(&mut chip, REG_ID, 0xffff_ffff);
    assert_eq!(read(&mut chip, REG_ID), 0x0f00_0000);
    assert_eq!(read(&mut chip, 0x10), 0x1_0000);
    write(&mut chip, 0x11, 0xffff_ffff);
    assert_eq!(read(&mut chip, 0x11), 0xff00_0000);
    assert_eq!(read(&mut chip, 0x40), u32::MAX);
}

#[test]
fn there_are_as_many_pins_as_the_version_register_says() {
    let mut chip = IoApic::new(56);
    assert_eq!(read(&mut chip, REG_VERSION), 0x0037_0020);
    assert_eq!(write(&mut chip, 0x10 + 2 * 55, 0x8077), []);
    assert_eq!(chip.set_pin(55, true), Some(Msi { address: 0xfee0_0000, data: 0xc077 }));
    assert_eq!((chip.set_pin(56, true), read(&mut chip, 0x10 + 2 * 56)), (None, u32::MAX));
    chip.reset();
    assert_eq!((read(&mut chip, 0x10 + 2 * 55), chip.state().lines), (MASKED as u32, 1 << 55));
    let mut small = IoApic::default();
    small.restore(&chip.state());
    assert_eq!((small.state().table.len(), small.state().lines), (PINS, 0));
}

#[test]
fn edges() {
    let mut chip = IoApic::default();
    assert_eq!(chip.set_pin(4, true), None, "masked");
    assert_eq!(write(&mut chip, 0x18, 0x34), []);
    assert_eq!(chip.set_pin(4, true), None, "no edge");
    chip.set_pin(4, false);
    write(&mut chip, 0x19, 0x0500_0000);
    assert_eq!(chip.set_pin(4, true), Some(Msi { address: 0xfee0_5000, data: 0x34 }));
    assert_eq!(eoi(&mut chip, 0x34), []);
    assert_eq!(chip.set_pin(99, true), None);
}

#[test]
fn levels() {
    let mut chip = IoApic::default();
    chip.set_pin(17, true);
    let sent = write(&mut chip, 0x10 + 34, 0xa955);
    assert_eq!(sent, [Msi { address: 0xfee0_0004, data: 0xc155 }]);
    assert_eq!(read(&mut chip, 0x10 + 34), 0xe955, "remote IRR");
    assert_eq!(chip.set_pin(17, true), None);
    assert_eq!(eoi(&mut chip, 0x55).len(), 1, "still asserted");
    chip.set_pin(17, false);
    assert_eq!(eoi(&mut chip, 0x55), []);
    assert_eq!(read(&mut chip, 0x10 + 34), 0xa955);
    // The EOI register does what a broadcast does.
    chip.set_pin(17, true);
    let mut sent = 0;
    chip.write(EOIR, &0x55u32.to_le_bytes(), |_| sent += 1);
    assert_eq!(sent, 1);
    // Masked, switched to edge and back: remote IRR is gone.
    write(&mut chip, 0x10 + 34, 0x1_2955);
    assert_eq!(read(&mut chip, 0x10 + 34), 0x1_2955);
    assert_eq!(write(&mut chip, 0x10 + 34, 0xa955).len(), 1);
}

#[test]
fn save_restore_reset_and_anything() {
    let mut chip = IoApic::default();
    let mut random = Random::new(0);
    for _ in 0..100_000 {
        let word = random.word();
        let mut data = (word >> 8).to_le_bytes();
        let width = 1 << (word >> 60 & 3);
        let offset = if word >> 20 & 1 != 0 { word >> 40 & 0x50 } else { word };
        match word >> 58 & 3 {
            0 => chip.read(offset, &mut data[..width]),
            1 | 2 => chip.write(offset, &data[..width], |_| {}),
            _ => drop(chip.set_pin((word >> 32) as usize & 31, word >> 50 & 1 != 0)),
        }
    }
    let saved = chip.state();
    let mut other = IoApic::default();
    other.restore(&saved);
    assert_eq!(other.state(), saved);
    for pin in 0..PINS {
        other.set_pin(pin, false);
    }
    other.reset();
    assert_eq!(other.state(), IoApic::default().state());
}
