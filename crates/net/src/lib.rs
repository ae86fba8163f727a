//! What is behind a guest's network devices: where frames go to, and where they come from.
//!
//! A [`Network`] has one [`Port`] for each pair of a device's queues. Frames have the header of virtio (virtio 1.2, 5.1.6)
//! before them, in which checksums to be completed and segments to be cut are named, so that neither is done where nobody
//! needs it. A network knows nothing of guests' registers; whoever shows it to a guest knows nothing of sockets.

mod checksum;
mod frame;
mod header;
mod netns;
pub mod switch;
pub mod tap;
pub mod user;
mod vectors;

use std::os::fd::BorrowedFd;

pub use header::{Gso, HEADER_LEN, Header};
use vm_memory::VolatileSlice;

/// Memory that somebody else may change at any time, such as a guest's.
pub type Slice<'a> = VolatileSlice<'a, ()>;

bitflags::bitflags! {
    /// What may be left to be done of a frame, named in its header.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offloads: u8 {
        /// The checksum of TCP or UDP.
        const CHECKSUM = 1;
        /// Cutting TCP over IPv4 into segments.
        const TSO4 = 2;
        /// Cutting TCP over IPv6 into segments.
        const TSO6 = 4;
        /// Those segments may have congestion marks.
        const ECN = 8;
        /// Cutting UDP into datagrams.
        const USO = 16;
    }
}

/// What a network has for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// What frames from the guest may leave to it.
    pub takes: Offloads,
    /// What frames to the guest may leave to the guest.
    pub gives: Offloads,
    /// The largest packet, if the guest has to know.
    pub mtu: Option<u16>,
}

/// What a driver has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Driver {
    /// What frames to it may leave to it.
    pub offloads: Offloads,
    /// It knows the largest packet; else that is what Ethernet has.
    pub knows_mtu: bool,
}

/// A network as a device's control queue sees it.
pub trait Network: Send + Sync {
    /// What it has.
    fn offer(&self) -> Offer;
    /// A driver has started. What was kept about the one before ends.
    fn start(&self, driver: Driver);
    /// The driver takes other offloads now.
    fn set_offloads(&self, offloads: Offloads);
    /// The driver uses so many pairs of queues.
    fn set_pairs(&self, _pairs: u16) {}
    /// Whether frames from the guest set off frames to it in this process. One thread serves both queues of a pair then, and
    /// asks for frames after it has sent some.
    fn answers(&self) -> bool {
        false
    }
    /// Whether it leads anywhere. Once it does not it never will again.
    fn is_connected(&self) -> bool {
        true
    }
}

/// Takes frames from the guest.
pub trait Sender: Send {
    /// Sends a frame, header and all. What cannot be sent is dropped, as on every network.
    fn send(&mut self, frame: &[Slice]);
}

/// What came of asking for a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// It was taken.
    Taken,
    /// It was not; it comes again.
    Refused,
    /// There is none.
    Nothing,
}

/// Has frames for the guest.
pub trait Receiver: Send {
    /// A file that becomes readable when there may be a frame again after there was none.
    fn source(&self) -> BorrowedFd<'_>;
    /// Gives the next frame in parts, header and all, to `take`, which says whether it takes it.
    fn receive(&mut self, take: &mut dyn FnMut(&[&[u8]]) -> bool) -> Received;
}

/// What serves a pair of queues. Where the network [answers](Network::answers), what frames have set off does not make the
/// receiver's source readable.
pub struct Port {
    /// For the transmit queue.
    pub sender: Box<dyn Sender>,
    /// For the receive queue.
    pub receiver: Box<dyn Receiver>,
}
