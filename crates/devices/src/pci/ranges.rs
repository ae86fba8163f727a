//! Where on the bus functions answer: what the guest has placed and enabled, as far as the host bridge forwards it.

use std::fmt;
use std::ops::{Range, RangeInclusive};

use super::{BarRange, BridgeWindows, PciAddress, SharedFunction, Space};
use crate::bus::AddressMap;

/// What the host bridge forwards to the bus. A range elsewhere is not reached, whatever a guest places there.
#[derive(Clone, Debug)]
pub struct PciWindows {
    /// I/O ports.
    pub ports: RangeInclusive<u64>,
    /// Memory, lowest first.
    pub memory: Vec<RangeInclusive<u64>>,
}

impl PciWindows {
    /// Whether a range lies in a window as a whole.
    pub(super) fn hold(&self, range: &BarRange) -> bool {
        let within = |window: &RangeInclusive<u64>| {
            *window.start() <= range.base
                && range.base.checked_add(range.size - 1).is_some_and(|last| last <= *window.end())
        };
        match range.space {
            Space::Io => within(&self.ports),
            Space::Memory => self.memory.iter().any(within),
        }
    }

    /// Whether a bridge's window in memory lies in one of these as a whole.
    fn hold_window(&self, inner: &RangeInclusive<u64>) -> bool {
        self.memory.iter().any(|window| window.contains(inner.start()) && window.contains(inner.end()))
    }
}

/// The range of one base address register.
#[derive(Clone)]
pub struct BarTarget {
    /// The function.
    pub function: SharedFunction,
    /// Its place at power-up, which stands for it.
    pub at: PciAddress,
    /// The base address register, or [`UNCLAIMED`].
    pub bar: u8,
}

/// What stands for a base address register of a root port where it answers itself: nobody behind it does.
pub const UNCLAIMED: u8 = 6;

impl fmt::Debug for BarTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} BAR {}", self.at, self.bar)
    }
}

/// A doorbell at an address of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciDoorbell {
    /// Guest physical address.
    pub address: u64,
    /// The function ([`PciAddress::id`]).
    pub source: u16,
    /// Which of its doorbells.
    pub number: u16,
}

/// Where functions answer. Of two ranges in each other's way, that of the function that comes first counts.
#[derive(Clone, Debug)]
pub struct PciRanges {
    /// By I/O port; the offsets of targets are those in their range.
    pub ports: AddressMap<BarTarget>,
    /// By guest physical address.
    pub memory: AddressMap<BarTarget>,
    /// Doorbells, by address.
    pub doorbells: Vec<PciDoorbell>,
}

impl Default for PciRanges {
    fn default() -> Self {
        Self { ports: AddressMap::ports(), memory: AddressMap::memory(), doorbells: Vec::new() }
    }
}

impl PciRanges {
    /// Adds the ranges of a function that pass `forwarded`.
    pub(super) fn add(
        &mut self,
        at: PciAddress,
        function: &SharedFunction,
        forwarded: impl Fn(&BarRange) -> bool,
    ) {
        let (bars, bells) = {
            let function = super::lock(function);
            (function.space().bars(), function.doorbells())
        };
        for range in bars.into_iter().filter(forwarded) {
            let target = BarTarget { function: function.clone(), at, bar: range.bar };
            let map = if range.space == Space::Io { &mut self.ports } else { &mut self.memory };
            if let Err(error) = map.insert(range.base, range.size, target, 0) {
                tracing::debug!(%at, bar = range.bar, %error, "a range is in another's way");
                continue;
            }
            if range.space == Space::Memory {
                let here = bells.iter().filter(|bell| bell.bar == range.bar && bell.offset < range.size);
                self.doorbells.extend(here.map(|bell| PciDoorbell {
                    address: range.base + bell.offset,
                    source: at.id(),
                    number: bell.number,
                }));
            }
        }
        self.doorbells.sort_unstable();
    }

    /// Adds the memory that a root port forwards and where nobody answers, as far as the host bridge forwards it.
    pub(super) fn add_unclaimed(
        &mut self,
        at: PciAddress,
        port: &SharedFunction,
        forwarded: &BridgeWindows,
        host: &PciWindows,
    ) {
        for window in forwarded.memory.iter().flatten().filter(|window| host.hold_window(window)) {
            for gap in self.gaps(window) {
                let target = BarTarget { function: port.clone(), at, bar: UNCLAIMED };
                if let Err(error) = self.memory.insert(gap.start, gap.end - gap.start, target, 0) {
                    tracing::error!(%at, %error, "a gap is in another's way");
                }
            }
        }
    }

    /// Where in a window of memory nobody answers.
    fn gaps(&self, window: &RangeInclusive<u64>) -> Vec<Range<u64>> {
        let end = window.end() + 1;
        let inside = self.memory.iter().filter(|&(first, last, _)| first < end && last >= *window.start());
        let mut next = *window.start();
        let mut gaps = Vec::new();
        for (first, behind) in inside.map(|(first, last, _)| (first, last + 1)).chain([(end, end)]) {
            if next < first {
                gaps.push(next..first);
            }
            next = behind;
        }
        gaps
    }
}
