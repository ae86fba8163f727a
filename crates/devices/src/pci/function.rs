//! What a function of a PCI device is to the bus.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{ConfigSpace, PciAddress};
use crate::{Access, Effects};

/// A function and its lock, which is taken inside the host bridge's. Nothing of a machine is locked inside it.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// Takes a function's lock, also one that a panicking thread has left behind: a function survives any state.
pub fn lock<T: ?Sized>(function: &Mutex<T>) -> MutexGuard<'_, T> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What answers accesses to one function.
pub trait PciFunction: Send {
    /// Its configuration space.
    fn space(&self) -> &ConfigSpace;
    /// Its configuration space, for firmware's part.
    fn space_mut(&mut self) -> &mut ConfigSpace;
    /// Reads the double word at `register`, a multiple of 4 below 4096. What is not there reads as zero.
    fn config_read(&mut self, _access: &mut Access, register: u16) -> u32 {
        self.space().read(register)
    }
    /// Writes those bytes of the double word at `register` whose bit in `enables` (0 to 3) is set.
    fn config_write(&mut self, _access: &mut Access, register: u16, value: u32, enables: u8) {
        self.space_mut().write(register, value, enables);
    }
    /// Reads bytes at `offset` of the range of base address register `bar`.
    fn bar_read(&mut self, _access: &mut Access, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    /// Writes bytes at `offset` of the range of base address register `bar`.
    fn bar_write(&mut self, _access: &mut Access, _bar: u8, _offset: u64, _data: &[u8]) {}
    /// Writes in its ranges, of any width and value, that only ring.
    fn doorbells(&self) -> Vec<BarDoorbell> {
        Vec::new()
    }
    /// Whether something is plugged in behind it now: of interest to the slots of root ports only.
    fn set_occupied(&mut self, _access: &mut Access, _occupied: bool) {}
    /// Back to the state after power-up.
    fn reset(&mut self, access: &mut Access);
}

/// A doorbell in a range of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarDoorbell {
    /// Base address register of the range, which is in memory.
    pub bar: u8,
    /// Offset in the range.
    pub offset: u64,
    /// Which of the function's doorbells.
    pub number: u16,
}

/// The level of the interrupt pin of something that is plugged in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntxLevel {
    /// The function ([`PciAddress::id`]), or on a machine without PCI the device, in the machine's numbering.
    pub source: u16,
    /// The interrupt line that the pin is wired to.
    pub gsi: u8,
    /// Whether it is asserted.
    pub level: bool,
}

/// A function's interrupt pin and where it leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntxPin {
    source: u16,
    gsi: u8,
    level: bool,
}

impl IntxPin {
    /// The pin of the function at `at`, wired to interrupt line `gsi`.
    pub fn new(at: PciAddress, gsi: u8) -> Self {
        Self { source: at.id(), gsi, level: false }
    }

    /// Who asserts it ([`PciAddress::id`]).
    pub fn source(&self) -> u16 {
        self.source
    }

    /// Asserts or releases the pin, unless the function may not (command register, bit 10; PCI 3.0, 6.2.2).
    pub fn set(&mut self, effects: &mut Effects, space: &ConfigSpace, asserted: bool) {
        let level = asserted && !space.intx_disabled();
        if level != self.level {
            self.level = level;
            effects.intx.push(IntxLevel { source: self.source, gsi: self.gsi, level });
        }
    }
}
