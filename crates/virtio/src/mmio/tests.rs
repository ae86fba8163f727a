//! A driver at the registers.

use ruse_memory::GuestRam;

use super::*;
use crate::chain::Buffer;
use crate::device::{Handler, Served};
use crate::dma::Dma;
use crate::features::VERSION_1;
use crate::ring::RingError;
use crate::ring::driver::Driver;
use crate::testing::Echo;

struct Bench {
    device: VirtioMmio,
    effects: Effects,
}

impl Bench {
    fn new() -> Self {
        Self { device: VirtioMmio::new(7, 5, Box::new(Echo::new())), effects: Effects::default() }
    }
    fn access<R>(&mut self, call: impl FnOnce(&mut VirtioMmio, &mut Access) -> R) -> R {
        self.effects = Effects::default();
        call(&mut self.device, &mut Access { now: 0, effects: &mut self.effects })
    }
    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.access(|device, access| device.read(access, offset, &mut data));
        u32::from_le_bytes(data)
    }
    fn write(&mut self, offset: u64, value: u32) {
        self.access(|device, access| device.write(access, offset, &value.to_le_bytes()));
    }
    fn start(&mut self, driver: &Driver) {
        for (offset, value) in [
            (register::STATUS, 3),
            (register::DRIVER_FEATURES_SELECT, 1),
            (register::DRIVER_FEATURES, (VERSION_1 >> 32) as u32),
            (register::STATUS, 11),
            (register::QUEUE_SELECT, 1),
            (register::QUEUE_SIZE, driver.layout.size.into()),
            (register::QUEUE_DESCRIPTORS, driver.layout.descriptors as u32),
            (register::QUEUE_DRIVER, driver.layout.driver as u32),
            (register::QUEUE_DEVICE, driver.layout.device as u32),
            (register::QUEUE_DEVICE + 4, 0),
            (register::QUEUE_READY, 1),
            (register::STATUS, 15),
        ] {
            self.write(offset, value);
        }
    }
}

fn pin(level: bool) -> IntxLevel {
    IntxLevel { source: 7, gsi: 5, level }
}

#[test]
fn a_driver_finds_the_device() {
    let mut bench = Bench::new();
    let first = [0, 4, 8, 12].map(|offset| bench.read(offset));
    assert_eq!(first, [0x7472_6976, 2, 42, 0x1af4]);
    assert_eq!(bench.read(register::DEVICE_FEATURES) & 1 << 5, 1 << 5);
    bench.write(register::DEVICE_FEATURES_SELECT, 1);
    assert_eq!(bench.read(register::DEVICE_FEATURES) & 1, 1);
    bench.write(register::DEVICE_FEATURES_SELECT, u32::MAX);
    assert_eq!(bench.read(register::DEVICE_FEATURES), 0);
    assert_eq!((bench.read(register::QUEUE_MOST), bench.read(0xb0)), (8, u32::MAX));
    assert_eq!((bench.read(0x101), bench.read(0x104)), (0x0504_0302, 5));
    bench.write(0x104, 6);
    assert_eq!(bench.read(0x104), 6);
}

#[test]
fn a_driver_is_served_and_acknowledges_the_interrupt() {
    let ram = GuestRam::new(1 << 20).unwrap();
    let dma = Dma::new(&ram);
    let mut driver = Driver::new(0x1_0000, 16, 0);
    let mut bench = Bench::new();
    bench.start(&driver);
    driver.add(&dma, &[(Buffer { at: 0x5000, len: 9 }, true)], false).unwrap();
    bench.write(register::NOTIFY, 1);
    assert_eq!(bench.effects.rings, [Ring { source: 7, number: 1 }]);
    bench.write(register::NOTIFY, 2);
    assert!(bench.effects.rings.is_empty());
    let mut work = bench.device.begin(1).unwrap();
    let result = Echo::new().serve(&mut work, &dma);
    bench.access(|device, access| device.finish(access, work, result));
    assert_eq!((driver.take(&dma).unwrap().1, &bench.effects.intx[..]), (9, &[pin(true)][..]));
    assert_eq!(bench.read(register::INTERRUPT_STATUS), 1);
    bench.write(register::INTERRUPT_ACK, 1);
    assert_eq!(bench.effects.intx, [pin(false)]);
}

#[test]
fn a_reset_is_as_power_up() {
    let mut bench = Bench::new();
    bench.start(&Driver::new(0x1_0000, 16, 0));
    assert_eq!((bench.read(register::STATUS), bench.read(register::QUEUE_READY)), (15, 1));
    let saved = bench.device.state().unwrap();
    let mut other = Bench::new();
    other.access(|device, access| device.restore(access, &saved));
    assert_eq!(other.device.state().unwrap(), saved);
    bench.access(|device, access| device.config_changed(access));
    assert_eq!((bench.read(register::GENERATION), bench.effects.intx.len()), (1, 0));
    bench.write(register::STATUS, 0);
    assert_eq!(bench.effects.intx, [pin(false)]);
    bench.access(|device, access| device.reset(access));
    assert_eq!(bench.device.state(), Bench::new().device.state());
}

#[test]
fn a_queue_that_is_lent_stays_ready_until_it_is_back() {
    let mut bench = Bench::new();
    bench.start(&Driver::new(0x1_0000, 16, 0));
    bench.write(register::QUEUE_READY, 0);
    assert_eq!((bench.read(register::QUEUE_READY), bench.read(register::STATUS)), (0, 15));
    bench.start(&Driver::new(0x1_0000, 16, 0));
    let work = bench.device.begin(1).unwrap();
    bench.write(register::QUEUE_READY, 0);
    assert_eq!(bench.read(register::QUEUE_READY), 1);
    bench.access(|device, access| device.finish(access, work, Ok(Served::default())));
    assert_eq!(bench.read(register::QUEUE_READY), 0);
}

#[test]
fn a_broken_ring_asks_for_a_reset_by_the_interrupt() {
    let mut bench = Bench::new();
    bench.start(&Driver::new(0x1_0000, 16, 0));
    let work = bench.device.begin(1).unwrap();
    bench.access(|device, access| device.finish(access, work, Err(RingError::Chain("of the test"))));
    assert_eq!(bench.effects.intx, [pin(true)]);
    assert_eq!((bench.read(register::INTERRUPT_STATUS), bench.read(register::STATUS)), (2, 15 | 64));
    bench.write(register::STATUS, 0);
    assert_eq!((bench.read(register::INTERRUPT_STATUS), bench.read(register::STATUS)), (0, 0));
}

#[test]
fn any_access_is_survived() {
    for value in [0, 1, 3, 11, 15, u64::MAX, 0x8000_0000_0000_0001] {
        let mut bench = Bench::new();
        bench.start(&Driver::new(0x1_0000, 16, 0));
        for offset in (0..VirtioMmio::LEN + 8).chain([u64::MAX - 1, u64::MAX]) {
            for width in [1, 2, 4, 8] {
                bench.access(|device, access| device.write(access, offset, &value.to_le_bytes()[..width]));
                bench.access(|device, access| device.read(access, offset, &mut [0; 8][..width]));
            }
        }
    }
}
