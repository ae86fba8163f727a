//! The debug-exit port: a guest ends the monitor with an exit code of its choice (as QEMU's `isa-debug-exit`).

use serde::{Deserialize, Serialize};

use crate::{Access, Device, Power};

/// The port where guests expect the device.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// A port of one to four bytes: a write of `v` ends the process with code `v << 1 | 1`.
#[derive(Debug, Default)]
pub struct DebugExit;

/// Saved state of [`DebugExit`]: it has none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DebugExitState {}

impl DebugExit {
    /// Number of ports.
    pub const LEN: u64 = 4;

    /// The device.
    pub fn new() -> Self {
        Self
    }
    /// The state to save.
    pub fn state(&self) -> DebugExitState {
        DebugExitState {}
    }
    /// Takes a saved state.
    pub fn restore(&mut self, _state: &DebugExitState) {}
}

impl Device for DebugExit {
    fn read(&mut self, _access: &mut Access, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, access: &mut Access, offset: u64, data: &[u8]) {
        if let (0, Some(&low)) = (offset, data.first()) {
            // Only the low byte can reach an exit code.
            access.effects.power = Some(Power::Exit(low << 1 | 1));
        }
    }

    fn reset(&mut self, _access: &mut Access) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Effects;

    #[test]
    fn the_code_is_odd() {
        for (data, code) in [(&[0u8][..], 1), (&[0x10, 0, 0, 0], 33), (&[0xff, 1], 255)] {
            let mut effects = Effects::default();
            DebugExit::new().write(&mut Access { now: 0, effects: &mut effects }, 0, data);
            assert_eq!(effects.power, Some(Power::Exit(code)));
        }
    }
}
