//! Both kinds of rings against a driver, and against what no driver may do.

use ruse_memory::GuestRam;

use super::driver::Driver;
use super::*;
use crate::chain::Buffer;
use crate::features::{EVENT_IDX, INDIRECT_DESC, RING_PACKED};

const AT: u64 = 0x1_0000;
const KINDS: [u64; 4] = [0, EVENT_IDX, RING_PACKED, RING_PACKED | EVENT_IDX];

fn ram() -> GuestRam {
    GuestRam::new(1 << 20).unwrap()
}
fn part(at: u64, len: u32, writable: bool) -> (Buffer, bool) {
    (Buffer { at, len }, writable)
}
fn queue(size: u16, features: u64) -> (Driver, Queue) {
    let driver = Driver::new(AT, size, features);
    let queue = Queue::new(driver.layout, features | INDIRECT_DESC).unwrap();
    (driver, queue)
}

#[test]
fn chains_go_round_the_ring_many_times() {
    for features in KINDS {
        let ram = ram();
        let dma = Dma::new(&ram);
        // A packed ring may have any size.
        let (mut driver, mut queue) = queue(if features & RING_PACKED != 0 { 7 } else { 8 }, features);
        let mut expected = std::collections::VecDeque::new();
        for round in 0..100u32 {
            let parts: Vec<_> = (0..1 + round % 4)
                .map(|n| part(0x8_0000 + u64::from(round * 16 + n), round + 1, n >= 2))
                .collect();
            while let Some(id) = driver.add(&dma, &parts, round % 3 == 1) {
                expected.push_back((id, parts.clone()));
            }
            while let Some((id, parts)) = expected.pop_front() {
                let chain = queue.pop(&dma).unwrap().unwrap();
                let sum =
                    |write| parts.iter().filter(|p| p.1 == write).map(|p| u64::from(p.0.len)).sum::<u64>();
                assert_eq!(
                    (chain.readable_len(), chain.writable_len()),
                    (sum(false), sum(true)),
                    "{features:#x}"
                );
                queue.push(&dma, &chain, round).unwrap();
                assert_eq!(driver.take(&dma), Some((id, round)));
            }
            assert_eq!(queue.pop(&dma), Ok(None));
            assert_eq!(driver.take(&dma), None);
        }
    }
}

#[test]
fn chains_come_back_in_another_order_than_they_were_taken() {
    for features in KINDS {
        let ram = ram();
        let dma = Dma::new(&ram);
        let (mut driver, mut queue) = queue(8, features);
        let one = [part(0x8_0000, 1, false)];
        let ids: Vec<_> = (0..3).map(|_| driver.add(&dma, &one, false).unwrap()).collect();
        let chains: Vec<_> = (0..3).map(|_| queue.pop(&dma).unwrap().unwrap()).collect();
        for n in [2, 0, 1] {
            queue.push(&dma, &chains[n], n as u32).unwrap();
            assert_eq!(driver.take(&dma), Some((ids[n], n as u32)));
        }
    }
}

#[test]
fn chains_that_were_put_back_are_taken_again_first() {
    for features in KINDS {
        let ram = ram();
        let dma = Dma::new(&ram);
        let (mut driver, mut queue) = queue(4, features);
        let mut add = |n: u64| driver.add(&dma, &[part(0x8_0000 + n, 1, false)], false);
        let ids: Vec<_> = (0..4).map(|n| add(n).unwrap()).collect();
        let chains: Vec<_> = (0..3).map(|_| queue.pop(&dma).unwrap().unwrap()).collect();
        // The driver uses its place again; in a packed ring it is that of the first one.
        queue.push(&dma, &chains[1], 0).unwrap();
        assert_eq!(driver.take(&dma), Some((ids[1], 0)));
        let last = driver.add(&dma, &[part(0x8_0004, 1, false)], false).unwrap();
        queue.put_back(chains[2].clone());
        queue.put_back(chains[0].clone());
        let mut saved: Queue = serde_json::from_str(&serde_json::to_string(&queue).unwrap()).unwrap();
        assert_eq!(saved, queue);
        assert!(saved.enable_notifications(&dma).unwrap(), "nobody will notify of them");
        for (id, at) in [(ids[0], 0x8_0000), (ids[2], 0x8_0002), (ids[3], 0x8_0003), (last, 0x8_0004)] {
            let chain = saved.pop(&dma).unwrap().unwrap();
            assert_eq!(chain.readable(), [Buffer { at, len: 1 }]);
            saved.push(&dma, &chain, 0).unwrap();
            assert_eq!(driver.take(&dma), Some((id, 0)));
        }
        assert_eq!(saved.pop(&dma), Ok(None));
    }
}

#[test]
fn of_chains_that_come_back_together_none_is_seen_before_the_others() {
    let end = 1 << 20;
    // There is RAM for two of three.
    let split = Layout { size: 8, descriptors: AT, driver: AT + 0x1000, device: end - 4 - 2 * 8 };
    let packed = Layout { size: 8, descriptors: end - 2 * 16, driver: AT, device: AT + 4 };
    for (layout, features, shows) in
        [(split, 0, split.device + 2), (packed, RING_PACKED, packed.descriptors + 14)]
    {
        let ram = ram();
        let dma = Dma::new(&ram);
        let mut queue = Queue::new(layout, features).unwrap();
        let chains = [0, 1, 2].map(|id| Chain::new(id, 1));
        let used: Vec<_> = chains.iter().map(|chain| (chain, 1)).collect();
        let failed = queue.clone().push_together(&dma, &used);
        assert!(matches!(failed, Err(RingError::Memory { .. })), "{failed:?}");
        assert_eq!(dma.load(shows), Ok(0), "the first is shown before the last is there");
        queue.push_together(&dma, &used[..2]).unwrap();
        assert_ne!(dma.load(shows), Ok(0));
    }
}

#[test]
fn interrupts_come_when_the_driver_waits_for_them() {
    for features in KINDS {
        let ram = ram();
        let dma = Dma::new(&ram);
        let (mut driver, mut queue) = queue(4, features);
        let one = [part(0x8_0000, 1, false)];
        let mut serve = |driver: &mut Driver, count: usize| {
            for _ in 0..count {
                driver.add(&dma, &one, false).unwrap();
                let chain = queue.pop(&dma).unwrap().unwrap();
                queue.push(&dma, &chain, 0).unwrap();
            }
            let wanted = queue.needs_interrupt(&dma).unwrap();
            assert_eq!((0..count).filter_map(|_| driver.take(&dma)).count(), count);
            wanted
        };
        assert!(!serve(&mut driver, 0), "nothing was given back");
        for round in 0..10 {
            driver.ask_for_interrupts(&dma, true);
            assert!(serve(&mut driver, 1 + round % 4), "{features:#x}");
        }
        if features & EVENT_IDX != 0 {
            assert!(!serve(&mut driver, 2), "the index is behind");
        } else {
            driver.ask_for_interrupts(&dma, false);
            assert!(!serve(&mut driver, 2));
        }
    }
}

#[test]
fn notifications_are_asked_for_when_nothing_waits() {
    for features in KINDS {
        let ram = ram();
        let dma = Dma::new(&ram);
        let (mut driver, mut queue) = queue(4, features);
        let one = [part(0x8_0000, 1, false)];
        driver.add(&dma, &one, false).unwrap();
        assert!(driver.must_notify(&dma), "at the beginning");
        queue.disable_notifications(&dma).unwrap();
        assert!(queue.enable_notifications(&dma).unwrap(), "one waits already");
        queue.pop(&dma).unwrap().unwrap();
        queue.disable_notifications(&dma).unwrap();
        driver.add(&dma, &one, false).unwrap();
        if features & EVENT_IDX == 0 {
            assert!(!driver.must_notify(&dma), "{features:#x}");
        }
        queue.pop(&dma).unwrap().unwrap();
        assert!(!queue.enable_notifications(&dma).unwrap());
        driver.add(&dma, &one, false).unwrap();
        assert!(driver.must_notify(&dma), "{features:#x}");
    }
}

#[test]
fn a_saved_queue_goes_on_where_it_was() {
    for features in KINDS {
        let ram = ram();
        let dma = Dma::new(&ram);
        let (mut driver, mut queue) = queue(4, features);
        for round in 0..9 {
            let id = driver.add(&dma, &[part(0x8_0000, 1, true)], false).unwrap();
            let text = serde_json::to_string(&queue).unwrap();
            queue = serde_json::from_str(&text).unwrap();
            let chain = queue.pop(&dma).unwrap().unwrap();
            queue.push(&dma, &chain, round).unwrap();
            assert_eq!(driver.take(&dma), Some((id, round)));
        }
    }
}

#[test]
fn impossible_layouts_are_refused() {
    let good = Driver::new(AT, 8, 0).layout;
    assert!(Queue::new(good, 0).is_some());
    for (layout, features) in [
        (Layout { size: 0, ..good }, 0),
        (Layout { size: 7, ..good }, 0),
        (Layout { size: 0x8001, ..good }, RING_PACKED),
        (Layout { descriptors: AT + 8, ..good }, 0),
        (Layout { driver: good.driver + 1, ..good }, 0),
        (Layout { driver: good.driver + 2, ..good }, RING_PACKED),
        (Layout { device: good.device + 2, ..good }, 0),
        (Layout { device: u64::MAX - 3, ..good }, 0),
    ] {
        assert!(Queue::new(layout, features).is_none(), "{layout:?}");
    }
}

/// A split ring of four entries whose descriptors a test writes as it likes.
fn broken(descriptors: &[(u64, u32, u16, u16)], head: u16) -> RingError {
    let ram = ram();
    let dma = Dma::new(&ram);
    let (driver, mut queue) = queue(4, 0);
    for (n, &(at, len, flags, next)) in (0..).zip(descriptors) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&at.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..].copy_from_slice(&(u32::from(next) << 16 | u32::from(flags)).to_le_bytes());
        dma.write(AT + 16 * n, &bytes).unwrap();
    }
    dma.store(driver.layout.driver + 4, head).unwrap();
    dma.store(driver.layout.driver + 2, 1).unwrap();
    queue.pop(&dma).unwrap_err()
}

#[test]
fn broken_chains_are_errors() {
    let chain = |descriptors: &[_], head| matches!(broken(descriptors, head), RingError::Chain(_));
    assert!(chain(&[], 4), "a head beyond the table");
    assert!(chain(&[(0, 1, 1, 4)], 0), "a next beyond the table");
    assert!(chain(&[(0, 1, 1, 1), (0, 1, 1, 0)], 0), "a loop");
    assert!(chain(&[(0, 1, 3, 1), (0, 1, 0, 0)], 0), "to read behind to write");
    assert!(chain(&[(AT, 24, 4, 0)], 0), "a table of one and a half descriptors");
    assert!(chain(&[(AT, 0, 4, 0)], 0), "an empty table");
    assert!(chain(&[(AT, 80, 4, 0)], 0), "a table longer than the queue");
    assert!(chain(&[(AT, 16, 4, 0)], 0), "a table that has itself in it");
    assert!(chain(&[(AT, 16, 5, 0)], 0), "a table, and more");
    assert!(chain(&[(0, u32::MAX, 1, 1), (0, 2, 0, 0)], 0), "more than 4 GiB");
    assert_eq!(broken(&[(u64::MAX - 7, 16, 4, 0)], 0), RingError::Memory { at: u64::MAX - 7 });
}

#[test]
fn rings_without_ram_are_errors() {
    for features in KINDS {
        let ram = ram();
        let dma = Dma::new(&ram);
        let layout = Layout { size: 8, descriptors: 0xfee0_0000, driver: 0xfee0_1000, device: 0xfee0_2000 };
        let mut queue = Queue::new(layout, features).unwrap();
        assert!(matches!(queue.pop(&dma), Err(RingError::Memory { .. })));
        assert!(queue.enable_notifications(&dma).is_err());
        assert!(queue.push(&dma, &Chain::new(0, 1), 0).is_err());
    }
    let ram = ram();
    let dma = Dma::new(&ram);
    let (driver, mut queue) = queue(4, 0);
    dma.store(driver.layout.driver + 2, 5).unwrap();
    assert_eq!(queue.pop(&dma), Err(RingError::Index { size: 4, available: 5 }));
}

#[test]
fn a_packed_chain_longer_than_the_ring_is_an_error() {
    let ram = ram();
    let dma = Dma::new(&ram);
    let (_, mut queue) = queue(4, RING_PACKED);
    for n in 0..4 {
        dma.store(AT + 16 * n + 14, 1 << 7 | 1).unwrap();
    }
    assert!(matches!(queue.pop(&dma), Err(RingError::Chain(_))));
}
