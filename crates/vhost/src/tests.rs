//! Drivers, devices and backends together: backends that work, end and come back, and those that do not keep to the rules.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ruse_memory::GuestRam;
use ruse_virtio::ring::driver::Driver;
use ruse_virtio::ring::{Queue, RingError};
use ruse_virtio::{Buffer, Device, Dma, Handler, Served, Work, features};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::user::{Peer, VhostUserError, block, fs, net};

const CONFIG_LEN: usize = 60;
const SECTORS: u64 = 2048;
const PATIENCE: Duration = Duration::from_secs(20);
/// What the backends offer: VERSION_1, INDIRECT_DESC, PROTOCOL_FEATURES, FLUSH.
const OFFERED: u64 = 1 << 32 | 1 << 28 | 1 << 30 | 1 << 9;

/// What a backend does otherwise than it should.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Vice {
    None,
    /// It closes the connection at this request.
    Closes(u32),
    /// It does not answer this request.
    Silent(u32),
    /// It answers this request with another one's number.
    Confused(u32),
    /// It answers this request with more than there can be.
    Long(u32),
    /// It says that it could not do this.
    Refuses(u32),
    /// It gives back chains that it does not have.
    Invents,
    /// It says that it has written more than there is room for.
    Boasts,
    /// It has no version 1.
    Old,
    /// It takes chains and answers none.
    Hoards,
}

/// A ring, as a backend has it.
#[derive(Default)]
struct Ring {
    size: u16,
    /// Addresses in the front end: descriptors, used, available.
    places: [u64; 3],
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    next: u16,
}

/// A backend that fills what the driver wants to be written with 0x5a.
struct Server {
    stream: UnixStream,
    vice: Vice,
    rings: Vec<Ring>,
    /// Guest physical address, bytes, address in the front end, bytes mapped here.
    memory: Vec<(u64, u64, u64, vm_memory::MmapRegion)>,
}

impl Server {
    fn run(mut self) {
        use rustix::event::{PollFd, PollFlags, poll};
        loop {
            let mut files = vec![PollFd::new(&self.stream, PollFlags::IN)];
            let kicks: Vec<_> = self.rings.iter().filter_map(|ring| ring.kick.as_ref()).collect();
            files.extend(kicks.iter().map(|kick| PollFd::new(*kick, PollFlags::IN)));
            poll(&mut files, None).unwrap();
            let asked = !files[0].revents().is_empty();
            drop(files);
            if asked && !self.answer() {
                return;
            }
            (0..self.rings.len()).for_each(|index| self.serve(index));
        }
    }

    fn answer(&mut self) -> bool {
        let mut header = [0; 12];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [std::io::IoSliceMut::new(&mut header)];
        match recvmsg(&self.stream, &mut parts, &mut control, RecvFlags::empty()) {
            Ok(message) if message.bytes == 12 => {}
            _ => return false,
        }
        let mut files: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        let [code, flags, len] =
            [0, 4, 8].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
        let mut body = vec![0; len as usize];
        if self.stream.read_exact(&mut body).is_err() {
            return false;
        }
        let mut answer = self.obey(code, &body, files);
        if answer.is_none() && flags & 8 != 0 {
            answer = Some(u64::from(self.vice == Vice::Refuses(code)).to_le_bytes().to_vec());
        }
        match self.vice {
            Vice::Closes(at) if at == code => return false,
            Vice::Silent(at) if at == code => return true,
            _ => {}
        }
        let Some(mut answer) = answer else { return true };
        if self.vice == Vice::Long(code) {
            answer.resize(5000, 0);
        }
        let code = if self.vice == Vice::Confused(code) { code ^ 1 } else { code };
        let header = [code, 5, answer.len() as u32].map(u32::to_le_bytes).concat();
        self.stream.write_all(&[header, answer].concat()).is_ok()
    }

    fn obey(&mut self, code: u32, body: &[u8], mut files: Vec<OwnedFd>) -> Option<Vec<u8>> {
        let word = |at: usize| u64::from_le_bytes(body[8 * at..8 * at + 8].try_into().unwrap());
        let index = body.first().map_or(0, |&index| usize::from(index));
        let value = || u32::from_le_bytes(body[4..8].try_into().unwrap());
        let number = |number: u64| Some(number.to_le_bytes().to_vec());
        match code {
            1 => return number(if self.vice == Vice::Old { OFFERED & !(1 << 32) } else { OFFERED }),
            15 => return number(1 | 1 << 3 | 1 << 9),
            17 => return number(2),
            24 => {
                let mut config = [0; CONFIG_LEN];
                config[..8].copy_from_slice(&SECTORS.to_le_bytes());
                return Some([&body[..12], &config].concat());
            }
            2 => assert_eq!(word(0) & !OFFERED, 0, "features that were not offered"),
            5 => {
                self.memory.clear();
                for (n, file) in files.drain(..).enumerate() {
                    let [gpa, size, host, offset] = [1, 2, 3, 4].map(|at| word(at + 4 * n));
                    let file = vm_memory::FileOffset::new(file.into(), offset);
                    let mapped = vm_memory::MmapRegion::from_file(file, size as usize).unwrap();
                    self.memory.push((gpa, size, host, mapped));
                }
            }
            8 => self.rings[index].size = value() as u16,
            9 => self.rings[index].places = [word(1), word(2), word(3)],
            10 => self.rings[index].next = value() as u16,
            11 => {
                self.rings[index].kick = None;
                let next = u32::from(self.rings[index].next);
                return Some([index as u32, next].map(u32::to_le_bytes).concat());
            }
            12 => self.rings[index].kick = files.pop(),
            13 => self.rings[index].call = files.pop(),
            _ => {}
        }
        None
    }

    /// The memory at an address, of the guest or in the front end.
    fn at(&self, address: u64, of_guest: bool) -> (&vm_memory::MmapRegion, usize) {
        for (gpa, size, host, mapped) in &self.memory {
            let base = if of_guest { *gpa } else { *host };
            if address.wrapping_sub(base) < *size {
                return (mapped, (address - base) as usize);
            }
        }
        panic!("no memory at {address:#x}");
    }

    fn load<const N: usize>(&self, address: u64, of_guest: bool) -> [u8; N] {
        use vm_memory::{Bytes, VolatileMemory};
        let (mapped, at) = self.at(address, of_guest);
        let mut bytes = [0; N];
        mapped.as_volatile_slice().read_slice(&mut bytes, at).unwrap();
        bytes
    }

    fn store(&self, address: u64, of_guest: bool, bytes: &[u8]) {
        use vm_memory::{Bytes, VolatileMemory};
        let (mapped, at) = self.at(address, of_guest);
        mapped.as_volatile_slice().write_slice(bytes, at).unwrap();
    }

    /// Answers what is available.
    fn serve(&mut self, index: usize) {
        let Ring { size, places: [table, used, available], kick: Some(kick), call: Some(call), next } =
            &self.rings[index]
        else {
            return;
        };
        // The front end's eventfds do not block.
        let _ = rustix::io::read(kick, &mut [0; 8]);
        let (size, mut at) = (*size, *next);
        let end = u16::from_le_bytes(self.load(available + 2, false));
        while at != end && self.vice != Vice::Hoards {
            let entry = u64::from(at % size);
            let head = u16::from_le_bytes(self.load(available + 4 + 2 * entry, false));
            let mut written = self.fill(*table, head);
            let head = u32::from(head) ^ u32::from(self.vice == Vice::Invents);
            if self.vice == Vice::Boasts {
                written = u32::MAX;
            }
            self.store(used + 4 + 8 * entry, false, &[head.to_le_bytes(), written.to_le_bytes()].concat());
            at = at.wrapping_add(1);
            self.store(used + 2, false, &at.to_le_bytes());
        }
        let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        self.rings[index].next = at;
    }

    /// Fills what is to be written of a chain; says how many bytes that are.
    fn fill(&self, table: u64, head: u16) -> u32 {
        let (mut at, mut of_guest, mut written) = (table + 16 * u64::from(head), false, 0);
        let mut table = table;
        loop {
            let bytes: [u8; 16] = self.load(at, of_guest);
            let (address, len) =
                (u64::from_le_bytes(bytes[..8].try_into().unwrap()), bytes[8..12].try_into().unwrap());
            let len = u32::from_le_bytes(len);
            let flags = u16::from_le_bytes([bytes[12], bytes[13]]);
            if flags & 4 != 0 {
                (table, at, of_guest) = (address, address, true);
                continue;
            }
            if flags & 2 != 0 {
                self.store(address, true, &vec![0x5a; len as usize]);
                written += len;
            }
            if flags & 1 == 0 {
                return written;
            }
            at = table + 16 * u64::from(u16::from_le_bytes([bytes[14], bytes[15]]));
        }
    }
}

/// Backends at a socket, one connection after the other; the last vice stays.
struct Host {
    dir: tempfile::TempDir,
    /// The last connection.
    stream: Arc<Mutex<Option<UnixStream>>>,
    _thread: JoinHandle<()>,
}

impl Host {
    fn new(vices: &[Vice]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let vices = vices.to_vec();
        let stream = Arc::<Mutex<Option<UnixStream>>>::default();
        let last = stream.clone();
        let thread = std::thread::spawn(move || {
            for n in 0.. {
                let Ok((stream, _)) = listener.accept() else { return };
                *last.lock().unwrap() = stream.try_clone().ok();
                let rings = (0..2).map(|_| Ring::default()).collect();
                let vice = vices[n.min(vices.len() - 1)];
                Server { stream, vice, rings, memory: Vec::new() }.run();
                // The other one of its files.
                last.lock().unwrap().take();
            }
        });
        Self { dir, stream, _thread: thread }
    }

    /// Ends the backend, as if it were killed.
    fn end(&self) {
        self.stream.lock().unwrap().take().unwrap().shutdown(Shutdown::Both).unwrap();
    }

    fn peer(&self) -> Peer {
        Peer::new(&self.path()).with_patience(Duration::from_millis(300))
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("socket")
    }
}

/// A device, and what serves its first queue.
fn plug(host: &Host, ram: &GuestRam) -> (Box<dyn Device>, Box<dyn Handler>) {
    let (device, writable) = block(&host.peer(), None, 4).unwrap();
    assert!(writable);
    let (device, mut handlers) = device.plug(ram).unwrap();
    assert_eq!(handlers.len(), 2);
    (device, handlers.swap_remove(0))
}

/// A driver with one queue of a device.
struct Bench {
    ram: GuestRam,
    driver: Driver,
    queue: Option<Queue>,
    handler: Box<dyn Handler>,
    features: u64,
    resets: u64,
}

impl Bench {
    fn new(host: &Host, features: u64) -> Self {
        let ram = GuestRam::new(1 << 20).unwrap();
        let (device, handler) = plug(host, &ram);
        assert_eq!((features & !device.features(), device.config().len()), (0, CONFIG_LEN));
        let driver = Driver::new(0x1_0000, 8, features);
        let queue = Queue::new(driver.layout, features);
        Self { ram, driver, queue, handler, features, resets: 0 }
    }

    fn serve(&mut self) -> Result<Served, RingError> {
        self.lend(|handler, work, dma| handler.serve(work, dma))
    }

    /// The machine is held.
    fn recall(&mut self) {
        assert!(!self.lend(|handler, work, dma| handler.recall(work, dma)).unwrap().outside);
    }

    fn lend<T>(&mut self, what: impl FnOnce(&mut dyn Handler, &mut Work, &Dma) -> T) -> T {
        let queue = self.queue.take().unwrap();
        let mut work = Work { index: 0, features: self.features, resets: self.resets, queue };
        let result = what(&mut *self.handler, &mut work, &Dma::new(&self.ram));
        self.queue = Some(work.queue);
        result
    }

    /// Makes a chain available: 16 bytes to read, 512 to write at this address.
    fn add(&mut self, at: u64) {
        let parts = [(Buffer { at: 0x4_0000, len: 16 }, false), (Buffer { at, len: 512 }, true)];
        self.driver.add(&Dma::new(&self.ram), &parts, false).unwrap();
    }

    /// Serves until the driver has a chain back.
    fn answered(&mut self) -> Result<(), RingError> {
        let limit = Instant::now() + PATIENCE;
        loop {
            let served = self.serve()?;
            if self.driver.take(&Dma::new(&self.ram)).is_some() {
                assert!(served.interrupt);
                return Ok(());
            }
            assert!(Instant::now() < limit, "no answer");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn byte(&self, at: u64) -> u8 {
        let mut byte = [0];
        Dma::new(&self.ram).read(at, &mut byte).unwrap();
        byte[0]
    }

    /// The driver resets the device and starts anew.
    fn reset(&mut self) {
        self.handler.idle(self.resets);
        self.resets += 1;
        Dma::new(&self.ram).write(0x1_0000, &[0; 0x8000]).unwrap();
        self.driver = Driver::new(0x1_0000, 8, self.features);
        self.queue = Queue::new(self.driver.layout, self.features);
    }
}

#[test]
fn a_backend_serves_any_ring_of_the_guests_and_what_it_writes_is_seen() {
    for features in
        [0, features::RING_PACKED, features::RING_PACKED | features::EVENT_IDX | features::INDIRECT_DESC]
    {
        let host = Host::new(&[Vice::None]);
        let mut bench = Bench::new(&host, features::VERSION_1 | features);
        let (tracker, offset) = bench.ram.tracker(0x5_1000).map(|(t, o)| (t.clone(), o)).unwrap();
        for n in 0..300 {
            tracker.take_dirty(offset);
            bench.add(0x5_1000);
            bench.answered().unwrap();
            assert_eq!((n, bench.byte(0x5_11ff), bench.byte(0x5_1200)), (n, 0x5a, 0));
            assert!(tracker.take_dirty(offset), "the page counts as written");
            Dma::new(&bench.ram).write(0x5_1000, &[0; 512]).unwrap();
        }
    }
}

#[test]
fn a_driver_starts_anew_and_a_held_machine_goes_on() {
    let host = Host::new(&[Vice::None]);
    let mut bench = Bench::new(&host, features::VERSION_1);
    for _ in 0..3 {
        bench.add(0x5_0000);
        bench.answered().unwrap();
        bench.recall();
        bench.add(0x6_0000);
        bench.answered().unwrap();
        bench.reset();
    }
}

#[test]
fn what_a_backend_has_not_answered_another_one_answers() {
    let host = Host::new(&[Vice::Hoards, Vice::None]);
    let mut bench = Bench::new(&host, features::VERSION_1);
    for at in [0x5_0000, 0x6_0000] {
        bench.add(at);
        assert!(bench.serve().unwrap().outside);
    }
    // It is held for a while, and has not answered after that either.
    bench.recall();
    assert!(bench.serve().unwrap().outside);
    host.end();
    bench.answered().unwrap();
    assert!(bench.driver.take(&Dma::new(&bench.ram)).is_some(), "both come back at once");
    assert_eq!((bench.byte(0x5_0000), bench.byte(0x6_0000)), (0x5a, 0x5a));
}

#[test]
fn what_was_not_answered_when_the_machine_was_held_another_handler_answers() {
    let (host, other) = (Host::new(&[Vice::Hoards]), Host::new(&[Vice::None]));
    let mut bench = Bench::new(&host, features::VERSION_1 | features::RING_PACKED);
    for at in [0x5_0000, 0x6_0000] {
        bench.add(at);
    }
    assert!(bench.serve().unwrap().outside);
    bench.recall();
    (_, bench.handler) = plug(&other, &bench.ram);
    bench.answered().unwrap();
    assert!(bench.driver.take(&Dma::new(&bench.ram)).is_some(), "both come back at once");
    assert_eq!((bench.byte(0x5_0000), bench.byte(0x6_0000)), (0x5a, 0x5a));
}

#[test]
fn nobody_and_the_unfit_are_errors_of_one_line() {
    let error = |result: Result<_, VhostUserError>| result.map(drop).unwrap_err().to_string();
    let dir = tempfile::tempdir().unwrap();
    let nobody = error(block(&Peer::new(&dir.path().join("x")), None, 1).map(drop));
    assert!(nobody.starts_with("nobody serves a device at '"), "{nobody}");
    let peer = |vice| Host::new(&[vice]);
    for (vice, expected) in [
        (Vice::Closes(1), "it has closed the connection"),
        (Vice::Closes(24), "it has closed the connection"),
        (Vice::Silent(1), "it does not answer"),
        (Vice::Silent(24), "it does not answer"),
        (Vice::Confused(15), "an answer to something that it was not asked"),
        (Vice::Long(24), "an answer of a length that it cannot have"),
        (Vice::Old, "it knows devices of before virtio 1.0 only"),
    ] {
        let host = peer(vice);
        let text = error(block(&host.peer(), None, 1).map(drop));
        assert!(text.ends_with(expected) && !text.contains('\n'), "{vice:?}: {text}");
    }
    let host = Host::new(&[Vice::None]);
    let text = error(block(&host.peer(), Some(3), 1).map(drop));
    assert!(text.ends_with("it has 2 queues, fewer than 3"), "{text}");
    assert!(fs(&host.peer(), "tag").is_ok());
    assert!(net(&host.peer(), [2; 6], Some(1400)).is_ok());
    assert!(Path::new(&host.path()).exists());
}

#[test]
fn a_backend_that_breaks_the_rules_is_not_trusted_until_the_driver_starts_anew() {
    for vice in
        [Vice::Invents, Vice::Boasts, Vice::Silent(5), Vice::Confused(13), Vice::Refuses(9), Vice::Long(12)]
    {
        let host = Host::new(&[vice, Vice::None]);
        let mut bench = Bench::new(&host, features::VERSION_1);
        bench.add(0x5_0000);
        assert_eq!(bench.answered(), Err(RingError::Backend), "{vice:?}");
        assert_eq!(bench.serve(), Err(RingError::Backend), "{vice:?}");
        bench.reset();
        bench.add(0x6_0000);
        bench.answered().unwrap();
    }
}

#[test]
fn a_backend_that_ends_comes_back() {
    for code in [5, 12, 18] {
        let host = Host::new(&[Vice::Closes(code), Vice::None]);
        let mut bench = Bench::new(&host, features::VERSION_1);
        bench.add(0x5_0000);
        bench.answered().unwrap();
        assert_eq!(bench.byte(0x5_0000), 0x5a);
    }
}

#[test]
fn a_backend_that_does_not_stop_holds_nobody() {
    let host = Host::new(&[Vice::Silent(11), Vice::None]);
    let mut bench = Bench::new(&host, features::VERSION_1);
    bench.add(0x5_0000);
    bench.answered().unwrap();
    let start = Instant::now();
    bench.reset();
    assert!(start.elapsed() < Duration::from_secs(5));
    bench.add(0x6_0000);
    bench.answered().unwrap();
}
