//! virtio devices and the PCI bus under a hostile driver: registers, rings and requests that mean something, and any bytes
//! in their places; queues are served, reset and enabled again in any order, also while they are lent.

use std::io;
use std::sync::{Arc, Mutex};

use arbitrary::Unstructured;
use ruse_block::{Disk, Slice};
use ruse_devices::pci::{PciAddress, PciFunction, PciHost, PciRanges, PciWindows, RootPort, lock};
use ruse_devices::{Access, Device, Effects};
use ruse_memory::GuestRam;
use ruse_virtio::block::Block;
use ruse_virtio::entropy::{Entropy, EntropyHandler};
use ruse_virtio::ring::driver::Driver;
use ruse_virtio::{Buffer, Dma, Handler, VirtioPci, Work, features};

use crate::input::{byte, number, one_in, pick};

/// Accesses of one input at most.
const MOST_STEPS: usize = 400;
/// Bytes of RAM, and of the disk.
const RAM: u64 = 1 << 20;
const DISK: usize = 64 << 10;
/// Where rings, headers and data are.
const RINGS: [u64; 2] = [0x1_0000, 0x3_0000];
const HEADERS: u64 = 0x6_0000;
/// Windows of the bus.
const MEMORY: u64 = 0xc000_0000;

/// A disk in memory.
struct MemoryDisk(Mutex<Vec<u8>>);

impl MemoryDisk {
    fn with(&self, call: impl FnOnce(&mut [u8])) -> io::Result<()> {
        call(&mut self.0.lock().expect("nobody panics with it"));
        Ok(())
    }
    fn fill(&self, offset: u64, len: u64, value: u8) -> io::Result<()> {
        self.with(|bytes| bytes[offset as usize..(offset + len) as usize].fill(value))
    }
}

/// Ranges beyond the disk panic: nobody may ask for them.
impl Disk for MemoryDisk {
    fn size(&self) -> u64 {
        DISK as u64
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn refresh_size(&self) -> io::Result<u64> {
        Ok(self.size())
    }
    fn read(&self, offset: u64, to: &[Slice]) -> io::Result<()> {
        self.with(|bytes| {
            let mut at = offset as usize;
            for slice in to {
                slice.copy_from(&bytes[at..at + slice.len()]);
                at += slice.len();
            }
        })
    }
    fn write(&self, offset: u64, from: &[Slice]) -> io::Result<()> {
        self.with(|bytes| {
            let mut at = offset as usize;
            for slice in from {
                slice.copy_to(&mut bytes[at..at + slice.len()]);
                at += slice.len();
            }
        })
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fill(offset, len, 0xdd)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _unmap_allowed: bool) -> io::Result<()> {
        self.fill(offset, len, 0)
    }
}

/// A device with what serves it, and its driver's idea of its queues.
struct Slot {
    at: PciAddress,
    function: Arc<Mutex<VirtioPci>>,
    handlers: Vec<Box<dyn Handler>>,
    drivers: Vec<Driver>,
    lent: Vec<Work>,
}

struct Bench {
    host: PciHost,
    ranges: PciRanges,
    ram: GuestRam,
    slots: Vec<Slot>,
}

/// Runs the target.
pub(crate) fn run(data: &[u8]) {
    let u = &mut Unstructured::new(data);
    let mut bench = Bench::new();
    for _ in 0..MOST_STEPS {
        if u.is_empty() {
            break;
        }
        bench.step(u);
    }
}

impl Bench {
    fn new() -> Self {
        let windows = PciWindows { ports: 0x1000..=0xffff, memory: vec![MEMORY..=0xdfff_ffff] };
        let mut bench = Self {
            host: PciHost::new(256, windows),
            ranges: PciRanges::default(),
            ram: GuestRam::new(RAM).expect("a little RAM"),
            slots: Vec::new(),
        };
        let disk: Arc<dyn Disk> = Arc::new(MemoryDisk(Mutex::new(vec![0; DISK])));
        let block = Block::new(disk, "fuzz", 2);
        let handlers: Vec<Box<dyn Handler>> = vec![Box::new(block.handler()), Box::new(block.handler())];
        let port = PciAddress::new(24, 0);
        let port = (port, Arc::new(Mutex::new(RootPort::new(port, 16, 1))) as _);
        bench.access(|host, access| host.insert(access, port.0, port.1).expect("a free place"));
        bench.plug(
            PciAddress::new(8, 0),
            VirtioPci::new(PciAddress::new(8, 0), 16, Box::new(block)),
            handlers,
        );
        let behind = PciAddress::behind(1);
        bench.plug(behind, VirtioPci::new(behind, 17, Box::new(Entropy)), vec![Box::new(EntropyHandler)]);
        bench.host.assign();
        bench
    }

    fn plug(&mut self, at: PciAddress, function: VirtioPci, handlers: Vec<Box<dyn Handler>>) {
        let function = Arc::new(Mutex::new(function));
        let shared = function.clone();
        self.access(|host, access| host.insert(access, at, shared).expect("a free place"));
        self.slots.push(Slot { at, function, handlers, drivers: Vec::new(), lent: Vec::new() });
    }

    /// An access of the host bridge, after which accesses are routed as it says.
    fn access<R>(&mut self, call: impl FnOnce(&mut PciHost, &mut Access) -> R) -> R {
        let mut effects = Effects::default();
        let result = call(&mut self.host, &mut Access { now: 0, effects: &mut effects });
        if let Some(ranges) = effects.pci_ranges.take() {
            for (first, last, target) in ranges.memory.iter() {
                assert!(first >= MEMORY && last <= 0xdfff_ffff, "{target:?} at {first:#x}");
            }
            self.ranges = ranges;
        }
        result
    }

    fn step(&mut self, u: &mut Unstructured) {
        let slot = usize::from(byte(u)) % self.slots.len();
        match byte(u) % 16 {
            0 => self.config_space(u),
            1 | 2 => self.registers(u, slot),
            3 | 4 => self.start(u, slot),
            5..=8 => self.request(u, slot),
            9 => self.damage(u),
            10 => self.lend(u, slot),
            11 | 12 => self.serve(slot),
            13 => self.reset(u, slot),
            14 => self.save_and_restore(slot),
            _ => {
                let function = self.slots[slot].function.clone();
                lock(&function).config_changed(&mut Access { now: 0, effects: &mut Effects::default() });
            }
        }
        for slot in &self.slots {
            let function = lock(&slot.function);
            assert_eq!(function.is_busy(), !slot.lent.is_empty());
        }
    }

    /// Any access to the configuration space.
    fn config_space(&mut self, u: &mut Unstructured) {
        let bus = byte(u) % 3;
        let offset = u64::from(bus) << 20 | u64::from(pick(u, &[8u8, 24, 0])) << 15;
        let offset = if bus == 0 { offset } else { offset & !(0x1f << 15) } + u64::from(byte(u));
        let width = pick(u, &[1, 2, 4]);
        let value = if one_in(u, 3) { MEMORY | u64::from(byte(u)) << 14 } else { number(u) };
        if one_in(u, 4) {
            self.access(|host, access| host.read(access, PciHost::ECAM + offset, &mut [0; 4][..width]));
        } else {
            self.access(|host, access| {
                host.write(access, PciHost::ECAM + offset, &value.to_le_bytes()[..width])
            });
        }
    }

    /// Writes to the range of a device as the bus does: where it is, if it is anywhere; else past the bus.
    fn write(&mut self, slot: usize, offset: u64, data: &[u8]) {
        let mut effects = Effects::default();
        let mut access = Access { now: 0, effects: &mut effects };
        lock(&self.slots[slot].function).bar_write(&mut access, 0, offset, data);
        assert!(effects.rings.iter().all(|ring| ring.source == self.slots[slot].at.id()));
    }

    fn read(&mut self, slot: usize, offset: u64, data: &mut [u8]) {
        let mut access = Access { now: 0, effects: &mut Effects::default() };
        lock(&self.slots[slot].function).bar_read(&mut access, 0, offset, data);
    }

    /// Any register, also through the map of the bus.
    fn registers(&mut self, u: &mut Unstructured, slot: usize) {
        let offset = match byte(u) % 4 {
            0 => number(u) % 0x9000,
            1 => 0x4000 + u64::from(byte(u)),
            _ => u64::from(byte(u) % 0x40),
        };
        let width = pick(u, &[1, 2, 4, 8]);
        let value = number(u).to_le_bytes();
        if one_in(u, 3) {
            self.read(slot, offset, &mut [0; 8][..width]);
        } else if one_in(u, 2) {
            self.write(slot, offset, &value[..width]);
        } else {
            let ranges = self.ranges.clone();
            ranges.memory.write(MEMORY + number(u) % (1 << 22), &value[..width], |target, offset, bytes| {
                let mut access = Access { now: 0, effects: &mut Effects::default() };
                lock(&target.function).bar_write(&mut access, target.bar, offset, bytes);
            });
        }
    }

    /// What a driver does to start a device, mostly as it should be done.
    fn start(&mut self, u: &mut Unstructured, slot: usize) {
        let mut taken = features::VERSION_1 | features::RING_RESET | number(u) & 0xffff;
        for feature in [features::RING_PACKED, features::EVENT_IDX, features::INDIRECT_DESC] {
            taken |= if one_in(u, 2) { feature } else { 0 };
        }
        let mut offered = [[0; 4]; 2];
        for (select, half) in (0u32..).zip(&mut offered) {
            self.write(slot, 0x00, &select.to_le_bytes());
            self.read(slot, 0x04, half);
        }
        let offered =
            u64::from(u32::from_le_bytes(offered[1])) << 32 | u64::from(u32::from_le_bytes(offered[0]));
        let taken = if one_in(u, 16) { taken } else { taken & offered };
        self.write(slot, 0x14, &[3]);
        for (select, half) in [(0u32, taken as u32), (1, (taken >> 32) as u32)] {
            self.write(slot, 0x08, &select.to_le_bytes());
            self.write(slot, 0x0c, &half.to_le_bytes());
        }
        self.write(slot, 0x14, &[11]);
        self.slots[slot].drivers.clear();
        for (queue, at) in (0u16..).zip(&RINGS[..self.slots[slot].handlers.len()]) {
            let driver = Driver::new(*at, pick(u, &[8, 16, 4, 64, 256]), taken);
            self.enable(u, slot, queue, &driver);
            self.slots[slot].drivers.push(driver);
        }
        self.write(slot, 0x14, &[15]);
    }

    fn enable(&mut self, u: &mut Unstructured, slot: usize, queue: u16, driver: &Driver) {
        let mut layout = driver.layout;
        if one_in(u, 16) {
            let area = match byte(u) % 3 {
                0 => &mut layout.descriptors,
                1 => &mut layout.driver,
                _ => &mut layout.device,
            };
            *area = number(u);
        }
        self.write(slot, 0x16, &queue.to_le_bytes());
        self.write(slot, 0x18, &layout.size.to_le_bytes());
        self.write(slot, 0x1a, &u16::from(byte(u) % 4).to_le_bytes());
        self.write(slot, 0x20, &layout.descriptors.to_le_bytes());
        self.write(slot, 0x28, &layout.driver.to_le_bytes());
        self.write(slot, 0x30, &layout.device.to_le_bytes());
        self.write(slot, 0x1c, &[1, 0]);
    }

    /// A request, mostly as it should be, and a notification.
    fn request(&mut self, u: &mut Unstructured, slot: usize) {
        let queue = usize::from(byte(u)) % self.slots[slot].handlers.len();
        let header = HEADERS + u64::from(byte(u)) * 64;
        let kind: u32 = pick(u, &[0, 1, 1, 4, 8, 11, 13, 99]);
        let sector = if one_in(u, 4) { number(u) } else { u64::from(byte(u)) % 128 };
        let ram = self.ram.clone();
        let dma = Dma::new(&ram);
        let words = [u64::from(kind).to_le_bytes(), sector.to_le_bytes()].concat();
        dma.write(header, &words).expect("it is in RAM");
        let mut parts = vec![(Buffer { at: header, len: 16 }, false)];
        let device_writes = matches!(kind, 0 | 8);
        for _ in 0..byte(u) % 4 {
            let at = if one_in(u, 8) { number(u) } else { 0x8_0000 + u64::from(byte(u)) * 0x700 };
            let len = if one_in(u, 8) {
                number(u) as u32
            } else {
                u32::from(byte(u) % 5) * 512 + 16 * u32::from(kind > 10)
            };
            parts.push((Buffer { at, len }, device_writes ^ one_in(u, 16)));
        }
        parts.push((Buffer { at: header + 32, len: 1 }, true));
        let indirect = one_in(u, 3);
        let Some(driver) = self.slots[slot].drivers.get_mut(queue) else { return };
        driver.add(&dma, &parts, indirect);
        self.write(slot, 0x3000 + 4 * queue as u64, &[0, 0]);
    }

    /// Any bytes in rings, tables and headers.
    fn damage(&mut self, u: &mut Unstructured) {
        let at = match byte(u) % 4 {
            0 => HEADERS + u64::from(byte(u)) * 64,
            1 => RINGS[usize::from(byte(u)) % 2] + 0xc000 + u64::from(byte(u)) * 2,
            2 => RINGS[usize::from(byte(u)) % 2] + 0x4000 + number(u) % 0x1100,
            _ => RINGS[usize::from(byte(u)) % 2] + number(u) % 0x1100,
        };
        let value = number(u).to_le_bytes();
        let width = pick(u, &[1, 2, 4, 8]);
        Dma::new(&self.ram).write(at, &value[..width]).expect("it is in RAM");
    }

    /// A handler takes a queue, and comes back later.
    fn lend(&mut self, u: &mut Unstructured, slot: usize) {
        let queue = u16::from(byte(u) % 3);
        let slot = &mut self.slots[slot];
        if let Some(work) = lock(&slot.function).begin(queue) {
            assert!(slot.lent.iter().all(|other| other.index != queue), "a queue is lent twice");
            slot.lent.push(work);
        }
    }

    /// Handlers serve the queues that are lent, else all queues.
    fn serve(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        let mut works = std::mem::take(&mut slot.lent);
        if works.is_empty() {
            let queues = 0..slot.handlers.len() as u16;
            works = queues.filter_map(|queue| lock(&slot.function).begin(queue)).collect();
        }
        for mut work in works {
            let result = slot.handlers[usize::from(work.index)].serve(&mut work, &Dma::new(&self.ram));
            let mut access = Access { now: 0, effects: &mut Effects::default() };
            lock(&slot.function).finish(&mut access, work, result);
        }
    }

    /// Of the machine, of a device or of a queue.
    fn reset(&mut self, u: &mut Unstructured, slot: usize) {
        match byte(u) % 4 {
            0 => {
                (0..self.slots.len()).for_each(|slot| self.serve(slot));
                self.access(|host, access| host.reset(access));
            }
            1 => {
                self.write(slot, 0x16, &u16::from(byte(u) % 3).to_le_bytes());
                self.write(slot, 0x3a, &[1, 0]);
            }
            _ => {
                self.write(slot, 0x14, &[0]);
                let mut status = [0];
                self.read(slot, 0x14, &mut status);
                assert_eq!(
                    status[0] == 0,
                    self.slots[slot].lent.is_empty(),
                    "complete when no queue is lent"
                );
            }
        }
    }

    fn save_and_restore(&mut self, slot: usize) {
        let slot = &self.slots[slot];
        let mut function = lock(&slot.function);
        let state = function.state();
        assert_eq!(state.is_some(), slot.lent.is_empty());
        if let Some(state) = state {
            function.restore(&mut Access { now: 0, effects: &mut Effects::default() }, &state);
            assert_eq!(function.state(), Some(state));
        }
    }
}
