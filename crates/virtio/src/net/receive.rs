//! Receive queues: frames to the guest.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use ruse_net::{HEADER_LEN, Received, Receiver};

use super::control::ControlHandler;
use super::{Shared, feature, lock};
use crate::chain::Chain;
use crate::core::Work;
use crate::device::{Handler, Served};
use crate::dma::Dma;
use crate::ring::{Queue, RingError};

/// Most frames before the driver is told and others have their turn.
const BATCH: usize = 32;
/// Where the header counts the buffers of a frame.
const BUFFERS: usize = 10;

/// Serves a receive queue.
pub(super) struct ReceiveHandler {
    shared: Arc<Shared>,
    receiver: Box<dyn Receiver>,
    /// Whether frames are waited for; if not, buffers are.
    waits_for_frames: bool,
    /// The network led somewhere when that was last looked at.
    connected: bool,
}

/// What came of a frame.
enum Delivered {
    /// The guest has it.
    Yes,
    /// No buffers of the guest could ever take it.
    Never,
    /// There are not buffers enough; the driver notifies when there are more.
    NotYet,
}

impl ReceiveHandler {
    pub(super) fn new(shared: Arc<Shared>, receiver: Box<dyn Receiver>) -> Self {
        Self { shared, receiver, waits_for_frames: false, connected: true }
    }

    fn receive(&mut self, work: &mut Work, dma: &Dma) -> Result<bool, RingError> {
        let (queue, shared) = (&mut work.queue, &self.shared);
        let mergeable = work.features & feature::MRG_RXBUF != 0;
        for _ in 0..BATCH {
            let mut result = Ok(Delivered::Never);
            let received = self.receiver.receive(&mut |frame| {
                let head = frame.first().and_then(|part| part.get(HEADER_LEN..)).unwrap_or(&[]);
                if shared.is_up() && lock(&shared.filter).passes(head) {
                    result = deliver(queue, dma, frame, mergeable);
                }
                !matches!(result, Ok(Delivered::NotYet))
            });
            result?;
            match received {
                Received::Taken => {}
                Received::Refused => return Ok(false),
                Received::Nothing => {
                    self.waits_for_frames = true;
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

impl Handler for ReceiveHandler {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        self.shared.look_at(work);
        self.waits_for_frames = false;
        work.queue.disable_notifications(dma)?;
        let more = self.receive(work, dma)?;
        Ok(Served { interrupt: work.queue.needs_interrupt(dma)?, more, ..Served::default() })
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.waits_for_frames.then(|| self.receiver.source())
    }

    fn take_config_change(&mut self) -> bool {
        let connected = self.shared.network.is_connected();
        std::mem::replace(&mut self.connected, connected) != connected
    }
}

/// Writes a frame into as many chains as it needs, or into one if they cannot be merged (5.1.6.4).
fn deliver(queue: &mut Queue, dma: &Dma, frame: &[&[u8]], mergeable: bool) -> Result<Delivered, RingError> {
    let len: u64 = frame.iter().map(|part| part.len() as u64).sum();
    let before = queue.clone();
    let (mut chains, mut room) = (Vec::new(), 0);
    while room < len {
        match queue.pop(dma)? {
            Some(chain) => {
                room += chain.writable_len();
                chains.push(chain);
                // A driver can make available more than a ring holds, also what has no room at all.
                let whole = chains.len() >= usize::from(queue.size());
                if room < len && (!mergeable || whole) {
                    *queue = before;
                    return Ok(Delivered::Never);
                }
            }
            // What was taken is given back only now, so that the driver notifies about what comes behind it.
            None if !queue.enable_notifications(dma)? => {
                let whole = chains.len() >= usize::from(queue.size());
                *queue = before;
                return Ok(if whole { Delivered::Never } else { Delivered::NotYet });
            }
            None => {}
        }
    }
    write(queue, dma, frame, &chains)?;
    Ok(Delivered::Yes)
}

fn write(queue: &mut Queue, dma: &Dma, frame: &[&[u8]], chains: &[Chain]) -> Result<(), RingError> {
    let Some((first, rest)) = frame.split_first() else { return Ok(()) };
    let Some((header, first)) = first.split_first_chunk::<HEADER_LEN>() else { return Ok(()) };
    let mut header = *header;
    header[BUFFERS..].copy_from_slice(&(chains.len() as u16).to_le_bytes());
    let mut parts = [&header[..], first].into_iter().chain(rest.iter().copied());
    let mut part = parts.next().unwrap_or_default();
    let mut used = Vec::with_capacity(chains.len());
    for chain in chains {
        let mut at = 0;
        while at < chain.writable_len() {
            if part.is_empty() {
                match parts.next() {
                    Some(next) => part = next,
                    None => break,
                }
            }
            let here = part.len().min((chain.writable_len() - at).min(usize::MAX as u64) as usize);
            chain.write(dma, at, &part[..here])?;
            at += here as u64;
            part = &part[here..];
        }
        used.push((chain, at as u32));
    }
    queue.push_together(dma, &used)
}

/// Serves the third queue of a device with several pairs: the second receive queue, or the control queue of a driver that
/// knows of one pair only (5.1.2).
pub(super) struct SecondHandler {
    receive: ReceiveHandler,
    control: ControlHandler,
    controls: bool,
}

impl SecondHandler {
    pub(super) fn new(receive: ReceiveHandler, control: ControlHandler) -> Self {
        Self { receive, control, controls: false }
    }
}

impl Handler for SecondHandler {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        self.controls = work.features & feature::MQ == 0;
        if self.controls { self.control.serve(work, dma) } else { self.receive.serve(work, dma) }
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        if self.controls { None } else { self.receive.source() }
    }

    fn take_config_change(&mut self) -> bool {
        self.receive.take_config_change()
    }
}
