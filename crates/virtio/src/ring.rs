//! Virtqueues, the device's side (virtio 1.2, 2.6 to 2.8).
//!
//! One [`Queue`] for both kinds of rings. They are Ruse's own: crates have split rings only, and end a chain silently
//! where a driver has broken it; here that is an error, by which the device needs a reset.

mod descriptor;
#[cfg(any(test, feature = "test-driver"))]
pub mod driver;
mod packed;
mod split;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::chain::Chain;
use crate::dma::Dma;
use crate::features;
use packed::Packed;
use split::Split;

/// What makes a queue unusable, most often something that its driver has done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// There is no RAM.
    #[error("no RAM at {at:#x}")]
    Memory {
        /// Guest physical address.
        at: u64,
    },
    /// The driver says that more is available than the ring has entries.
    #[error("the ring has {size} entries, and {available} are available")]
    Index {
        /// Entries.
        size: u16,
        /// What the driver says.
        available: u16,
    },
    /// A chain of descriptors is broken.
    #[error("a broken chain: {0}")]
    Chain(&'static str),
    /// No fault of the driver's: whoever serves the queue outside this process cannot go on.
    #[error("what serves the device has failed")]
    Backend,
}

/// Where a queue lies and how large it is (4.1.4.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Entries.
    pub size: u16,
    /// Descriptor area: the table, or the packed ring.
    pub descriptors: u64,
    /// Driver area: the available ring, or the driver's event suppression.
    pub driver: u64,
    /// Device area: the used ring, or the device's event suppression.
    pub device: u64,
}

/// A queue that the driver has enabled, at some point of its work. It can be saved between any two calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    layout: Layout,
    /// Notifications and interrupts are suppressed by index (VIRTIO_F_EVENT_IDX).
    event_index: bool,
    /// Chains may be in tables of their own (VIRTIO_F_INDIRECT_DESC).
    indirect: bool,
    ring: Ring,
    /// Chains that were taken from the ring and put back.
    put_back: VecDeque<Chain>,
    /// Entries used since the driver was last asked whether it wants to know.
    unsignalled: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Ring {
    Split(Split),
    Packed(Packed),
}

impl Queue {
    /// A queue at its beginning, under the features that were negotiated; `None` if it cannot be where the layout says.
    pub fn new(layout: Layout, features: u64) -> Option<Self> {
        let packed = features & features::RING_PACKED != 0;
        let aligned = layout.descriptors.is_multiple_of(16)
            && layout.driver.is_multiple_of(if packed { 4 } else { 2 })
            && layout.device.is_multiple_of(4);
        // No sum of an address and an offset in a queue overflows.
        let far = [layout.descriptors, layout.driver, layout.device].iter().any(|&at| at > u64::MAX >> 1);
        let size = layout.size != 0 && layout.size <= 0x8000 && (packed || layout.size.is_power_of_two());
        let ring = if packed { Ring::Packed(Packed::default()) } else { Ring::Split(Split::default()) };
        (aligned && !far && size).then_some(Self {
            layout,
            event_index: features & features::EVENT_IDX != 0,
            indirect: features & features::INDIRECT_DESC != 0,
            ring,
            put_back: VecDeque::new(),
            unsignalled: 0,
        })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// Takes the next chain that is available. A copy of the queue from before knows nothing of it, which takes it back
    /// as long as nothing was pushed.
    pub fn pop(&mut self, dma: &Dma) -> Result<Option<Chain>, RingError> {
        if let Some(chain) = self.put_back.pop_front() {
            return Ok(Some(chain));
        }
        match &mut self.ring {
            Ring::Split(ring) => ring.pop(&self.layout, self.indirect, dma),
            Ring::Packed(ring) => ring.pop(&self.layout, self.indirect, dma),
        }
    }

    /// Puts a chain back that was taken and not answered: it is the next one to be taken. The ring does not keep it: where
    /// others were answered meanwhile, the driver may have used its place again.
    pub fn put_back(&mut self, chain: Chain) {
        self.put_back.push_front(chain);
    }

    /// Gives a chain back, into which the device has written `written` bytes.
    pub fn push(&mut self, dma: &Dma, chain: &Chain, written: u32) -> Result<(), RingError> {
        self.push_together(dma, &[(chain, written)])
    }

    /// Gives chains back of which the driver must not see one before all are there, as it expects of the buffers of one
    /// packet (5.1.6.4).
    pub fn push_together(&mut self, dma: &Dma, chains: &[(&Chain, u32)]) -> Result<(), RingError> {
        let entries = match &mut self.ring {
            Ring::Split(ring) => {
                ring.push(&self.layout, dma, chains)?;
                chains.len() as u16
            }
            Ring::Packed(ring) => {
                ring.push(&self.layout, dma, chains)?;
                chains.iter().map(|(chain, _)| chain.entries).sum()
            }
        };
        self.unsignalled = self.unsignalled.saturating_add(entries);
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was given back since the last call (2.7.7 and 2.8.10).
    pub fn needs_interrupt(&mut self, dma: &Dma) -> Result<bool, RingError> {
        let added = std::mem::take(&mut self.unsignalled);
        if added == 0 {
            return Ok(false);
        }
        // The entries have to be visible before it is looked whether anyone waits for them.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        match &self.ring {
            Ring::Split(ring) => ring.needs_interrupt(&self.layout, self.event_index, dma, added),
            Ring::Packed(ring) => ring.needs_interrupt(&self.layout, self.event_index, dma, added),
        }
    }

    /// Asks the driver not to notify for now. It may all the same.
    pub fn disable_notifications(&mut self, dma: &Dma) -> Result<(), RingError> {
        match &self.ring {
            // The index is far behind: that is as good.
            _ if self.event_index => Ok(()),
            Ring::Split(_) => Split::set_notifications(&self.layout, dma, false),
            Ring::Packed(_) => Packed::set_notifications(&self.layout, dma, false),
        }
    }

    /// Asks the driver to notify about the next chain; says whether there is one already, about which it may not.
    pub fn enable_notifications(&mut self, dma: &Dma) -> Result<bool, RingError> {
        match &self.ring {
            Ring::Split(ring) if self.event_index => ring.notify_at_next(&self.layout, dma)?,
            Ring::Packed(ring) if self.event_index => ring.notify_at_next(&self.layout, dma)?,
            Ring::Split(_) => Split::set_notifications(&self.layout, dma, true)?,
            Ring::Packed(_) => Packed::set_notifications(&self.layout, dma, true)?,
        }
        // The driver has to see that before it is looked whether there is more.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        match &self.ring {
            _ if !self.put_back.is_empty() => Ok(true),
            Ring::Split(ring) => ring.is_available(&self.layout, dma),
            Ring::Packed(ring) => ring.is_available(&self.layout, dma),
        }
    }
}

/// Whether an index that goes from `old` to `new` passes `event` (2.7.10.1).
fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
