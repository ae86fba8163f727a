//! Slots as a guest's hot-plug driver and whoever attaches devices see them.

use std::time::{Duration, Instant};

use ruse_devices::pci::ECAM_BASE;
use ruse_engine::Bus;
use ruse_loader::PciIntx;

use super::*;
use crate::fake;
use crate::lifecycle::Phase;
use crate::pci_slots::plug_root_ports;
use crate::report::Outcome;

/// The device in slot 1, and its root port.
const DEVICE: u64 = ECAM_BASE + (1 << 20);
const PORT: u64 = ECAM_BASE + (24 << 15);
const COMMAND: u64 = 4;
const ON: u16 = 1 << 8;
const BLINKS: u16 = 2 << 8;
const OFF: u16 = 3 << 8;
const BUTTON: u16 = 1;
const PRESENCE_CHANGED: u16 = 1 << 3;
const PRESENT: u16 = 1 << 6;
/// What a slow host may take for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// A board with slots, and files to make disks of.
struct Bench {
    board: Arc<Board>,
    slots: Arc<Slots>,
    keeper: Option<JoinHandle<()>>,
    files: [tempfile::NamedTempFile; 2],
}

impl Bench {
    fn new(slots: u8) -> Self {
        let (board, _) = fake::board(0, Some(fake::windows()));
        let ports = plug_root_ports(&board, PciIntx::Gsi16To23, slots).unwrap();
        let ram = GuestRam::new(1 << 20).unwrap();
        let slots = Slots::new(&board, &ram, "m", 1, ports).unwrap();
        board.assign_pci();
        let keeper = Some(SlotKeeper(slots.clone()).spawn().unwrap());
        Self { board, slots, keeper, files: [fake::image(), fake::image()] }
    }

    /// Attaches the disk of a file.
    fn attach(&self, file: usize) -> Result<String, AttachError> {
        self.slots.attach(disk(self.files[file].path().to_str().unwrap()))
    }

    fn ids(&self) -> Vec<String> {
        self.slots.refresh_disks().unwrap().into_iter().map(|disk| disk.id).collect()
    }

    fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.board.mmio_read(0, address, &mut data);
        data
    }

    /// Where the root port has its slot registers: in its first capability.
    fn slot_control(&self) -> u64 {
        let [capability] = self.read(PORT + 0x34);
        PORT + u64::from(capability) + 0x18
    }

    fn slot_status(&self) -> u16 {
        u16::from_le_bytes(self.read(self.slot_control() + 2))
    }

    /// Clears the slot's events.
    fn clear_events(&self) {
        self.board.mmio_write(0, self.slot_control() + 2, &0x1ff_u16.to_le_bytes());
    }

    fn set_indicator(&self, indicator: u16) {
        self.board.mmio_write(0, self.slot_control(), &indicator.to_le_bytes());
    }

    #[track_caller]
    fn wait_until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let limit = Instant::now() + PATIENCE;
        while !holds(self) {
            assert!(Instant::now() < limit, "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.board.lifecycle.end(Outcome::Stopped);
        self.board.kick_all();
        self.keeper.take().unwrap().join().unwrap();
    }
}

fn disk(words: &str) -> DeviceConfig {
    DeviceConfig::Disk(words.parse().unwrap())
}

#[test]
fn a_device_leaves_when_the_guest_that_was_asked_lets_go_of_it() {
    let bench = Bench::new(1);
    assert_eq!(bench.attach(0).unwrap(), "slot1");
    assert_eq!(bench.slot_status() & (PRESENT | PRESENCE_CHANGED), PRESENT | PRESENCE_CHANGED);
    bench.clear_events();
    // The guest has begun to use it and cannot be asked yet.
    bench.set_indicator(BLINKS);
    bench.slots.detach("slot1", false).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((bench.slot_status(), bench.ids()), (PRESENT, vec!["slot1".into()]));
    bench.set_indicator(ON);
    bench.wait_until("the button is pressed", |bench| bench.slot_status() & BUTTON != 0);
    bench.clear_events();
    bench.set_indicator(BLINKS);
    bench.set_indicator(ON);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(bench.slot_status() & BUTTON, 0, "the guest has refused, and is not asked again by itself");
    bench.slots.detach("slot1", false).unwrap();
    bench.wait_until("the button is pressed again", |bench| bench.slot_status() & BUTTON != 0);
    bench.set_indicator(OFF);
    bench.wait_until("it is gone", |bench| bench.ids().is_empty());
    assert_eq!(bench.slot_status() & PRESENT, 0);
    assert_eq!(bench.read(DEVICE), [0xff; 4]);
    assert_eq!(bench.attach(0).unwrap(), "slot1", "the file is free");
}

#[test]
fn by_force_a_device_leaves_at_once_and_reads_as_zeros() {
    let bench = Bench::new(1);
    bench.attach(0).unwrap();
    bench.set_indicator(ON);
    bench.clear_events();
    // As a system enables it: the port's window, and the device's first range in it.
    bench.board.mmio_write(0, PORT + 0x20, &[0x00, 0xd0, 0x00, 0xd0]);
    bench.board.mmio_write(0, PORT + COMMAND, &[6, 0]);
    bench.board.mmio_write(0, DEVICE + 0x10, &0xd000_0000u32.to_le_bytes());
    bench.board.mmio_write(0, DEVICE + COMMAND, &[6, 0]);
    bench.board.mmio_write(0, 0xd000_0014, &[3]);
    assert_eq!(bench.read(0xd000_0014), [3], "the status");
    bench.slots.detach("slot1", true).unwrap();
    bench.wait_until("it is gone", |bench| bench.ids().is_empty());
    assert_eq!(bench.slot_status() & (PRESENT | PRESENCE_CHANGED | BUTTON), PRESENCE_CHANGED);
    assert_eq!((bench.read(DEVICE), bench.read(0xd000_0014)), ([0xff; 4], [0]));
    assert_eq!(bench.attach(1).unwrap(), "slot1");
    assert_eq!(bench.read(0xd000_0014), [0], "the next one does not answer there yet");
}

#[test]
fn a_device_of_a_machine_that_is_held_can_be_torn_out() {
    let bench = Bench::new(1);
    bench.attach(0).unwrap();
    bench.set_indicator(ON);
    assert!(bench.board.lifecycle.pause());
    bench.board.gate.wait_empty();
    // Who serves it waits for the machine to go on.
    bench.board.bells.ring_all();
    std::thread::sleep(Duration::from_millis(20));
    bench.slots.detach("slot1", true).unwrap();
    bench.wait_until("it is gone", |bench| bench.ids().is_empty());
    assert_eq!(bench.board.lifecycle.phase(), Phase::Paused);
    assert_eq!(bench.attach(0).unwrap(), "slot1", "the file is free");
}

#[test]
fn a_reset_leaves_a_device_in_its_slot() {
    let bench = Bench::new(1);
    bench.attach(0).unwrap();
    bench.set_indicator(ON);
    bench.slots.detach("slot1", false).unwrap();
    bench.wait_until("the button is pressed", |bench| bench.slot_status() & BUTTON != 0);
    bench.board.lifecycle.reset(None);
    bench.board.gate.wait_empty();
    bench.board.reset();
    bench.board.lifecycle.reset_done();
    assert_eq!((bench.slot_status(), bench.ids()), (PRESENT, vec!["slot1".into()]));
    assert_eq!(bench.read(DEVICE), [0xf4, 0x1a, 0x42, 0x10]);
    let [low, high] = bench.read(bench.slot_control());
    assert_eq!(u16::from_le_bytes([low, high]) & OFF, ON, "the next system knows of no question");
    bench.slots.detach("slot1", false).unwrap();
    bench.wait_until("it is asked", |bench| bench.slot_status() & BUTTON != 0);
}

#[test]
fn what_cannot_be_attached_leaves_its_slot_free() {
    let bench = Bench::new(2);
    let error = |result: Result<String, AttachError>| result.unwrap_err().to_string();
    assert!(error(bench.slots.attach(disk("/no/such/disk"))).contains("No such file"));
    assert!(error(bench.slots.attach(disk("vhost-user=/no/such/socket"))).contains("/no/such/socket"));
    let net = DeviceConfig::Net("vhost-user=/no/such/socket".parse::<crate::NetOption>().unwrap().0.unwrap());
    assert!(error(bench.slots.attach(net)).contains("/no/such/socket"));
    assert_eq!(bench.attach(0).unwrap(), "slot1");
    assert!(error(bench.attach(0)).contains("in use"), "one file, two disks");
    assert_eq!(bench.attach(1).unwrap(), "slot2");
    let third = tempfile::NamedTempFile::new().unwrap();
    third.as_file().set_len(4096).unwrap();
    let path = third.path().to_str().unwrap();
    assert!(error(bench.slots.attach(disk(path))).contains("no slot is free: the machine has 2"));
    for id in
        ["", "slot", "slot0", "slot3", "slot01", "slot1 ", "SLOT1", "slot1\n", "disk0", "../slot1", "slot-1"]
    {
        assert_eq!(bench.slots.detach(id, true), Err(DetachError(id.into())));
    }
    assert_eq!(bench.ids(), ["slot1", "slot2"]);
}
