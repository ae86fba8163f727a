//! The socket device (virtio 1.2, 5.10): streams between programs of the guest and of the host.
//!
//! On the host's side they are Unix sockets, by the convention of Firecracker and Cloud Hypervisor. A program of the host
//! connects to the device's socket, writes `CONNECT 1234\n` for the guest's port 1234, and gets `OK 1073741824\n`, where the
//! number is the port that it has itself. A guest that connects to port 1234 of the host (address 2) reaches whoever listens
//! at the socket's path with `_1234` behind it.
//!
//! Two threads share the connections: that of the queue to the guest waits for what the host's programs send, that of the queue
//! from the guest for those that read slowly.

mod connection;
mod hub;
mod packet;
#[cfg(test)]
mod tests;

use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::core::Work;
use crate::device::{Device, Handler, Identity, Served, serve_while};
use crate::dma::Dma;
use crate::features;
use crate::listener::ListenError;
use crate::ring::RingError;
use hub::Hub;

/// Device type.
const KIND: u16 = 19;
/// A communication controller of no kind that PCI knows.
const PCI_CLASS: u32 = 0x07_80_00;
/// Entries of each queue.
const ENTRIES: u16 = 256;
/// There are streams (5.10.3).
const STREAM: u64 = 1 << 0;
/// The addresses that a guest can have. Those below are the hypervisor's, a program's own machine and the host; the last
/// means any.
pub const GUEST_CIDS: RangeInclusive<u32> = 3..=u32::MAX - 1;

/// The registers' side.
#[derive(Clone, Copy, Debug)]
pub struct Vsock {
    cid: u32,
}

impl Vsock {
    /// The device of a guest whose address is `cid`, with the handlers of its queues. The host's programs reach it by the
    /// socket at `path`, which is made here and removed with the handlers.
    pub fn listen(cid: u32, path: &Path) -> Result<(Self, Vec<Box<dyn Handler>>), ListenError> {
        let hub = Hub::listen(cid, path)?;
        let (input, output) = (hub.input.clone(), hub.output.clone());
        let hub = Arc::new(Mutex::new(hub));
        let to_guest = ToGuest { hub: hub.clone(), input, starved: false };
        let handlers: Vec<Box<dyn Handler>> =
            vec![Box::new(to_guest), Box::new(FromGuest { hub, output }), Box::new(Events)];
        Ok((Self { cid }, handlers))
    }
}

impl Device for Vsock {
    fn identity(&self) -> Identity {
        Identity { kind: KIND, pci_class: PCI_CLASS }
    }
    fn features(&self) -> u64 {
        features::COMMON | STREAM
    }
    fn queues(&self) -> Vec<u16> {
        vec![ENTRIES; 3]
    }
    fn config(&self) -> Vec<u8> {
        u64::from(self.cid).to_le_bytes().to_vec()
    }
}

fn lock(hub: &Mutex<Hub>) -> MutexGuard<'_, Hub> {
    hub.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves the queue to the guest.
struct ToGuest {
    hub: Arc<Mutex<Hub>>,
    /// Readable when the hub has work for this handler.
    input: Arc<OwnedFd>,
    /// There are packets, but no buffers for them.
    starved: bool,
}

impl Handler for ToGuest {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        let mut hub = lock(&self.hub);
        hub.follow(work.resets);
        hub.take_input();
        let (served, starved) =
            serve_while(&mut work.queue, dma, &mut *hub, Hub::stage, |hub, chain| hub.fill(chain, dma))?;
        self.starved = starved;
        Ok(served)
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        (!self.starved).then(|| self.input.as_fd())
    }

    fn idle(&mut self, resets: u64) {
        lock(&self.hub).follow(resets);
    }
}

/// Serves the queue from the guest.
struct FromGuest {
    hub: Arc<Mutex<Hub>>,
    /// Readable when the hub has work for this handler.
    output: Arc<OwnedFd>,
}

impl Handler for FromGuest {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        let mut hub = lock(&self.hub);
        hub.follow(work.resets);
        hub.take_output();
        // A guest that takes no answers is not heard further (5.10.6.1).
        let (served, _) = serve_while(
            &mut work.queue,
            dma,
            &mut *hub,
            |hub| !hub.is_clogged(),
            |hub, chain| hub.packet(chain, dma).map(|()| 0),
        )?;
        Ok(served)
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.output.as_fd())
    }

    fn idle(&mut self, resets: u64) {
        lock(&self.hub).follow(resets);
    }
}

/// Has the queue of events: there are none but for guests that are moved.
struct Events;

impl Handler for Events {
    fn serve(&mut self, _work: &mut Work, _dma: &Dma) -> Result<Served, RingError> {
        Ok(Served::default())
    }
}
