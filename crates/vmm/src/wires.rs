//! Interrupt lines that several devices may drive.

use std::collections::BTreeSet;

/// Interrupt lines of a machine, of which each leads to a pin of the I/O APIC.
const LINES: usize = ruse_devices::ioapic::MOST_PINS;

/// Who drives each line. A line is high while anyone holds it high.
#[derive(Debug)]
pub(crate) struct Wires {
    drivers: [BTreeSet<usize>; LINES],
}

impl Default for Wires {
    fn default() -> Self {
        Self { drivers: std::array::from_fn(|_| BTreeSet::new()) }
    }
}

impl Wires {
    /// Device `source` drives line `gsi` to `level`; returns the level of the line, or `None` where there is no such
    /// line.
    pub(crate) fn drive(&mut self, source: usize, gsi: u8, level: bool) -> Option<bool> {
        let drivers = self.drivers.get_mut(usize::from(gsi))?;
        if level {
            drivers.insert(source);
        } else {
            drivers.remove(&source);
        }
        Some(!drivers.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_line_stays_high_while_one_holds_it() {
        let mut wires = Wires::default();
        assert_eq!(wires.drive(0, 4, true), Some(true));
        assert_eq!(wires.drive(2, 4, true), Some(true));
        assert_eq!(wires.drive(0, 4, false), Some(true));
        assert_eq!(wires.drive(0, 3, false), Some(false));
        assert_eq!(wires.drive(2, 4, false), Some(false));
        assert_eq!(wires.drive(0, 64, true), None);
        assert_eq!(wires.drive(70_000, 4, true), Some(true), "PCI functions have large numbers");
    }
}
