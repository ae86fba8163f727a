//! Single instructions in tier 0, for an engine whose own executor does not know one.

use std::sync::Arc;

use iced_x86::{EncodingKind, Instruction, Mnemonic};
use ruse_arch::{MpState, VcpuState};
use ruse_engine::{Bus, Clock, CpuidTable, DoorbellTable};
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

/// The component of XSAVE with the upper halves of ZMM0 to ZMM15.
const ZMM_HIGH: u8 = 6;

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
    /// A stepper for vCPU `id` over `ram`. It notes the pages that it writes for a dirty log.
    pub fn new(id: u32, cpuid: CpuidTable, clock: Arc<Clock>, ram: &GuestRam) -> Self {
        let code = CodeMap::new(ram.clone());
        code.log_writes(true);
        let mmu = Mmu::new(ram.clone(), code, id);
        Self { cpu: CpuBox::new(id, cpuid, clock, mmu) }
    }

    /// Gives it the doorbells of a VM.
    pub fn set_doorbells(&mut self, doorbells: &Arc<DoorbellTable>) {
        self.cpu.doorbells = doorbells.reader();
    }

    /// Executes the instruction at which `state` stands. What it raises is delivered.
    pub fn step(&mut self, state: &VcpuState, bus: &dyn Bus) -> Step {
        self.cpu.load_state(state);
        let (decoded, ok) = self.cpu.with_bus(bus, |cpu| {
            let decoded = tier0::decode(cpu).ok().map(|insn| insn.i);
            let ok = match tier0::step(cpu) {
                Ok(()) => true,
                Err(fault) => interrupt::deliver(cpu, Event::Exception(fault)).is_ok(),
            };
            vector::spill_x87(cpu);
            (decoded, ok)
        });
        let mut after = self.cpu.save_state();
        // What this CPU does not have passes through.
        after.lapic.clone_from(&state.lapic);
        after.fpu.extended.clone_from(&state.fpu.extended);
        if let Some(high) = after.fpu.extended.get_mut(&ZMM_HIGH) {
            decoded.iter().for_each(|insn| clear_high(insn, high));
        }
        after.paravirt = state.paravirt;
        after.tsc = 0;
        if !ok {
            after.mp_state = MpState::Shutdown;
        }
        let instruction = decoded.map(|insn| format!("{:?}", insn.mnemonic()).to_lowercase());
        Step { state: after, instruction }
    }
}

/// A VEX-encoded instruction clears its destination up to the longest length that the CPU has (SDM volume 1, 15.5).
/// `high` are the upper halves of ZMM0 to ZMM15.
fn clear_high(insn: &Instruction, high: &mut [u8]) {
    let target = insn.op0_register();
    if matches!(insn.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall) {
        high.fill(0);
    } else if insn.encoding() == EncodingKind::VEX && (target.is_xmm() || target.is_ymm()) {
        let half = high.chunks_exact_mut(32).nth(target.number());
        half.into_iter().for_each(|half| half.fill(0));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::tier0::testing::{Machine, NullBus};

    /// The upper halves of the ZMM registers after one instruction in 64-bit code.
    fn high_after(code: &[u8]) -> Vec<u8> {
        let mut machine = Machine::long();
        machine.load(code);
        let mut state = machine.cpu.save_state();
        state.fpu.extended = BTreeMap::from([(ZMM_HIGH, vec![0xaa; 512])]);
        let clock = Arc::new(Clock::with_frequency(1_000_000_000));
        let mut stepper = SingleStepper::new(0, crate::cpuid::supported(), clock, &machine.ram);
        stepper.step(&state, &NullBus).state.fpu.extended[&ZMM_HIGH].clone()
    }

    #[test]
    fn vex_instructions_clear_what_is_longer_than_their_destination() {
        if !std::is_x86_feature_detected!("avx") {
            println!("skipped: the host has no AVX");
            return;
        }
        // vpxor xmm3, xmm1, xmm2
        let high = high_after(&[0xc5, 0xf1, 0xef, 0xda]);
        assert!(high[96..128].iter().all(|&byte| byte == 0));
        assert_eq!(high.iter().filter(|&&byte| byte == 0xaa).count(), 480);
        // vzeroupper
        assert!(high_after(&[0xc5, 0xf8, 0x77]).iter().all(|&byte| byte == 0));
        // pxor xmm3, xmm1
        assert!(high_after(&[0x66, 0x0f, 0xef, 0xd9]).iter().all(|&byte| byte == 0xaa));
    }
}
