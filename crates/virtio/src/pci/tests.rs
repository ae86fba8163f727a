//! A driver at the registers.

use ruse_devices::fabric::Msi;
use ruse_memory::GuestRam;

use super::*;
use crate::chain::Buffer;
use crate::device::Handler;
use crate::dma::Dma;
use crate::features::{RING_PACKED, VERSION_1};
use crate::ring::driver::Driver;
use crate::testing::Echo;

/// A function, and the effects of the last access.
struct Bench {
    function: VirtioPci,
    effects: Effects,
}

impl Bench {
    fn new() -> Self {
        let function = VirtioPci::new(PciAddress::new(3, 0), 19, Box::new(Echo::new()));
        Self { function, effects: Effects::default() }
    }
    fn access<R>(&mut self, call: impl FnOnce(&mut VirtioPci, &mut Access) -> R) -> R {
        self.effects = Effects::default();
        call(&mut self.function, &mut Access { now: 0, effects: &mut self.effects })
    }
    fn read<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.access(|function, access| function.bar_read(access, 0, offset, &mut data));
        data
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.access(|function, access| function.bar_write(access, 0, offset, data));
    }
    fn config_write(&mut self, register: u16, value: u32) {
        self.access(|function, access| function.config_write(access, register, value, 0xf));
    }

    /// Does what a driver does first, and enables queue 1.
    fn start(&mut self, features: u64, driver: &Driver) {
        for status in [1, 3] {
            self.write(0x14, &[status]);
        }
        for (select, half) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            self.write(0x08, &select.to_le_bytes());
            self.write(0x0c, &half.to_le_bytes());
        }
        self.write(0x14, &[11]);
        assert_eq!(self.read(0x14), [11]);
        self.write(0x16, &[1, 0]);
        let layout = driver.layout;
        self.write(0x18, &layout.size.to_le_bytes());
        self.write(0x1a, &[1, 0]);
        self.write(0x20, &layout.descriptors.to_le_bytes());
        self.write(0x28, &(layout.driver as u32).to_le_bytes());
        self.write(0x2c, &((layout.driver >> 32) as u32).to_le_bytes());
        self.write(0x30, &layout.device.to_le_bytes());
        self.write(0x1c, &[1, 0]);
        assert_eq!(self.read(0x1c), [1, 0]);
        self.write(0x14, &[15]);
    }

    fn serve(&mut self, ram: &GuestRam) {
        let mut work = self.function.begin(1).unwrap();
        let result = Echo::new().serve(&mut work, &Dma::new(ram));
        self.access(|function, access| function.finish(access, work, result));
    }
}

/// Offset of the vendor-specific capability of a type.
fn find(function: &VirtioPci, kind: u8) -> u16 {
    let mut at = function.space.read(0x34) as u16 & 0xff;
    while at != 0 {
        let word = function.space.read(at);
        if word as u8 == CAPABILITY && (word >> 24) as u8 == kind {
            return at;
        }
        at = (word >> 8) as u16 & 0xff;
    }
    panic!("no structure of type {kind}");
}

fn ram_and_driver(features: u64) -> (GuestRam, Driver) {
    (GuestRam::new(1 << 20).unwrap(), Driver::new(0x1_0000, 16, features))
}

#[test]
fn the_capabilities_tell_where_everything_is() {
    let bench = Bench::new();
    let space = &bench.function.space;
    assert_eq!((space.read(0), space.read(8) & 0xff, space.read(0x2c)), (0x106a_1af4, 1, 0x106a_1af4));
    for (kind, offset, len) in [(1, 0, 0x40), (2, 0x3000, 0x1000), (3, 0x1000, 1), (4, 0x2000, 0x1000)] {
        let at = find(&bench.function, kind);
        assert_eq!((space.read(at + 4) & 0xff, space.read(at + 8), space.read(at + 12)), (0, offset, len));
    }
    assert_eq!(space.read(find(&bench.function, 2) + 16), 4, "bytes between doorbells");
    let bells = bench.function.doorbells();
    assert_eq!(bells[1], BarDoorbell { bar: 0, offset: 0x3004, number: 1 });
}

#[test]
fn a_driver_is_served_and_interrupted_by_a_message() {
    for features in [VERSION_1, VERSION_1 | RING_PACKED] {
        let (ram, mut driver) = ram_and_driver(features);
        let mut bench = Bench::new();
        let msix = bench.function.space.read(0x34) as u16 & 0xff;
        bench.config_write(msix, 1 << 31);
        for (offset, value) in [(0x4010, 0xfee0_2000u32), (0x4018, 0x51), (0x401c, 0)] {
            bench.write(offset, &value.to_le_bytes());
        }
        bench.start(features, &driver);
        assert_eq!(bench.effects.rings.len(), 2, "what waits already is looked for");
        driver.add(&Dma::new(&ram), &[(Buffer { at: 0x5000, len: 4 }, true)], false).unwrap();
        bench.write(0x3004, &[1, 0]);
        assert_eq!(bench.effects.rings, [Ring { source: 24, number: 1 }]);
        bench.serve(&ram);
        assert_eq!(bench.effects.messages, [Msi { address: 0xfee0_2000, data: 0x51 }]);
        assert!(bench.effects.intx.is_empty());
        assert_eq!(driver.take(&Dma::new(&ram)).unwrap().1, 4);
    }
}

#[test]
fn without_messages_the_pin_is_held_until_the_status_is_read() {
    let (ram, mut driver) = ram_and_driver(VERSION_1);
    let mut bench = Bench::new();
    bench.start(VERSION_1, &driver);
    driver.add(&Dma::new(&ram), &[(Buffer { at: 0x5000, len: 4 }, true)], false).unwrap();
    bench.serve(&ram);
    assert!(bench.effects.intx[0].level && bench.effects.intx[0].gsi == 19);
    bench.access(|function, access| function.config_changed(access));
    assert_eq!(bench.read(0x1000), [3]);
    assert!(!bench.effects.intx[0].level);
    assert_eq!(bench.read(0x1000), [0]);
}

#[test]
fn a_broken_ring_shows_in_the_status_until_a_reset() {
    let (ram, driver) = ram_and_driver(VERSION_1);
    let mut bench = Bench::new();
    bench.start(VERSION_1, &driver);
    Dma::new(&ram).store(driver.layout.driver + 2, 99).unwrap();
    bench.serve(&ram);
    assert_eq!((bench.read(0x14), bench.read(0x1000)), ([15 | 64], [2]));
    bench.write(0x14, &[0]);
    assert_eq!((bench.read(0x14), bench.read(0x1c), bench.read(0x1a)), ([0], [0, 0], [0xff, 0xff]));
    let (_, driver) = ram_and_driver(VERSION_1);
    bench.start(VERSION_1, &driver);
    assert_eq!(bench.read(0x14), [15]);
}

#[test]
fn the_window_reaches_all_registers() {
    let mut bench = Bench::new();
    let at = find(&bench.function, WINDOW_TYPE);
    bench.config_write(at + WINDOW_OFFSET, 0x14);
    bench.config_write(at + WINDOW_LENGTH, 1);
    bench.config_write(at + WINDOW_DATA, 1);
    assert_eq!(bench.read(0x14), [1]);
    bench.config_write(at + WINDOW_OFFSET, 0x2000);
    bench.config_write(at + WINDOW_LENGTH, 4);
    assert_eq!(bench.access(|f, access| f.config_read(access, at + WINDOW_DATA)), 0x0403_0201);
    bench.write(0x2004, &[6]);
    assert_eq!(bench.read(0x2003), [4, 6]);
    bench.config_write(at + WINDOW_OFFSET, 0x3004);
    bench.config_write(at + WINDOW_DATA, 1);
    assert_eq!(bench.effects.rings, [Ring { source: 24, number: 1 }]);
    bench.config_write(at + WINDOW_OFFSET, 0x3002);
    bench.config_write(at + WINDOW_DATA, 1);
    assert!(bench.effects.rings.is_empty(), "not aligned");
}

#[test]
fn registers_take_what_fits_them() {
    let mut bench = Bench::new();
    bench.write(0x10, &[2, 0]);
    assert_eq!(bench.read(0x10), [2, 0]);
    bench.write(0x10, &[3, 0]);
    assert_eq!(bench.read(0x10), [0xff, 0xff], "there are three vectors");
    bench.write(0x16, &[7, 0]);
    bench.write(0x18, &[4, 0]);
    assert_eq!((bench.read(0x18), bench.read(0x20)), ([0, 0], [0; 8]), "there is no queue 7");
    bench.write(0x00, &[2, 0, 0, 0]);
    assert_eq!(bench.read(0x04), [0; 4], "there are two halves of features");
    bench.write(0x16, &[1, 0]);
    bench.write(0x18, &[9, 0]);
    bench.write(0x1c, &[1, 0]);
    assert_eq!(bench.read(0x1c), [0, 0]);
    assert_eq!((bench.read(0x2003), bench.read(0x12)), ([4, 5, 0, 0], [2, 0]));
}

#[test]
fn a_saved_function_is_restored() {
    let (_, driver) = ram_and_driver(VERSION_1);
    let mut bench = Bench::new();
    bench.start(VERSION_1, &driver);
    bench.config_write(0x04, 6);
    let saved = bench.function.state().unwrap();
    let text = serde_json::to_string(&saved).unwrap();
    let mut other = Bench::new();
    let read = serde_json::from_str(&text).unwrap();
    other.access(|function, access| function.restore(access, &read));
    assert_eq!(other.function.state().unwrap(), saved);
    assert!(other.effects.rings.contains(&Ring { source: 24, number: 1 }));
    other.access(|function, access| function.reset(access));
    assert_eq!(other.function.state(), Bench::new().function.state());
}

#[test]
fn any_access_is_survived() {
    for value in [0, 1, 3, 11, 15, u64::MAX, 0x8000_0000_0000_0001] {
        let mut bench = Bench::new();
        let (_, driver) = ram_and_driver(VERSION_1);
        bench.start(VERSION_1, &driver);
        for offset in (0..BAR_LEN + 8).chain([u64::MAX - 1, u64::MAX]) {
            for width in [1, 2, 4, 8] {
                bench.write(offset, &value.to_le_bytes()[..width]);
                bench.access(|function, access| function.bar_read(access, 0, offset, &mut [0; 8][..width]));
            }
        }
        for register in (0..0x1000).step_by(4) {
            bench.config_write(register, value as u32);
            bench.access(|function, access| function.config_read(access, register));
        }
    }
}
