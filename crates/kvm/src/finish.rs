//! Finishes in tier 0 of the translator what the kernel's emulator has given up on.

use std::collections::BTreeMap;

use ruse_arch::VcpuState;
use ruse_dbt::single::SingleStepper;
use ruse_engine::{Bus, EngineError};

use crate::vm::Shared;

/// Executes single instructions of one vCPU.
pub struct Finisher {
    stepper: SingleStepper,
    /// How often, by mnemonic.
    counts: BTreeMap<String, u64>,
}

impl Finisher {
    /// For vCPU `id`. It knows all that tier 0 knows: a KVM that emulates is one that may not be able to keep the
    /// host's features from the guest.
    pub fn new(id: u32, vm: &Shared) -> Self {
        let cpuid = ruse_dbt::cpuid::supported();
        Self { stepper: SingleStepper::new(id, cpuid, vm.clock.clone(), &vm.ram), counts: BTreeMap::new() }
    }

    /// The state after the instruction at which `state` stands, or after the delivery of what it raises.
    pub fn finish(&mut self, state: &VcpuState, bus: &dyn Bus) -> Result<VcpuState, EngineError> {
        let step = self.stepper.step(state, bus);
        let name = step.instruction.unwrap_or_else(|| "fetch".into());
        if self.counts.is_empty() {
            tracing::warn!(instruction = %name, rip = %format_args!("{:#x}", state.rip),
                "KVM's emulator gave up; tier 0 finishes such instructions from now on");
        }
        *self.counts.entry(name).or_default() += 1;
        Ok(step.state)
    }

    /// How many instructions it has finished.
    pub fn total(&self) -> u64 {
        self.counts.values().sum()
    }
}

impl Drop for Finisher {
    fn drop(&mut self) {
        if !self.counts.is_empty() {
            tracing::info!(counts = ?self.counts, "instructions that KVM's emulator gave up on");
        }
    }
}
