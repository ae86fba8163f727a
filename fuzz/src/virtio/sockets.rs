//! The other side of the socket device and of ports: programs of the host that connect, write, read and leave; and what a
//! guest sends them.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use arbitrary::Unstructured;
use ruse_virtio::Handler;
use ruse_virtio::console::{End, Ports};
use ruse_virtio::vsock::Vsock;

use crate::input::{byte, number, one_in, pick};

/// The guest's address.
const CID: u32 = 3;
/// Bytes of a packet's header.
pub(super) const HEADER_LEN: u32 = 44;
/// The host's port that a program listens at.
const SERVICE: u32 = 1;
/// Most programs.
const MOST: usize = 8;

/// Programs of the host.
pub(super) struct Programs {
    path: PathBuf,
    service: UnixListener,
    streams: Vec<UnixStream>,
}

impl Programs {
    pub(super) fn new() -> Self {
        static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let dir = DIR.get_or_init(|| tempfile::tempdir().expect("a folder"));
        let path = dir.path().join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        let service =
            UnixListener::bind(format!("{}_{SERVICE}", path.display())).expect("nobody listens there");
        service.set_nonblocking(true).expect("a socket can be so");
        Self { path, service, streams: Vec::new() }
    }

    /// The device, and what serves it.
    pub(super) fn device(&self) -> (Vsock, Vec<Box<dyn Handler>>) {
        Vsock::listen(CID, &self.path).expect("nobody listens there")
    }

    /// Two ports: one to a program, one to nobody.
    pub(super) fn ports(&mut self) -> (Ports, Vec<Box<dyn Handler>>) {
        let (near, far) = UnixStream::pair().expect("a pair of sockets");
        near.set_nonblocking(true).expect("a socket can be so");
        self.streams.push(near);
        let ends = vec![("p".to_owned(), End::Stream(far)), ("q".to_owned(), End::Nowhere)];
        Ports::new(ends).expect("eventfds")
    }

    /// Some program does something.
    pub(super) fn step(&mut self, u: &mut Unstructured) {
        let place = usize::from(byte(u)) % MOST;
        if place >= self.streams.len() {
            let stream = match one_in(u, 2) {
                true => self.service.accept().map(|(stream, _)| stream),
                false => UnixStream::connect(&self.path).and_then(|mut stream| {
                    writeln!(stream, "CONNECT {}", byte(u) % 4)?;
                    Ok(stream)
                }),
            };
            if let Ok(stream) = stream {
                stream.set_nonblocking(true).expect("a socket can be so");
                self.streams.push(stream);
            }
            return;
        }
        let mut stream = &self.streams[place];
        match byte(u) % 4 {
            0 => drop(self.streams.remove(place)),
            1 => drop(stream.shutdown(pick(u, &[std::net::Shutdown::Read, std::net::Shutdown::Write]))),
            2 => drop(stream.read(&mut [0; 4096])),
            _ => drop(stream.write(&vec![byte(u); usize::from(byte(u)) * 40])),
        }
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        // The folder is removed at the end of the process at the latest.
        let _ = std::fs::remove_file(format!("{}_{SERVICE}", self.path.display()));
    }
}

/// A packet's header, mostly of one of few connections.
pub(super) fn header(u: &mut Unstructured, len: u32) -> Vec<u8> {
    let cid = |u: &mut Unstructured, usual: u32| if one_in(u, 32) { number(u) } else { usual.into() };
    let host_port = pick(u, &[SERVICE, SERVICE, 9, 1 << 30, (1 << 30) + 1, (1 << 30) + 2]);
    let op = byte(u) % 9;
    let kind = if one_in(u, 32) { byte(u) } else { 1 };
    let room: u32 = if one_in(u, 4) { number(u) as u32 } else { 4096 };
    let passed_on = if one_in(u, 4) { number(u) as u32 } else { 0 };
    [
        cid(u, CID).to_le_bytes().to_vec(),
        cid(u, 2).to_le_bytes().to_vec(),
        u32::from(byte(u) % 4).to_le_bytes().to_vec(),
        host_port.to_le_bytes().to_vec(),
        len.to_le_bytes().to_vec(),
        vec![kind, 0, op, 0],
        u32::from(byte(u) % 4).to_le_bytes().to_vec(),
        room.to_le_bytes().to_vec(),
        passed_on.to_le_bytes().to_vec(),
    ]
    .concat()
}

/// A message of a driver of ports, mostly of those that there are.
pub(super) fn port_message(u: &mut Unstructured) -> Vec<u8> {
    let port = if one_in(u, 16) { number(u) as u32 } else { u32::from(byte(u) % 2) };
    [port.to_le_bytes().to_vec(), vec![byte(u) % 8, 0, byte(u) % 2, 0]].concat()
}
