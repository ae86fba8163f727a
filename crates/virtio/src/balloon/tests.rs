//! A driver that gives pages, takes them back and tells of its memory.

use std::time::Duration;

use ruse_memory::GuestRam;

use super::*;
use crate::chain::Buffer;
use crate::ring::Queue;
use crate::ring::driver::Driver;

const LIST: u64 = 0x4_0000;
const RAM: u64 = 4 << 20;

struct Bench {
    ram: GuestRam,
    driver: Driver,
    work: Work,
    handlers: Vec<Box<dyn Handler>>,
    balloon: Balloon,
    control: BalloonControl,
}

impl Bench {
    fn new() -> Self {
        let driver = Driver::new(0x1_0000, 8, 0);
        let queue = Queue::new(driver.layout, 0).unwrap();
        let (balloon, handlers) = Balloon::new(3 << 20).unwrap();
        let control = balloon.control();
        let work = Work { index: 0, features: feature::STATISTICS, resets: 0, queue };
        let bench = Self { ram: GuestRam::new(RAM).unwrap(), driver, work, handlers, balloon, control };
        Dma::new(&bench.ram).write(1 << 20, &vec![7; 2 << 20]).unwrap();
        bench
    }

    fn send(&mut self, handler: usize, parts: &[(Buffer, bool)]) -> Result<Served, RingError> {
        let dma = Dma::new(&self.ram);
        self.driver.add(&dma, parts, false).unwrap();
        self.handlers[handler].serve(&mut self.work, &dma)
    }

    fn list(&mut self, handler: usize, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        Dma::new(&self.ram).write(LIST, &bytes).unwrap();
        self.send(handler, &[(Buffer { at: LIST, len: bytes.len() as u32 }, false)]).unwrap();
        assert!(self.driver.take(&Dma::new(&self.ram)).is_some());
    }

    /// Pages from 1 MiB on that still have their content.
    fn left(&self) -> Vec<u64> {
        let full = |page: &u64| {
            let mut bytes = vec![0; 4096];
            Dma::new(&self.ram).read((256 + page) * PAGE_SIZE, &mut bytes).unwrap();
            assert!(bytes == [0; 4096] || bytes == [7; 4096]);
            bytes[0] == 7
        };
        (0..512).filter(full).collect()
    }
}

#[test]
fn pages_that_are_given_lose_their_content_and_no_others() {
    let mut bench = Bench::new();
    bench.list(0, &[258, 257, 257, 300, u32::MAX, 1024, 767]);
    let expected: Vec<_> = (0..512).filter(|page| ![1, 2, 44, 511].contains(page)).collect();
    assert_eq!(bench.left(), expected);
    bench.list(1, &[258, 300]);
    assert_eq!(bench.left(), expected, "they are there again, and empty");
    assert_eq!(runs(vec![5, 4, 9, 6, u32::MAX, 5]), [(4, 3), (9, 1), (u32::MAX, 1)]);
    let long = (Buffer { at: 0, len: 64 << 10 }, false);
    assert!(bench.send(0, &[long, long]).is_err(), "a list that is too long");
}

#[test]
fn pages_that_are_not_used_are_given_back_in_whole() {
    let mut bench = Bench::new();
    let part = |at, len| (Buffer { at, len }, true);
    let parts = [
        part(1 << 20, 0x4000),
        part((1 << 20) + 0x8001, 0x1fff),
        part((1 << 20) + 0x20_0000 - 0x1000, 0x20_0000),
        part(u64::MAX - 5, 0x3000),
    ];
    bench.send(3, &parts).unwrap();
    let expected: Vec<_> = (4..512).filter(|page| *page != 9).collect();
    assert_eq!(bench.left(), expected);
}

#[test]
fn pages_that_are_not_used_may_come_where_a_driver_counts_its_queues_to() {
    for (features, queue) in [(0, 2), (feature::STATISTICS, 3), (feature::STATISTICS, 4), (0, 4)] {
        let mut bench = Bench::new();
        bench.work.features = features | feature::REPORTING;
        bench.send(queue, &[(Buffer { at: 1 << 20, len: 2 << 20 }, true)]).unwrap();
        assert!(bench.left().is_empty(), "queue {queue}");
        assert!(bench.driver.take(&Dma::new(&bench.ram)).is_some(), "queue {queue}");
    }
    let mut bench = Bench::new();
    bench.send(2, &[(Buffer { at: 1 << 20, len: 2 << 20 }, true)]).unwrap();
    assert_eq!(bench.left().len(), 512, "statistics are no pages");
}

#[test]
fn sizes_are_told_in_the_configuration() {
    let mut bench = Bench::new();
    assert_eq!(bench.balloon.config(), [0, 3, 0, 0, 0, 0, 0, 0]);
    assert!(bench.control.set_target(1 << 20) && !bench.control.set_target(1 << 20));
    bench.balloon.write_config(4, &[0, 1, 0, 0]);
    bench.balloon.write_config(0, &[9, 9, 9, 9]);
    bench.balloon.write_config(5, &[9]);
    assert_eq!(bench.balloon.config(), [0, 1, 0, 0, 0, 1, 0, 0]);
    assert_eq!((bench.control.target(), bench.control.actual()), (1 << 20, 1 << 20));
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let mut bench = Bench::new();
    let value = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let buffer = |len| [(Buffer { at: LIST, len }, false)];
    let source = bench.control.statistics.clone();
    let told = |values: &[(&str, u64)]| -> Statistics {
        values.iter().map(|(name, value)| (name.to_string(), *value)).collect()
    };
    assert!(source.ask(Duration::ZERO).is_empty());
    Dma::new(&bench.ram).write(LIST, &[value(4, 1000), value(99, 1), value(5, 2000)].concat()).unwrap();
    // It was asked for before: the buffer comes back at once.
    assert!(bench.send(2, &buffer(30)).unwrap().interrupt);
    assert_eq!(bench.driver.take(&Dma::new(&bench.ram)), Some((0, 0)));
    assert_eq!(source.ask(Duration::ZERO), told(&[("free-memory", 1000), ("total-memory", 2000)]));
    Dma::new(&bench.ram).write(LIST, &value(4, 7)).unwrap();
    bench.send(2, &buffer(19)).unwrap();
    assert!(bench.driver.take(&Dma::new(&bench.ram)).is_some());
    assert_eq!(source.ask(Duration::ZERO), told(&[("free-memory", 7)]), "half a value is none");
    // A buffer of before a reset is the old driver's.
    bench.send(2, &buffer(10)).unwrap();
    bench.driver.take(&Dma::new(&bench.ram));
    bench.send(2, &buffer(10)).unwrap();
    bench.handlers[2].idle(1);
    source.ask(Duration::ZERO);
    bench.handlers[2].serve(&mut bench.work, &Dma::new(&bench.ram)).unwrap();
    assert_eq!(bench.driver.take(&Dma::new(&bench.ram)), None);
}
