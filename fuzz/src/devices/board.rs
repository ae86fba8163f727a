//! All devices on one board, as the machine has them, without threads and with a clock that the input moves.

use std::sync::LazyLock;

use ruse_devices::bus::AddressMap;
use ruse_devices::debug_exit::{DEBUG_EXIT_PORT, DebugExit};
use ruse_devices::fabric::Msi;
use ruse_devices::i8042::{I8042, I8042_COMMAND_PORT, I8042_DATA_PORT, PORT_92, Port92};
use ruse_devices::interrupts::{Interrupts, SignalKind};
use ruse_devices::pci::{CONFIG_ADDRESS_PORT, ECAM_BASE, PciHost, PciWindows};
use ruse_devices::pit::{self, Pit};
use ruse_devices::pm::{PM_BASE, Pm};
use ruse_devices::post::{POST_PORT, Post};
use ruse_devices::rtc::{RTC_PORT, Rtc, RtcConfig};
use ruse_devices::serial::{COM_IRQS, COM_PORTS, Serial};
use ruse_devices::{Access, Device, Effects, ioapic, lapic, pic};

/// How often a timer may have to be called until it is due in the future only.
const MOST_TICKS: u32 = 2;
/// The lines that devices drive.
const LINES: usize = 24;
/// Bytes that a serial port may hold back for the host.
const MOST_OUTPUT: usize = 4096;

#[derive(Clone, Copy)]
enum Target {
    Device(usize),
    Pic,
    IoApic,
}

/// The devices in the order of their numbers; the serial ports are the first four.
const PM: usize = 8;
const COUNT: usize = 12;

/// The board.
pub(super) struct Board {
    now: u64,
    serial: [Serial; 4],
    pit: Pit,
    rtc: Rtc,
    i8042: I8042,
    port_92: Port92,
    pm: Pm,
    pci: PciHost,
    post: Post,
    debug_exit: DebugExit,
    chips: Interrupts,
    /// For each line, the devices that hold it high.
    lines: [u32; LINES],
    cpus: u32,
}

/// What answers at which port.
static PORTS: LazyLock<AddressMap<Target>> = LazyLock::new(ports);
/// What answers at which address.
static MEMORY: LazyLock<AddressMap<Target>> = LazyLock::new(memory);
/// Buses that the memory-mapped configuration space covers.
const ECAM_BUSES: u16 = 256;

impl Board {
    /// A board after power-up, of `cpus` CPUs or for an engine that has the local APICs itself.
    pub(super) fn new(cpus: Option<u32>) -> Self {
        let mut chips = match cpus {
            Some(cpus) => Interrupts::new(cpus, 2_000_000_000),
            None => Interrupts::with_external_lapics(),
        };
        chips.virtual_wire();
        Self {
            now: 0,
            serial: COM_IRQS.map(Serial::new),
            pit: Pit::new(),
            rtc: Rtc::new(RtcConfig::default()),
            i8042: I8042::new(),
            port_92: Port92::new(),
            pm: Pm::new(),
            pci: PciHost::new(ECAM_BUSES, PciWindows { ports: 0x1000..=0xffff, memory: Vec::new() }),
            post: Post::new(),
            debug_exit: DebugExit::new(),
            chips,
            lines: [0; LINES],
            cpus: cpus.unwrap_or(1),
        }
    }

    pub(super) fn cpus(&self) -> u32 {
        self.cpus
    }

    fn device(&mut self, number: usize) -> &mut dyn Device {
        match number {
            0..4 => &mut self.serial[number],
            4 => &mut self.pit,
            5 => &mut self.rtc,
            6 => &mut self.i8042,
            7 => &mut self.port_92,
            PM => &mut self.pm,
            9 => &mut self.pci,
            10 => &mut self.post,
            _ => &mut self.debug_exit,
        }
    }

    /// Calls a device and carries out its effects.
    fn access(&mut self, number: usize, call: impl FnOnce(&mut dyn Device, &mut Access)) {
        let mut effects = Effects::default();
        let now = self.now;
        call(self.device(number), &mut Access { now, effects: &mut effects });
        self.settle(number, effects);
    }

    fn settle(&mut self, number: usize, effects: Effects) {
        for (gsi, level) in effects.lines {
            let drivers = self.lines.get_mut(usize::from(gsi)).expect("devices drive lines that exist");
            *drivers = if level { *drivers | 1 << number } else { *drivers & !(1 << number) };
            let level = *drivers != 0;
            self.interrupts(|chips, _| chips.set_line(gsi, level));
        }
        // What a guest asks for by its power registers is the machine's matter.
    }

    /// Calls the interrupt chips, and tells CPUs what they signal.
    pub(super) fn interrupts<R>(&mut self, call: impl FnOnce(&mut Interrupts, u64) -> R) -> R {
        let result = call(&mut self.chips, self.now);
        for signal in self.chips.take_signals() {
            assert!(signal.cpu < self.cpus);
            if signal.kind == SignalKind::Init {
                self.chips.init_cpu(signal.cpu);
            }
        }
        for message in self.chips.take_messages() {
            assert_eq!(message.address >> 20, Msi::ADDRESS >> 20, "{message:x?}");
        }
        result
    }

    /// A port that some device has.
    pub(super) fn some_port(choice: usize) -> u16 {
        let count = PORTS.iter().map(|(first, last, _)| last - first + 1).sum::<u64>();
        let mut left = choice as u64 % count;
        for (first, last, _) in PORTS.iter() {
            let len = last - first + 1;
            if left < len {
                return (first + left) as u16;
            }
            left -= len;
        }
        unreachable!("the choice is below the number of ports")
    }

    /// An address in a range that some device has, or a little outside.
    pub(super) fn some_memory(choice: usize, offset: u64) -> u64 {
        let ranges: Vec<_> = MEMORY.iter().map(|(first, last, _)| (first, last - first + 1)).collect();
        let (first, len) = ranges[choice % ranges.len()];
        first.wrapping_add(offset % (len + 16)).wrapping_sub(8)
    }

    pub(super) fn lapic_page(&self, cpu: u32) -> Option<u64> {
        self.chips.cpu_line(cpu)?.apic_page()
    }

    pub(super) fn port_read(&mut self, port: u16, data: &mut [u8]) {
        PORTS.read(port.into(), data, |&target, offset, bytes| self.read(target, offset, bytes));
    }

    pub(super) fn port_write(&mut self, port: u16, data: &[u8]) {
        PORTS.write(port.into(), data, |&target, offset, bytes| {
            self.write(target, offset, bytes);
        });
    }

    pub(super) fn memory_read(&mut self, cpu: u32, address: u64, data: &mut [u8]) {
        match self.lapic_offset(cpu, address) {
            Some(offset) => self.interrupts(|chips, now| chips.lapic_read(cpu, offset, data, now)),
            None => MEMORY.read(address, data, |&target, offset, bytes| self.read(target, offset, bytes)),
        }
    }

    pub(super) fn memory_write(&mut self, cpu: u32, address: u64, data: &[u8]) {
        match self.lapic_offset(cpu, address) {
            Some(offset) => self.interrupts(|chips, now| chips.lapic_write(cpu, offset, data, now)),
            None => MEMORY.write(address, data, |&target, offset, bytes| self.write(target, offset, bytes)),
        }
    }

    fn lapic_offset(&self, cpu: u32, address: u64) -> Option<u64> {
        address.checked_sub(self.lapic_page(cpu)?).filter(|&offset| offset < lapic::PAGE_SIZE)
    }

    fn read(&mut self, target: Target, offset: u64, bytes: &mut [u8]) {
        match target {
            Target::Device(n) => self.access(n, |device, access| device.read(access, offset, bytes)),
            Target::Pic => bytes[0] = self.interrupts(|chips, _| chips.pic_read(offset as u16)),
            Target::IoApic => self.interrupts(|chips, _| chips.ioapic_read(offset, bytes)),
        }
    }

    fn write(&mut self, target: Target, offset: u64, bytes: &[u8]) {
        match target {
            Target::Device(n) => self.access(n, |device, access| device.write(access, offset, bytes)),
            Target::Pic => self.interrupts(|chips, _| chips.pic_write(offset as u16, bytes[0])),
            Target::IoApic => self.interrupts(|chips, _| chips.ioapic_write(offset, bytes)),
        }
    }

    /// An interrupt is there to be taken exactly when the CPU is told so.
    pub(super) fn acknowledge(&mut self, cpu: u32) {
        let pending = self.chips.pending(cpu);
        let vector = self.interrupts(|chips, _| chips.acknowledge(cpu));
        assert_eq!(vector.is_some(), pending, "{vector:?}");
    }

    /// Bytes arrive at a serial port.
    pub(super) fn receive(&mut self, port: usize, bytes: &[u8]) {
        let mut effects = Effects::default();
        let mut access = Access { now: self.now, effects: &mut effects };
        let space = self.serial[port].input_space();
        let taken = self.serial[port].queue_input(&mut access, bytes);
        assert_eq!(taken, space.min(bytes.len()));
        self.settle(port, effects);
    }

    pub(super) fn take_output(&mut self, port: usize) {
        let mut effects = Effects::default();
        let mut access = Access { now: self.now, effects: &mut effects };
        assert!(self.serial[port].take_output(&mut access).len() <= MOST_OUTPUT);
        self.settle(port, effects);
    }

    pub(super) fn press_power_button(&mut self) {
        let mut effects = Effects::default();
        self.pm.press_power_button(&mut Access { now: self.now, effects: &mut effects });
        self.settle(PM, effects);
    }

    pub(super) fn reset(&mut self) {
        for number in 0..COUNT {
            self.access(number, |device, access| device.reset(access));
        }
        assert_eq!(self.lines, [0; LINES], "nobody drives a line after a reset");
        self.interrupts(|chips, _| {
            chips.reset();
            chips.virtual_wire();
        });
    }

    /// The state of the interrupt chips is what they are.
    pub(super) fn save_and_restore(&mut self) {
        let saved = self.chips.state(self.now);
        self.chips.restore(&saved).expect("a saved state");
        assert_eq!(self.chips.state(self.now), saved);
        self.interrupts(|_, _| ());
    }

    /// Lets time pass, and then calls whose time has come.
    pub(super) fn advance(&mut self, by: u64) {
        self.now = self.now.saturating_add(by);
        for number in 0..COUNT {
            let mut ticks = 0;
            while self.device(number).deadline().is_some_and(|at| at <= self.now) && self.now < u64::MAX {
                self.access(number, |device, access| device.tick(access));
                ticks += 1;
                assert!(
                    ticks <= MOST_TICKS,
                    "device {number} is due at {:?}",
                    self.device(number).deadline()
                );
            }
        }
        let mut ticks = 0;
        while self.chips.deadline().is_some_and(|at| at <= self.now) && self.now < u64::MAX {
            self.interrupts(|chips, now| chips.tick(now));
            ticks += 1;
            assert!(ticks <= MOST_TICKS, "a local APIC is due at {:?}", self.chips.deadline());
        }
    }

    /// Lets time pass up to the next deadline.
    pub(super) fn advance_to_deadline(&mut self) {
        let devices = (0..COUNT).filter_map(|number| self.device(number).deadline()).min();
        let next = devices.into_iter().chain(self.chips.deadline()).min();
        self.advance(next.unwrap_or(0).saturating_sub(self.now));
    }

    /// What must always hold.
    pub(super) fn check(&self) {
        for cpu in 0..self.cpus {
            let line = self.chips.cpu_line(cpu).expect("a CPU has a line");
            assert_eq!(line.pending(), self.chips.pending(cpu), "CPU {cpu}");
        }
    }
}

fn ports() -> AddressMap<Target> {
    let mut map = AddressMap::ports();
    for (number, port) in COM_PORTS.into_iter().enumerate() {
        map.insert(port.into(), Serial::LEN, Target::Device(number), 0).expect("free");
    }
    let speaker = u64::from(pit::PORT_SPEAKER - pit::PORT);
    for (port, len, number, offset) in [
        (pit::PORT, u64::from(pit::PORTS), 4, 0),
        (pit::PORT_SPEAKER, 1, 4, speaker),
        (RTC_PORT, Rtc::LEN, 5, 0),
        (I8042_DATA_PORT, 1, 6, 0),
        (I8042_COMMAND_PORT, 1, 6, I8042::COMMAND),
        (PORT_92, Port92::LEN, 7, 0),
        (PM_BASE, Pm::LEN, PM, 0),
        (CONFIG_ADDRESS_PORT, PciHost::LEN, 9, 0),
        (POST_PORT, Post::LEN, 10, 0),
        (DEBUG_EXIT_PORT, DebugExit::LEN, 11, 0),
    ] {
        map.insert(port.into(), len, Target::Device(number), offset).expect("free");
    }
    for port in pic::PORTS {
        map.insert(port.into(), 1, Target::Pic, port.into()).expect("free");
    }
    map
}

fn memory() -> AddressMap<Target> {
    let mut map = AddressMap::memory();
    map.insert(ioapic::BASE, ioapic::SIZE, Target::IoApic, 0).expect("free");
    let len = u64::from(ECAM_BUSES) << 20;
    map.insert(ECAM_BASE, len, Target::Device(9), PciHost::ECAM).expect("free");
    map
}
