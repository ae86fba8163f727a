//! The control queue (virtio 1.2, 5.1.6.5): commands, each with a byte for the answer.

use std::sync::Arc;

use super::filter::Mode;
use super::{Mac, Shared, TO_GUEST, feature, lock, offloads};
use crate::chain::Chain;
use crate::core::Work;
use crate::device::{Handler, Served, serve};
use crate::dma::Dma;
use crate::ring::RingError;

/// Classes of commands.
mod class {
    pub const RX: u8 = 0;
    pub const MAC: u8 = 1;
    pub const VLAN: u8 = 2;
    pub const MQ: u8 = 4;
    pub const GUEST_OFFLOADS: u8 = 5;
}

/// Answers.
const OK: u8 = 0;
const ERROR: u8 = 1;
/// The longest command is one with two full tables of addresses, which drivers may make longer than anybody needs.
const MOST: u64 = 16 << 10;

/// Serves the control queue.
pub(super) struct ControlHandler {
    shared: Arc<Shared>,
    pairs: u16,
}

impl ControlHandler {
    pub(super) fn new(shared: Arc<Shared>, pairs: u16) -> Self {
        Self { shared, pairs }
    }

    fn command(&self, chain: &Chain, dma: &Dma, features: u64) -> Result<u32, RingError> {
        if chain.writable_len() == 0 {
            return Err(RingError::Chain("a command without room for the answer"));
        }
        let mut bytes = vec![0; chain.readable_len().min(MOST) as usize];
        chain.read(dma, 0, &mut bytes)?;
        let done = match *bytes {
            [class, command, ref data @ ..] => self.carry_out(class, command, data, features).is_some(),
            _ => false,
        };
        chain.write(dma, 0, &[if done { OK } else { ERROR }])?;
        Ok(1)
    }

    /// `None` for a command that makes no sense.
    fn carry_out(&self, class: u8, command: u8, data: &[u8], features: u64) -> Option<()> {
        // Not held while the network is called: it calls those who receive, who look at the filter.
        let filter = || lock(&self.shared.filter);
        match (class, command, data) {
            (class::RX, command, &[on]) => filter().set_mode(Mode::of(command)?, on != 0),
            (class::MAC, 0, data) => {
                let (unicast, rest) = table(data)?;
                let (multicast, _) = table(rest)?;
                filter().set_tables(unicast, multicast);
            }
            (class::MAC, 1, data) => filter().set_mac(data.try_into().ok()?),
            (class::VLAN, command @ (0 | 1), &[low, high]) => {
                filter().set_vlan(u16::from_le_bytes([low, high]), command == 0).then_some(())?;
            }
            (class::MQ, 0, &[low, high]) if features & feature::MQ != 0 => {
                let pairs = u16::from_le_bytes([low, high]);
                (1..=self.pairs).contains(&pairs).then_some(())?;
                self.shared.network.set_pairs(pairs);
            }
            (class::GUEST_OFFLOADS, 0, data) => {
                let bits = u64::from_le_bytes(data.try_into().ok()?);
                (bits & !features == 0).then_some(())?;
                self.shared.network.set_offloads(offloads(&TO_GUEST, bits));
            }
            _ => return None,
        }
        Some(())
    }
}

/// A table of addresses with its length before it, and what follows it.
fn table(data: &[u8]) -> Option<(Vec<Mac>, &[u8])> {
    let (count, rest) = data.split_first_chunk()?;
    let count = u32::from_le_bytes(*count) as usize;
    let (table, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
    Some((table.as_chunks::<6>().0.to_vec(), rest))
}

impl Handler for ControlHandler {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        self.shared.look_at(work);
        let features = work.features;
        serve(&mut work.queue, dma, |chain| self.command(chain, dma, features))
    }
}
