//! Whether this host's KVM leaves SYSCALL unfinished: a guest of two instructions tries it.

use std::{
    path::Path,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use kvm_ioctls::Kvm;
use ruse_arch::{flags::efer, state::seg};
use ruse_engine::{Bus, Clock, EngineError, VcpuHandle, Vm};

use crate::{cpuid, log::LogInterface, open::OpenError, trial, vm::KvmVm};

/// The program: `syscall; out 10h, al`, where the second is what the first enters.
const PROGRAM: [u8; 4] = [0x0f, 0x05, 0xe6, 0x10];
const ENTRY: u64 = trial::CODE + 2;

/// Whether SYSCALL stays at the user's privilege level. Tried once in a process, and only where none of the two modules
/// is loaded that leave it to the CPU.
pub fn is_unfinished(kvm: &Kvm) -> bool {
    static UNFINISHED: OnceLock<bool> = OnceLock::new();
    *UNFINISHED.get_or_init(|| {
        let hardware = ["kvm_intel", "kvm_amd"].map(|name| Path::new("/sys/module").join(name));
        if hardware.iter().any(|module| module.exists()) {
            return false;
        }
        run_trial(kvm).unwrap_or_else(|error| {
            tracing::debug!(%error, "KVM's SYSCALL cannot be tried");
            false
        })
    })
}

/// Stops the vCPU after its port access.
struct Stop(Mutex<Option<Arc<dyn VcpuHandle>>>);

impl Bus for Stop {
    fn pio_write(&self, _: u32, _: u16, _: &[u8]) {
        if let Some(handle) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            handle.kick();
        }
    }
}

fn run_trial(kvm: &Kvm) -> Result<bool, EngineError> {
    let clock = Arc::new(Clock::with_frequency(1_000_000_000));
    let cpuid =
        cpuid::supported(kvm).map_err(|error| EngineError::Guest(OpenError::Other(error).to_string()))?;
    let vm = KvmVm::new(kvm, trial::ram(&PROGRAM)?, clock, false, LogInterface::default(), false)?;
    let mut vcpu = vm.create_vcpu(0, cpuid)?;
    let mut state = trial::state(3);
    state.efer |= efer::SCE;
    (state.star, state.lstar) = (8 << 32, ENTRY);
    vcpu.set_state(&state)?;
    // Either the port access has come, or it was refused to user code, and nobody handles that.
    vcpu.run(&Stop(Mutex::new(Some(vcpu.handle()))))?;
    let after = vcpu.state()?;
    trial::dispose(vcpu, Arc::new(vm));
    Ok(after.rip >= ENTRY && after.seg[seg::SS].dpl() == 3)
}
