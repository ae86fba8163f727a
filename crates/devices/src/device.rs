//! What every device is: a struct with registers that gets accesses and events, answers with values, and names its
//! side effects as values that the machine carries out after the access. No device has threads, locks or callbacks.

use crate::fabric::Msi;
use crate::pci::{IntxLevel, PciRanges};

/// A change of the machine's power that the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// Soft off (ACPI S5).
    Off,
    /// Reset of the whole machine.
    Reset,
    /// End the process with this code (debug-exit device).
    Exit(u8),
    /// None: the guest's system has panicked (pvpanic device).
    Panicked,
    /// None: the machine is held until its user lets it go on.
    Pause,
}

/// Side effects that a device names. The machine carries them out in order after the access.
#[derive(Debug, Default)]
pub struct Effects {
    /// Interrupt lines (GSI numbers) and their new levels.
    pub lines: Vec<(u8, bool)>,
    /// Interrupt pins of what is plugged in, PCI functions or virtio devices without PCI, and their new levels.
    pub intx: Vec<IntxLevel>,
    /// Message-signalled interrupts to deliver.
    pub messages: Vec<Msi>,
    /// What has been rung that no doorbell of the engine has caught.
    pub rings: Vec<Ring>,
    /// Where PCI functions answer from now on.
    pub pci_ranges: Option<PciRanges>,
    /// When the watchdog wants to be called from now on, in nanoseconds since the machine's start.
    pub watchdog: Option<u64>,
    /// Power change asked for.
    pub power: Option<Power>,
}

/// A device's doorbell: somebody is to look at what the guest has put there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ring {
    /// Whose doorbell, in the machine's numbering.
    pub source: u16,
    /// Which of its doorbells.
    pub number: u16,
}

impl Effects {
    /// Sets the level of interrupt line `gsi`.
    pub fn line(&mut self, gsi: u8, level: bool) {
        self.lines.push((gsi, level));
    }
}

/// The circumstances of an access.
pub struct Access<'a> {
    /// Nanoseconds since the machine's start.
    pub now: u64,
    /// Where the device puts its side effects.
    pub effects: &'a mut Effects,
}

/// A device behind a range of ports or addresses.
pub trait Device: Send {
    /// Reads `data.len()` (1, 2, 4 or 8) bytes at `offset` into the device's range. Any offset and width must be
    /// survived; what hardware would not answer reads as all ones.
    fn read(&mut self, access: &mut Access, offset: u64, data: &mut [u8]);
    /// Writes bytes at `offset` into the device's range.
    fn write(&mut self, access: &mut Access, offset: u64, data: &[u8]);
    /// When the device next wants [`Device::tick`], in nanoseconds since the machine's start.
    fn deadline(&self) -> Option<u64> {
        None
    }
    /// The deadline has passed (late or early calls are harmless).
    fn tick(&mut self, _access: &mut Access) {}
    /// Back to the state after power-up.
    fn reset(&mut self, access: &mut Access);
}
