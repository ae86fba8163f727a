//! The network device over a network that keeps what it gets and gives what it is given.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ruse_memory::GuestRam;
use ruse_net::{HEADER_LEN, Offer, Received, Receiver, Sender, Slice};
use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::chain::Buffer;
use crate::device::Served;
use crate::dma::Dma;
use crate::ring::Queue;
use crate::ring::driver::{Driver as RingDriver, Part};

const BUFFERS: u64 = 0x4_0000;
const KINDS: [u64; 4] =
    [0, features::EVENT_IDX, features::RING_PACKED, features::RING_PACKED | features::EVENT_IDX];

#[derive(Default)]
struct State {
    sent: Vec<Vec<u8>>,
    waiting: VecDeque<Vec<u8>>,
    started: Vec<Driver>,
    offloads: Vec<Offloads>,
    pairs: Vec<u16>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<State>>);

impl Fake {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }
    fn port(&self) -> Port {
        let source = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        Port {
            sender: Box::new(self.clone()),
            receiver: Box::new(FakeReceiver { fake: self.clone(), source }),
        }
    }
}

impl Network for Fake {
    fn offer(&self) -> Offer {
        let all = Offloads::CHECKSUM | Offloads::TSO4;
        Offer { takes: all, gives: all, mtu: Some(9000) }
    }
    fn start(&self, driver: Driver) {
        self.state().started.push(driver);
    }
    fn set_offloads(&self, offloads: Offloads) {
        self.state().offloads.push(offloads);
    }
    fn set_pairs(&self, pairs: u16) {
        self.state().pairs.push(pairs);
    }
}

impl Sender for Fake {
    fn send(&mut self, frame: &[Slice]) {
        let mut bytes = Vec::new();
        for slice in frame {
            let start = bytes.len();
            bytes.resize(start + slice.len(), 0);
            slice.copy_to(&mut bytes[start..]);
        }
        self.state().sent.push(bytes);
    }
}

struct FakeReceiver {
    fake: Fake,
    source: OwnedFd,
}

impl Receiver for FakeReceiver {
    fn source(&self) -> BorrowedFd<'_> {
        self.source.as_fd()
    }
    fn receive(&mut self, take: &mut dyn FnMut(&[&[u8]]) -> bool) -> Received {
        let mut state = self.fake.state();
        let Some(frame) = state.waiting.front() else { return Received::Nothing };
        let (first, rest) = frame.split_at(HEADER_LEN + 20);
        if !take(&[first, rest]) {
            return Received::Refused;
        }
        state.waiting.pop_front();
        Received::Taken
    }
}

/// A queue with its two sides.
struct Bench {
    ram: GuestRam,
    driver: RingDriver,
    work: Work,
    handler: Box<dyn Handler>,
}

impl Bench {
    /// Queue `index` of a device with one pair.
    fn new(fake: &Fake, index: usize, features: u64) -> Self {
        let (_, mut handlers) = Net::new(Arc::new(fake.clone()), vec![fake.port()], [2, 0, 0, 0, 0, 1]);
        Self::around(handlers.remove(index), index, features)
    }

    fn around(handler: Box<dyn Handler>, index: usize, features: u64) -> Self {
        let ram = GuestRam::new(1 << 20).unwrap();
        let driver = RingDriver::new(0x1_0000, 16, features);
        let queue = Queue::new(driver.layout, features).unwrap();
        Self { ram, driver, work: Work { index: index as u16, features, resets: 0, queue }, handler }
    }

    fn add(&mut self, parts: &[Part]) {
        self.driver.add(&Dma::new(&self.ram), parts, false).unwrap();
    }

    fn serve(&mut self) -> Served {
        self.handler.serve(&mut self.work, &Dma::new(&self.ram)).unwrap()
    }

    fn take(&mut self) -> Option<u32> {
        self.driver.take(&Dma::new(&self.ram)).map(|(_, written)| written)
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        Dma::new(&self.ram).read(at, &mut bytes).unwrap();
        bytes
    }

    /// Sends a command; the answer.
    fn command(&mut self, command: &[u8]) -> u8 {
        Dma::new(&self.ram).write(BUFFERS, command).unwrap();
        self.add(&[
            (Buffer { at: BUFFERS, len: command.len() as u32 }, false),
            (Buffer { at: BUFFERS + 0x1000, len: 1 }, true),
        ]);
        self.serve();
        assert_eq!(self.take(), Some(1));
        self.bytes(BUFFERS + 0x1000, 1)[0]
    }
}

fn buffer(number: u64, len: u32) -> [Part; 1] {
    [(Buffer { at: BUFFERS + number * 0x1000, len }, true)]
}

/// A frame with its header.
fn frame(len: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|n| n as u8).collect();
    frame[..HEADER_LEN].fill(0);
    frame[HEADER_LEN..HEADER_LEN + 6].fill(0xff);
    frame
}

#[test]
fn frames_of_the_guest_reach_the_network() {
    for kind in KINDS {
        let fake = Fake::default();
        let mut bench = Bench::new(&fake, 1, kind);
        let bytes = frame(200);
        Dma::new(&bench.ram).write(BUFFERS, &bytes).unwrap();
        let part = |from: u64, len| (Buffer { at: BUFFERS + from, len }, false);
        bench.add(&[part(0, 12), part(12, 88), part(100, 100)]);
        bench.add(&[part(0, 20)]);
        assert!(bench.serve().interrupt);
        assert_eq!((bench.take(), bench.take(), bench.take()), (Some(0), Some(0), None));
        assert_eq!(fake.state().sent, [bytes], "what is no frame is dropped");
        assert!(bench.handler.source().is_none());
    }
}

#[test]
fn a_frame_goes_into_as_many_buffers_as_it_needs() {
    for kind in KINDS {
        let fake = Fake::default();
        let mut bench = Bench::new(&fake, 0, kind | feature::MRG_RXBUF);
        fake.state().waiting.extend([frame(250), frame(60)]);
        for number in 0..5 {
            bench.add(&buffer(number, 100));
        }
        assert_eq!(bench.serve(), Served { interrupt: true, more: false, ..Served::default() });
        let written: Vec<_> = std::iter::from_fn(|| bench.take()).collect();
        assert_eq!(written, [100, 100, 50, 60]);
        let all = [
            bench.bytes(BUFFERS, 100),
            bench.bytes(BUFFERS + 0x1000, 100),
            bench.bytes(BUFFERS + 0x2000, 50),
        ];
        let mut expected = frame(250);
        expected[10] = 3;
        assert_eq!(all.concat(), expected);
        assert_eq!(bench.bytes(BUFFERS + 0x3000, 12)[10], 1);
        assert!(bench.handler.source().is_some(), "more frames are waited for");
    }
}

#[test]
fn a_frame_waits_for_buffers() {
    for kind in KINDS {
        let fake = Fake::default();
        let mut bench = Bench::new(&fake, 0, kind | feature::MRG_RXBUF);
        fake.state().waiting.push_back(frame(250));
        bench.add(&buffer(0, 100));
        bench.add(&buffer(1, 100));
        assert_eq!(bench.serve(), Served::default());
        assert!(bench.take().is_none() && bench.handler.source().is_none());
        bench.add(&buffer(2, 100));
        assert!(bench.driver.must_notify(&Dma::new(&bench.ram)), "{kind:#x}");
        bench.serve();
        let written: Vec<_> = std::iter::from_fn(|| bench.take()).collect();
        assert_eq!(written, [100, 100, 50]);
    }
}

#[test]
fn what_no_buffer_takes_is_dropped() {
    let fake = Fake::default();
    let mut bench = Bench::new(&fake, 0, 0);
    fake.state().waiting.extend([frame(250), frame(90)]);
    bench.add(&buffer(0, 100));
    bench.serve();
    assert_eq!((bench.take(), bench.take()), (Some(90), None), "buffers that cannot be merged");
    let mut bench = Bench::new(&fake, 0, feature::MRG_RXBUF);
    fake.state().waiting.extend([frame(1000), frame(90)]);
    (0..16).for_each(|number| bench.add(&buffer(number, 50)));
    bench.serve();
    assert_eq!(
        (bench.take(), bench.take(), bench.take()),
        (Some(50), Some(40), None),
        "more than the ring has"
    );
}

#[test]
fn the_driver_says_what_it_wants() {
    let fake = Fake::default();
    let taken = feature::CTRL_VQ | feature::CTRL_VLAN | feature::GUEST_CSUM | feature::MTU;
    let mut bench = Bench::new(&fake, 2, taken);
    for (command, answer) in [
        (&[0, 0, 0][..], 0),
        (&[0, 6, 0], 1),
        (&[0, 0], 1),
        (&[1, 1, 2, 0, 0, 0, 0, 9], 0),
        (&[1, 1, 2, 0], 1),
        (&[1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 7, 0, 0, 0, 0], 0),
        (&[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0], 1),
        (&[2, 0, 5, 0], 0),
        (&[2, 0, 0, 0x10], 1),
        (&[4, 0, 1, 0], 1),
        (&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0], 0),
        (&[5, 0, 0x80, 0, 0, 0, 0, 0, 0, 0], 1),
        (&[9], 1),
    ] {
        assert_eq!(bench.command(command), answer, "{command:?}");
    }
    let state = fake.state();
    assert_eq!(state.started, [Driver { offloads: Offloads::CHECKSUM, knows_mtu: true }]);
    assert_eq!((&state.offloads[..], &state.pairs[..]), (&[Offloads::CHECKSUM][..], &[1][..]));
}

#[test]
fn addresses_that_nobody_wants_are_left_out() {
    let fake = Fake::default();
    let (_, mut handlers) = Net::new(Arc::new(fake.clone()), vec![fake.port()], [2, 0, 0, 0, 0, 1]);
    let mut control = Bench::around(handlers.pop().unwrap(), 2, feature::CTRL_VQ);
    let mut receive = Bench::around(handlers.remove(0), 0, feature::CTRL_VQ);
    assert_eq!(control.command(&[0, 0, 0]), 0);
    let mut other = frame(60);
    other[HEADER_LEN..HEADER_LEN + 6].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
    fake.state().waiting.extend([other.clone(), frame(70)]);
    receive.add(&buffer(0, 100));
    receive.serve();
    assert_eq!(receive.take(), Some(70));
    // A driver that starts anew has no filter.
    receive.work.resets = 1;
    fake.state().waiting.push_back(other);
    receive.add(&buffer(0, 100));
    receive.serve();
    assert_eq!((receive.take(), fake.state().started.len()), (Some(60), 2));
}

#[test]
fn nothing_passes_while_the_link_is_down() {
    let fake = Fake::default();
    let (device, mut handlers) = Net::new(Arc::new(fake.clone()), vec![fake.port()], [2, 0, 0, 0, 0, 1]);
    let link = device.link();
    let mut transmit = Bench::around(handlers.remove(1), 1, 0);
    let mut receive = Bench::around(handlers.remove(0), 0, 0);
    assert!(link.is_up() && !link.set_up(true) && link.set_up(false));
    assert_eq!(device.config()[6], 0);
    let mut pass = |sent: usize, received: Option<u32>| {
        fake.state().waiting.push_back(frame(60));
        receive.add(&buffer(0, 100));
        receive.serve();
        assert_eq!(receive.take(), received);
        transmit.add(&[(Buffer { at: BUFFERS, len: 60 }, false)]);
        transmit.serve();
        assert!(transmit.take().is_some());
        assert_eq!(fake.state().sent.len(), sent);
        assert!(fake.state().waiting.is_empty(), "what came meanwhile does not come later");
    };
    pass(0, None);
    assert!(link.set_up(true));
    pass(1, Some(60));
    assert_eq!(device.config()[6], 1);
}

#[test]
fn the_control_queue_is_where_the_driver_looks_for_it() {
    let fake = Fake::default();
    let make = || {
        let ports = vec![fake.port(), fake.port(), fake.port()];
        Net::new(Arc::new(fake.clone()), ports, [2, 0, 0, 0, 0, 1])
    };
    let (device, handlers) = make();
    assert_eq!((device.queues().len(), handlers.len()), (7, 7));
    assert!(device.features() & feature::MQ != 0);
    assert_eq!(device.config(), [2, 0, 0, 0, 0, 1, 1, 0, 3, 0, 0x28, 0x23]);
    for (features, index) in [(feature::CTRL_VQ, 2), (feature::CTRL_VQ | feature::MQ, 6)] {
        let mut bench = Bench::around(make().1.remove(index), index, features);
        assert_eq!(bench.command(&[0, 0, 1]), 0);
        assert_eq!(bench.command(&[4, 0, 3, 0]), u8::from(index == 2));
        assert_eq!(bench.command(&[4, 0, 4, 0]), 1);
    }
    assert_eq!(fake.state().pairs, [1, 1, 3]);
    let mut second = Bench::around(make().1.remove(2), 2, feature::MQ);
    fake.state().waiting.push_back(frame(60));
    second.add(&buffer(0, 100));
    second.serve();
    assert_eq!(second.take(), Some(60));
}
