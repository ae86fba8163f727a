//! A function for tests, and windows to put it in.

use super::{BarDoorbell, ConfigSpace, PciFunction, PciWindows};
use crate::Access;

/// Windows as a small machine has them.
pub(crate) fn windows() -> PciWindows {
    PciWindows {
        ports: 0x1000..=0xffff,
        memory: vec![0xc000_0000..=0xdfff_ffff, 0x10_0000_0000..=0x1f_ffff_ffff],
    }
}

/// Notes what is written to its ranges, and reads as the number of the range.
pub(crate) struct Dummy {
    pub(crate) space: ConfigSpace,
    pub(crate) written: Vec<(u8, u64, Vec<u8>)>,
}

impl Dummy {
    pub(crate) fn new(space: ConfigSpace) -> Self {
        Self { space, written: Vec::new() }
    }
}

impl PciFunction for Dummy {
    fn space(&self) -> &ConfigSpace {
        &self.space
    }
    fn space_mut(&mut self) -> &mut ConfigSpace {
        &mut self.space
    }
    fn bar_read(&mut self, _: &mut Access, bar: u8, _: u64, data: &mut [u8]) {
        data.fill(bar);
    }
    fn bar_write(&mut self, _: &mut Access, bar: u8, offset: u64, data: &[u8]) {
        self.written.push((bar, offset, data.to_vec()));
    }
    fn doorbells(&self) -> Vec<BarDoorbell> {
        vec![BarDoorbell { bar: 0, offset: 0x40, number: 7 }]
    }
    fn reset(&mut self, _: &mut Access) {
        self.space.reset();
    }
}
