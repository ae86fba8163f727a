//! Single instructions in tier 0, for an engine whose own executor does not know one.

use std::sync::Arc;

use ruse_arch::{MpState, VcpuState};
use ruse_engine::{Bus, Clock, CpuidTable};
use ruse_memory::GuestRam;

use crate::{
    cpu::CpuBox,
    mmu::{Mmu, watch::CodeMap},
    tier0::{
        self,
        interrupt::{self, Event},
        vector,
    },
};

/// What one step did.
pub struct Step {
    /// The state after it. A triple fault shows as [`MpState::Shutdown`].
    pub state: VcpuState,
    /// The instruction's mnemonic, if it could be fetched.
    pub instruction: Option<String>,
}

/// Executes one instruction at a time, each from a state of its own.
pub struct SingleStepper {
    cpu: CpuBox,
}

impl SingleStepper {
    /// A stepper for vCPU `id` over `ram`.
    pub fn new(id: u32, cpuid: CpuidTable, clock: Arc<Clock>, ram: &GuestRam) -> Self {
        let mmu = Mmu::new(ram.clone(), CodeMap::new(ram.clone()), id);
        Self { cpu: CpuBox::new(id, cpuid, clock, mmu) }
    }

    /// Executes the instruction at which `state` stands. What it raises is delivered.
    pub fn step(&mut self, state: &VcpuState, bus: &dyn Bus) -> Step {
        self.cpu.load_state(state);
        let (instruction, ok) = self.cpu.with_bus(bus, |cpu| {
            let instruction =
                tier0::decode(cpu).ok().map(|insn| format!("{:?}", insn.i.mnemonic()).to_lowercase());
            let ok = match tier0::step(cpu) {
                Ok(()) => true,
                Err(fault) => interrupt::deliver(cpu, Event::Exception(fault)).is_ok(),
            };
            vector::spill_x87(cpu);
            (instruction, ok)
        });
        let mut after = self.cpu.save_state();
        // What this CPU does not have passes through.
        after.lapic.clone_from(&state.lapic);
        after.paravirt = state.paravirt;
        after.tsc = 0;
        if !ok {
            after.mp_state = MpState::Shutdown;
        }
        Step { state: after, instruction }
    }
}
