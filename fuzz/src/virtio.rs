//! virtio devices, on a PCI bus or without one, under a hostile driver: registers, rings and requests that mean something, and any bytes
//! in their places; queues are served, reset and enabled again in any order, also while they are lent.

mod network;
mod registers;
mod sockets;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arbitrary::Unstructured;
use ruse_block::{Disk, Slice};
use ruse_devices::pci::{PciAddress, PciFunction, PciHost, PciRanges, PciWindows, RootPort, lock};
use ruse_devices::pvpanic::Pvpanic;
use ruse_devices::watchdog::Watchdog;
use ruse_devices::{Access, Device, Effects, Power};
use ruse_memory::{BLOCK_SIZE, GuestRam, HIGH_RAM_START, Layout};
use ruse_virtio::balloon::{Balloon, BalloonControl};
use ruse_virtio::block::Block;
use ruse_virtio::entropy::{Entropy, EntropyHandler};
use ruse_virtio::mem::{Mem, MemControl};
use ruse_virtio::pmem::Pmem;
use ruse_virtio::ring::driver::{Driver, Part};
use ruse_virtio::{Buffer, Device as VirtioDevice, Dma, Handler, VirtioPci, Work, features};

use self::network::Frames;
use self::registers::{Register, Registers};
use self::sockets::Programs;
use crate::input::{byte, number, one_in, pick, steps};

/// Accesses of one input at most.
const MOST_STEPS: usize = 400;
/// Bytes of RAM, and of the disk.
const RAM: u64 = 1 << 20;
const DISK: usize = 64 << 10;
/// Memory to be plugged in, and that of a file.
const PLUGGABLE: (u64, u64) = (HIGH_RAM_START, 70 * BLOCK_SIZE);
const PMEM: (u64, u64) = (HIGH_RAM_START << 1, BLOCK_SIZE);
/// Where rings, headers and data are.
const RINGS: [u64; 5] = [0x1_0000, 0x2_0000, 0x3_0000, 0x4_0000, 0x5_0000];
const HEADERS: u64 = 0x6_0000;
/// Windows of the bus.
const MEMORY: u64 = 0xc000_0000;
/// Where the root port is.
const PORT: PciAddress = PciAddress { bus: 0, device: 24, function: 0 };

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

/// What a driver asks of a device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Requests as to a disk, also of a device that knows of none.
    Disk,
    /// Packets of connections.
    Sockets,
    /// Messages and bytes of ports.
    Ports,
    /// Lists of pages.
    Balloon,
    /// Frames and commands.
    Network,
    /// Requests for blocks.
    Memory,
    /// Requests to flush.
    Pmem,
}

/// A device with what serves it, and its driver's idea of its queues.
struct Slot {
    kind: Kind,
    at: PciAddress,
    registers: Registers,
    handlers: Vec<Box<dyn Handler>>,
    drivers: Vec<Driver>,
    lent: Vec<Work>,
}

struct Bench {
    /// Virtio devices are on the bus.
    has_pci: bool,
    host: PciHost,
    port: Arc<Mutex<RootPort>>,
    ranges: PciRanges,
    ram: GuestRam,
    slots: Vec<Slot>,
    watchdog: Arc<Mutex<Watchdog>>,
    /// The host's side of the socket device and of ports.
    programs: Programs,
    balloon: Option<BalloonControl>,
    memory: MemControl,
    /// The host's side of the network device.
    frames: Frames,
}

/// Runs the target.
pub(crate) fn run(data: &[u8]) {
    let u = &mut Unstructured::new(data);
    let mut bench = Bench::new(!one_in(u, 4));
    steps(u, MOST_STEPS, |u| bench.step(u));
}

impl Bench {
    fn new(has_pci: bool) -> Self {
        let windows = PciWindows { ports: 0x1000..=0xffff, memory: vec![MEMORY..=0xdfff_ffff] };
        let (mem, mem_handlers) = Mem::new(PLUGGABLE.0, PLUGGABLE.1);
        let file = Arc::new(tempfile::tempfile().expect("a file"));
        file.set_len(PMEM.1).expect("a sparse file");
        let mut bench = Self {
            has_pci,
            host: PciHost::new(256, windows),
            port: Arc::new(Mutex::new(RootPort::new(PORT, 16, 1))),
            ranges: PciRanges::default(),
            ram: memory(&file),
            slots: Vec::new(),
            programs: Programs::new(),
            balloon: None,
            memory: mem.control(),
            watchdog: Arc::new(Mutex::new(Watchdog::new(Some(Power::Reset)))),
            frames: Frames::default(),
        };
        let disk: Arc<dyn Disk> = Arc::new(MemoryDisk(Mutex::new(vec![0; DISK])));
        let block = Block::new(disk, "fuzz", 2);
        let handlers: Vec<Box<dyn Handler>> = vec![Box::new(block.handler()), Box::new(block.handler())];
        let port = bench.port.clone();
        bench.access(|host, access| host.insert(access, PORT, port).expect("a free place"));
        bench.plug(Kind::Disk, PciAddress::new(8, 0), Box::new(block), handlers);
        bench.plug(Kind::Disk, PciAddress::behind(1), Box::new(Entropy), vec![Box::new(EntropyHandler)]);
        let (vsock, handlers) = bench.programs.device();
        bench.plug(Kind::Sockets, PciAddress::new(5, 0), Box::new(vsock), handlers);
        let pvpanic = Arc::new(Mutex::new(Pvpanic::default()));
        bench.access(|host, access| {
            host.insert(access, PciAddress::new(7, 0), pvpanic).expect("a free place");
        });
        let (ports, handlers) = bench.programs.ports();
        bench.plug(Kind::Ports, PciAddress::new(7, 1), Box::new(ports), handlers);
        let (balloon, handlers) = Balloon::new(1 << 16).expect("an eventfd");
        let control = balloon.control();
        bench.plug(Kind::Balloon, PciAddress::new(6, 0), Box::new(balloon), handlers);
        bench.balloon = Some(control);
        let (net, handlers) = bench.frames.device();
        bench.plug(Kind::Network, PciAddress::new(2, 0), Box::new(net), handlers);
        let watchdog = bench.watchdog.clone();
        bench.access(|host, access| {
            host.insert(access, PciAddress::new(7, 3), watchdog).expect("a free place");
        });
        bench.plug(Kind::Memory, PciAddress::new(7, 2), Box::new(mem), mem_handlers);
        let (pmem, handlers) = Pmem::new(PMEM.0, PMEM.1, file);
        bench.plug(Kind::Pmem, PciAddress::new(7, 4), Box::new(pmem), handlers);
        bench.host.assign();
        bench
    }

    fn plug(
        &mut self,
        kind: Kind,
        at: PciAddress,
        device: Box<dyn VirtioDevice>,
        handlers: Vec<Box<dyn Handler>>,
    ) {
        let registers = if self.has_pci {
            let function = Arc::new(Mutex::new(VirtioPci::new(at, 16, device)));
            let shared = function.clone();
            self.access(|host, access| host.insert(access, at, shared).expect("a free place"));
            Registers::Pci(function)
        } else {
            Registers::mmio(at, device)
        };
        self.slots.push(Slot { kind, at, registers, handlers, drivers: Vec::new(), lent: Vec::new() });
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
        match byte(u) % 20 {
            0 => self.config_space(u),
            1 | 2 => self.registers(u, slot),
            3 | 4 => self.start(u, slot),
            5..=8 => self.request(u, slot),
            9 => self.damage(u),
            10 => self.lend(u, slot),
            11 | 12 => self.serve(slot),
            13 => self.reset(u, slot),
            14 => self.save_and_restore(slot),
            15 | 16 => self.programs.step(u),
            17 => self.ask_balloon(u),
            18 if one_in(u, 2) => self.frames.step(u),
            18 => {
                self.resize_memory(u);
                self.watchdog(u);
            }
            _ if one_in(u, 2) => self.change_slot(u),
            _ => {
                self.slots[slot].registers.with(|device, access| device.config_changed(access));
            }
        }
        for slot in &mut self.slots {
            let busy = slot.registers.with(|device, _| device.is_busy());
            assert_eq!(busy, !slot.lent.is_empty());
        }
    }

    /// Asks for what is in the root port's slot, or tears it out and puts it back, if there is anything.
    fn change_slot(&mut self, u: &mut Unstructured) {
        if one_in(u, 2) || !self.has_pci {
            let mut effects = Effects::default();
            lock(&self.port).press_button(&mut Access { now: 0, effects: &mut effects });
            return;
        }
        let at = PciAddress::behind(1);
        let function = self.access(|host, access| host.remove(access, at)).expect("it is there");
        assert!(self.ranges.memory.iter().all(|(_, _, target)| target.at != at), "it answers no more");
        self.access(|host, access| host.insert(access, at, function)).expect("the slot is free");
    }

    /// Any access to the configuration space.
    fn config_space(&mut self, u: &mut Unstructured) {
        let bus = byte(u) % 3;
        let offset = u64::from(bus) << 20 | u64::from(pick(u, &[8u8, 24, 5, 6, 7, 2, 0])) << 15;
        // Functions of the small devices.
        let offset = offset | u64::from(byte(u) % 8) << 12;
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

    /// Writes to the registers of a device as the bus does: where they are, if they are anywhere; else past the bus.
    fn write(&mut self, slot: usize, offset: u64, data: &[u8]) {
        let slot = &mut self.slots[slot];
        let rings = slot.registers.write(offset, data);
        assert!(rings.iter().all(|ring| ring.source == slot.at.id()));
    }

    /// Any register, also through the map of the bus.
    fn registers(&mut self, u: &mut Unstructured, slot: usize) {
        let offset = match byte(u) % 4 {
            0 => number(u) % 0x9000,
            1 if self.has_pci => 0x4000 + u64::from(byte(u)),
            1 => u64::from(byte(u) % 0x80) * 4,
            _ => u64::from(byte(u) % 0x40),
        };
        let width = pick(u, &[1, 2, 4, 8]);
        let value = number(u).to_le_bytes();
        if one_in(u, 3) {
            self.slots[slot].registers.read(offset, &mut [0; 8][..width]);
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
        let registers = &mut self.slots[slot].registers;
        let offered = [0, 1].map(|select| {
            registers.set(Register::FeaturesSelect, select);
            registers.get(Register::Features) << (32 * select)
        });
        let taken = if one_in(u, 16) { taken } else { taken & (offered[0] | offered[1]) };
        registers.set(Register::Status, 3);
        for select in [0, 1] {
            registers.set(Register::DriverFeaturesSelect, select);
            registers.set(Register::DriverFeatures, taken >> (32 * select));
        }
        registers.set(Register::Status, 11);
        self.slots[slot].drivers.clear();
        for (queue, at) in (0u16..).zip(&RINGS).take(self.slots[slot].handlers.len()) {
            let driver = Driver::new(*at, pick(u, &[8, 16, 4, 64, 256]), taken);
            self.enable(u, slot, queue, &driver);
            self.slots[slot].drivers.push(driver);
        }
        self.slots[slot].registers.set(Register::Status, 15);
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
        let registers = &mut self.slots[slot].registers;
        registers.set(Register::Queue, queue.into());
        registers.set(Register::Size, layout.size.into());
        // The vector, over PCI.
        registers.write(0x1a, &u16::from(byte(u) % 4).to_le_bytes());
        registers.set(Register::Descriptors, layout.descriptors);
        registers.set(Register::Driver, layout.driver);
        registers.set(Register::Device, layout.device);
        registers.set(Register::Enable, 1);
    }

    /// A request, mostly as it should be, and a notification.
    fn request(&mut self, u: &mut Unstructured, slot: usize) {
        let queue = usize::from(byte(u)) % self.slots[slot].handlers.len();
        let header = HEADERS + u64::from(byte(u)) * 64;
        let parts = match (self.slots[slot].kind, queue) {
            (Kind::Disk, _) => self.disk_request(u, header),
            (Kind::Sockets, 1) => self.packet(u, header),
            (Kind::Network, _) => self.network_request(u, queue, header),
            (Kind::Ports, 3) => {
                Dma::new(&self.ram).write(header, &sockets::port_message(u)).expect("it is in RAM");
                vec![(Buffer { at: header, len: 8 }, false)]
            }
            (Kind::Ports, 1) => vec![(any_buffer(u, 0x900), false)],
            (Kind::Balloon, 0..=2) => self.pages(u, header),
            (Kind::Memory, _) => self.memory_request(u, header),
            (Kind::Pmem, _) => {
                Dma::new(&self.ram).write(header, &[byte(u) % 2, 0, 0, 0]).expect("it is in RAM");
                vec![(Buffer { at: header, len: 4 }, one_in(u, 16)), (any_buffer(u, 4), true)]
            }
            (Kind::Sockets | Kind::Ports | Kind::Balloon, _) => {
                vec![(any_buffer(u, 0x1200), !one_in(u, 16))]
            }
        };
        let ram = self.ram.clone();
        let dma = Dma::new(&ram);
        let indirect = one_in(u, 3);
        let Some(driver) = self.slots[slot].drivers.get_mut(queue) else { return };
        driver.add(&dma, &parts, indirect);
        self.slots[slot].registers.notify(queue);
    }

    /// A header, data and room for the answer.
    fn disk_request(&self, u: &mut Unstructured, header: u64) -> Vec<Part> {
        let kind: u32 = pick(u, &[0, 1, 1, 4, 8, 11, 13, 99]);
        let sector = if one_in(u, 4) { number(u) } else { u64::from(byte(u)) % 128 };
        let words = [u64::from(kind).to_le_bytes(), sector.to_le_bytes()].concat();
        Dma::new(&self.ram).write(header, &words).expect("it is in RAM");
        let mut parts = vec![(Buffer { at: header, len: 16 }, false)];
        let device_writes = matches!(kind, 0 | 8);
        for _ in 0..byte(u) % 4 {
            let len = u32::from(byte(u) % 5) * 512 + 16 * u32::from(kind > 10);
            parts.push((any_buffer(u, len), device_writes ^ one_in(u, 16)));
        }
        parts.push((Buffer { at: header + 32, len: 1 }, true));
        parts
    }

    /// A list of pages, some of which are RAM; or some statistics.
    fn pages(&self, u: &mut Unstructured, list: u64) -> Vec<Part> {
        let pages = byte(u) % 16;
        for n in 0..u64::from(pages) {
            let page = if one_in(u, 4) { number(u) as u32 } else { u32::from(byte(u)) };
            Dma::new(&self.ram).write(list + 4 * n, &page.to_le_bytes()).expect("it is in RAM");
        }
        vec![(Buffer { at: list, len: 4 * u32::from(pages) + 1 }, false)]
    }

    /// The machine asks the guest's balloon.
    fn ask_balloon(&self, u: &mut Unstructured) {
        let Some(control) = &self.balloon else { return };
        control.set_target(number(u));
        assert!(control.statistics.ask(Duration::ZERO).len() <= 64);
    }

    /// A request for blocks, mostly of those that there are.
    fn memory_request(&self, u: &mut Unstructured, header: u64) -> Vec<Part> {
        let at = if one_in(u, 8) { number(u) } else { PLUGGABLE.0 + u64::from(byte(u) % 71) * BLOCK_SIZE };
        let blocks = if one_in(u, 8) { number(u) } else { u64::from(byte(u) % 4) };
        let words = [u64::from(byte(u) % 5), at, blocks].map(u64::to_le_bytes).concat();
        Dma::new(&self.ram).write(header, &words).expect("it is in RAM");
        let answer = if one_in(u, 4) { any_buffer(u, 10) } else { Buffer { at: header + 32, len: 10 } };
        vec![(Buffer { at: header, len: 24 }, one_in(u, 32)), (answer, !one_in(u, 32))]
    }

    /// The machine lets the guest have more memory, or less.
    fn resize_memory(&self, u: &mut Unstructured) {
        let bytes = if one_in(u, 4) { number(u) } else { u64::from(byte(u)) * (BLOCK_SIZE / 2) };
        self.memory.request(bytes);
        let there = (0..PLUGGABLE.1 / BLOCK_SIZE)
            .filter(|block| !self.ram.is_unplugged(PLUGGABLE.0 + block * BLOCK_SIZE, BLOCK_SIZE))
            .count();
        assert_eq!(self.memory.plugged(), there as u64 * BLOCK_SIZE);
        assert!(self.memory.requested() <= PLUGGABLE.1);
    }

    /// The watchdog, unlocked or not; saved, restored and called at any time.
    fn watchdog(&self, u: &mut Unstructured) {
        let mut effects = Effects::default();
        let now = if one_in(u, 4) { number(u) } else { u64::from(byte(u)) << 22 };
        let mut access = Access { now, effects: &mut effects };
        let mut watchdog = lock(&self.watchdog);
        for _ in 0..byte(u) % 4 {
            match byte(u) % 6 {
                0 => watchdog.bar_write(&mut access, 0, 0x0c, &[0x80, 0]),
                1 => watchdog.bar_write(&mut access, 0, 0x0c, &[0x86, 0]),
                2 => watchdog.bar_write(&mut access, 0, number(u) % 20, &number(u).to_le_bytes()[..4]),
                3 => watchdog.config_write(&mut access, pick(u, &[0x60, 0x68]), number(u) as u32, byte(u)),
                4 => watchdog.held(&mut access),
                _ => drop(watchdog.tick(&mut access)),
            }
        }
        let state = watchdog.state();
        watchdog.restore(&mut access, &state);
        assert_eq!(watchdog.state(), state);
    }

    /// A packet of a connection.
    fn packet(&self, u: &mut Unstructured, header: u64) -> Vec<Part> {
        let len = u32::from(byte(u)) * pick(u, &[0, 1, 300]);
        Dma::new(&self.ram).write(header, &sockets::header(u, len)).expect("it is in RAM");
        vec![(Buffer { at: header, len: sockets::HEADER_LEN }, one_in(u, 32)), (any_buffer(u, len), false)]
    }

    /// Any bytes in rings, tables and headers.
    fn damage(&mut self, u: &mut Unstructured) {
        let at = match byte(u) % 4 {
            0 => HEADERS + u64::from(byte(u)) * 64,
            1 => RINGS[usize::from(byte(u)) % RINGS.len()] + 0xc000 + u64::from(byte(u)) * 2,
            2 => RINGS[usize::from(byte(u)) % RINGS.len()] + 0x4000 + number(u) % 0x1100,
            _ => RINGS[usize::from(byte(u)) % RINGS.len()] + number(u) % 0x1100,
        };
        let value = number(u).to_le_bytes();
        let width = pick(u, &[1, 2, 4, 8]);
        Dma::new(&self.ram).write(at, &value[..width]).expect("it is in RAM");
    }

    /// A handler takes a queue, and comes back later.
    fn lend(&mut self, u: &mut Unstructured, slot: usize) {
        let queue = u16::from(byte(u) % 3);
        let slot = &mut self.slots[slot];
        if let Some(work) = slot.registers.with(|device, _| device.begin(queue)) {
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
            works = queues.filter_map(|queue| slot.registers.with(|device, _| device.begin(queue))).collect();
        }
        for mut work in works {
            let result = slot.handlers[usize::from(work.index)].serve(&mut work, &Dma::new(&self.ram));
            slot.registers.with(|device, access| device.finish(access, work, result));
        }
    }

    /// Of the machine, of a device or of a queue.
    fn reset(&mut self, u: &mut Unstructured, slot: usize) {
        match byte(u) % 4 {
            0 => {
                (0..self.slots.len()).for_each(|slot| self.serve(slot));
                self.access(|host, access| host.reset(access));
                self.slots.iter_mut().for_each(|slot| slot.registers.reset());
            }
            1 => {
                let registers = &mut self.slots[slot].registers;
                registers.set(Register::Queue, u64::from(byte(u) % 3));
                registers.set(Register::Reset, 1);
            }
            2 => self.slots[slot].registers.set(Register::Enable, 0),
            _ => {
                let slot = &mut self.slots[slot];
                slot.registers.set(Register::Status, 0);
                let complete = slot.registers.get(Register::Status) == 0;
                assert_eq!(complete, slot.lent.is_empty(), "complete when no queue is lent");
            }
        }
    }

    fn save_and_restore(&mut self, slot: usize) {
        let slot = &mut self.slots[slot];
        assert_eq!(slot.registers.save_and_restore(), slot.lent.is_empty());
    }
}

/// A little RAM, some that can be plugged in, and a file.
fn memory(file: &Arc<std::fs::File>) -> GuestRam {
    let layout = Layout::of_ram(RAM)
        .and_then(|layout| layout.with_pluggable(PLUGGABLE.0, PLUGGABLE.1))
        .and_then(|layout| layout.with_file(PMEM.0, PMEM.1, file.clone(), false));
    GuestRam::with_layout(&layout.expect("they do not meet")).expect("a little RAM")
}

/// Data of `len` bytes; at times of any number, anywhere.
fn any_buffer(u: &mut Unstructured, len: u32) -> Buffer {
    let at = match byte(u) % 16 {
        0 | 1 => number(u),
        2 => PLUGGABLE.0 + u64::from(byte(u) % 71) * BLOCK_SIZE - 8,
        3 => PMEM.0 + PMEM.1 - u64::from(byte(u)),
        _ => 0x8_0000 + u64::from(byte(u)) * 0x700,
    };
    Buffer { at, len: if one_in(u, 8) { number(u) as u32 } else { len } }
}
