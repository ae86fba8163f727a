//! Finishes in tier 0 of the translator what the kernel's emulator has given up on.

use std::{collections::BTreeMap, sync::Arc};

use ruse_arch::VcpuState;
use ruse_dbt::single::SingleStepper;
use ruse_engine::{Bus, Clock, DoorbellTable, EngineError};
use ruse_memory::GuestRam;

/// Extended state that tier 0 has: x87, SSE, AVX.
const XCR0_KNOWN: u64 = 7;

/// Whether an instruction with this mnemonic saves or restores extended state.
fn touches_extended_state(mnemonic: &str) -> bool {
    mnemonic.starts_with("xsave") || mnemonic.starts_with("xrstor")
}

/// Executes single instructions of one vCPU.
pub struct Finisher {
    stepper: SingleStepper,
    /// How often, by mnemonic.
    counts: BTreeMap<String, u64>,
}

impl Finisher {
    /// For vCPU `id`. It knows all that tier 0 knows: a KVM that emulates is one that may not be able to keep the
    /// host's features from the guest.
    pub fn new(id: u32, clock: Arc<Clock>, ram: &GuestRam) -> Self {
        let cpuid = ruse_dbt::cpuid::supported();
        Self { stepper: SingleStepper::new(id, cpuid, clock, ram), counts: BTreeMap::new() }
    }

    /// Gives it the doorbells of the VM.
    pub fn set_doorbells(&mut self, doorbells: &Arc<DoorbellTable>) {
        self.stepper.set_doorbells(doorbells);
    }

    /// The state after the instruction at which `state` stands, or after the delivery of what it raises.
    ///
    /// # Errors
    /// Refuses what saves or restores extended state of which tier 0 does not have all.
    pub fn finish(&mut self, state: &VcpuState, bus: &dyn Bus) -> Result<VcpuState, EngineError> {
        let step = self.stepper.step(state, bus);
        let name = step.instruction.unwrap_or_else(|| "fetch".into());
        if state.xcr0 & !XCR0_KNOWN != 0 && touches_extended_state(&name) {
            return Err(EngineError::Guest(format!(
                "KVM's emulator gave up on {name} at {:#x}, and tier 0 has not all of the state that the guest has \
                 switched on (XCR0 {:#x}); give it --cpu x86-64-v3, and where KVM shows it the host's CPU all the \
                 same, 'noxsave' on the kernel's command line",
                state.rip, state.xcr0
            )));
        }
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use ruse_arch::{
        MpState,
        state::{reg, seg},
    };
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const CODE: u64 = 0x1000;

    /// Remembers bytes written to ports.
    #[derive(Default)]
    struct Ports(Mutex<Vec<(u16, u8)>>);

    impl Bus for Ports {
        fn pio_read(&self, _: u32, _: u16, data: &mut [u8]) {
            data.fill(0x5a);
        }
        fn pio_write(&self, _: u32, port: u16, data: &[u8]) {
            self.0.lock().unwrap().push((port, data[0]));
        }
    }

    /// A finisher before code in real mode.
    fn before(code: &[u8]) -> (Finisher, GuestRam, VcpuState) {
        let ram = GuestRam::new(1 << 16).unwrap();
        ram.memory().write_slice(code, GuestAddress(CODE)).unwrap();
        let finisher = Finisher::new(0, Arc::new(Clock::with_frequency(1_000_000_000)), &ram);
        let mut state = VcpuState { rip: CODE, ..VcpuState::default() };
        (state.seg[seg::CS].base, state.seg[seg::CS].selector) = (0, 0);
        state.gpr[reg::RSP] = 0x8000;
        (finisher, ram, state)
    }

    fn finish(finisher: &mut Finisher, state: &VcpuState) -> VcpuState {
        finisher.finish(state, &Ports::default()).unwrap()
    }

    #[test]
    fn an_instruction_over_memory_and_registers_is_finished() {
        // lock cmpxchg8b [4000h]
        let (mut finisher, ram, mut state) = before(&[0xf0, 0x0f, 0xc7, 0x0e, 0x00, 0x40]);
        ram.memory().write_obj(0x7766_5544_3322_1100u64, GuestAddress(0x4000)).unwrap();
        (state.gpr[reg::RAX], state.gpr[reg::RDX]) = (0x3322_1100, 0x7766_5544);
        (state.gpr[reg::RBX], state.gpr[reg::RCX]) = (0x89ab_cdef, 0x0123_4567);
        state.tsc = 12345;
        let after = finish(&mut finisher, &state);
        assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(0x4000)).unwrap(), 0x0123_4567_89ab_cdef);
        assert_eq!((after.rip, after.rflags & 0x40, after.tsc), (CODE + 6, 0x40, 0));
        assert_eq!((finisher.total(), finisher.counts["cmpxchg8b"]), (1, 1));
    }

    #[test]
    fn ports_are_the_machine_s() {
        // in al, 60h; out 61h, al
        let (mut finisher, _ram, state) = before(&[0xe4, 0x60, 0xe6, 0x61]);
        let ports = Ports::default();
        let state = finisher.finish(&state, &ports).unwrap();
        let state = finisher.finish(&state, &ports).unwrap();
        assert_eq!((state.rip, state.gpr[reg::RAX] & 0xff), (CODE + 4, 0x5a));
        assert_eq!(*ports.0.lock().unwrap(), [(0x61, 0x5a)]);
    }

    #[test]
    fn what_an_instruction_raises_is_delivered() {
        // ud2, with its handler at 0:2345h
        let (mut finisher, ram, state) = before(&[0x0f, 0x0b]);
        ram.memory().write_obj(0x2345u32, GuestAddress(4 * 6)).unwrap();
        let after = finish(&mut finisher, &state);
        assert_eq!((after.rip, after.gpr[reg::RSP]), (0x2345, 0x8000 - 6));
        assert_eq!(ram.memory().read_obj::<u16>(GuestAddress(0x8000 - 6)).unwrap(), CODE as u16);
    }

    #[test]
    fn an_exception_that_cannot_be_delivered_shuts_the_vcpu_down() {
        let (mut finisher, _ram, mut state) = before(&[0x0f, 0x0b]);
        state.idtr.limit = 0;
        assert_eq!(finish(&mut finisher, &state).mp_state, MpState::Shutdown);
    }

    #[test]
    fn the_local_apic_of_the_engine_passes_through() {
        let (mut finisher, _ram, mut state) = before(&[0x90]);
        state.lapic = Some(ruse_arch::LapicState { regs: vec![7; 64], ..Default::default() });
        assert_eq!(finish(&mut finisher, &state).lapic, state.lapic);
    }
}
