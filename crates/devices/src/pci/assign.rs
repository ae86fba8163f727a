//! Firmware's part: places for all base address registers and bridge windows at power-up, always the same for the same
//! functions. Systems may keep them or choose others.

use std::cmp::Reverse;
use std::ops::RangeInclusive;

use super::{Bar, ConfigSpace, PciWindows};

/// Ranges of more bytes than this go above 4 GiB, where the register can.
const LARGE: u64 = 64 << 20;
/// What a bridge's memory window is in units of.
const BRIDGE_UNIT: u64 = 1 << 20;

/// Free room in windows, taken from the beginning.
struct Room(Vec<RangeInclusive<u64>>);

impl Room {
    /// Takes `size` bytes, aligned to `align`, a power of two.
    fn take(&mut self, size: u64, align: u64) -> Option<u64> {
        self.0.iter_mut().find_map(|window| {
            let base = window.start().checked_next_multiple_of(align)?;
            let last = base.checked_add(size - 1)?;
            (last <= *window.end()).then(|| {
                *window = last.saturating_add(1)..=*window.end();
                base
            })
        })
    }
}

/// The room that is left.
pub(super) struct Assignment {
    ports: Room,
    /// Memory below 4 GiB.
    low: Room,
    /// Memory above.
    high: Room,
}

impl Assignment {
    /// All of the windows is free.
    pub(super) fn new(windows: &PciWindows) -> Self {
        let (high, low) = windows.memory.iter().cloned().partition(|window| *window.start() >= 1 << 32);
        Self { ports: Room(vec![windows.ports.clone()]), low: Room(low), high: Room(high) }
    }

    /// Places the ranges of a function on bus 0. What finds no room is left to the system.
    pub(super) fn on_bus_0(&mut self, space: &mut ConfigSpace) {
        let bars: Vec<_> = space.declared_bars().collect();
        for (index, bar) in bars {
            let base = match bar {
                Bar::Io(size) => self.ports.take(size.into(), size.into()),
                Bar::Memory32(size) => self.low.take(size.into(), size.into()),
                Bar::Memory64 { size, .. } if size > LARGE => self.high.take(size, size),
                Bar::Memory64 { size, .. } => self.low.take(size, size),
            };
            if let Some(base) = base {
                space.place_bar(index, base);
            }
        }
    }

    /// Places the memory of a function behind a bridge, in one window. Ports and large ranges are left to the system.
    pub(super) fn behind(&mut self, bridge: &mut ConfigSpace, space: &mut ConfigSpace) {
        let mut bars: Vec<_> =
            space.declared_bars().filter_map(|(index, bar)| Some((memory_size(&bar)?, index))).collect();
        // The largest first, so that all are aligned.
        bars.sort_by_key(|&(size, _)| Reverse(size));
        let total =
            bars.iter().map(|(size, _)| size).sum::<u64>().next_multiple_of(BRIDGE_UNIT).max(BRIDGE_UNIT);
        let align = bars.first().map_or(BRIDGE_UNIT, |&(size, _)| size.max(BRIDGE_UNIT));
        let Some(mut base) = self.low.take(total, align) else { return };
        bridge.open_memory(base, base + total - 1);
        for (size, index) in bars {
            space.place_bar(index, base);
            base += size;
        }
    }
}

/// Bytes of a range in memory that fits below 4 GiB.
fn memory_size(bar: &Bar) -> Option<u64> {
    match *bar {
        Bar::Memory32(size) => Some(size.into()),
        Bar::Memory64 { size, .. } if size <= LARGE => Some(size),
        Bar::Memory64 { .. } | Bar::Io(_) => None,
    }
}
