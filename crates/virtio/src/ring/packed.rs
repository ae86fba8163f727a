//! Packed rings (virtio 1.2, 2.8).

use serde::{Deserialize, Serialize};

use super::descriptor::{self, Descriptor, INDIRECT, NEXT, SIZE, WRITE};
use super::{Layout, RingError, passes};
use crate::chain::Chain;
use crate::dma::Dma;

/// Flags of a descriptor: equal to the driver's wrap counter, and not, when it is available; both equal to the device's
/// when it is used (2.8.1).
const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Offset of a descriptor's flags, and of its length and id.
const FLAGS: u64 = 14;
const LENGTH: u64 = 8;

/// Event suppression (2.8.14): the flags, at offset 2, and their values.
const EVENT_FLAGS: u64 = 2;
const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const BY_INDEX: u16 = 2;
/// The wrap counter beside an index.
const WRAP: u16 = 1 << 15;

/// A place in the ring, and how often it has come round, modulo 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Default for Place {
    fn default() -> Self {
        Self { index: 0, wrap: true }
    }
}

impl Place {
    fn advance(&mut self, by: u16, size: u16) {
        let index = u32::from(self.index) + u32::from(by);
        let wraps = index >= u32::from(size);
        self.index = (index - if wraps { u32::from(size) } else { 0 }) as u16;
        self.wrap ^= wraps;
    }
}

/// Where the device is in the ring.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Packed {
    available: Place,
    used: Place,
}

impl Packed {
    pub(super) fn is_available(&self, layout: &Layout, dma: &Dma) -> Result<bool, RingError> {
        let flags = dma.load(layout.descriptors + SIZE * u64::from(self.available.index) + FLAGS)?;
        Ok((flags & AVAILABLE != 0) == self.available.wrap && (flags & USED != 0) != self.available.wrap)
    }

    pub(super) fn pop(
        &mut self,
        layout: &Layout,
        indirect: bool,
        dma: &Dma,
    ) -> Result<Option<Chain>, RingError> {
        if !self.is_available(layout, dma)? {
            return Ok(None);
        }
        let (mut chain, mut place) = (Chain::default(), self.available);
        loop {
            // Of a chain, all is available when its first descriptor is.
            let Descriptor { buffer, words: [id, flags] } =
                Descriptor::read(dma, layout.descriptors, place.index)?;
            place.advance(1, layout.size);
            chain.entries += 1;
            if flags & INDIRECT != 0 {
                if !indirect || chain.entries > 1 || flags & (NEXT | WRITE) != 0 {
                    return Err(RingError::Chain("a table where none can be"));
                }
                add_table(
                    &mut chain,
                    dma,
                    buffer.at,
                    descriptor::table_len(buffer, layout.size)?,
                    layout.size,
                )?;
            } else {
                descriptor::add(&mut chain, buffer, flags, layout.size)?;
            }
            if flags & NEXT == 0 {
                chain.id = id;
                break;
            }
        }
        self.available = place;
        Ok(Some(chain))
    }

    pub(super) fn push(
        &mut self,
        layout: &Layout,
        dma: &Dma,
        chains: &[(&Chain, u32)],
    ) -> Result<(), RingError> {
        // The driver looks at one after the other, so that the flags of the first show all of them.
        let mut first = None;
        for (chain, written) in chains {
            let at = layout.descriptors + SIZE * u64::from(self.used.index);
            let mut bytes = [0; 6];
            bytes[..4].copy_from_slice(&written.to_le_bytes());
            bytes[4..].copy_from_slice(&chain.id.to_le_bytes());
            dma.write(at + LENGTH, &bytes)?;
            let wrap = if self.used.wrap { AVAILABLE | USED } else { 0 };
            let flags = wrap | if *written > 0 { WRITE } else { 0 };
            match first {
                None => first = Some((at + FLAGS, flags)),
                Some(_) => dma.store(at + FLAGS, flags)?,
            }
            self.used.advance(chain.entries, layout.size);
        }
        first.map_or(Ok(()), |(at, flags)| dma.store(at, flags))
    }

    pub(super) fn needs_interrupt(
        &self,
        layout: &Layout,
        by_index: bool,
        dma: &Dma,
        added: u16,
    ) -> Result<bool, RingError> {
        match dma.load(layout.driver + EVENT_FLAGS)? {
            DISABLE => Ok(false),
            BY_INDEX if by_index => {
                let event = dma.load(layout.driver)?;
                let round = if (event & WRAP != 0) == self.used.wrap { 0 } else { layout.size };
                let event = (event & !WRAP).wrapping_sub(round);
                Ok(passes(event, self.used.index, self.used.index.wrapping_sub(added)))
            }
            _ => Ok(true),
        }
    }

    pub(super) fn set_notifications(layout: &Layout, dma: &Dma, on: bool) -> Result<(), RingError> {
        dma.store(layout.device + EVENT_FLAGS, if on { ENABLE } else { DISABLE })
    }

    pub(super) fn notify_at_next(&self, layout: &Layout, dma: &Dma) -> Result<(), RingError> {
        dma.store(layout.device, self.available.index | if self.available.wrap { WRAP } else { 0 })?;
        dma.store(layout.device + EVENT_FLAGS, BY_INDEX)
    }
}

/// Appends all buffers of a table, which lie one behind the other (2.8.7).
fn add_table(chain: &mut Chain, dma: &Dma, table: u64, len: u16, most: u16) -> Result<(), RingError> {
    for index in 0..len {
        let Descriptor { buffer, words: [_, flags] } = Descriptor::read(dma, table, index)?;
        if flags & INDIRECT != 0 {
            return Err(RingError::Chain("a table in a table"));
        }
        descriptor::add(chain, buffer, flags, most)?;
    }
    Ok(())
}
