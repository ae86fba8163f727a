//! Where memory lies in guest physical space, and where PCI functions can be.

use std::ops::Range;

use ruse_memory::{HIGH_RAM_START, LOW_RAM_END, Layout, MAX_RAM};

use crate::config::{ConfigError, MachineConfig};
use crate::machine::MachineError;
use crate::virtio::OpenPmem;

/// Memory that devices bring begins at a multiple of this: Linux plugs memory in and out in parts of at most so many bytes.
const ALIGNMENT: u64 = 2 << 30;
/// Bytes of the window for PCI memory above all other memory, which is also what it begins at a multiple of.
const PCI_WINDOW: u64 = 64 << 30;

/// What lies where.
pub(crate) struct AddressPlan {
    /// All memory.
    pub(crate) layout: Layout,
    /// RAM that can be plugged in: its address and size.
    pub(crate) pluggable: Option<(u64, u64)>,
    /// Where each file is.
    pub(crate) pmems: Vec<u64>,
    /// The window for PCI memory above 4 GiB.
    pub(crate) pci: Range<u64>,
}

impl AddressPlan {
    /// Puts what there is above RAM one behind the other.
    pub(crate) fn new(config: &MachineConfig, pmems: &[OpenPmem]) -> Result<Self, MachineError> {
        let mut layout = Layout::of_ram(config.memory)?;
        let mut end = HIGH_RAM_START + config.memory.saturating_sub(LOW_RAM_END);
        let mut place = |size: u64| {
            let start = end.next_multiple_of(ALIGNMENT);
            end = start.saturating_add(size);
            match end <= MAX_RAM + HIGH_RAM_START {
                true => Ok(start),
                false => Err(ConfigError::TooMuchInAll),
            }
        };
        let mut pluggable = None;
        if let Some(size) = config.pluggable_memory() {
            let start = place(size)?;
            layout = layout.with_pluggable(start, size)?;
            pluggable = Some((start, size));
        }
        let mut places = Vec::new();
        for pmem in pmems {
            let start = place(pmem.size)?;
            layout = layout.with_file(start, pmem.size, pmem.file.clone(), pmem.read_only)?;
            places.push(start);
        }
        let pci = end.next_multiple_of(PCI_WINDOW);
        Ok(Self { layout, pluggable, pmems: places, pci: pci..pci + PCI_WINDOW })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn plan(memory: u64, max: u64, pmems: &[u64]) -> Result<AddressPlan, MachineError> {
        let config = MachineConfig { memory, max_memory: Some(max), ..MachineConfig::new("vmlinuz") };
        let file = Arc::new(tempfile::tempfile().unwrap());
        let pmems: Vec<_> = pmems
            .iter()
            .map(|&size| OpenPmem { path: "x".into(), file: file.clone(), size, read_only: false })
            .collect();
        AddressPlan::new(&config, &pmems)
    }

    #[test]
    fn what_devices_bring_lies_between_ram_and_the_pci_window() {
        let small = plan(GIB / 2, GIB / 2, &[]).unwrap();
        assert_eq!((small.pluggable, small.pci), (None, 64 * GIB..128 * GIB));
        let large = plan(5 * GIB, 63 * GIB, &[GIB / 2, GIB]).unwrap();
        assert_eq!(large.pluggable, Some((6 * GIB, 58 * GIB)));
        assert_eq!((large.pmems, large.pci), (vec![64 * GIB, 66 * GIB], 128 * GIB..192 * GIB));
    }

    #[test]
    fn more_than_there_are_addresses_for_is_refused() {
        assert!(plan(GIB, GIB, &[MAX_RAM - 4 * GIB, GIB]).is_ok());
        for pmems in [&[MAX_RAM][..], &[MAX_RAM / 2, MAX_RAM / 2], &[u64::MAX - 1]] {
            let refused = plan(5 * GIB, 5 * GIB, pmems).err();
            assert!(matches!(refused, Some(MachineError::Config(ConfigError::TooMuchInAll))), "{pmems:?}");
        }
    }
}
