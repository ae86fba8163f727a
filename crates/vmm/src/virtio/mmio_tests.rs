//! A driver at the registers of a machine without PCI, down to the file of a disk and up to the interrupt.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ruse_devices::pci::PciAddress;
use ruse_engine::{Bus, DoorbellTable, IoAddress};
use ruse_virtio::ring::driver::Driver;
use ruse_virtio::{Buffer, Dma, features};

use super::*;
use crate::fake;
use crate::mmio_slots;
use crate::report::Outcome;

/// The first disk's registers, and its pin of the I/O APIC.
const DISK: u64 = 0xfeb0_8000;
const PIN: u32 = 32;
/// Registers (virtio 1.2, 4.2.2).
const NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const DEVICE_STATUS: u64 = 0x70;
const VECTOR: u8 = 0x51;
const PATIENCE: Duration = Duration::from_secs(60);

struct Bench {
    board: Arc<Board>,
    ram: GuestRam,
    file: tempfile::NamedTempFile,
    driver: Driver,
    doorbells: Arc<DoorbellTable>,
    disk: AttachedDisk,
    threads: Vec<JoinHandle<()>>,
}

impl Bench {
    /// A disk whose driver has started with these features of rings.
    fn new(rings: u64) -> Self {
        let file = fake::image();
        let (board, doorbells) = fake::board(1, None);
        let ram = GuestRam::new(1 << 20).unwrap();
        let config = format!("{},queues=1", file.path().display()).parse().unwrap();
        let disks = OpenDisk::open_all(&[config], 1).unwrap();
        let (mut disks, servers) = AttachedDisk::plug_all(&board, &ram, mmio_slots::gsi, 1, disks).unwrap();
        let threads = servers.into_iter().map(|server| server.spawn().unwrap()).collect();
        let (driver, disk) = (Driver::new(0x1_0000, 8, rings), disks.remove(0));
        let bench = Self { board, ram, file, driver, doorbells, disk, threads };
        bench.start(rings);
        bench
    }

    fn write(&self, at: u64, value: u32) {
        self.board.mmio_write(0, at, &value.to_le_bytes());
    }
    fn read(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.board.mmio_read(0, at, &mut data);
        u32::from_le_bytes(data)
    }

    /// What a system does first: the interrupt chips, then the device.
    fn start(&self, rings: u64) {
        self.write(0xfee0_00f0, 0x1ff);
        let level = 1 << 15;
        for (register, value) in [(0x11 + 2 * PIN, 0), (0x10 + 2 * PIN, u32::from(VECTOR) | level)] {
            self.write(0xfec0_0000, register);
            self.write(0xfec0_0010, value);
        }
        let layout = self.driver.layout;
        for (offset, value) in [
            (DEVICE_STATUS, 3),
            (0x24, 0),
            (0x20, rings as u32),
            (0x24, 1),
            (0x20, ((rings | features::VERSION_1) >> 32) as u32),
            (DEVICE_STATUS, 11),
            (0x30, 0),
            (0x38, layout.size.into()),
            (0x80, layout.descriptors as u32),
            (0x90, layout.driver as u32),
            (0xa0, layout.device as u32),
            (0x44, 1),
            (DEVICE_STATUS, 15),
        ] {
            self.write(DISK + offset, value);
        }
        assert_eq!((self.read(DISK + DEVICE_STATUS), self.read(DISK + 0x44)), (15, 1));
    }

    /// Makes a request to write these bytes to the first sector.
    fn add(&mut self, bytes: &[u8; 512]) {
        const HEADER: u64 = 0x4_0000;
        let dma = Dma::new(&self.ram);
        dma.write(HEADER, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        dma.write(0x5_0000, bytes).unwrap();
        let part = |at, len, write| (Buffer { at, len }, write);
        let parts = [part(HEADER, 16, false), part(0x5_0000, 512, false), part(0x4_1000, 1, true)];
        self.driver.add(&dma, &parts, false).unwrap();
    }

    /// Waits for the answer, then for the interrupt.
    fn expect_interrupt(&mut self) {
        let limit = Instant::now() + PATIENCE;
        while self.driver.take(&Dma::new(&self.ram)).is_none() || !self.board.interrupt_pending(0) {
            assert!(Instant::now() < limit, "no answer, or no interrupt");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.board.acknowledge_interrupt(0), Some(VECTOR));
    }

    fn end_interrupt(&self) {
        self.write(0xfee0_00b0, 0);
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.board.lifecycle.end(Outcome::Stopped);
        self.board.kick_all();
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

#[test]
fn the_interrupt_stays_until_it_is_acknowledged() {
    let mut bench = Bench::new(0);
    bench.add(&[7; 512]);
    bench.write(DISK + NOTIFY, 0);
    bench.expect_interrupt();
    assert_eq!(std::fs::read(bench.file.path()).unwrap()[0], 7);
    bench.end_interrupt();
    assert_eq!(bench.board.acknowledge_interrupt(0), Some(VECTOR), "it is a level");
    assert_eq!(bench.read(DISK + INTERRUPT_STATUS), 1);
    bench.write(DISK + INTERRUPT_ACK, 1);
    bench.end_interrupt();
    assert!(!bench.board.interrupt_pending(0));
}

#[test]
fn the_engine_catches_notifications_by_their_value() {
    for rings in [features::EVENT_IDX, features::EVENT_IDX | features::RING_PACKED] {
        let mut bench = Bench::new(rings);
        let mut reader = bench.doorbells.reader();
        let mut ring = |at: u64, value: u32| reader.ring(IoAddress::Memory(at), &value.to_le_bytes());
        bench.add(&[8; 512]);
        assert!(!ring(DISK + NOTIFY, 1), "there is one queue");
        assert!(!ring(DISK + 0x1000 + NOTIFY, 0), "there is one disk");
        assert!(ring(DISK + NOTIFY, 0));
        bench.expect_interrupt();
        assert_eq!(std::fs::read(bench.file.path()).unwrap()[0], 8, "{rings:#x}");
    }
}

#[test]
fn a_disk_that_has_grown_interrupts_for_its_configuration() {
    let bench = Bench::new(0);
    bench.file.as_file().set_len(3 << 20).unwrap();
    assert_eq!(bench.disk.refresh(&bench.board).unwrap().size, 3 << 20);
    assert_eq!(bench.board.acknowledge_interrupt(0), Some(VECTOR));
    let sectors = bench.read(DISK + 0x100);
    assert_eq!((bench.read(DISK + INTERRUPT_STATUS), sectors, bench.read(DISK + 0xfc)), (2, 0x1800, 1));
}

#[test]
fn a_reset_of_the_machine_resets_the_device() {
    let mut bench = Bench::new(0);
    bench.add(&[9; 512]);
    bench.write(DISK + NOTIFY, 0);
    bench.expect_interrupt();
    bench.board.lifecycle.reset(None);
    bench.board.gate.wait_empty();
    bench.board.reset();
    assert_eq!((bench.read(DISK + DEVICE_STATUS), bench.read(DISK + INTERRUPT_STATUS)), (0, 0));
    bench.board.lifecycle.reset_done();
    bench.driver = Driver::new(0x1_0000, 8, 0);
    Dma::new(&bench.ram).write(0x1_0000, &[0; 0x8000]).unwrap();
    bench.start(0);
    assert!(!bench.board.interrupt_pending(0), "the line is low");
    bench.add(&[10; 512]);
    bench.write(DISK + NOTIFY, 0);
    bench.expect_interrupt();
    assert_eq!(std::fs::read(bench.file.path()).unwrap()[0], 10);
}

#[test]
fn without_pci_nothing_answers_where_it_would_be() {
    let bench = Bench::new(0);
    bench.board.pio_write(0, 0xcf8, &0x8000_0000u32.to_le_bytes());
    for port in [0xcf8, 0xcfc] {
        let mut data = [0; 4];
        bench.board.pio_read(0, port, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
    let nothing = [0xe000_0000, 0xc000_0000, mmio_slots::BASE, DISK + 0x200, DISK + 0x1000, DISK - 0x1000];
    assert!(nothing.iter().all(|&at| bench.read(at) == u32::MAX));
    for offset in (0..0x204).chain([0xffc]) {
        bench.board.mmio_read(0, DISK + offset, &mut [0; 8]);
    }
    let at = PciAddress::new(8, 0);
    let again = plug(&bench.board, &bench.ram, at, 32, "rng", Box::new(Entropy), Vec::new());
    assert!(matches!(again, Err(PlugError::Slot(SlotTaken(taken))) if taken == at));
}
