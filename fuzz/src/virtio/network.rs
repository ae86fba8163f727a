//! The network device's other side: frames that come and go as an input says.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use arbitrary::Unstructured;
use ruse_devices::pci::lock;
use ruse_net::{Driver, HEADER_LEN, Network, Offer, Offloads, Port, Received, Receiver, Sender, Slice};
use ruse_virtio::net::Net;
use ruse_virtio::ring::driver::Part;
use ruse_virtio::{Buffer, Dma, Handler};

use super::{Bench, any_buffer};
use crate::input::{byte, number, one_in, pick};

/// Frames that wait for the guest: their lengths.
#[derive(Clone, Default)]
pub(super) struct Frames(Arc<Mutex<Vec<usize>>>);

impl Frames {
    /// The device, and what serves its queues.
    pub(super) fn device(&self) -> (Net, Vec<Box<dyn Handler>>) {
        let file = tempfile::tempfile().expect("a file can be made");
        let receiver = Box::new(Source { frames: self.clone(), file });
        Net::new(Arc::new(self.clone()), vec![Port { sender: Box::new(self.clone()), receiver }], [2; 6])
    }

    /// A frame comes.
    pub(super) fn step(&self, u: &mut Unstructured) {
        let len = if one_in(u, 4) { number(u) as usize % 65562 } else { usize::from(byte(u)) * 8 };
        lock(&self.0).push(HEADER_LEN + 14 + len);
    }
}

impl Network for Frames {
    fn offer(&self) -> Offer {
        Offer { takes: Offloads::all(), gives: Offloads::all(), mtu: Some(1500) }
    }
    fn start(&self, driver: Driver) {
        assert!(Offloads::all().contains(driver.offloads));
    }
    fn set_offloads(&self, _offloads: Offloads) {}
    fn set_pairs(&self, pairs: u16) {
        assert_eq!(pairs, 1, "there is one pair");
    }
}

impl Sender for Frames {
    fn send(&mut self, frame: &[Slice]) {
        let len: usize = frame.iter().map(|slice| slice.len()).sum();
        assert!((HEADER_LEN + 14..=HEADER_LEN + 18 + 65535).contains(&len));
    }
}

struct Source {
    frames: Frames,
    file: std::fs::File,
}

impl Receiver for Source {
    fn source(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
    fn receive(&mut self, take: &mut dyn FnMut(&[&[u8]]) -> bool) -> Received {
        let Some(len) = lock(&self.frames.0).last().copied() else { return Received::Nothing };
        let frame = vec![0xff; len];
        let (head, rest) = frame.split_at(HEADER_LEN + 6);
        if !take(&[head, rest]) {
            return Received::Refused;
        }
        lock(&self.frames.0).pop();
        Received::Taken
    }
}

impl Bench {
    /// Buffers for frames, frames, and commands.
    pub(super) fn network_request(&self, u: &mut Unstructured, queue: usize, header: u64) -> Vec<Part> {
        let any = |u: &mut Unstructured, writable: bool| {
            let len = if one_in(u, 4) { 0x1_0000 } else { u32::from(byte(u)) * 8 };
            (any_buffer(u, len), writable ^ one_in(u, 32))
        };
        match queue {
            0 => (0..=byte(u) % 3).map(|_| any(u, true)).collect(),
            1 => (0..=byte(u) % 3).map(|_| any(u, false)).collect(),
            _ => {
                let mut command = vec![byte(u) % 7, byte(u) % 7];
                let len = pick(u, &[1, 2, 6, 8, 16, 0, 40]);
                command.extend((0..len).map(|_| if one_in(u, 3) { byte(u) } else { byte(u) % 3 }));
                Dma::new(&self.ram).write(header, &command).expect("it is in RAM");
                let parts = [(header, command.len() as u32, false), (header + 60, 1, true)];
                parts.map(|(at, len, writable)| (Buffer { at, len }, writable)).into()
            }
        }
    }
}
