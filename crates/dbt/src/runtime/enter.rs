//! The way into generated code and the call back out of it.

use std::sync::atomic::Ordering;

use iced_x86::Mnemonic;
use ruse_arch::{Exception, MpState, flags::rflags, paging::Access};

use crate::{
    backend::x86_64::thunks::Interpret,
    cpu::{Cpu, Who, request},
    mmu::access::Place,
    tier0,
};

/// Makes GS address the vCPU block on this thread.
pub fn set_gs(cpu: &Cpu) {
    const ARCH_SET_GS: libc::c_int = 0x1001;
    // SAFETY: GS is not used by the host's user space on x86-64 Linux (thread-local storage is FS).
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, cpu.this) };
}

/// Runs generated code at `code` until it leaves; the reason is in [`Cpu::exit_reason`].
///
/// # Safety
/// GS addresses `cpu` on this thread, `enter` is the entry thunk, `code` the beginning of a block of the same vCPU, and
/// the TLB and jump cache pointers in `cpu` are current.
pub unsafe fn enter(enter: u64, code: *const u8) {
    // SAFETY: the entry thunk has this signature.
    let function: unsafe extern "C" fn(*const u8) = unsafe { std::mem::transmute(enter as *const ()) };
    // SAFETY: by this function's contract. Generated code stays within guest RAM and the vCPU block, keeps the
    // registers that a function keeps, and returns.
    unsafe { function(code) };
}

/// Serves an access that the TLB has no entry for: the host address, or 0 if tier 0 must execute the instruction. `pc`
/// is the address behind the call.
///
/// # Safety
/// Called by generated code only, with the address of the running vCPU's block.
pub unsafe extern "C" fn slow_access(cpu: u64, va: u64, kind: u64, pc: u64) -> u64 {
    // SAFETY: the block is exclusively this thread's while generated code runs; the loop that entered generated code
    // holds no reference across the call.
    let cpu = unsafe { &mut *(cpu as *mut Cpu) };
    // Generated code changes AC and the view with it; the MMU must know before it fills.
    cpu.select_view();
    cpu.counters.helpers.access += 1;
    let size = (kind & 0xff) as usize;
    let access = if kind >> 8 & 1 != 0 { Access::Write } else { Access::Read };
    let last = va.wrapping_add(size as u64 - 1);
    if cpu.is_canonical(va) && cpu.is_canonical(last) && last >= va {
        if va as usize % 4096 + size <= 4096 {
            if let Ok(Place::Ram(host)) = cpu.place(va, size, access, Who::Current) {
                return host as u64;
            }
        } else if access == Access::Read
            && let Some(host) = gather(cpu, va, size)
        {
            return host;
        }
    }
    cpu.counters.helpers.access_refused += 1;
    cpu.exit_value = pc - 1;
    0
}

/// Makes ready a group of accesses of so many bytes on one page that the TLB has no entry for: its host address, or 0 if
/// the page is not RAM that may be accessed so.
///
/// # Safety
/// Called by generated code only, with the address of the running vCPU's block.
pub unsafe extern "C" fn slow_group(cpu: u64, va: u64, kind: u64) -> u64 {
    // SAFETY: as in `slow_access`.
    let cpu = unsafe { &mut *(cpu as *mut Cpu) };
    cpu.select_view();
    cpu.counters.helpers.group += 1;
    let size = (kind & 0xffff) as usize;
    let access = if kind >> 16 & 1 != 0 { Access::Write } else { Access::Read };
    if cpu.is_canonical(va)
        && let Ok(Place::Ram(host)) = cpu.place(va, size, access, Who::Current)
    {
        return host as u64;
    }
    cpu.counters.helpers.group_refused += 1;
    0
}

/// Tier 0 executes the instruction of `len` bytes at `rip` in the middle of a region: 1 if the region goes on, 0 if it is
/// left for the address in [`Cpu::exit_value`].
///
/// # Safety
/// Called by generated code only, with the address of the running vCPU's block.
pub unsafe extern "C" fn step(cpu: u64, rip: u64, len: u64) -> u64 {
    // SAFETY: as in `slow_access`.
    let cpu = unsafe { &mut *(cpu as *mut Cpu) };
    cpu.select_view();
    cpu.rip = rip;
    cpu.rflags = cpu.rflags & !rflags::ARITH | cpu.arith & rflags::ARITH;
    let done = match tier0::step(cpu) {
        Ok(()) => true,
        Err(fault) => {
            // Delivered before the next instruction.
            cpu.exception = Some(fault);
            false
        }
    };
    cpu.arith = cpu.rflags & rflags::ARITH | rflags::FIXED;
    cpu.exit_value = cpu.rip;
    // The code behind may have been written: by the instruction, or by another vCPU before a CPUID, which serializes.
    let stays = cpu.written_code.is_empty() && cpu.shared().requests.load(Ordering::SeqCst) == 0;
    let goes_on = done && cpu.rip == rip.wrapping_add(len) && stays;
    cpu.counters.helpers.step += 1;
    cpu.counters.helpers.step_left += u64::from(!goes_on);
    u64::from(goes_on)
}

/// Tier 0 executes the instruction at `rip`, which may lead anywhere: the address of the translated code there, or 0 if
/// generated code is left for the address in [`Cpu::exit_value`].
///
/// # Safety
/// Called by generated code only, with the address of the running vCPU's block.
pub unsafe extern "C" fn interpret(cpu: u64, rip: u64) -> u64 {
    // SAFETY: as in `slow_access`.
    let cpu = unsafe { &mut *(cpu as *mut Cpu) };
    cpu.select_view();
    lead_on(cpu, rip, tier0::step)
}

/// As [`interpret`], for a SYSCALL of `len` bytes.
///
/// # Safety
/// Called by generated code only, with the address of the running vCPU's block.
pub unsafe extern "C" fn system_call(cpu: u64, rip: u64, len: u64) -> u64 {
    // SAFETY: as in `slow_access`.
    let cpu = unsafe { &mut *(cpu as *mut Cpu) };
    lead_on(cpu, rip, |cpu| tier0::step_known(cpu, Mnemonic::Syscall, len, tier0::system_call))
}

/// As [`system_call`], for a SYSRET to 64-bit code.
///
/// # Safety
/// Called by generated code only, with the address of the running vCPU's block.
pub unsafe extern "C" fn system_return(cpu: u64, rip: u64, len: u64) -> u64 {
    // SAFETY: as in `slow_access`.
    let cpu = unsafe { &mut *(cpu as *mut Cpu) };
    lead_on(cpu, rip, |cpu| tier0::step_known(cpu, Mnemonic::Sysretq, len, tier0::system_return))
}

/// Executes the instruction at `rip` by `step`: the address of the translated code to which it leads, or 0 if generated code
/// is left for the address in [`Cpu::exit_value`].
#[inline]
fn lead_on(cpu: &mut Cpu, rip: u64, step: impl FnOnce(&mut Cpu) -> Result<(), Exception>) -> u64 {
    cpu.rip = rip;
    cpu.rflags = cpu.rflags & !rflags::ARITH | cpu.arith & rflags::ARITH;
    let result = step(cpu);
    cpu.arith = cpu.rflags & rflags::ARITH | rflags::FIXED;
    cpu.exit_value = cpu.rip;
    let next = match result {
        Ok(()) => next_code(cpu),
        Err(fault) => {
            // Delivered before the next instruction.
            cpu.exception = Some(fault);
            None
        }
    };
    cpu.counters.helpers.interpret += 1;
    cpu.counters.helpers.interpret_left += u64::from(next.is_none());
    next.map_or(0, |host| host as u64)
}

/// The ways to execute an instruction that may lead anywhere.
pub const INTERPRET: Interpret = Interpret { any: interpret, system_call, system_return };

/// The translated code at RIP, if the jump cache knows it and nothing is to be done before it.
fn next_code(cpu: &mut Cpu) -> Option<*const u8> {
    // That interrupts may be let in now is looked at here.
    let shared = cpu.shared();
    let mut requests = shared.requests.load(Ordering::SeqCst);
    if requests == request::SELF {
        shared.take(request::SELF);
        requests = shared.requests.load(Ordering::SeqCst);
    }
    let busy = requests != 0 || cpu.nmi_pending || !cpu.written_code.is_empty();
    if busy || cpu.mp_state != MpState::Running {
        return None;
    }
    let waits = cpu.bus().interrupt_pending(cpu.id);
    cpu.irq_waiting = waits.into();
    if waits && cpu.rflags & rflags::IF != 0 {
        return None;
    }
    if cpu.mode.cpl == 3 && cpu.direct.enter(cpu.root()) {
        return None;
    }
    let mode = cpu.code_mode(false)?;
    cpu.kernel_generation = cpu.mmu.kernel_generation();
    cpu.rflags &= !rflags::RF;
    cpu.mmu.find_jump(cpu.rip, mode.bits())
}

/// Reads bytes from two pages of RAM into the bounce buffer, at an address of the same alignment.
fn gather(cpu: &mut Cpu, va: u64, size: usize) -> Option<u64> {
    let split = 4096 - va as usize % 4096;
    let second = va + split as u64;
    let Ok(Place::Ram(_)) = cpu.place(va, split, Access::Read, Who::Current) else { return None };
    let Ok(Place::Ram(_)) = cpu.place(second, size - split, Access::Read, Who::Current) else { return None };
    let mut bytes = [0u8; 32];
    cpu.read_linear(va, &mut bytes[..size], Who::Current).ok()?;
    let skew = va as usize % 32;
    let words = &mut cpu.bounce.0;
    for (i, &b) in bytes[..size].iter().enumerate() {
        let at = skew + i;
        let shift = at % 8 * 8;
        words[at / 8] = words[at / 8] & !(0xff << shift) | u64::from(b) << shift;
    }
    Some(std::ptr::from_ref(words) as u64 + skew as u64)
}
