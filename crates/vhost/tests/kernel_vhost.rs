//! Devices that the host's kernel serves: /dev/vhost-net and /dev/vhost-vsock. Where there are none, or not for this user, the
//! tests say so and are left out; with RUSE_NEED_VHOST in the environment that is a failure.

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use ruse_memory::GuestRam;
use ruse_net::tap::{Tap, TapConfig, TapKind};
use ruse_vhost::{OpenDevice, kernel_net, kernel_vsock};
use ruse_virtio::ring::driver::Driver;
use ruse_virtio::ring::{Queue, RingError};
use ruse_virtio::{Buffer, Dma, Handler, Served, Work, features};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Where rings and buffers of each queue are.
const RINGS: [u64; 2] = [0x1_0000, 0x2_0000];
const BUFFERS: [u64; 2] = [0x4_0000, 0x8_0000];
const BUFFER_LEN: u64 = 0x1000;
const ENTRIES: u16 = 16;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is there to test with, if it is.
fn needed<T>(what: Result<T, impl std::fmt::Display>) -> Option<T> {
    what.map_err(|error| {
        assert!(std::env::var_os("RUSE_NEED_VHOST").is_none(), "{error}");
        println!("skipped: {error}");
    })
    .ok()
}

/// A queue, its driver, and what serves it.
struct Side {
    number: u16,
    driver: Driver,
    queue: Option<Queue>,
    handler: Box<dyn Handler>,
}

impl Side {
    fn start(&mut self, features: u64) {
        self.driver = Driver::new(RINGS[usize::from(self.number)], ENTRIES, features);
        self.queue = Queue::new(self.driver.layout, features);
    }
}

/// A driver of a device with a queue to receive and one to send.
struct Bench {
    ram: GuestRam,
    features: u64,
    resets: u64,
    receive: Side,
    send: Side,
}

impl Bench {
    fn new(device: OpenDevice, features: u64) -> Self {
        let ram = GuestRam::new(1 << 20).unwrap();
        let (device, handlers) = device.plug(&ram).unwrap();
        let features = features | features::VERSION_1;
        assert_eq!(features & !device.features(), 0);
        let side = |(number, handler)| {
            let driver = Driver::new(RINGS[usize::from(number)], ENTRIES, features);
            Side { number, driver, queue: None, handler }
        };
        let mut sides = (0..).zip(handlers).map(side);
        let (receive, send) = (sides.next().unwrap(), sides.next().unwrap());
        assert!(sides.next().is_none());
        drop(sides);
        let mut bench = Self { ram, features, resets: 0, receive, send };
        bench.start();
        bench
    }

    /// The driver starts, and gives buffers for what comes.
    fn start(&mut self) {
        Dma::new(&self.ram).write(RINGS[0], &[0; 0x2_0000]).unwrap();
        self.receive.start(self.features);
        self.send.start(self.features);
        for n in 0..ENTRIES {
            self.give_buffer(BUFFERS[0] + BUFFER_LEN * u64::from(n));
        }
    }

    /// The driver resets the device and starts anew.
    fn reset(&mut self) {
        for side in [&mut self.receive, &mut self.send] {
            side.handler.idle(self.resets);
        }
        self.resets += 1;
        self.start();
    }

    /// The machine is held for a moment.
    fn hold(&mut self) {
        for served in self.lend(|handler, work, dma| handler.recall(work, dma)) {
            assert!(!served.unwrap().outside);
        }
    }

    fn lend<T>(&mut self, what: impl Fn(&mut dyn Handler, &mut Work, &Dma) -> T) -> [T; 2] {
        let dma = Dma::new(&self.ram);
        [&mut self.receive, &mut self.send].map(|side| {
            let queue = side.queue.take().unwrap();
            let (index, features, resets) = (side.number, self.features, self.resets);
            let mut work = Work { index, features, resets, queue };
            let result = what(&mut *side.handler, &mut work, &dma);
            side.queue = Some(work.queue);
            result
        })
    }

    fn give_buffer(&mut self, at: u64) {
        let buffer = Buffer { at, len: BUFFER_LEN as u32 };
        self.receive.driver.add(&Dma::new(&self.ram), &[(buffer, true)], false).unwrap();
    }

    /// Sends a packet: the device has taken it.
    fn send(&mut self, packet: &[u8]) {
        let dma = Dma::new(&self.ram);
        dma.write(BUFFERS[1], packet).unwrap();
        let buffer = Buffer { at: BUFFERS[1], len: packet.len() as u32 };
        self.send.driver.add(&dma, &[(buffer, false)], false).unwrap();
        let limit = Instant::now() + PATIENCE;
        self.serve();
        while self.send.driver.take(&Dma::new(&self.ram)).is_none() {
            assert!(Instant::now() < limit, "the packet is not taken");
            thread::sleep(Duration::from_millis(1));
            self.serve();
        }
    }

    fn serve(&mut self) {
        let serve = |handler: &mut dyn Handler, work: &mut Work, dma: &Dma| handler.serve(work, dma);
        let served: [Result<Served, RingError>; 2] = self.lend(serve);
        assert!(served.iter().all(|served| served.as_ref().is_ok_and(|served| served.outside)), "{served:?}");
    }

    /// The next packet from the device, if one comes in this time. Its page counts as written.
    fn receive(&mut self, patience: Duration) -> Option<Vec<u8>> {
        let limit = Instant::now() + patience;
        loop {
            self.serve();
            if let Some((id, len)) = self.receive.driver.take(&Dma::new(&self.ram)) {
                // A buffer that is given again has the same id.
                let at = BUFFERS[0] + BUFFER_LEN * u64::from(id);
                let mut packet = vec![0; len as usize];
                Dma::new(&self.ram).read(at, &mut packet).unwrap();
                let (tracker, offset) = self.ram.tracker(at).unwrap();
                assert!(tracker.take_dirty(offset));
                self.give_buffer(at);
                return Some(packet);
            }
            if Instant::now() > limit {
                return None;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// Bytes before a frame (virtio 1.2, 5.1.6).
const NET_HEADER: usize = 12;

/// Asks who has 10.9.0.1, until the host answers.
fn ask(bench: &mut Bench) {
    let mut request = vec![0; NET_HEADER];
    request.extend([0xff; 6]);
    request.extend(OUR_MAC);
    request.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    request.extend(OUR_MAC);
    request.extend([10, 9, 0, 2, 0, 0, 0, 0, 0, 0, 10, 9, 0, 1]);
    let limit = Instant::now() + PATIENCE;
    loop {
        bench.send(&request);
        while let Some(packet) = bench.receive(Duration::from_millis(200)) {
            let frame = &packet[NET_HEADER..];
            if frame[..6] == OUR_MAC && frame[12..22] == [8, 6, 0, 1, 8, 0, 6, 4, 0, 2] {
                assert_eq!(frame[28..32], [10, 9, 0, 1]);
                return;
            }
        }
        assert!(Instant::now() < limit, "nobody answers");
    }
}

/// Makes a tap in a network namespace of this thread's own.
fn tap() -> io::Result<TapConfig> {
    // SAFETY: the namespace of networks is the thread's alone; it shares all else as before.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    let setup = "ip tuntap add t0 mode tap 2>/dev/null || tunctl -t t0; \
                 ip addr add 10.9.0.1/24 dev t0; ip link set t0 up";
    let status = Command::new("sh").args(["-ec", setup]).status()?;
    assert!(status.success());
    Ok(TapConfig { kind: TapKind::Tap("t0".into()), pairs: 1, namespace: None, mtu: None })
}

#[test]
fn the_kernel_passes_frames_between_a_tap_and_a_driver() {
    if !ruse_vhost::has_vhost_net() {
        needed(Err::<(), _>("there is no /dev/vhost-net for this user"));
        return;
    }
    let Some(config) = needed(tap()) else { return };
    for features in [0, features::RING_PACKED | features::EVENT_IDX, features::INDIRECT_DESC] {
        let (tap, _ports) = Tap::open(&config).unwrap();
        let mut bench = Bench::new(kernel_net(tap, OUR_MAC).unwrap(), features);
        ask(&mut bench);
        bench.hold();
        ask(&mut bench);
        bench.reset();
        ask(&mut bench);
    }
}

/// The header of a packet between sockets (virtio 1.2, 5.10.6), its operations, and what a driver has room for.
const VSOCK_HEADER: usize = 44;
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
const RESET: u8 = 3;
const DATA: u8 = 5;
const ROOM: u32 = 0x1_0000;

/// A packet to the host in answer to one from it.
fn answer(packet: &[u8], operation: u8, data: &[u8]) -> Vec<u8> {
    let [source, destination] = [&packet[..8], &packet[8..16]];
    let [source_port, destination_port] = [&packet[16..20], &packet[20..24]];
    let mut answer = [destination, source, destination_port, source_port].concat();
    answer.extend((data.len() as u32).to_le_bytes());
    answer.extend([1, 0, operation, 0, 0, 0, 0, 0]);
    answer.extend([ROOM.to_le_bytes(), [0; 4]].concat());
    answer.extend(data);
    answer
}

/// The next packet from the host with data, or of this operation.
fn expect(bench: &mut Bench, operation: u8) -> Vec<u8> {
    let limit = Instant::now() + PATIENCE;
    while Instant::now() < limit {
        if let Some(packet) = bench.receive(Duration::from_millis(200))
            && packet[30] == operation
        {
            return packet;
        }
    }
    panic!("no packet of operation {operation}");
}

/// Connects to a port of a guest.
fn connect(cid: u32, port: u32) -> io::Result<File> {
    // SAFETY: the call makes a socket, or fails.
    let socket = match unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) } {
        // SAFETY: nobody else has this file.
        fd @ 0.. => unsafe { OwnedFd::from_raw_fd(fd) },
        _ => return Err(io::Error::last_os_error()),
    };
    // SAFETY: the address is plain data, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    (address.svm_family, address.svm_cid, address.svm_port) = (libc::AF_VSOCK as _, cid, port);
    let len = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the address is of that length.
    match unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) } {
        0 => Ok(File::from(socket)),
        _ => Err(io::Error::last_os_error()),
    }
}

#[test]
fn a_program_of_the_host_talks_with_a_driver_by_way_of_the_kernel() {
    const PORT: u32 = 1234;
    // Machines that run meanwhile have other addresses.
    let cid = 0x7000_0000 + std::process::id();
    let Some(device) = needed(kernel_vsock(cid)) else { return };
    let mut bench = Bench::new(device, features::RING_PACKED);
    for round in 0..2 {
        bench.serve();
        let program = thread::spawn(move || {
            let mut socket = connect(cid, PORT).expect("the guest answers");
            socket.write_all(b"from the host").unwrap();
            let mut text = [0; 14];
            socket.read_exact(&mut text).unwrap();
            assert_eq!(&text, b"from the guest");
            assert_eq!(socket.read(&mut text).unwrap_or(0), 0, "it is closed");
        });
        let request = expect(&mut bench, REQUEST);
        assert_eq!(
            request[..16],
            [u64::from(libc::VMADDR_CID_HOST), cid.into()].map(u64::to_le_bytes).concat()
        );
        assert_eq!(request[20..24], PORT.to_le_bytes());
        bench.send(&answer(&request, RESPONSE, b""));
        let data = expect(&mut bench, DATA);
        assert_eq!(&data[VSOCK_HEADER..], b"from the host");
        bench.hold();
        bench.send(&answer(&request, DATA, b"from the guest"));
        bench.send(&answer(&request, RESET, b""));
        while !program.is_finished() {
            bench.serve();
            thread::sleep(Duration::from_millis(1));
        }
        program.join().expect("the program has what it should");
        if round == 0 {
            bench.reset();
        }
    }
}
