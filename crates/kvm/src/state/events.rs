//! What the vCPU is doing, and events on their way.

use std::io;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED,
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, kvm_mp_state, kvm_vcpu_events,
};
use kvm_ioctls::VcpuFd;
use ruse_arch::{Exception, MpState, VcpuState};

/// Bits of the interrupt shadow: after MOV SS, after STI.
const SHADOW_STI: u8 = 2;

/// What the vCPU is doing.
pub fn mp_state(vcpu: &VcpuFd) -> io::Result<MpState> {
    Ok(match vcpu.get_mp_state()?.mp_state {
        KVM_MP_STATE_HALTED => MpState::Halted,
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => MpState::WaitForSipi,
        _ => MpState::Running,
    })
}

pub fn save(vcpu: &VcpuFd, state: &mut VcpuState) -> io::Result<()> {
    let events = vcpu.get_vcpu_events()?;
    let e = events.exception;
    if e.injected != 0 || e.pending != 0 {
        // The page fault's address is in CR2, a debug exception's bits are in DR6 already.
        let payload = if e.nr == 14 { state.cr2 } else { 0 };
        let error = (e.has_error_code != 0).then_some(e.error_code);
        state.exception = Some(Exception { vector: e.nr, error, payload });
    }
    // A software interrupt is one of an instruction, which is executed anew.
    let i = events.interrupt;
    state.interrupt = (i.injected != 0 && i.soft == 0).then_some(i.nr);
    state.interrupt_shadow = i.shadow != 0;
    state.nmi_pending = events.nmi.pending != 0 || events.nmi.injected != 0;
    // One that is being delivered masks the next only when it has arrived.
    state.nmi_blocked = events.nmi.masked != 0 && events.nmi.injected == 0;
    Ok(())
}

/// Gives the vCPU an interrupt of the 8259s, which KVM does not have. The guest must be ready for it.
///
/// KVM_INTERRUPT would keep it where the state does not show it until the guest runs.
pub fn interrupt(vcpu: &VcpuFd, vector: u8) -> io::Result<()> {
    let mut events = vcpu.get_vcpu_events()?;
    // An NMI may come in between: what waits is left as it is.
    events.flags = 0;
    (events.interrupt.injected, events.interrupt.nr, events.interrupt.soft) = (1, vector, 0);
    vcpu.set_vcpu_events(&events)?;
    if mp_state(vcpu)? == MpState::Halted {
        vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
    }
    Ok(())
}

pub fn load(vcpu: &VcpuFd, state: &VcpuState) -> io::Result<()> {
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if let Some(exception) = state.exception {
        events.exception.injected = 1;
        events.exception.nr = exception.vector;
        events.exception.has_error_code = u8::from(exception.error.is_some());
        events.exception.error_code = exception.error.unwrap_or(0);
    }
    if let Some(vector) = state.interrupt {
        (events.interrupt.injected, events.interrupt.nr) = (1, vector);
    }
    events.interrupt.shadow = if state.interrupt_shadow { SHADOW_STI } else { 0 };
    (events.nmi.pending, events.nmi.masked) = (state.nmi_pending.into(), state.nmi_blocked.into());
    vcpu.set_vcpu_events(&events)?;
    let mp_state = match state.mp_state {
        MpState::Running => KVM_MP_STATE_RUNNABLE,
        MpState::Halted => KVM_MP_STATE_HALTED,
        // An uninitialized one would wait for an INIT before.
        MpState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
        MpState::Shutdown => {
            return Err(io::Error::other("a vCPU that a triple fault has stopped cannot go on"));
        }
    };
    Ok(vcpu.set_mp_state(kvm_mp_state { mp_state })?)
}
