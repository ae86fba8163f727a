//! The file system device (virtio 1.2, 5.11): carries requests to the server of a folder ([`ruse_fs`]).

use std::sync::Arc;

use ruse_fs::abi::{Header, IN_HEADER, OUT_HEADER, opcode};
pub use ruse_fs::{Cache, Options, Server, ShareError};
use ruse_fs::{Reply, Request};
use rustix::io::Errno;

use crate::chain::Chain;
use crate::core::Work;
use crate::device::{Device, Handler, Identity, Served, serve};
use crate::dma::{Dma, plain, written};
use crate::features;
use crate::ring::RingError;

/// Device type.
const KIND: u16 = 26;
/// A mass storage controller of no kind that PCI knows.
const PCI_CLASS: u32 = 0x01_80_00;
/// Entries of each queue: a request of 1 MiB has 256 pages and what stands before them.
const ENTRIES: u16 = 1024;
/// The queue of what must not wait for others, and that of the requests.
const QUEUES: usize = 2;
/// Most bytes of a tag.
pub const TAG_LEN: usize = 36;
/// Most bytes of a request without its data.
const MOST_BODY: u64 = 64 << 10;
/// Where the data of an answer begin.
const DATA: u64 = OUT_HEADER as u64;
/// What stands in a write before its data.
const WRITE: u64 = 40;

/// The registers' side.
#[derive(Clone, Debug)]
pub struct FileSystem {
    tag: [u8; TAG_LEN],
    server: Arc<Server>,
}

impl FileSystem {
    /// A folder by the name that the guest mounts it by. Of `tag`, the first 36 bytes count.
    pub fn new(tag: &str, server: Server) -> Self {
        let mut bytes = [0; TAG_LEN];
        bytes.iter_mut().zip(tag.bytes()).for_each(|(to, from)| *to = from);
        Self { tag: bytes, server: Arc::new(server) }
    }

    /// What serves its queues.
    pub fn handlers(&self) -> Vec<Box<dyn Handler>> {
        let handler = || FileSystemHandler { server: self.server.clone(), confined: false };
        (0..QUEUES).map(|_| Box::new(handler()) as Box<dyn Handler>).collect()
    }
}

impl Device for FileSystem {
    fn identity(&self) -> Identity {
        Identity { kind: KIND, pci_class: PCI_CLASS }
    }

    fn features(&self) -> u64 {
        features::COMMON
    }

    fn queues(&self) -> Vec<u16> {
        vec![ENTRIES; QUEUES]
    }

    /// The tag and the number of queues for requests (5.11.4).
    fn config(&self) -> Vec<u8> {
        [&self.tag[..], &(QUEUES as u32 - 1).to_le_bytes()].concat()
    }
}

/// Serves one queue.
#[derive(Debug)]
struct FileSystemHandler {
    server: Arc<Server>,
    confined: bool,
}

impl Handler for FileSystemHandler {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        // The thread that serves is the handler's own from here on.
        if !std::mem::replace(&mut self.confined, true) {
            self.server.confine();
        }
        serve(&mut work.queue, dma, |chain| answer(&self.server, chain, dma))
    }
}

/// Answers one request; gives the bytes written.
fn answer(server: &Server, chain: &Chain, dma: &Dma) -> Result<u32, RingError> {
    let mut bytes = [0; IN_HEADER];
    chain.read(dma, 0, &mut bytes)?;
    let header = Header::parse(&bytes);
    let reply = request(server, &header, chain, dma)?;
    let (error, len) = match &reply {
        Ok(Reply::None) => return Ok(0),
        Ok(Reply::Bytes(bytes)) => (0, bytes.len()),
        Ok(Reply::Filled(len)) => (0, *len),
        Err(error) => (-error.raw_os_error(), 0),
    };
    // An answer that has no room is none: nobody waits for it.
    let len = OUT_HEADER + len;
    if len as u64 > chain.writable_len() {
        return Ok(0);
    }
    let head = [&(len as u32).to_le_bytes()[..], &error.to_le_bytes(), &header.unique.to_le_bytes()].concat();
    chain.write(dma, 0, &head)?;
    if let Ok(Reply::Bytes(bytes)) = &reply {
        chain.write(dma, OUT_HEADER as u64, bytes)?;
    }
    Ok(len as u32)
}

fn request(
    server: &Server,
    header: &Header,
    chain: &Chain,
    dma: &Dma,
) -> Result<Result<Reply, Errno>, RingError> {
    let start = IN_HEADER as u64;
    let behind = chain.readable_len() - start;
    let has_data = header.opcode == opcode::WRITE;
    let len = if has_data { behind.min(WRITE) } else { behind };
    if len > MOST_BODY {
        return Ok(Err(Errno::TOOBIG));
    }
    let mut body = vec![0; len as usize];
    chain.read(dma, start, &mut body)?;
    let data = chain.readable_slices(dma, start + len, behind - len)?;
    // Only what is read goes past this function.
    let len = if header.opcode == opcode::READ { chain.writable_len().saturating_sub(DATA) } else { 0 };
    let to = chain.writable_slices(dma, DATA.min(chain.writable_len()), len)?;
    let (data, room) = (plain(&data), plain(&to));
    let reply = server.serve(&Request { header: *header, body: &body, data: &data }, &room);
    written(&to);
    Ok(reply)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ruse_memory::GuestRam;

    use super::*;
    use crate::chain::Buffer;
    use crate::ring::Queue;
    use crate::ring::driver::Driver;

    const IN: u64 = 0x4_0000;
    const OUT: u64 = 0x8_0000;

    struct Bench {
        folder: tempfile::TempDir,
        ram: GuestRam,
        driver: Driver,
        work: Work,
        handler: Box<dyn Handler>,
    }

    impl Bench {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let server = Server::new(folder.path(), Options::default()).unwrap();
            let device = FileSystem::new("work", server);
            assert_eq!(device.config()[..5], *b"work\0");
            let driver = Driver::new(0x1_0000, 64, 0);
            let work =
                Work { index: 1, features: 0, resets: 0, queue: Queue::new(driver.layout, 0).unwrap() };
            let handler = device.handlers().remove(1);
            Self { folder, ram: GuestRam::new(2 << 20).unwrap(), driver, work, handler }
        }

        /// Sends a request with room for an answer; gives the answer's error and what is behind its header.
        fn ask(&mut self, opcode: u32, node: u64, body: &[u8], room: u32) -> Option<(i32, Vec<u8>)> {
            let dma = Dma::new(&self.ram);
            let mut header = [0; IN_HEADER];
            header[4..8].copy_from_slice(&opcode.to_le_bytes());
            header[8..16].copy_from_slice(&77u64.to_le_bytes());
            header[16..24].copy_from_slice(&node.to_le_bytes());
            dma.write(IN, &header).unwrap();
            dma.write(IN + IN_HEADER as u64, body).unwrap();
            let parts = [
                (Buffer { at: IN, len: (IN_HEADER + body.len()) as u32 }, false),
                (Buffer { at: OUT, len: room.min(20) }, true),
                (Buffer { at: OUT + 20, len: room.saturating_sub(20) }, true),
            ];
            self.driver.add(&dma, &parts, false).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| self.handler.serve(&mut self.work, &dma)).join().unwrap().unwrap()
            });
            let (_, len) = self.driver.take(&dma).unwrap();
            let mut answer = vec![0; len as usize];
            dma.read(OUT, &mut answer).unwrap();
            let (head, rest) = answer.split_at_checked(OUT_HEADER)?;
            assert_eq!((&head[..4], head[8]), (&len.to_le_bytes()[..], 77));
            Some((i32::from_le_bytes(head[4..8].try_into().unwrap()), rest.to_vec()))
        }
    }

    #[test]
    fn a_file_is_found_and_read() {
        let mut bench = Bench::new();
        let content: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
        fs::write(bench.folder.path().join("file"), &content).unwrap();
        let (error, entry) = bench.ask(opcode::LOOKUP, 1, b"file\0", 144).unwrap();
        let node = u64::from_le_bytes(entry[..8].try_into().unwrap());
        assert_eq!((error, entry.len(), node), (0, 128, 2));
        let (_, open) = bench.ask(opcode::OPEN, node, &[0; 8], 32).unwrap();
        let mut read = open[..8].to_vec();
        read.extend(5u64.to_le_bytes());
        read.extend(99_000u32.to_le_bytes());
        read.extend([0; 20]);
        let (error, data) = bench.ask(opcode::READ, node, &read, 99_016).unwrap();
        assert_eq!((error, &data[..]), (0, &content[5..99_005]));
        assert_eq!(bench.ask(opcode::READ, node, &read, 516).unwrap().1, content[5..505]);
    }

    #[test]
    fn data_of_a_write_reach_the_file() {
        let mut bench = Bench::new();
        let mut create = vec![2, 0, 0, 0, 0xa4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        create.extend(b"new\0");
        let (error, made) = bench.ask(opcode::CREATE, 1, &create, 160).unwrap();
        assert_eq!((error, made.len()), (0, 144));
        let mut write = made[128..136].to_vec();
        write.extend(1u64.to_le_bytes());
        write.extend(7u32.to_le_bytes());
        write.extend([0; 20]);
        write.extend(b"content and more");
        assert_eq!(bench.ask(opcode::WRITE, 2, &write, 24).unwrap(), (0, vec![7, 0, 0, 0, 0, 0, 0, 0]));
        assert_eq!(fs::read(bench.folder.path().join("new")).unwrap(), b"\0content");
    }

    #[test]
    fn failures_are_answers_and_forgetting_is_none() {
        let mut bench = Bench::new();
        assert_eq!(bench.ask(opcode::LOOKUP, 1, b"none\0", 144), Some((-2, Vec::new())));
        assert_eq!(bench.ask(opcode::LOOKUP, 1, b"no end", 144), Some((-22, Vec::new())));
        assert_eq!(bench.ask(opcode::LOOKUP, 99, b"x\0", 144), Some((-116, Vec::new())));
        assert_eq!(bench.ask(opcode::LOOKUP, 1, &[0; 65537], 144), Some((-7, Vec::new())));
        assert_eq!(bench.ask(opcode::FORGET, 1, &[0; 8], 0), None);
        assert_eq!(bench.ask(opcode::GETATTR, 1, &[0; 16], 100), None, "no room for the answer");
        assert_eq!(bench.ask(opcode::GETATTR, 1, &[0; 16], 120).unwrap().0, 0);
    }
}
