//! Split rings (virtio 1.2, 2.7).

use serde::{Deserialize, Serialize};

use super::descriptor::{self, Descriptor, INDIRECT, NEXT, WRITE};
use super::{Layout, RingError, passes};
use crate::chain::Chain;
use crate::dma::Dma;

/// Flag of the available ring: no interrupts; of the used ring: no notifications.
const SUPPRESS: u16 = 1;
/// Offsets in both rings.
const INDEX: u64 = 2;
const ENTRIES: u64 = 4;

/// Where the device is in the rings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Split {
    next_available: u16,
    next_used: u16,
}

impl Split {
    /// Entries that the driver has made available and nobody has taken.
    fn available(&self, layout: &Layout, dma: &Dma) -> Result<u16, RingError> {
        let available = dma.load(layout.driver + INDEX)?.wrapping_sub(self.next_available);
        if available > layout.size {
            return Err(RingError::Index { size: layout.size, available });
        }
        Ok(available)
    }

    pub(super) fn is_available(&self, layout: &Layout, dma: &Dma) -> Result<bool, RingError> {
        Ok(self.available(layout, dma)? > 0)
    }

    pub(super) fn pop(
        &mut self,
        layout: &Layout,
        indirect: bool,
        dma: &Dma,
    ) -> Result<Option<Chain>, RingError> {
        if self.available(layout, dma)? == 0 {
            return Ok(None);
        }
        let entry = u64::from(self.next_available % layout.size);
        let head = dma.load(layout.driver + ENTRIES + 2 * entry)?;
        self.next_available = self.next_available.wrapping_add(1);
        let mut chain = Chain::new(head, 1);
        follow(
            &mut chain,
            dma,
            Table { at: layout.descriptors, len: layout.size },
            head,
            indirect,
            layout.size,
        )?;
        Ok(Some(chain))
    }

    pub(super) fn push(
        &mut self,
        layout: &Layout,
        dma: &Dma,
        chains: &[(&Chain, u32)],
    ) -> Result<(), RingError> {
        for (chain, written) in chains {
            let entry = u64::from(self.next_used % layout.size);
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&u32::from(chain.id).to_le_bytes());
            bytes[4..].copy_from_slice(&written.to_le_bytes());
            dma.write(layout.device + ENTRIES + 8 * entry, &bytes)?;
            self.next_used = self.next_used.wrapping_add(1);
        }
        // The index shows all of them.
        dma.store(layout.device + INDEX, self.next_used)
    }

    pub(super) fn needs_interrupt(
        &self,
        layout: &Layout,
        by_index: bool,
        dma: &Dma,
        added: u16,
    ) -> Result<bool, RingError> {
        if !by_index {
            return Ok(dma.load(layout.driver)? & SUPPRESS == 0);
        }
        let event = dma.load(layout.driver + ENTRIES + 2 * u64::from(layout.size))?;
        Ok(passes(event, self.next_used, self.next_used.wrapping_sub(added)))
    }

    pub(super) fn set_notifications(layout: &Layout, dma: &Dma, on: bool) -> Result<(), RingError> {
        dma.store(layout.device, if on { 0 } else { SUPPRESS })
    }

    pub(super) fn notify_at_next(&self, layout: &Layout, dma: &Dma) -> Result<(), RingError> {
        dma.store(layout.device + ENTRIES + 8 * u64::from(layout.size), self.next_available)
    }
}

/// A table of descriptors.
#[derive(Clone, Copy)]
struct Table {
    at: u64,
    len: u16,
}

/// Follows a chain from `head` on. A table within a table is refused (2.7.5.3.1); `most` ends loops.
fn follow(
    chain: &mut Chain,
    dma: &Dma,
    table: Table,
    head: u16,
    indirect: bool,
    most: u16,
) -> Result<(), RingError> {
    let mut index = head;
    loop {
        if index >= table.len {
            return Err(RingError::Chain("a descriptor beyond the table"));
        }
        let Descriptor { buffer, words: [flags, next] } = Descriptor::read(dma, table.at, index)?;
        if flags & INDIRECT != 0 {
            if !indirect || flags & (NEXT | WRITE) != 0 {
                return Err(RingError::Chain("a table where none can be"));
            }
            let inner = Table { at: buffer.at, len: descriptor::table_len(buffer, most)? };
            return follow(chain, dma, inner, 0, false, most);
        }
        descriptor::add(chain, buffer, flags, most)?;
        if flags & NEXT == 0 {
            return Ok(());
        }
        index = next;
    }
}
