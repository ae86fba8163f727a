//! A driver's accesses at the board, down to the file of a disk.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ruse_devices::pci::ECAM_BASE;
use ruse_engine::{Bus, DoorbellTable, IoAddress};
use ruse_virtio::ring::RingError;
use ruse_virtio::ring::driver::Driver;
use ruse_virtio::{Buffer, Dma, Served, Work, features};

use super::*;
use crate::config::DiskConfig;
use crate::fake;
use crate::lifecycle::Phase;
use crate::report::Outcome;

const BAR: u64 = 0xc000_0000;
const HEADER: u64 = 0x4_0000;
const STATUS: u64 = 0x4_1000;
const DATA: u64 = 0x5_0000;
/// What a slow host may take for a request.
const PATIENCE: Duration = Duration::from_secs(60);

/// A board with one disk whose driver has started.
struct Bench {
    board: Arc<Board>,
    ram: GuestRam,
    file: tempfile::NamedTempFile,
    driver: Driver,
    /// The engine's doorbells.
    doorbells: Arc<DoorbellTable>,
    function: SharedTransport,
    disk: AttachedDisk,
    threads: Vec<JoinHandle<()>>,
}

impl Bench {
    fn new() -> Self {
        Self::with("queues=1", |disk| disk)
    }

    /// A board whose disk has these options, behind what `wrap` makes of it.
    fn with(
        options: &str,
        wrap: impl FnOnce(Arc<dyn ruse_block::Disk>) -> Arc<dyn ruse_block::Disk>,
    ) -> Self {
        Self::served_by(options, wrap, |handler| handler)
    }

    /// The same, where `change` says what serves each queue.
    fn served_by(
        options: &str,
        wrap: impl FnOnce(Arc<dyn ruse_block::Disk>) -> Arc<dyn ruse_block::Disk>,
        change: impl Fn(Box<dyn Handler>) -> Box<dyn Handler>,
    ) -> Self {
        let file = fake::image();
        let (board, doorbells) = fake::board(0, Some(fake::windows()));
        let ram = GuestRam::new(1 << 20).unwrap();
        let config: DiskConfig = format!("{},{options}", file.path().display()).parse().unwrap();
        let (config, disk) = OpenDisk::open_all(&[config], 1).unwrap().remove(0);
        let OpenDisk::File(disk) = disk else { panic!() };
        let disks = vec![(config, OpenDisk::File(wrap(disk)))];
        let (mut disks, servers) = AttachedDisk::plug_all(&board, &ram, |_| 16, 1, disks).unwrap();
        board.assign_pci();
        let function = servers[0].function.clone();
        let serve = |server: Server| server.with_handlers(&change).spawn().unwrap();
        let threads = servers.into_iter().map(serve).collect();
        let (driver, disk) = (Driver::new(0x1_0000, 8, 0), disks.remove(0));
        let bench = Self { board, ram, file, driver, doorbells, function, disk, threads };
        bench.start();
        bench
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.board.mmio_write(0, BAR + offset, data);
    }
    fn read(&self, offset: u64) -> u8 {
        let mut data = [0];
        self.board.mmio_read(0, BAR + offset, &mut data);
        data[0]
    }

    /// Enables memory of the function, and does what a driver does first.
    fn start(&self) {
        self.board.mmio_write(0, ECAM_BASE + (8 << 15) + 4, &[6, 0]);
        self.write(0x14, &[3]);
        self.write(0x08, &1u32.to_le_bytes());
        self.write(0x0c, &((features::VERSION_1 >> 32) as u32).to_le_bytes());
        self.write(0x14, &[11]);
        self.write(0x18, &self.driver.layout.size.to_le_bytes());
        self.write(0x20, &self.driver.layout.descriptors.to_le_bytes());
        self.write(0x28, &self.driver.layout.driver.to_le_bytes());
        self.write(0x30, &self.driver.layout.device.to_le_bytes());
        self.write(0x1c, &[1, 0]);
        self.write(0x14, &[15]);
        assert_eq!(self.read(0x14), 15);
    }

    /// Makes a request to write these bytes to the first sector, and notifies by way of the bus.
    fn send(&mut self, bytes: &[u8; 512]) {
        self.add(bytes);
        self.write(0x3000, &[0, 0]);
    }

    fn add(&mut self, bytes: &[u8; 512]) {
        let dma = Dma::new(&self.ram);
        dma.write(HEADER, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        dma.write(DATA, bytes).unwrap();
        let part = |at, len, write| (Buffer { at, len }, write);
        let parts = [part(HEADER, 16, false), part(DATA, 512, false), part(STATUS, 1, true)];
        self.driver.add(&dma, &parts, false).unwrap();
    }

    fn is_answered(&mut self, patience: Duration) -> bool {
        let limit = Instant::now() + patience;
        while Instant::now() < limit {
            if self.driver.take(&Dma::new(&self.ram)).is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    fn first_bytes(&self) -> u8 {
        std::fs::read(self.file.path()).unwrap()[0]
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.board.lifecycle.end(Outcome::Stopped);
        self.board.kick_all();
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

#[test]
fn a_request_reaches_the_file_and_its_answer_the_driver() {
    let mut bench = Bench::new();
    bench.send(&[7; 512]);
    assert!(bench.is_answered(PATIENCE));
    assert_eq!(bench.first_bytes(), 7);
    // The interrupt comes after the answer.
    let limit = Instant::now() + PATIENCE;
    while bench.read(0x1000) != 1 {
        assert!(Instant::now() < limit, "no interrupt");
    }
}

#[test]
fn the_engine_catches_notifications_wherever_the_range_is() {
    let mut bench = Bench::new();
    let mut reader = bench.doorbells.reader();
    let mut ring = |range: u64| reader.ring(IoAddress::Memory(range + 0x3000), &[0, 0]);
    bench.add(&[7; 512]);
    assert!(ring(BAR));
    assert!(bench.is_answered(PATIENCE));
    let elsewhere = BAR + 0x10_0000;
    bench.board.mmio_write(0, ECAM_BASE + (8 << 15) + 0x10, &(elsewhere as u32).to_le_bytes());
    bench.add(&[8; 512]);
    assert!(!ring(BAR) && ring(elsewhere));
    assert!(bench.is_answered(PATIENCE));
    bench.board.mmio_write(0, ECAM_BASE + (8 << 15) + 4, &[4, 0]);
    assert!(!ring(elsewhere), "memory is not enabled");
}

/// A disk whose storage is full until there is room.
struct FullDisk {
    disk: Arc<dyn ruse_block::Disk>,
    full: std::sync::atomic::AtomicBool,
}

impl ruse_block::Disk for FullDisk {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn refresh_size(&self) -> io::Result<u64> {
        self.disk.refresh_size()
    }
    fn read(&self, offset: u64, to: &[ruse_block::Slice]) -> io::Result<()> {
        self.disk.read(offset, to)
    }
    fn write(&self, offset: u64, from: &[ruse_block::Slice]) -> io::Result<()> {
        match self.full.load(std::sync::atomic::Ordering::SeqCst) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => self.disk.write(offset, from),
        }
    }
    fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.disk.write_zeroes(offset, len, unmap)
    }
}

#[test]
fn a_full_disk_pauses_the_machine_until_there_is_room() {
    let mut full = None;
    let mut bench = Bench::with("queues=1,on-error=pause", |disk| {
        let disk = Arc::new(FullDisk { disk, full: true.into() });
        full = Some(disk.clone());
        disk
    });
    bench.send(&[7; 512]);
    let limit = Instant::now() + PATIENCE;
    while bench.board.lifecycle.phase() != Phase::Paused {
        assert!(Instant::now() < limit, "it is not paused");
        std::thread::sleep(Duration::from_millis(1));
    }
    bench.board.gate.wait_empty();
    // Without room, it comes to nothing again.
    bench.board.lifecycle.resume();
    while bench.board.lifecycle.phase() != Phase::Paused {
        assert!(Instant::now() < limit, "it is not paused again");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!bench.is_answered(Duration::from_millis(20)));
    full.unwrap().full.store(false, std::sync::atomic::Ordering::SeqCst);
    bench.board.lifecycle.resume();
    assert!(bench.is_answered(PATIENCE));
    assert_eq!(bench.first_bytes(), 7);
}

#[test]
fn a_disk_with_limits_goes_on_when_it_may() {
    let mut bench = Bench::with("queues=1,iops=20", |disk| disk);
    let start = Instant::now();
    for n in 0..6 {
        bench.send(&[n; 512]);
        assert!(bench.is_answered(PATIENCE), "request {n}");
    }
    // Two or three at once, then one every 50 ms.
    assert!(start.elapsed() >= Duration::from_millis(120), "{:?}", start.elapsed());
}

#[test]
fn nothing_is_served_while_the_machine_is_held() {
    let mut bench = Bench::new();
    assert!(bench.board.lifecycle.pause());
    bench.board.gate.wait_empty();
    bench.send(&[8; 512]);
    assert!(!bench.is_answered(Duration::from_millis(100)));
    assert!(bench.board.lifecycle.resume());
    assert!(bench.is_answered(PATIENCE));
}

/// Gives chains to somebody outside, who answers nothing, until it is to answer them itself.
struct Lender {
    lent: Vec<ruse_virtio::Chain>,
    answers: Arc<std::sync::atomic::AtomicBool>,
}

impl Handler for Lender {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        while let Some(chain) = work.queue.pop(dma)? {
            match self.answers.load(std::sync::atomic::Ordering::SeqCst) {
                true => work.queue.push(dma, &chain, 0)?,
                false => self.lent.push(chain),
            }
        }
        Ok(Served { outside: !self.lent.is_empty(), ..Served::default() })
    }

    fn recall(&mut self, work: &mut Work, _dma: &Dma) -> Result<Served, RingError> {
        self.lent.drain(..).rev().for_each(|chain| work.queue.put_back(chain));
        Ok(Served::default())
    }
}

#[test]
fn a_device_of_a_held_machine_has_taken_back_what_was_outside_and_can_be_saved() {
    let answers = Arc::<std::sync::atomic::AtomicBool>::default();
    let lender = |_| Box::new(Lender { lent: Vec::new(), answers: answers.clone() }) as Box<dyn Handler>;
    let mut bench = Bench::served_by("queues=1", |disk| disk, lender);
    bench.send(&[7; 512]);
    let limit = Instant::now() + PATIENCE;
    while lock(&bench.function).core().state().is_some() {
        assert!(Instant::now() < limit, "nobody takes the request");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!bench.is_answered(Duration::from_millis(20)));
    assert!(lock(&bench.function).core().state().is_none(), "it is outside");
    bench.board.lifecycle.pause();
    bench.board.kick_all();
    bench.board.gate.wait_empty();
    assert!(lock(&bench.function).core().state().is_some());
    answers.store(true, std::sync::atomic::Ordering::SeqCst);
    bench.board.lifecycle.resume();
    assert!(bench.is_answered(PATIENCE));
}

#[test]
fn a_reset_of_the_machine_resets_the_device() {
    let mut bench = Bench::new();
    bench.send(&[9; 512]);
    assert!(bench.is_answered(PATIENCE));
    bench.board.lifecycle.reset(None);
    assert_eq!(bench.board.lifecycle.phase(), Phase::Resetting);
    bench.board.gate.wait_empty();
    bench.board.reset();
    assert_eq!(bench.read(0x14), 0xff, "memory is not enabled");
    bench.board.lifecycle.reset_done();
    bench.driver = Driver::new(0x1_0000, 8, 0);
    Dma::new(&bench.ram).write(0x1_0000, &[0; 0x8000]).unwrap();
    bench.start();
    bench.send(&[10; 512]);
    assert!(bench.is_answered(PATIENCE));
    assert_eq!(bench.first_bytes(), 10);
}

#[test]
fn the_guest_hears_of_a_disk_that_has_grown() {
    let bench = Bench::new();
    assert_eq!((bench.disk.refresh(&bench.board).unwrap().size, bench.read(0x1000)), (1 << 20, 0));
    bench.file.as_file().set_len(3 << 20).unwrap();
    assert_eq!(bench.disk.refresh(&bench.board).unwrap().size, 3 << 20);
    assert_eq!((bench.read(0x1000), bench.read(0x2001)), (2, 0x18), "sectors and an interrupt");
    assert_eq!(bench.read(0x15), 1, "another generation");
}
