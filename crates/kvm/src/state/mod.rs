//! The architectural state of a vCPU, from KVM's structures and into them.

mod events;
mod fpu;
mod lapic;
mod msrs;
mod registers;

use std::io;

use kvm_bindings::kvm_msr_entry;
use kvm_ioctls::{Kvm, VcpuFd};
use ruse_arch::VcpuState;

pub use registers::to_kvm as segment;

/// What this host's KVM knows of a vCPU's state.
pub struct Support {
    /// MSRs that can be read and written.
    msrs: Vec<u32>,
    /// PDPTEs can be read and written.
    sregs2: bool,
}

impl Support {
    /// Asks KVM.
    pub fn new(kvm: &Kvm, sregs2: bool) -> Result<Self, kvm_ioctls::Error> {
        Ok(Self { msrs: kvm.get_msr_index_list()?.as_slice().to_vec(), sregs2 })
    }
}

/// The whole state. The vCPU must not be inside an instruction: after an exit, KVM_RUN has to complete it first.
pub fn save(vcpu: &VcpuFd, support: &Support) -> io::Result<VcpuState> {
    // First, for it takes events in flight over into what the others show.
    let mp_state = events::mp_state(vcpu)?;
    let mut state = VcpuState { mp_state, ..VcpuState::default() };
    registers::save(vcpu, support.sregs2, &mut state)?;
    fpu::save(vcpu, &mut state)?;
    msrs::save(vcpu, &support.msrs, &mut state)?;
    lapic::save(vcpu, &mut state)?;
    events::save(vcpu, &mut state)?;
    Ok(state)
}

/// Replaces the whole state.
pub fn load(vcpu: &VcpuFd, support: &Support, state: &VcpuState) -> io::Result<()> {
    registers::load(vcpu, support.sregs2, state)?;
    fpu::load(vcpu, state)?;
    msrs::load(vcpu, &support.msrs, state)?;
    lapic::load(vcpu, state)?;
    events::load(vcpu, state)
}

/// Gives the vCPU an interrupt of the 8259s; the guest must be ready for it.
pub fn interrupt(vcpu: &VcpuFd, vector: u8) -> io::Result<()> {
    events::interrupt(vcpu, vector)
}

/// Reads MSRs that every KVM has.
pub fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> io::Result<Vec<u64>> {
    Ok(msrs::read(vcpu, indices.to_vec())?.into_iter().map(|(_, value)| value).collect())
}

/// Writes one MSR.
pub fn write_msr(vcpu: &VcpuFd, entry: kvm_msr_entry) -> io::Result<()> {
    msrs::write(vcpu, vec![entry])
}
