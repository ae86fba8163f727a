//! The reset control register of PIIX and ICH chipsets at port 0xcf9, which the FADT names as RESET_REG (ACPI 6.5,
//! 4.8.3.6). It lies among the PCI configuration ports, so the host bridge holds it.

use serde::{Deserialize, Serialize};

use crate::Power;

/// The port.
pub const RESET_PORT: u16 = 0xcf9;
/// What to write to reset everything (FADT field RESET_VALUE): RST_CPU and SYS_RST.
pub const RESET_VALUE: u8 = 0x06;

/// Sets what RST_CPU resets (82371SB data sheet, 2.1.10).
const SYS_RST: u8 = 0x02;
/// Resets when it becomes one; reads as zero after the reset.
const RST_CPU: u8 = 0x04;

/// The register.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetControl {
    value: u8,
}

impl ResetControl {
    /// What the register reads.
    pub fn read(&self) -> u8 {
        self.value
    }

    /// A byte is written; a soft reset is the whole machine's here too.
    pub fn write(&mut self, value: u8) -> Option<Power> {
        self.value = value & SYS_RST;
        (value & RST_CPU != 0).then_some(Power::Reset)
    }
}
