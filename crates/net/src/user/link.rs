//! What all protocols of the stack share: the way to the guest, time and events.

use std::collections::VecDeque;
use std::net::SocketAddr;

use rustix::rand::{GetRandomFlags, getrandom};

use super::poller::Poller;
use super::slab::Id;
use crate::Driver;

/// Most frames that wait for the guest; more are dropped.
const MOST_FRAMES: usize = 512;
/// The largest packet of a driver that was told nothing.
const ETHERNET_MTU: u16 = 1500;

/// Who may have something for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ready {
    Tcp(Id),
    Udp(Id),
    Echo(Id),
}

pub(super) struct Link {
    pub(super) poller: Poller,
    pub(super) driver: Driver,
    /// The largest packet of a driver that knows it.
    mtu: u16,
    /// Frames that are complete.
    frames: VecDeque<Vec<u8>>,
    /// Those whose turn it is, in order.
    pub(super) ready: VecDeque<Ready>,
}

impl Link {
    pub(super) fn new(poller: Poller, mtu: u16) -> Self {
        Self { poller, driver: Driver::default(), mtu, frames: VecDeque::new(), ready: VecDeque::new() }
    }

    /// A driver has started.
    pub(super) fn start(&mut self, driver: Driver) {
        self.driver = driver;
        self.frames.clear();
        self.ready.clear();
    }

    /// The largest packet.
    pub(super) fn mtu(&self) -> u16 {
        if self.driver.knows_mtu { self.mtu } else { self.mtu.min(ETHERNET_MTU) }
    }

    /// The largest segment of TCP.
    pub(super) fn mss(&self, guest: SocketAddr) -> u16 {
        self.mtu() - if guest.is_ipv4() { 40 } else { 60 }
    }

    /// Sends a frame, with its header.
    pub(super) fn send(&mut self, frame: Vec<u8>) {
        if self.frames.len() < MOST_FRAMES {
            self.frames.push_back(frame);
        }
    }

    /// The next frame that is complete.
    pub(super) fn frame(&self) -> Option<&[u8]> {
        self.frames.front().map(|frame| &**frame)
    }

    /// The next frame has been taken.
    pub(super) fn frame_taken(&mut self) {
        self.frames.pop_front();
    }

    /// A number that nobody can guess.
    pub(super) fn random(&self) -> u32 {
        let mut bytes = [0; 4];
        // Four bytes come whole once the host's generator has been seeded.
        if let Err(error) = getrandom(&mut bytes, GetRandomFlags::empty()) {
            tracing::warn!(%error, "the host has no random bytes");
        }
        u32::from_ne_bytes(bytes)
    }
}
