//! Backends of vhost-user that keep to no rule: what they say when they are asked, and what they write into the rings that
//! they share. The guest's driver is hostile as well, but in little.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arbitrary::Unstructured;
use ruse_memory::GuestRam;
use ruse_vhost::{Backend, BackendError, Kind, OpenDevice, Peer, Region, RingSetup, VhostDevice};
use ruse_virtio::ring::Queue;
use ruse_virtio::ring::driver::Driver;
use ruse_virtio::{Buffer, Dma, Work, features};

use crate::input::{byte, number, one_in, pick};

const RAM: u64 = 1 << 20;
const RINGS: u64 = 0x1_0000;
const DATA: u64 = 0x4_0000;
/// What happens for one input at most.
const MOST_STEPS: usize = 60;

pub(crate) fn run(data: &[u8]) {
    let mut u = Unstructured::new(data);
    if one_in(&mut u, 4) { talk(&mut u) } else { rings(&mut u) }
}

/// A backend that answers requests with anything: an error, or a device.
fn talk(u: &mut Unstructured) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).expect("a socket");
    let mut answers: Vec<Vec<u8>> = (0..byte(u) % 6).map(|_| answer(u)).collect();
    let kind = byte(u) % 3;
    answers.reverse();
    let backend = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a front end");
        while let Some(answer) = answers.pop() {
            // Somebody who hears nothing more has been heard.
            if request(&mut stream).is_none() || stream.write_all(&answer).is_err() {
                return;
            }
        }
    });
    let peer = Peer::new(&path).with_patience(Duration::from_millis(10));
    let _ = match kind {
        0 => ruse_vhost::block(&peer, None, 4).map(drop),
        1 => ruse_vhost::net(&peer, [2; 6], None).map(drop),
        _ => ruse_vhost::fs(&peer, "tag").map(drop),
    };
    backend.join().expect("the backend does not panic");
}

/// Takes a request.
fn request(stream: &mut UnixStream) -> Option<()> {
    let mut header = [0; 12];
    stream.read_exact(&mut header).ok()?;
    let len = u32::from_le_bytes([8, 9, 10, 11].map(|at| header[at]));
    stream.read_exact(&mut vec![0; len as usize]).ok()
}

/// An answer to a request that front ends make at first, or something like it.
fn answer(u: &mut Unstructured) -> Vec<u8> {
    let code = pick(u, &[1u32, 3, 15, 16, 17, 24, 2]);
    let len = pick(u, &[8u32, 8, 8, 72, 0, 5000]);
    let flags = if one_in(u, 8) { number(u) as u32 } else { 5 };
    let mut bytes = [code, flags, len].map(u32::to_le_bytes).concat();
    let mut body = vec![0; len as usize];
    let value = if one_in(u, 2) { 1 << 32 | 1 << 30 | 0xb } else { number(u) };
    body.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
    bytes.extend(body);
    if one_in(u, 8) {
        bytes.truncate(usize::from(byte(u)) % (bytes.len() + 1));
    }
    bytes
}

/// The memory of rings, as a backend sees it.
#[derive(Default)]
struct Shared {
    file: Option<File>,
    used: u64,
    fails: bool,
}

/// A backend that only remembers where the rings are.
struct Rings(Arc<Mutex<Shared>>);

impl Rings {
    fn check(&self) -> Result<(), BackendError> {
        match std::mem::take(&mut self.0.lock().expect("nobody panics with it").fails) {
            true => Err(BackendError::Closed),
            false => Ok(()),
        }
    }
}

impl Backend for Rings {
    fn features(&self) -> u64 {
        features::VERSION_1 | features::INDIRECT_DESC
    }
    fn configure(&mut self, _features: u64, memory: &[Region]) -> Result<(), BackendError> {
        let rings = memory.last().ok_or(BackendError::Closed)?;
        let mut shared = self.0.lock().expect("nobody panics with it");
        shared.file = Some(File::from(rings.file.try_clone_to_owned()?));
        shared.used = rings.host;
        drop(shared);
        self.check()
    }
    fn start(&mut self, index: u16, ring: &RingSetup) -> Result<(), BackendError> {
        if index == 0 {
            let mut shared = self.0.lock().expect("nobody panics with it");
            shared.used = ring.used - ring.descriptors;
        }
        self.check()
    }
    fn stop(&mut self, _index: u16) -> Result<(), BackendError> {
        self.check()
    }
}

/// A backend that gives chains back, or writes anything where it should.
fn rings(u: &mut Unstructured) {
    let ram = GuestRam::new(RAM).expect("RAM");
    let shared = Arc::new(Mutex::new(Shared::default()));
    let device = VhostDevice::new(Kind::Net, 0, 1, vec![0; 12]);
    let open = OpenDevice::new(device, "a backend".into(), Box::new(Rings(shared.clone())));
    let (_, mut handlers) = open.plug(&ram).expect("eventfds");
    let handler = handlers.first_mut().expect("one queue");
    let dma = Dma::new(&ram);
    let taken = features::VERSION_1 | if one_in(u, 2) { features::RING_PACKED } else { features::EVENT_IDX };
    let (mut resets, mut index) = (0, 0u16);
    let mut driver = Driver::new(RINGS, 16, taken);
    let mut queue = Queue::new(driver.layout, taken).expect("a queue");
    for _ in 0..MOST_STEPS {
        match byte(u) % 8 {
            0 | 1 => {
                let at = if one_in(u, 8) { number(u) } else { DATA + u64::from(byte(u)) * 512 };
                let parts =
                    [(Buffer { at: DATA, len: 16 }, false), (Buffer { at, len: byte(u).into() }, true)];
                driver.add(&dma, &parts, false);
            }
            2 | 3 => give_back(u, &shared.lock().expect("nobody panics with it"), &mut index),
            4 if one_in(u, 4) => {
                let mut work = Work { index: 0, features: taken, resets, queue };
                let served = handler.recall(&mut work, &dma);
                assert!(served.is_err() || served.is_ok_and(|served| !served.outside));
                queue = work.queue;
            }
            5 if one_in(u, 4) => shared.lock().expect("nobody panics with it").fails = true,
            6 if one_in(u, 4) => {
                handler.idle(resets);
                (resets, index) = (resets + 1, 0);
                dma.write(RINGS, &[0; 0x8000]).expect("RAM");
                driver = Driver::new(RINGS, 16, taken);
                queue = Queue::new(driver.layout, taken).expect("a queue");
            }
            _ => {
                let mut work = Work { index: 0, features: taken, resets, queue };
                let result = handler.serve(&mut work, &dma);
                queue = work.queue;
                if result.is_err() {
                    // As a device that needs a reset.
                    handler.idle(resets);
                }
                while driver.take(&dma).is_some() {}
            }
        }
        if u.is_empty() {
            break;
        }
    }
}

/// Writes an entry of the used ring, and the index behind it.
fn give_back(u: &mut Unstructured, shared: &Shared, index: &mut u16) {
    let Some(file) = &shared.file else { return };
    let head = if one_in(u, 4) { number(u) as u32 } else { 0 };
    let len = if one_in(u, 4) { number(u) as u32 } else { 0 };
    let entry = shared.used + 4 + 8 * u64::from(*index % 256);
    file.write_all_at(&[head, len].map(u32::to_le_bytes).concat(), entry).expect("shared memory");
    *index = if one_in(u, 8) { number(u) as u16 } else { index.wrapping_add(1) };
    file.write_all_at(&index.to_le_bytes(), shared.used + 2).expect("shared memory");
}
