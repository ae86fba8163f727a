//! A guest's packets on one side, programs of the host on the other.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use ruse_memory::GuestRam;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit};

use super::connection::ROOM;
use super::hub::MOST_CONNECTIONS;
use super::packet::{HEADER_LEN, HOST_CID, Header, STREAM, op, shutdown};
use super::*;
use crate::chain::Buffer;
use crate::ring::Queue;
use crate::ring::driver::Driver;

const CID: u32 = 7;
/// What the guest has room for in these tests.
const GUEST_ROOM: u32 = 100_000;
const TO_GUEST: u64 = 0x10_0000;
const FROM_GUEST: u64 = 0x20_0000;
const BUFFER: u32 = 4096;
/// Buffers for packets to the guest.
const BUFFERS: u64 = 64;
/// Bytes of a packet's data that a guest sends at most.
const MOST_DATA: usize = 0x1_0000;

struct Side {
    driver: Driver,
    work: Work,
    handler: Box<dyn Handler>,
}

struct Bench {
    dir: tempfile::TempDir,
    ram: GuestRam,
    rx: Side,
    tx: Side,
    /// The guest's own counter of bytes passed on, for all connections.
    passed_on: u32,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (_, mut handlers) = Vsock::listen(CID, &dir.path().join("s")).unwrap();
        let side = |at, index, handler| {
            let driver = Driver::new(at, 128, 0);
            let queue = Queue::new(driver.layout, 0).unwrap();
            Side { driver, work: Work { index, features: 0, resets: 0, queue }, handler }
        };
        let tx = side(0x2_0000, 1, handlers.remove(1));
        let rx = side(0x1_0000, 0, handlers.remove(0));
        let mut bench = Self { dir, ram: GuestRam::new(4 << 20).unwrap(), rx, tx, passed_on: 0 };
        (0..BUFFERS).for_each(|n| bench.give(n));
        bench
    }

    fn give(&mut self, n: u64) {
        let buffer = Buffer { at: TO_GUEST + n * u64::from(BUFFER), len: BUFFER };
        self.rx.driver.add(&Dma::new(&self.ram), &[(buffer, true)], false).unwrap();
    }

    fn program(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("s")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    fn header(&self, ports: (u32, u32), op: u16, len: u32) -> Header {
        let (src_port, dst_port) = ports;
        let (src_cid, dst_cid, kind) = (CID.into(), HOST_CID, STREAM);
        let (buf_alloc, fwd_cnt) = (GUEST_ROOM, self.passed_on);
        Header { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags: 0, buf_alloc, fwd_cnt }
    }

    /// The guest sends a packet.
    fn send_header(&mut self, header: &Header, data: &[u8]) {
        let dma = Dma::new(&self.ram);
        dma.write(FROM_GUEST, &header.to_bytes()).unwrap();
        dma.write(FROM_GUEST + HEADER_LEN, data).unwrap();
        let parts = [
            (Buffer { at: FROM_GUEST, len: HEADER_LEN as u32 }, false),
            (Buffer { at: FROM_GUEST + HEADER_LEN, len: data.len() as u32 }, false),
        ];
        self.tx.driver.add(&dma, &parts[..1 + usize::from(!data.is_empty())], false).unwrap();
        self.serve_tx();
        self.tx.driver.take(&Dma::new(&self.ram));
    }

    fn send(&mut self, ports: (u32, u32), op: u16, data: &[u8]) {
        let header = self.header(ports, op, data.len() as u32);
        self.send_header(&header, data);
    }

    fn shut(&mut self, ports: (u32, u32), flags: u32) {
        let header = Header { flags, ..self.header(ports, op::SHUTDOWN, 0) };
        self.send_header(&header, &[]);
    }

    fn serve_tx(&mut self) -> Served {
        self.tx.handler.serve(&mut self.tx.work, &Dma::new(&self.ram)).unwrap()
    }

    /// What the guest finds in its next buffer, if anything.
    fn take(&mut self) -> Option<(Header, Vec<u8>)> {
        let dma = Dma::new(&self.ram);
        self.rx.handler.serve(&mut self.rx.work, &dma).unwrap();
        let (id, written) = self.rx.driver.take(&dma)?;
        // Each id stays with its buffer.
        let at = TO_GUEST + u64::from(id) * u64::from(BUFFER);
        let mut bytes = vec![0; written as usize];
        dma.read(at, &mut bytes).unwrap();
        self.give(id.into());
        let data = bytes.split_off(HEADER_LEN as usize);
        let header = Header::from_bytes(bytes.try_into().unwrap());
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, CID.into(), STREAM));
        assert_eq!(header.len as usize, data.len());
        Some((header, data))
    }

    /// Waits for a packet of the device.
    fn wait(&mut self) -> (Header, Vec<u8>) {
        let limit = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(packet) = self.take() {
                return packet;
            }
            assert!(Instant::now() < limit, "no packet");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for a packet that is to be of this kind.
    fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let packet = self.wait();
        assert_eq!(packet.0.op, op, "{packet:?}");
        packet
    }

    /// A connection that a program of the host has made; its ports as the guest has them.
    fn connected(&mut self) -> (UnixStream, (u32, u32)) {
        let mut program = self.program();
        program.write_all(b"CONNECT 52\n").unwrap();
        let (request, _) = self.expect(op::REQUEST);
        assert_eq!((request.dst_port, request.buf_alloc), (52, ROOM));
        let ports = (52, request.src_port);
        self.send(ports, op::RESPONSE, &[]);
        assert_eq!(line(&mut program), format!("OK {}\n", ports.1));
        (program, ports)
    }
}

fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn is_readable(handler: &dyn Handler) -> bool {
    let Some(source) = handler.source() else { return false };
    let mut files = [PollFd::from_borrowed_fd(source, PollFlags::IN)];
    poll(&mut files, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0
}

#[test]
fn a_program_of_the_host_talks_with_one_of_the_guest() {
    let mut bench = Bench::new();
    let (mut program, ports) = bench.connected();
    bench.send(ports, op::RW, b"from the guest");
    let mut bytes = [0; 14];
    program.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"from the guest");
    program.write_all(b"from the host").unwrap();
    let (header, data) = bench.expect(op::RW);
    assert_eq!((header.src_port, header.dst_port, &data[..]), (ports.1, 52, &b"from the host"[..]));
    assert_eq!(header.fwd_cnt, 14);
    // One after the other, both say that they are done.
    program.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(bench.expect(op::SHUTDOWN).0.flags, shutdown::SEND);
    bench.send(ports, op::RW, b"more");
    bench.shut(ports, shutdown::SEND);
    let mut rest = Vec::new();
    program.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"more");
    bench.shut(ports, shutdown::BOTH);
    bench.expect(op::RST);
    assert!(bench.take().is_none());
    bench.send(ports, op::RW, b"late");
    bench.expect(op::RST);
}

#[test]
fn what_follows_the_line_is_for_the_guest() {
    let mut bench = Bench::new();
    let mut program = bench.program();
    program.write_all(b"CONNECT 9").unwrap();
    assert!(bench.take().is_none(), "the line is not whole");
    program.write_all(b"99\nhello").unwrap();
    let (request, _) = bench.expect(op::REQUEST);
    assert_eq!(request.dst_port, 999);
    bench.send((999, request.src_port), op::RESPONSE, &[]);
    assert_eq!(bench.expect(op::RW).1, b"hello");
}

#[test]
fn programs_that_want_nothing_sensible_or_leave_are_forgotten() {
    let mut bench = Bench::new();
    for bad in ["CONNECT x\n", "GET / HTTP/1.1\n", "a line that is much too long to be one\n", "CONNECT 5"] {
        let mut program = bench.program();
        program.write_all(bad.as_bytes()).unwrap();
        program.shutdown(std::net::Shutdown::Write).unwrap();
        while is_readable(&*bench.rx.handler) {
            assert!(bench.take().is_none());
        }
        assert_eq!(program.read(&mut [0]).map_err(|_| ()).unwrap_or(0), 0, "{bad}");
    }
    let mut program = bench.program();
    program.write_all(b"CONNECT 5\n").unwrap();
    bench.expect(op::REQUEST);
    drop(program);
    bench.expect(op::RST);
    let mut program = bench.program();
    program.write_all(b"CONNECT 5\n").unwrap();
    let (request, _) = bench.expect(op::REQUEST);
    bench.send((5, request.src_port), op::RST, &[]);
    assert_eq!(program.read(&mut [0]).unwrap(), 0, "the guest has refused");
}

#[test]
fn a_program_of_the_guest_talks_with_one_of_the_host() {
    let mut bench = Bench::new();
    bench.send((4000, 80), op::REQUEST, &[]);
    let (header, _) = bench.expect(op::RST);
    assert_eq!((header.src_port, header.dst_port), (80, 4000), "nobody listens");
    let listener = UnixListener::bind(bench.dir.path().join("s_80")).unwrap();
    bench.send((4000, 80), op::REQUEST, &[]);
    bench.expect(op::RESPONSE);
    let (mut program, _) = listener.accept().unwrap();
    bench.send((4000, 80), op::RW, b"question");
    let mut bytes = [0; 8];
    program.read_exact(&mut bytes).unwrap();
    program.write_all(b"answer").unwrap();
    drop(program);
    assert_eq!(bench.expect(op::RW).1, b"answer");
    assert_eq!(bench.expect(op::SHUTDOWN).0.flags, shutdown::SEND);
    assert_eq!(bench.expect(op::SHUTDOWN).0.flags, shutdown::BOTH, "it is gone altogether");
    bench.send((4000, 80), op::RST, &[]);
    assert!(bench.take().is_none());
    // A connection that stands is not requested again, and a type that there is not is refused.
    bench.send((4000, 80), op::REQUEST, &[]);
    bench.expect(op::RESPONSE);
    bench.send((4000, 80), op::REQUEST, &[]);
    bench.expect(op::RST);
    let other = Header { kind: 2, ..bench.header((4001, 80), op::REQUEST, 0) };
    bench.send_header(&other, &[]);
    bench.expect(op::RST);
    let foreign = Header { src_cid: 9, ..bench.header((4001, 80), op::REQUEST, 0) };
    bench.send_header(&foreign, &[]);
    assert!(bench.take().is_none());
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut bench = Bench::new();
    let (program, ports) = bench.connected();
    let mut writer = program.try_clone().unwrap();
    let all: Vec<u8> = (0..500_000u32).map(|n| (n / 3) as u8).collect();
    let sent = all.clone();
    let thread = std::thread::spawn(move || writer.write_all(&sent).unwrap());
    let mut got = Vec::new();
    while got.len() < all.len() {
        match bench.wait() {
            (Header { op: op::RW, .. }, data) => got.extend(data),
            (Header { op: op::CREDIT_REQUEST, .. }, _) => {
                assert_eq!(got.len() as u32 - bench.passed_on, GUEST_ROOM);
                assert!(bench.take().is_none(), "nothing without room");
                bench.passed_on = got.len() as u32;
                bench.send(ports, op::CREDIT_UPDATE, &[]);
            }
            (header, _) => panic!("{header:?}"),
        }
    }
    assert!(got == all);
    thread.join().unwrap();
}

#[test]
fn a_program_that_does_not_read_holds_nobody_else_up() {
    let mut bench = Bench::new();
    let (mut slow, slow_ports) = bench.connected();
    let (mut quick, quick_ports) = bench.connected();
    let piece = vec![0x5a; MOST_DATA];
    let mut sent = 0;
    // The socket takes some; of the rest the device has room for so much.
    let mut passed_on = 0;
    while sent - passed_on + piece.len() as u32 <= ROOM {
        bench.send(slow_ports, op::RW, &piece);
        sent += piece.len() as u32;
        while let Some((header, _)) = bench.take() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            passed_on = header.fwd_cnt;
        }
    }
    bench.send(quick_ports, op::RW, b"quick");
    let mut bytes = [0; 5];
    quick.read_exact(&mut bytes).unwrap();
    quick.write_all(b"back").unwrap();
    assert_eq!(bench.expect(op::RW).1, b"back");
    // The guest closes; all that it had sent arrives.
    bench.shut(slow_ports, shutdown::BOTH);
    bench.send(slow_ports, op::RST, &[]);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        slow.read_to_end(&mut all).unwrap();
        all.len()
    });
    let limit = Instant::now() + Duration::from_secs(60);
    while !reader.is_finished() {
        assert!(Instant::now() < limit);
        if is_readable(&*bench.tx.handler) {
            bench.serve_tx();
        }
    }
    assert_eq!(reader.join().unwrap() as u32, sent);
    assert!(bench.take().is_none(), "the guest has left");
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_is_reset() {
    let mut bench = Bench::new();
    let (_program, ports) = bench.connected();
    for _ in 0..16 {
        bench.send(ports, op::RW, &vec![1; MOST_DATA]);
    }
    let mut last = op::RW;
    while let Some((header, _)) = bench.take() {
        last = header.op;
    }
    assert_eq!(last, op::RST);
}

#[test]
fn a_reset_of_the_device_ends_its_connections() {
    let mut bench = Bench::new();
    let (mut program, ports) = bench.connected();
    program.write_all(b"lost").unwrap();
    bench.tx.handler.idle(1);
    assert_eq!(program.read(&mut [0]).unwrap_or(0), 0);
    (bench.rx.work.resets, bench.tx.work.resets) = (1, 1);
    assert!(bench.take().is_none());
    bench.send(ports, op::RW, b"late");
    bench.expect(op::RST);
    bench.connected();
}

#[test]
fn a_guest_without_buffers_is_not_heard_for_ever() {
    let mut bench = Bench::new();
    let dma_ram = bench.ram.clone();
    let dma = Dma::new(&dma_ram);
    let mut heard = 0;
    // Each of these is answered.
    'sending: loop {
        for n in 0..100 {
            let header = bench.header((n, 1), op::RW, 0);
            dma.write(FROM_GUEST, &header.to_bytes()).unwrap();
            let part = (Buffer { at: FROM_GUEST, len: HEADER_LEN as u32 }, false);
            bench.tx.driver.add(&dma, &[part], false).unwrap();
            bench.serve_tx();
            if bench.tx.driver.take(&dma).is_none() {
                break 'sending;
            }
            heard += 1;
            assert!(heard < 10_000);
        }
    }
    assert!(!is_readable(&*bench.tx.handler));
    let answers = std::iter::from_fn(|| bench.take()).take(heard).count();
    assert_eq!(answers, heard);
    assert!(is_readable(&*bench.tx.handler), "it is woken");
    bench.serve_tx();
    assert!(bench.tx.driver.take(&dma).is_some());
}

#[test]
fn packets_wait_for_buffers() {
    let mut bench = Bench::new();
    let (mut program, _) = bench.connected();
    let dma_ram = bench.ram.clone();
    let dma = Dma::new(&dma_ram);
    program.write_all(&vec![7; 90_000]).unwrap();
    // The buffers are not given back.
    let mut filled = 0;
    for _ in 0..2 {
        bench.rx.handler.serve(&mut bench.rx.work, &dma).unwrap();
        filled += std::iter::from_fn(|| bench.rx.driver.take(&dma)).count() as u64;
    }
    assert_eq!(filled, 24, "64 KiB and the rest, in pieces of 4052 bytes");
    for _ in 0..BUFFERS - filled {
        program.write_all(&[1; 50]).unwrap();
        bench.rx.handler.serve(&mut bench.rx.work, &dma).unwrap();
        assert!(bench.rx.driver.take(&dma).is_some());
    }
    program.write_all(b"x").unwrap();
    bench.rx.handler.serve(&mut bench.rx.work, &dma).unwrap();
    assert!(bench.rx.driver.take(&dma).is_none());
    assert!(bench.rx.handler.source().is_none(), "it waits for the guest only");
}

#[test]
fn there_are_only_so_many_connections() {
    let mut bench = Bench::new();
    let listener = UnixListener::bind(bench.dir.path().join("s_1")).unwrap();
    // This process has to have files for both ends.
    let limit = rustix::process::getrlimit(Resource::Nofile);
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let mut programs = Vec::new();
    for port in 0..MOST_CONNECTIONS as u32 {
        bench.send((port, 1), op::REQUEST, &[]);
        bench.expect(op::RESPONSE);
        programs.push(listener.accept().unwrap());
    }
    bench.send((9999, 1), op::REQUEST, &[]);
    bench.expect(op::RST);
    let mut waiting = bench.program();
    waiting.write_all(b"CONNECT 5\n").unwrap();
    assert!(bench.take().is_none(), "it waits until another ends");
    bench.send((3, 1), op::RST, &[]);
    bench.expect(op::REQUEST);
}

#[test]
fn the_socket_is_the_users_own_and_goes_with_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    // What a process has left behind.
    drop(UnixListener::bind(&path).unwrap());
    let (device, handlers) = Vsock::listen(CID, &path).unwrap();
    assert_eq!(device.config(), [7, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let used = Vsock::listen(8, &path).map(drop).unwrap_err();
    assert_eq!(used.to_string(), format!("'{}' is in use", path.display()));
    drop(handlers);
    assert!(!path.exists());
    std::fs::write(&path, "a file of the user's").unwrap();
    assert!(matches!(Vsock::listen(CID, &path), Err(ListenError::InUse(_))));
    assert!(path.exists());
    assert!(matches!(Vsock::listen(CID, &dir.path().join("no/s")), Err(ListenError::Host { .. })));
}

#[test]
fn packets_that_no_driver_makes_break_the_queue() {
    for (len, data) in [(43, 0), (44, 100)] {
        let mut bench = Bench::new();
        let (_program, ports) = bench.connected();
        let header = bench.header(ports, op::RW, data);
        let dma = Dma::new(&bench.ram);
        dma.write(FROM_GUEST, &header.to_bytes()).unwrap();
        bench.tx.driver.add(&dma, &[(Buffer { at: FROM_GUEST, len }, false)], false).unwrap();
        assert!(bench.tx.handler.serve(&mut bench.tx.work, &dma).is_err());
    }
}
