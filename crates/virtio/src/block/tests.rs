//! Requests as drivers make them, and as none may.

use ruse_block::RawDisk;
use ruse_memory::GuestRam;

use super::*;
use crate::chain::Buffer;
use crate::features::{EVENT_IDX, INDIRECT_DESC, RING_PACKED};
use crate::ring::Queue;
use crate::ring::driver::Driver;

const HEADER: u64 = 0x4_0000;
const STATUS: u64 = 0x4_1000;
const DATA: u64 = 0x5_0000;
const SIZE: u64 = 1 << 20;

/// A disk in a file, and a driver of its queue.
struct Bench {
    file: tempfile::NamedTempFile,
    ram: GuestRam,
    driver: Driver,
    work: Work,
    block: Block,
    handler: BlockHandler,
}

impl Bench {
    fn new(features: u64, read_only: bool) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        // The bytes behind the last whole sector are none of the disk's.
        file.as_file().set_len(SIZE + 100).unwrap();
        let disk = Arc::new(RawDisk::open(file.path(), read_only).unwrap());
        let block = Block::new(disk, "serial-number-of-more-bytes", 2);
        let driver = Driver::new(0x1_0000, 16, features);
        let queue = Queue::new(driver.layout, features).unwrap();
        let (handler, ram) = (block.handler(), GuestRam::new(1 << 20).unwrap());
        Self { file, ram, driver, work: Work { index: 0, features, resets: 0, queue }, block, handler }
    }

    /// Makes a request with data of this length and gives its answer and the bytes written.
    fn request(&mut self, kind: u32, sector: u64, data: u32, device_writes: bool) -> (u8, u32) {
        let dma = Dma::new(&self.ram);
        let header = [
            kind.to_le_bytes(),
            [0; 4],
            (sector as u32).to_le_bytes(),
            ((sector >> 32) as u32).to_le_bytes(),
        ];
        dma.write(HEADER, &header.concat()).unwrap();
        dma.write(STATUS, &[0xee]).unwrap();
        let part = |at, len, write| (Buffer { at, len }, write);
        let mut parts = vec![part(HEADER, 16, false), part(DATA, data, device_writes), part(STATUS, 1, true)];
        if data == 0 {
            parts.remove(1);
        }
        self.driver.add(&dma, &parts, self.work.features & INDIRECT_DESC != 0).unwrap();
        self.handler.serve(&mut self.work, &dma).unwrap();
        let (_, written) = self.driver.take(&dma).unwrap();
        let mut status = [0];
        dma.read(STATUS, &mut status).unwrap();
        (status[0], written)
    }

    fn put(&self, bytes: &[u8]) {
        Dma::new(&self.ram).write(DATA, bytes).unwrap();
    }
    fn get<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        Dma::new(&self.ram).read(DATA, &mut bytes).unwrap();
        bytes
    }
    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        self.put(&[sector.to_le_bytes().as_slice(), &sectors.to_le_bytes(), &flags.to_le_bytes()].concat());
        self.request(kind, 0, 16, false).0
    }
}

const ALL: [u64; 4] =
    [0, feature::FLUSH | EVENT_IDX, feature::FLUSH | RING_PACKED | INDIRECT_DESC, INDIRECT_DESC | EVENT_IDX];

#[test]
fn what_is_written_is_in_the_file_and_is_read() {
    for features in ALL {
        let mut bench = Bench::new(features, false);
        for sector in [0, 7, SIZE / SECTOR - 4] {
            let bytes: Vec<u8> = (0..2048u64).map(|n| (n * 3 + sector) as u8).collect();
            bench.put(&bytes);
            assert_eq!(bench.request(1, sector, 2048, false), (0, 1), "{features:#x}");
            let at = (sector * SECTOR) as usize;
            assert_eq!(std::fs::read(bench.file.path()).unwrap()[at..at + 2048], bytes);
            bench.put(&[0; 2048]);
            assert_eq!(bench.request(0, sector, 2048, true), (0, 2049));
            assert_eq!(bench.get::<2048>()[..], bytes);
        }
        assert_eq!(bench.request(4, 0, 0, false), (0, 1), "flush");
    }
}

#[test]
fn what_is_read_shows_as_written_memory() {
    let mut bench = Bench::new(0, false);
    let (tracker, offset) =
        bench.ram.tracker(DATA).map(|(tracker, offset)| (tracker.clone(), offset)).unwrap();
    tracker.take_dirty(offset);
    bench.request(0, 0, 512, true);
    assert!(tracker.take_dirty(offset));
}

#[test]
fn nothing_beyond_the_disk_is_reached() {
    let mut bench = Bench::new(0, false);
    let last = SIZE / SECTOR;
    for (sector, len) in [(last, 512), (last - 1, 1024), (u64::MAX, 512), (1 << 55, 512), (0, 100), (0, 513)]
    {
        for kind in [0, 1] {
            // Without data that the device writes, the answer is all of what it writes.
            assert_eq!(bench.request(kind, sector, len, kind == 0), (1, kind), "{len} bytes at {sector}");
        }
    }
    assert_eq!(bench.file.as_file().metadata().unwrap().len(), SIZE + 100);
    for kind in [11, 13] {
        assert_eq!(bench.range(kind, last - 1, 2, 0), 1);
        assert_eq!(bench.range(kind, 0, MOST_SECTORS + 1, 0), 1);
    }
}

#[test]
fn ranges_are_zeroed_and_discarded() {
    let mut bench = Bench::new(0, false);
    for (kind, flags) in [(13, 0), (13, 1), (11, 0)] {
        bench.put(&[7; 2048]);
        bench.request(1, 8, 2048, false);
        assert_eq!(bench.range(kind, 9, 2, flags), 0);
        let bytes = std::fs::read(bench.file.path()).unwrap();
        let sums =
            [8, 9, 10, 11].map(|n| bytes[n * 512..(n + 1) * 512].iter().map(|&b| u32::from(b)).sum::<u32>());
        assert_eq!(sums, [3584, 0, 0, 3584], "{kind}");
    }
    assert_eq!(bench.range(11, 9, 2, 1), 2, "a discard has no flag");
    assert_eq!(bench.range(13, 9, 2, 2), 2, "an unknown flag");
    assert_eq!(bench.request(13, 0, 24, false).0, 1, "one range and a half");
    assert_eq!(bench.request(13, 0, 16 * 17, false).0, 1, "too many ranges");
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let mut bench = Bench::new(0, true);
    assert_eq!(
        bench.block.features() & (feature::RO | feature::DISCARD | feature::WRITE_ZEROES),
        feature::RO
    );
    assert_eq!(bench.request(0, 0, 512, true), (0, 513));
    assert_eq!(bench.request(1, 0, 512, false), (1, 1));
    assert_eq!((bench.range(11, 0, 1, 0), bench.range(13, 0, 1, 0)), (1, 1));
}

#[test]
fn a_disk_says_who_it_is() {
    let mut bench = Bench::new(0, false);
    assert_eq!(bench.request(8, 0, 20, true), (0, 21));
    assert_eq!(&bench.get::<20>(), b"serial-number-of-mor");
    assert_eq!(bench.request(99, 0, 0, false), (2, 1), "an unknown request");
    let config = bench.block.config();
    assert_eq!(config[..8], (SIZE / SECTOR).to_le_bytes());
    assert_eq!((config[12], config[34], bench.block.features() & feature::MQ != 0), (254, 2, true));
    bench.file.as_file().set_len(2 * SIZE).unwrap();
    assert_eq!(bench.block.config()[..8], (SIZE / SECTOR).to_le_bytes());
    bench.block.disk.refresh_size().unwrap();
    assert_eq!(bench.block.config()[..8], (2 * SIZE / SECTOR).to_le_bytes());
}

#[test]
fn requests_that_no_answer_can_be_given_to_break_the_queue() {
    let one = |at, len, write| (Buffer { at, len }, write);
    for parts in [
        vec![one(HEADER, 16, false)],
        vec![one(HEADER, 16, false), one(STATUS, 0, true)],
        vec![one(HEADER, 16, false), one(0xfee0_0000, 1, true)],
        vec![one(HEADER, 16, false), one(0x2000_0000, 512, true), one(STATUS, 1, true)],
    ] {
        let mut bench = Bench::new(0, false);
        let dma = Dma::new(&bench.ram);
        bench.driver.add(&dma, &parts, false).unwrap();
        assert!(bench.handler.serve(&mut bench.work, &dma).is_err(), "{parts:x?}");
    }
    let mut bench = Bench::new(0, false);
    let dma = Dma::new(&bench.ram);
    bench.driver.add(&dma, &[one(HEADER, 9, false), one(STATUS, 1, true)], false).unwrap();
    bench.handler.serve(&mut bench.work, &dma).unwrap();
    assert_eq!(dma.load(STATUS).unwrap() & 0xff, 1, "half a header");
}
