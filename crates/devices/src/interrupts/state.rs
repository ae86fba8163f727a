//! The saved state of all interrupt chips.

use serde::{Deserialize, Serialize};

use super::{CpuSignal, Interrupts, SignalKind};
use crate::ioapic::IoApicState;
use crate::lapic::{LapicState, StateError};
use crate::pic::Pic;

/// State of all interrupt chips of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptsState {
    /// The 8259s.
    pub pic: Pic,
    /// The I/O APIC.
    pub ioapic: IoApicState,
    /// The local APICs; none when the engine has them.
    pub lapics: Vec<LapicState>,
}

impl Interrupts {
    /// The state at time `now`. Signals must have been taken.
    pub fn state(&self, now: u64) -> InterruptsState {
        InterruptsState {
            pic: self.pic.state(),
            ioapic: self.ioapic.state(),
            lapics: self.lapics.iter().map(|lapic| lapic.state(now)).collect(),
        }
    }

    /// Takes a saved state. On an error nothing is changed. CPUs with an interrupt waiting are signalled.
    pub fn restore(&mut self, state: &InterruptsState) -> Result<(), StateError> {
        if state.lapics.len() != self.lapics.len() {
            return Err(StateError::Cpus { expected: self.lapics.len(), found: state.lapics.len() });
        }
        let mut lapics = self.lapics.clone();
        for (lapic, saved) in lapics.iter_mut().zip(&state.lapics) {
            lapic.restore(saved)?;
        }
        self.lapics = lapics;
        self.pic.restore(&state.pic);
        self.ioapic.restore(&state.ioapic);
        self.signals.clear();
        self.messages.clear();
        self.update_all();
        self.signal_all_pending();
        Ok(())
    }

    /// A restored CPU may sleep whatever the lines said before.
    fn signal_all_pending(&mut self) {
        self.signals.clear();
        for cpu in (0..self.lapics.len() as u32).filter(|cpu| self.pending(*cpu)).collect::<Vec<_>>() {
            self.signals.push(CpuSignal { cpu, kind: SignalKind::Interrupt });
        }
    }
}
