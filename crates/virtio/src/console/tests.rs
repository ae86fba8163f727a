//! A driver's queues on one side, the host's programs on the other.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use ruse_memory::GuestRam;

use super::*;
use crate::chain::Buffer;
use crate::core::Work;
use crate::dma::Dma;
use crate::ring::Queue;
use crate::ring::driver::Driver;

/// One queue.
struct Side {
    driver: Driver,
    work: Work,
    handler: Box<dyn Handler>,
    /// Where its buffers are.
    at: u64,
}

struct Bench {
    ram: GuestRam,
    sides: Vec<Side>,
}

const BUFFER: u32 = 256;

impl Bench {
    fn new(handlers: Vec<Box<dyn Handler>>) -> Self {
        let side = |(index, handler): (u16, _)| {
            let driver = Driver::new(0x1_0000 * (u64::from(index) + 1), 8, 0);
            let queue = Queue::new(driver.layout, 0).unwrap();
            let work = Work { index, features: 0, resets: 0, queue };
            Side { driver, work, handler, at: 0x8_0000 + 0x1_0000 * u64::from(index) }
        };
        Self { ram: GuestRam::new(1 << 20).unwrap(), sides: (0..).zip(handlers).map(side).collect() }
    }

    fn give(&mut self, queue: usize) {
        let side = &mut self.sides[queue];
        side.driver.add(&Dma::new(&self.ram), &[(Buffer { at: side.at, len: BUFFER }, true)], false).unwrap();
    }

    fn serve(&mut self, queue: usize) {
        let side = &mut self.sides[queue];
        side.handler.serve(&mut side.work, &Dma::new(&self.ram)).unwrap();
    }

    /// What comes in a buffer of a queue to the guest, which is given for it.
    fn receive(&mut self, queue: usize) -> Option<Vec<u8>> {
        let dma_ram = self.ram.clone();
        let dma = Dma::new(&dma_ram);
        self.serve(queue);
        self.sides[queue].driver.take(&dma)?;
        let mut bytes = vec![0; BUFFER as usize];
        dma.read(self.sides[queue].at, &mut bytes).unwrap();
        self.give(queue);
        Some(bytes)
    }

    /// Sends bytes; says whether they were taken at once.
    fn send(&mut self, queue: usize, bytes: &[u8]) -> bool {
        let (dma_ram, at) = (self.ram.clone(), self.sides[queue].at);
        let dma = Dma::new(&dma_ram);
        dma.write(at, bytes).unwrap();
        self.sides[queue]
            .driver
            .add(&dma, &[(Buffer { at, len: bytes.len() as u32 }, false)], false)
            .unwrap();
        self.serve(queue);
        self.sides[queue].driver.take(&dma).is_some()
    }

    fn control(&mut self, port: u32, event: u16, value: u16) {
        let words = [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()];
        assert!(self.send(3, &words.concat()));
    }

    /// The next message: port, event, value, and what follows.
    fn message(&mut self) -> Option<(u8, u8, u8, Vec<u8>)> {
        let bytes = self.receive(2)?;
        Some((bytes[0], bytes[4], bytes[6], bytes[8..12].to_vec()))
    }
}

fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

#[test]
fn a_console_leads_to_its_stream_and_has_a_size() {
    let (mut user, end) = UnixStream::pair().unwrap();
    let size = ConsoleSize::default();
    let (device, handlers) = Console::new(size.clone(), End::Stream(end)).unwrap();
    let mut bench = Bench::new(handlers);
    assert!(size.set(132, 50) && !size.set(132, 50));
    assert_eq!(device.config(), [132, 0, 50, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    bench.give(0);
    assert_eq!(bench.receive(0), None);
    user.write_all(b"typed").unwrap();
    assert_eq!(bench.receive(0).unwrap()[..6], *b"typed\0");
    assert!(bench.send(1, b"shown"));
    let mut shown = [0; 5];
    user.read_exact(&mut shown).unwrap();
    assert_eq!(&shown, b"shown");
    drop(user);
    assert_eq!(bench.receive(0), None);
    assert!(bench.send(1, b"to nobody"));
}

#[test]
fn input_waits_for_buffers() {
    let (mut user, end) = UnixStream::pair().unwrap();
    let mut bench = Bench::new(Console::new(ConsoleSize::default(), End::Stream(end)).unwrap().1);
    user.write_all(&[7; 300]).unwrap();
    bench.serve(0);
    assert!(bench.sides[0].handler.source().is_none(), "it waits for the guest only");
    bench.give(0);
    assert_eq!(bench.receive(0).unwrap(), [7; 256]);
    assert_eq!(bench.receive(0).unwrap()[..45], [[7; 44].as_slice(), &[7]].concat());
    assert!(bench.sides[0].handler.source().is_some());
}

#[test]
fn ports_are_announced_and_opened_from_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("port");
    let listener = UnixListener::bind(&path).unwrap();
    let ports = vec![("log".into(), End::Nowhere), ("org".into(), End::Listener(listener))];
    let (device, handlers) = Ports::new(ports).unwrap();
    assert_eq!((device.queues().len(), device.config()[4]), (6, 2));
    let mut bench = Bench::new(handlers);
    bench.give(2);
    bench.give(4);
    bench.control(0, 0, 1);
    assert_eq!(bench.message().unwrap(), (0, 1, 1, vec![0; 4]));
    assert_eq!(bench.message().unwrap(), (1, 1, 1, vec![0; 4]));
    bench.control(0, 3, 1);
    assert_eq!(bench.message().unwrap(), (0, 7, 1, b"log\0".to_vec()));
    assert_eq!(bench.message().unwrap().1, 6, "nowhere is always open");
    bench.control(1, 3, 1);
    assert_eq!(bench.message().unwrap(), (1, 7, 1, b"org\0".to_vec()));
    assert_eq!(bench.message(), None);
    let mut user = patient(UnixStream::connect(&path).unwrap());
    user.write_all(b"question").unwrap();
    assert_eq!(bench.receive(4), None, "no program of the guest has it open");
    let (port, event, value, _) = bench.message().unwrap();
    assert_eq!((port, event, value), (1, 6, 1));
    bench.control(1, 6, 1);
    assert_eq!(bench.receive(4).unwrap()[..9], *b"question\0");
    bench.send(5, b"answer");
    let mut answer = [0; 6];
    user.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    drop(user);
    assert_eq!(bench.receive(4), None);
    let (port, event, value, _) = bench.message().unwrap();
    assert_eq!((port, event, value), (1, 6, 0));
    // The next may come.
    let _user = UnixStream::connect(&path).unwrap();
    assert_eq!(bench.receive(4), None);
    assert_eq!(bench.message().unwrap().2, 1);
}

#[test]
fn a_reader_who_does_not_read_delays_the_guest() {
    let (user, end) = UnixStream::pair().unwrap();
    let mut user = patient(user);
    let mut bench = Bench::new(Console::new(ConsoleSize::default(), End::Stream(end)).unwrap().1);
    let piece = [9; 0x8000];
    let mut sent = 0;
    while bench.send(1, &piece) {
        sent += piece.len();
        assert!(sent < 16 << 20);
    }
    let mut all = vec![0; sent + piece.len()];
    let reader = std::thread::spawn(move || user.read_exact(&mut all));
    while !reader.is_finished() {
        bench.serve(1);
    }
    reader.join().unwrap().unwrap();
    let dma = Dma::new(&bench.ram);
    assert!(bench.sides[1].driver.take(&dma).is_some());
}

#[test]
fn output_goes_into_a_file() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let end = End::File(file.reopen().unwrap());
    let mut bench = Bench::new(Ports::new(vec![("log".into(), end)]).unwrap().1);
    assert!(bench.send(1, b"one ") && bench.send(1, b"two"));
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "one two");
}

#[test]
fn a_reset_closes_the_guests_ends() {
    let (mut user, end) = UnixStream::pair().unwrap();
    let mut bench = Bench::new(Ports::new(vec![("p".into(), End::Stream(end))]).unwrap().1);
    bench.give(0);
    bench.give(2);
    bench.control(0, 3, 1);
    bench.control(0, 6, 1);
    bench.sides.iter_mut().for_each(|side| side.handler.idle(1));
    bench.sides.iter_mut().for_each(|side| side.work.resets = 1);
    user.write_all(b"x").unwrap();
    assert_eq!(bench.receive(0), None);
    assert_eq!(bench.message(), None, "the old driver's answers are gone");
    bench.control(0, 6, 1);
    assert_eq!(bench.receive(0).unwrap()[0], b'x');
}

#[test]
fn what_no_driver_sends_does_no_harm() {
    let mut bench = Bench::new(Ports::new(vec![("p".into(), End::Nowhere)]).unwrap().1);
    for (port, event, value) in [(1, 3, 1), (u32::MAX, 6, 1), (0, 99, 1), (0, 3, 0), (0, 5, 0)] {
        bench.control(port, event, value);
    }
    // Nobody takes the answers.
    for _ in 0..3000 {
        bench.control(0, 0, 1);
    }
    bench.give(2);
    assert_eq!(std::iter::from_fn(|| bench.message()).count(), 1024);
    let short = (Buffer { at: 0x8_0000, len: 7 }, false);
    let large = (Buffer { at: 0, len: 1 << 20 }, false);
    for (queue, parts) in [(3, vec![short]), (1, vec![large, short])] {
        let side = &mut bench.sides[queue];
        side.driver.add(&Dma::new(&bench.ram), &parts, false).unwrap();
        assert!(side.handler.serve(&mut side.work, &Dma::new(&bench.ram)).is_err());
    }
}

#[test]
fn a_pipe_that_is_full_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let open = |write: bool| {
        use std::os::unix::fs::OpenOptionsExt;
        let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        std::fs::OpenOptions::new().read(!write).write(write).custom_flags(flags).open(&path).unwrap()
    };
    let mut reader = open(false);
    let end = End::File(open(true));
    let mut bench = Bench::new(Console::new(ConsoleSize::default(), end).unwrap().1);
    let mut sent = 0;
    while bench.send(1, &[b'x'; 4096]) {
        sent += 1;
        assert!(sent < 1000, "it is never full");
    }
    let room = |bench: &Bench| {
        let source = bench.sides[1].handler.source().unwrap();
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut files = [rustix::event::PollFd::from_borrowed_fd(source, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut files, Some(&now)).unwrap() > 0
    };
    assert!(!room(&bench));
    let mut bytes = vec![0; 8192];
    reader.read_exact(&mut bytes).unwrap();
    assert!(room(&bench));
    bench.serve(1);
    assert!(bench.sides[1].driver.take(&Dma::new(&bench.ram)).is_some());
}
