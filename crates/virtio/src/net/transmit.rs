//! Transmit queues: frames from the guest.

use std::sync::Arc;

use ruse_net::{HEADER_LEN, Sender};

use super::Shared;
use crate::core::Work;
use crate::device::{Handler, Served, serve};
use crate::dma::{Dma, plain};
use crate::ring::RingError;

/// Bytes of a frame without payload, and of the largest one: 64 KiB behind an Ethernet header with a VLAN.
const LEAST: u64 = HEADER_LEN as u64 + 14;
const MOST: u64 = HEADER_LEN as u64 + 18 + 65535;

/// Serves a transmit queue.
pub(super) struct TransmitHandler {
    shared: Arc<Shared>,
    sender: Box<dyn Sender>,
}

impl TransmitHandler {
    pub(super) fn new(shared: Arc<Shared>, sender: Box<dyn Sender>) -> Self {
        Self { shared, sender }
    }
}

impl Handler for TransmitHandler {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        self.shared.look_at(work);
        let (sender, up) = (&mut self.sender, self.shared.is_up());
        serve(&mut work.queue, dma, |chain| {
            let len = chain.readable_len();
            if up && (LEAST..=MOST).contains(&len) {
                sender.send(&plain(&chain.readable_slices(dma, 0, len)?));
            }
            Ok(0)
        })
    }
}
