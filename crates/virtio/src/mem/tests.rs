//! A driver that asks for memory and gives it back.

use ruse_memory::{HIGH_RAM_START, Layout};

use super::*;
use crate::chain::Buffer;
use crate::ring::Queue;
use crate::ring::driver::Driver;

const REQUEST: u64 = 0x4_0000;
const ANSWER: u64 = 0x4_1000;
const AT: u64 = HIGH_RAM_START;
const BLOCKS: u64 = 8;
const NACK: (u16, u16) = (1, 0);
const ERROR: (u16, u16) = (3, 0);

struct Bench {
    ram: GuestRam,
    driver: Driver,
    work: Work,
    handler: Box<dyn Handler>,
    device: Mem,
}

impl Bench {
    fn new() -> Self {
        let layout = Layout::of_ram(1 << 20).unwrap().with_pluggable(AT, BLOCKS * BLOCK_SIZE).unwrap();
        let driver = Driver::new(0x1_0000, 8, 0);
        let queue = Queue::new(driver.layout, 0).unwrap();
        let work = Work { index: 0, features: 0, resets: 0, queue };
        let (device, mut handlers) = Mem::new(AT, BLOCKS * BLOCK_SIZE);
        let ram = GuestRam::with_layout(&layout).unwrap();
        Self { ram, driver, work, handler: handlers.remove(0), device }
    }

    fn send(&mut self, parts: &[(Buffer, bool)]) -> Result<Served, RingError> {
        let dma = Dma::new(&self.ram);
        self.driver.add(&dma, parts, false).unwrap();
        self.handler.serve(&mut self.work, &dma)
    }

    /// Type and state of the answer to a request.
    fn ask(&mut self, kind: u16, at: u64, blocks: u16) -> (u16, u16) {
        let mut request = [0; REQUEST_LEN];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&at.to_le_bytes());
        request[16..18].copy_from_slice(&blocks.to_le_bytes());
        Dma::new(&self.ram).write(REQUEST, &request).unwrap();
        let parts = [(Buffer { at: REQUEST, len: 24 }, false), (Buffer { at: ANSWER, len: 10 }, true)];
        self.send(&parts).unwrap();
        assert_eq!(self.driver.take(&Dma::new(&self.ram)).map(|(_, written)| written), Some(10));
        let mut answer = [0; ANSWER_LEN];
        Dma::new(&self.ram).read(ANSWER, &mut answer).unwrap();
        (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]]))
    }

    /// Blocks that the configuration says are plugged in and requested.
    fn sizes(&self) -> (u64, u64) {
        let config = self.device.config();
        let word = |n: usize| u64::from_le_bytes(config[8 * n..8 * n + 8].try_into().unwrap());
        assert_eq!([0, 1, 2, 3, 4].map(word), [BLOCK_SIZE, 0, AT, BLOCKS * BLOCK_SIZE, BLOCKS * BLOCK_SIZE]);
        (word(5) / BLOCK_SIZE, word(6) / BLOCK_SIZE)
    }
}

fn block(n: u64) -> u64 {
    AT + n * BLOCK_SIZE
}

#[test]
fn a_guest_gets_what_it_is_to_have_and_no_more() {
    let mut bench = Bench::new();
    let control = bench.device.control();
    assert_eq!(bench.ask(request::PLUG, block(0), 1), NACK);
    assert!(control.request(3 * BLOCK_SIZE + 5) && !control.request(3 * BLOCK_SIZE));
    assert_eq!(bench.ask(request::PLUG, block(2), 2), (0, 0));
    assert_eq!(bench.ask(request::PLUG, block(4), 2), NACK);
    assert_eq!(bench.ask(request::PLUG, block(7), 1), (0, 0));
    assert_eq!(bench.sizes(), (3, 3));
    control.request(BLOCK_SIZE);
    assert_eq!(bench.ask(request::UNPLUG, block(2), 2), (0, 0));
    assert_eq!(bench.sizes(), (1, 1));
    assert!(control.request(u64::MAX));
    assert_eq!(bench.sizes(), (1, BLOCKS));
    assert_eq!(bench.ask(request::UNPLUG_ALL, 0, 0), (0, 0));
    assert_eq!((bench.sizes(), control.plugged()), ((0, BLOCKS), 0));
    assert_eq!(bench.ask(request::PLUG, block(0), 8), (0, 0));
    control.unplug_all(&bench.ram).unwrap();
    assert_eq!(
        (bench.sizes(), bench.ask(request::PLUG, block(0), 8)),
        ((0, BLOCKS), (0, 0)),
        "after a reset"
    );
}

#[test]
fn the_state_of_blocks_is_told() {
    let mut bench = Bench::new();
    bench.device.control().request(u64::MAX);
    bench.ask(request::PLUG, block(1), 1);
    let state = |bench: &mut Bench, n, count| bench.ask(request::STATE, block(n), count);
    assert_eq!(state(&mut bench, 1, 1), (0, 0));
    assert_eq!(state(&mut bench, 2, 6), (0, 1));
    assert_eq!(state(&mut bench, 0, 8), (0, 2));
    assert_eq!(state(&mut bench, 0, 9), ERROR);
}

#[test]
fn devices_reach_what_is_plugged_in_only() {
    let mut bench = Bench::new();
    bench.device.control().request(u64::MAX);
    bench.ask(request::PLUG, block(1), 1);
    let ram = bench.ram.clone();
    let dma = Dma::new(&ram);
    dma.write(block(1), &[7; 4]).unwrap();
    for at in [block(1) - 2, block(2) - 2, block(0), block(7)] {
        assert!(dma.write(at, &[7; 4]).is_err() && dma.read(at, &mut [0; 4]).is_err(), "{at:#x}");
        assert!(dma.slices(at, 4, false).is_err() && dma.slices(at, 4, true).is_err());
    }
    assert!(dma.store(block(0), 1).is_err() && dma.load(block(0)).is_err());
    bench.ask(request::UNPLUG, block(1), 1);
    assert!(dma.read(block(1), &mut [0; 4]).is_err());
    bench.ask(request::PLUG, block(1), 1);
    let mut bytes = [1; 4];
    dma.read(block(1), &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4], "what was there is gone");
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let mut bench = Bench::new();
    bench.device.control().request(u64::MAX);
    assert_eq!(bench.ask(request::PLUG, block(1), 1), (0, 0));
    for (kind, at, blocks) in [
        (request::PLUG, block(1), 1),
        (request::PLUG, block(0), 2),
        (request::PLUG, block(3), 0),
        (request::PLUG, block(3) + 4096, 1),
        (request::PLUG, block(7), 2),
        (request::PLUG, 0, 1),
        (request::PLUG, u64::MAX - BLOCK_SIZE + 1, u16::MAX),
        (request::UNPLUG, block(0), 2),
        (request::UNPLUG, block(3), 1),
        (request::STATE, 0, 1),
        (4, block(1), 1),
    ] {
        assert_eq!(bench.ask(kind, at, blocks), ERROR, "{kind} {at:#x} {blocks}");
    }
    assert_eq!(bench.sizes(), (1, BLOCKS));
    let part = |at, len, write| (Buffer { at, len }, write);
    assert!(bench.send(&[part(REQUEST, 23, false), part(ANSWER, 10, true)]).is_err(), "half a request");
    let mut bench = Bench::new();
    assert!(bench.send(&[part(REQUEST, 24, false), part(ANSWER, 9, true)]).is_err(), "half an answer");
}
