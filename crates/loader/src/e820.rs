//! The map of guest physical memory that a kernel gets (ACPI 6.5, section 15: INT 15h, E820h).

use ruse_memory::{GuestRam, PAGE_SIZE, RegionKind};

use crate::place::ONE_MIB;

/// End of conventional memory; the extended BIOS data area of a PC begins here.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;

/// What a run of memory is, as its number in the map (ACPI 6.5, table 15.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// Free for the system.
    Ram = 1,
    /// Not for the system.
    Reserved = 2,
}

/// A run of guest physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: MemoryKind,
}

/// The map of `ram` with a PC's reserved areas below 1 MiB and, if there is one, the window of PCI configuration
/// space (start and bytes). Entries are in rising order and do not overlap.
pub fn memory_map(ram: &GuestRam, ecam: Option<(u64, u64)>) -> Vec<MapEntry> {
    let mut map =
        vec![MapEntry { start: LOW_MEMORY_END, size: ONE_MIB - LOW_MEMORY_END, kind: MemoryKind::Reserved }];
    for region in ram.regions().iter().filter(|region| region.kind == RegionKind::Ram) {
        let (start, end) = (region.gpa, region.gpa + region.size);
        let holes = if start == 0 {
            [(start, end.min(LOW_MEMORY_END)), (ONE_MIB, end)]
        } else {
            [(start, end), (end, end)]
        };
        for (start, end) in holes.into_iter().filter(|(start, end)| start < end) {
            map.push(MapEntry { start, size: end - start, kind: MemoryKind::Ram });
        }
    }
    if let Some((start, size)) = ecam {
        map.push(MapEntry { start, size, kind: MemoryKind::Reserved });
    }
    map.sort_by_key(|e| e.start);
    map
}

/// KiB of RAM from 1 MiB up to the first hole, as multiboot's `mem_upper` counts it.
pub(crate) fn upper_kib(low_end: u64) -> u64 {
    low_end.saturating_sub(ONE_MIB) / 1024
}

/// Bytes of the smallest RAM that has the PC's areas below 1 MiB whole.
pub(crate) const SMALLEST_RAM: u64 = ONE_MIB + PAGE_SIZE;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_has_the_holes_of_a_pc() {
        let ram = GuestRam::new(4 << 30).unwrap();
        let map: Vec<_> = memory_map(&ram, Some((0xe000_0000, 0x1000_0000)))
            .iter()
            .map(|e| (e.start, e.start + e.size, e.kind as u32))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0x9fc00, 1),
                (0x9fc00, 0x10_0000, 2),
                (0x10_0000, 0xc000_0000, 1),
                (0xe000_0000, 0xf000_0000, 2),
                (0x1_0000_0000, 0x1_4000_0000, 1)
            ]
        );
    }
}
