//! SYSCALL on a KVM that runs user code itself, but emulates the kernel's, and leaves this step between them unfinished:
//! RIP, RCX, R11 and RFLAGS are set, CS and SS are still the user's.
//!
//! The vCPU is then at the kernel's entry at CPL 3, which may not fetch there. Of the page fault KVM does not tell; it
//! delivers it to the guest. But its emulator obeys breakpoints (KVM_SET_GUEST_DEBUG), so that there is one at the
//! guest's handler of page faults: where the fault is such a fetch, its delivery is undone and the SYSCALL finished. At
//! all others the vCPU makes one step without the breakpoint, which the emulator would hit again in spite of RF.
//!
//! Where the entry is, the writes to LSTAR tell, which an MSR filter brings here. The handler's address is read anew
//! with each of them, after each step and with each state that is set.
//!
//! While it lasts, the guest has no debug registers of its own: KVM gives them to whoever debugs the guest.

mod detect;

use std::{io, mem};

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, Msrs, kvm_debug_exit_arch,
    kvm_enable_cap, kvm_guest_debug, kvm_msr_entry, kvm_sregs,
};
use kvm_ioctls::{
    Cap, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd,
};
use ruse_arch::{
    Exception, Segment, VcpuState,
    flags::{efer, rflags},
    msr,
    state::seg,
};
use ruse_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::state;

pub use detect::is_unfinished;

/// R11, which keeps the flags.
const R11: usize = 11;
/// Vector of page faults.
const PAGE_FAULT: u8 = 14;
/// DR7: the first breakpoint is on, for execution (SDM volume 3, 18.2.4).
const FIRST_BREAKPOINT: u64 = 0x402;

/// Has KVM tell of the guest's writes to LSTAR; whether it does.
pub fn tell_of_lstar(vm: &VmFd) -> bool {
    filter_lstar(vm)
        .inspect_err(|error| tracing::warn!(%error, "KVM leaves SYSCALL unfinished, and has no MSR filter"))
        .is_ok()
}

fn filter_lstar(vm: &VmFd) -> io::Result<()> {
    let mut exits = kvm_enable_cap { cap: Cap::X86UserSpaceMsr as u32, ..Default::default() };
    exits.args[0] = MsrExitReason::Filter.bits().into();
    vm.enable_cap(&exits)?;
    let lstar =
        MsrFilterRange { flags: MsrFilterRangeFlags::WRITE, base: msr::LSTAR, msr_count: 1, bitmap: &[0] };
    Ok(vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[lstar])?)
}

/// Finishes the SYSCALLs of one vCPU.
#[derive(Default)]
pub struct SyscallEntry {
    /// Where they enter the kernel; zero where the guest has no entry yet.
    lstar: u64,
    /// The guest's handler of page faults, where the breakpoint is.
    handler: Option<u64>,
    /// The vCPU makes one step without the breakpoint.
    stepping: bool,
    finished: u64,
}

impl SyscallEntry {
    /// How many were finished.
    pub fn total(&self) -> u64 {
        self.finished
    }

    /// Makes the guest's write to LSTAR; whether KVM takes the value.
    pub fn write_lstar(&mut self, vcpu: &VcpuFd, ram: &GuestRam, data: u64) -> io::Result<bool> {
        let entry = kvm_msr_entry { index: msr::LSTAR, data, ..Default::default() };
        let entry = Msrs::from_entries(&[entry]).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let taken = vcpu.set_msrs(&entry)? == 1;
        if taken {
            self.watch(vcpu, ram, data)?;
        }
        Ok(taken)
    }

    /// The entry is at `lstar` from now on; all other state may have changed too.
    pub fn watch(&mut self, vcpu: &VcpuFd, ram: &GuestRam, lstar: u64) -> io::Result<()> {
        self.lstar = lstar;
        self.set_breakpoint(vcpu, ram)
    }

    /// Deals with KVM_EXIT_DEBUG. The guest's own debug exceptions do not come here: KVM delivers them.
    pub fn stopped(&mut self, vcpu: &VcpuFd, ram: &GuestRam, exit: &kvm_debug_exit_arch) -> io::Result<()> {
        if mem::take(&mut self.stepping) {
            return self.set_breakpoint(vcpu, ram);
        }
        if Some(exit.pc) != self.handler {
            return Err(io::Error::other(format!("it stopped at {:#x}, where no breakpoint is", exit.pc)));
        }
        if self.undo_fault(vcpu, ram)? {
            self.finished += 1;
            return Ok(());
        }
        self.stepping = true;
        debug(vcpu, KVM_GUESTDBG_SINGLESTEP, None)
    }

    /// Finishes in a state that was read a SYSCALL of which KVM has not even delivered the fault.
    pub fn finish(&self, state: &mut VcpuState) {
        let fetch = |e: Exception| e.vector == PAGE_FAULT && e.payload == self.lstar;
        let user = state.rip == self.lstar && state.seg[seg::SS].dpl() == 3;
        if user
            && state.exception.is_none_or(fetch)
            && has_syscall_flags(state.rflags, state.gpr[R11], state.sfmask)
        {
            [state.seg[seg::CS], state.seg[seg::SS]] = kernel_segments(state.star);
            state.rflags &= !rflags::RF;
            state.exception = None;
        }
    }

    fn set_breakpoint(&mut self, vcpu: &VcpuFd, ram: &GuestRam) -> io::Result<()> {
        self.stepping = false;
        self.handler = if self.lstar == 0 { None } else { page_fault_handler(vcpu, ram, &vcpu.get_sregs()?) };
        let control = if self.handler.is_some() { KVM_GUESTDBG_USE_HW_BP } else { 0 };
        debug(vcpu, control, self.handler)
    }

    /// If the page fault that was just delivered is the fetch after a SYSCALL, undoes the delivery and finishes the
    /// SYSCALL. CR2 stays changed: who makes system calls has no page fault to handle.
    fn undo_fault(&self, vcpu: &VcpuFd, ram: &GuestRam) -> io::Result<bool> {
        let mut sregs = vcpu.get_sregs()?;
        if sregs.cr2 != self.lstar {
            return Ok(false);
        }
        let mut regs = vcpu.get_regs()?;
        // What the delivery has pushed: the error code, RIP, CS, RFLAGS, RSP and SS (SDM volume 3, 6.14.2).
        let Some([_, rip, cs, flags, rsp, _]) = read(vcpu, ram, regs.rsp) else { return Ok(false) };
        let values = state::read_msrs(vcpu, &[msr::STAR, msr::SFMASK])?;
        let &[star, sfmask] = &values[..] else { return Ok(false) };
        if rip != self.lstar || cs & 3 != 3 || !has_syscall_flags(flags, regs.r11, sfmask) {
            return Ok(false);
        }
        [sregs.cs, sregs.ss] = kernel_segments(star).map(|segment| state::segment(&segment));
        vcpu.set_sregs(&sregs)?;
        (regs.rip, regs.rflags, regs.rsp) = (rip, flags & !rflags::RF, rsp);
        vcpu.set_regs(&regs)?;
        Ok(true)
    }
}

/// Whether these are the flags that a SYSCALL leaves. A user's jump to the entry has others: kernels mask interrupts there,
/// which users cannot.
fn has_syscall_flags(flags: u64, r11: u64, sfmask: u64) -> bool {
    flags & !rflags::RF == r11 & !sfmask & !rflags::RF | rflags::FIXED
}

/// CS and SS as SYSCALL sets them (SDM volume 2).
fn kernel_segments(star: u64) -> [Segment; 2] {
    let flat = |selector, attr| Segment { base: 0, limit: u32::MAX, attr, selector };
    let cs = (star >> 32) as u16 & !3;
    [flat(cs, 0xa09b), flat(cs.wrapping_add(8), 0xc093)]
}

/// Debugs the guest in this way, with a breakpoint here; not at all with neither.
fn debug(vcpu: &VcpuFd, control: u32, breakpoint: Option<u64>) -> io::Result<()> {
    let mut argument = kvm_guest_debug::default();
    if control != 0 {
        argument.control = KVM_GUESTDBG_ENABLE | control;
    }
    if let Some(at) = breakpoint {
        (argument.arch.debugreg[0], argument.arch.debugreg[7]) = (at, FIRST_BREAKPOINT);
    }
    Ok(vcpu.set_guest_debug(&argument)?)
}

/// Where the guest handles page faults: what the gate in its interrupt descriptor table says (SDM volume 3, 6.14.1).
fn page_fault_handler(vcpu: &VcpuFd, ram: &GuestRam, sregs: &kvm_sregs) -> Option<u64> {
    const PRESENT: u64 = 1 << 47;
    const SIZE: u16 = 16;
    let at = u16::from(PAGE_FAULT) * SIZE;
    if sregs.efer & efer::LMA == 0 || sregs.idt.limit < at + SIZE - 1 {
        return None;
    }
    let [low, high] = read(vcpu, ram, sregs.idt.base.wrapping_add(at.into()))?;
    (low & PRESENT != 0).then_some(low & 0xffff | low >> 32 & 0xffff_0000 | high << 32)
}

/// Reads quadwords at a linear address, where RAM is mapped there.
fn read<const N: usize>(vcpu: &VcpuFd, ram: &GuestRam, at: u64) -> Option<[u64; N]> {
    let mut values = [0; N];
    for (n, value) in (0..).zip(&mut values) {
        let place = vcpu.translate_gva(at.wrapping_add(8 * n)).ok().filter(|place| place.valid != 0)?;
        *value = ram.memory().read_obj(GuestAddress(place.physical_address)).ok()?;
    }
    Some(values)
}

#[cfg(test)]
mod tests {
    use ruse_arch::state::reg;

    use super::*;

    const LSTAR: u64 = 0xffff_ffff_8160_0000;

    /// After a SYSCALL of user code with these flags, as KVM leaves it.
    fn unfinished(flags: u64) -> VcpuState {
        let mut state = VcpuState { rip: LSTAR, lstar: LSTAR, star: 0x23_0010 << 32, ..VcpuState::default() };
        state.sfmask = rflags::IF | rflags::DF;
        state.gpr[R11] = flags;
        state.rflags = flags & !state.sfmask | rflags::RF;
        (state.seg[seg::CS].attr, state.seg[seg::SS].attr) = (0xa0fb, 0xc0f3);
        (state.gpr[reg::RCX], state.exception) = (0x40_1000, Some(fetch(LSTAR)));
        state
    }

    fn fetch(at: u64) -> Exception {
        Exception { vector: PAGE_FAULT, error: Some(0x15), payload: at }
    }

    fn finished(mut state: VcpuState) -> VcpuState {
        SyscallEntry { lstar: LSTAR, ..SyscallEntry::default() }.finish(&mut state);
        state
    }

    #[test]
    fn a_state_shows_no_unfinished_syscall() {
        let before = unfinished(0x246 | rflags::DF);
        let after = finished(before.clone());
        assert_eq!((after.seg[seg::CS].selector, after.seg[seg::CS].attr), (0x10, 0xa09b));
        assert_eq!((after.seg[seg::SS].selector, after.seg[seg::SS].attr), (0x18, 0xc093));
        assert_eq!((after.rflags, after.exception), (0x46, None));
        assert_eq!((after.rip, after.gpr), (before.rip, before.gpr));
    }

    #[test]
    fn what_is_no_syscall_stays_in_the_state() {
        let syscall = unfinished(0x246);
        let jump = VcpuState { rflags: 0x246, ..syscall.clone() };
        let elsewhere = VcpuState { rip: LSTAR + 3, ..syscall.clone() };
        let other_fault = VcpuState { exception: Some(fetch(LSTAR + 0x1000)), ..syscall.clone() };
        let mut kernel = syscall;
        kernel.seg[seg::SS].attr = 0xc093;
        for state in [jump, elsewhere, other_fault, kernel] {
            assert_eq!(finished(state.clone()), state);
        }
    }
}
