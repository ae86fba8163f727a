//! MSI with one vector, a 64-bit address and a mask (PCI 3.0, 6.8.1).

use super::ConfigSpace;
use crate::Effects;
use crate::fabric::Msi;

/// Capability id.
const ID: u8 = 0x05;
/// Message control: enabled; 64-bit address; per-vector mask.
const ENABLE: u32 = 1 << 16;
const WIDE_AND_MASKABLE: u8 = 0x80;
const MASKABLE_HIGH: u8 = 0x01;
/// Registers after the header.
const ADDRESS: u16 = 4;
const DATA: u16 = 12;
const MASK: u16 = 16;
const PENDING: u16 = 20;

/// The capability; its registers are in the configuration space, which saves them.
#[derive(Clone, Copy, Debug)]
pub struct MsiCapability {
    at: u16,
}

impl MsiCapability {
    /// Adds the capability to a configuration space.
    pub fn new(space: &mut ConfigSpace) -> Self {
        let mut body = [0; 22];
        body[..2].copy_from_slice(&[WIDE_AND_MASKABLE, MASKABLE_HIGH]);
        let mut writable = [0; 18];
        writable[0] = 1;
        writable[2] = 0xfc;
        writable[3..10].fill(0xff);
        writable[10..12].fill(0xff);
        writable[14] = 1;
        Self { at: space.add_capability(ID, &body, &writable).into() }
    }

    /// Whether the guest uses it.
    pub fn is_enabled(&self, space: &ConfigSpace) -> bool {
        space.read(self.at) & ENABLE != 0
    }

    /// Sends the message, or notes that it is pending. Nothing happens while the capability is not enabled.
    pub fn raise(&self, effects: &mut Effects, space: &mut ConfigSpace) {
        if self.is_enabled(space) {
            space.set_byte((self.at + PENDING) as u8, 1);
            self.changed(effects, space);
        }
    }

    /// The registers may have changed: sends what is pending and no longer masked.
    pub fn changed(&self, effects: &mut Effects, space: &mut ConfigSpace) {
        let masked = space.read(self.at + MASK) & 1 != 0;
        let pending = space.read(self.at + PENDING) & 1 != 0;
        if pending && !masked && self.is_enabled(space) {
            space.set_byte((self.at + PENDING) as u8, 0);
            let low = u64::from(space.read(self.at + ADDRESS));
            let high = u64::from(space.read(self.at + ADDRESS + 4));
            let data = space.read(self.at + DATA) & 0xffff;
            effects.messages.push(Msi { address: high << 32 | low, data });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Identity;

    #[test]
    fn a_masked_message_waits_for_its_unmasking() {
        let mut space = ConfigSpace::new(Identity::default());
        let msi = MsiCapability::new(&mut space);
        let mut effects = Effects::default();
        let at = msi.at;
        space.write(at + ADDRESS, 0xfee0_1003, 0xf);
        space.write(at + DATA, 0xffff_4051, 0xf);
        msi.raise(&mut effects, &mut space);
        space.write(at + MASK, 1, 0xf);
        space.write(at, ENABLE, 0xf);
        msi.changed(&mut effects, &mut space);
        assert!(effects.messages.is_empty(), "what came before it was enabled is lost");
        msi.raise(&mut effects, &mut space);
        assert_eq!((effects.messages.len(), space.read(at + PENDING)), (0, 1));
        space.write(at + MASK, 0, 0xf);
        msi.changed(&mut effects, &mut space);
        msi.changed(&mut effects, &mut space);
        assert_eq!(effects.messages, [Msi { address: 0xfee0_1000, data: 0x4051 }]);
        assert_eq!((space.read(at) >> 16, space.read(at + PENDING)), (0x181, 0));
    }
}
