//! The local APIC: KVM has the register page as hardware shows it.

use std::io;

use kvm_bindings::{kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use ruse_arch::{LapicState, VcpuState, msr};

use super::msrs;

/// Registers of the page, sixteen bytes apart.
const COUNT: usize = 64;

pub fn save(vcpu: &VcpuFd, state: &mut VcpuState) -> io::Result<()> {
    let page = vcpu.get_lapic()?;
    let regs = page.regs.chunks_exact(16).take(COUNT);
    let regs = regs.map(|r| u32::from_le_bytes([r[0] as u8, r[1] as u8, r[2] as u8, r[3] as u8])).collect();
    let deadline = msrs::read(vcpu, vec![msr::TSC_DEADLINE])?;
    state.lapic = Some(LapicState {
        regs,
        apic_base: vcpu.get_sregs()?.apic_base,
        tsc_deadline: deadline.first().map_or(0, |(_, value)| *value),
        ..LapicState::default()
    });
    Ok(())
}

/// The base is set with the special registers, before this.
pub fn load(vcpu: &VcpuFd, state: &VcpuState) -> io::Result<()> {
    let Some(lapic) = &state.lapic else { return Ok(()) };
    let mut page = kvm_lapic_state::default();
    for (bytes, value) in page.regs.chunks_exact_mut(16).zip(&lapic.regs) {
        for (to, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
            *to = from as _;
        }
    }
    vcpu.set_lapic(&page)?;
    // After the page, for its timer's mode decides whether there is a deadline.
    msrs::write(
        vcpu,
        vec![kvm_msr_entry { index: msr::TSC_DEADLINE, data: lapic.tsc_deadline, ..Default::default() }],
    )
}
