//! The pvpanic device on PCI (QEMU's `docs/specs/pvpanic.rst`): by it a guest's system says that it has panicked.

use crate::pci::{Bar, ConfigSpace, ConfigSpaceState, Identity, PciFunction};
use crate::{Access, Power};

/// The system has panicked.
const PANICKED: u8 = 1 << 0;
/// The same, but another kernel is there that deals with it.
const CRASH_LOADED: u8 = 1 << 1;
/// Bytes of its range, of which the first is the register.
const LEN: u32 = 16;

/// The device. All of its state is its configuration space.
#[derive(Debug)]
pub struct Pvpanic {
    space: ConfigSpace,
}

impl Default for Pvpanic {
    fn default() -> Self {
        let mut space = ConfigSpace::new(Identity {
            // What Linux knows from QEMU: a system peripheral of no other kind.
            vendor: 0x1b36,
            device: 0x0011,
            class: 0x08_80_00,
            ..Identity::default()
        });
        space.set_bar(0, Bar::Memory32(LEN));
        // Other functions of the same device are looked for.
        space.set_multifunction();
        Self { space }
    }
}

impl Pvpanic {
    /// The state to save.
    pub fn state(&self) -> ConfigSpaceState {
        self.space.state()
    }

    /// Takes a saved state.
    pub fn restore(&mut self, state: &ConfigSpaceState) {
        self.space.restore(state);
    }
}

impl PciFunction for Pvpanic {
    fn space(&self) -> &ConfigSpace {
        &self.space
    }

    fn space_mut(&mut self) -> &mut ConfigSpace {
        &mut self.space
    }

    /// The register reads as the events that are known.
    fn bar_read(&mut self, _access: &mut Access, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn bar_write(&mut self, access: &mut Access, _bar: u8, offset: u64, data: &[u8]) {
        if let (0, Some(events)) = (offset, data.first())
            && events & PANICKED != 0
        {
            access.effects.power = Some(Power::Panicked);
        }
    }

    fn reset(&mut self, _access: &mut Access) {
        self.space.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Effects;

    fn write(offset: u64, data: &[u8]) -> Option<Power> {
        let mut effects = Effects::default();
        Pvpanic::default().bar_write(&mut Access { now: 0, effects: &mut effects }, 0, offset, data);
        effects.power
    }

    #[test]
    fn a_panic_is_heard_and_what_another_kernel_deals_with_is_not() {
        for (offset, data, power) in [
            (0, &[1u8][..], Some(Power::Panicked)),
            (0, &[3, 0, 0, 0], Some(Power::Panicked)),
            (0, &[2], None),
            (0, &[0xfc, 0xff], None),
            (1, &[1], None),
        ] {
            assert_eq!(write(offset, data), power, "{data:?} at {offset}");
        }
    }

    #[test]
    fn it_is_found_as_linux_expects_it() {
        let mut device = Pvpanic::default();
        let mut effects = Effects::default();
        let mut access = Access { now: 0, effects: &mut effects };
        let mut data = [0xee; 4];
        device.bar_read(&mut access, 0, 0, &mut data);
        assert_eq!(data, [3, 0, 0, 0]);
        device.reset(&mut access);
        assert_eq!(device.space().read(0), 0x0011_1b36);
        assert_eq!(device.space().read(0x0c) >> 16, 0x80, "a device of several functions");
        let saved = device.state();
        device.restore(&saved);
        assert_eq!(device.state(), saved);
    }
}
