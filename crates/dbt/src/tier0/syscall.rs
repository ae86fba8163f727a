//! Fast system calls (SDM volume 2, SYSCALL, SYSRET, SYSENTER and SYSEXIT; volume 3, 5.8.7 and 5.8.8).

use iced_x86::Mnemonic;
use ruse_arch::{
    Exception, Segment,
    flags::{efer, rflags},
    paging::is_canonical,
    state::{reg, seg},
};

use super::{Insn, control::interrupts_enabled};
use crate::cpu::Cpu;

/// R11, which keeps the flags.
const R11: usize = 11;

/// Executes what belongs here; `Ok(false)` for other instructions.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Exception> {
    match insn.i.mnemonic() {
        Mnemonic::Syscall => system_call(cpu)?,
        Mnemonic::Sysret => sysret(cpu, false)?,
        Mnemonic::Sysretq => system_return(cpu)?,
        Mnemonic::Sysenter => sysenter(cpu)?,
        Mnemonic::Sysexit => sysexit(cpu, false)?,
        Mnemonic::Sysexitq => sysexit(cpu, true)?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// Sets flat CS and SS with the fixed attributes that these instructions give, and the privilege level with them.
fn set_flat(cpu: &mut Cpu, cs: u16, ss: u16, cpl: u8, code64: bool) {
    let dpl = u16::from(cpl) << 5;
    let size = if code64 { Segment::L } else { Segment::DB };
    let flat = |selector, attr| Segment { base: 0, limit: 0xffff_ffff, attr, selector };
    cpu.seg[seg::CS] = flat(cs, 0x809b | dpl | size);
    cpu.seg[seg::SS] = flat(ss, 0xc093 | dpl);
    if code64 && cpu.mode.code64 {
        cpu.mode.cpl = cpl;
        cpu.select_view();
    } else {
        cpu.update_mode();
    }
}

/// SYSCALL. Intel has it in 64-bit mode only.
pub(crate) fn system_call(cpu: &mut Cpu) -> Result<(), Exception> {
    if !cpu.mode.code64 || cpu.paging.efer & efer::SCE == 0 {
        return Err(Exception::UD);
    }
    cpu.gpr[reg::RCX] = cpu.rip;
    cpu.gpr[R11] = cpu.rflags & !rflags::RF;
    cpu.rip = cpu.lstar;
    cpu.rflags = cpu.rflags & !cpu.sfmask & !rflags::RF | rflags::FIXED;
    let cs = (cpu.star >> 32) as u16 & !3;
    set_flat(cpu, cs, cs.wrapping_add(8), 0, true);
    Ok(())
}

/// SYSRET to 64-bit code.
pub(crate) fn system_return(cpu: &mut Cpu) -> Result<(), Exception> {
    sysret(cpu, true)
}

fn sysret(cpu: &mut Cpu, wide: bool) -> Result<(), Exception> {
    if !cpu.mode.code64 || cpu.paging.efer & efer::SCE == 0 {
        return Err(Exception::UD);
    }
    let target = cpu.gpr[reg::RCX];
    // On Intel's CPUs the fault is raised before the return to level 3.
    if cpu.mode.cpl != 0 || (wide && !is_canonical(target)) {
        return Err(Exception::gp(0));
    }
    let before = cpu.rflags;
    let defined = 0x3c_7fd5;
    cpu.rflags = cpu.gpr[R11] & defined & !rflags::RF & !rflags::VM | rflags::FIXED;
    cpu.rip = if wide { target } else { target & 0xffff_ffff };
    let base = (cpu.star >> 48) as u16;
    let cs = if wide { base.wrapping_add(16) } else { base } | 3;
    set_flat(cpu, cs, base.wrapping_add(8) | 3, 3, wide);
    interrupts_enabled(cpu, before);
    Ok(())
}

fn sysenter(cpu: &mut Cpu) -> Result<(), Exception> {
    let cs = cpu.sysenter[0] as u16 & !3;
    if cpu.mode.real || cs == 0 {
        return Err(Exception::gp(0));
    }
    let long = cpu.mode.long;
    let width = if long { u64::MAX } else { 0xffff_ffff };
    cpu.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    cpu.gpr[reg::RSP] = cpu.sysenter[1] & width;
    cpu.rip = cpu.sysenter[2] & width;
    set_flat(cpu, cs, cs.wrapping_add(8), 0, long);
    Ok(())
}

fn sysexit(cpu: &mut Cpu, wide: bool) -> Result<(), Exception> {
    let base = cpu.sysenter[0] as u16 & !3;
    let (rip, rsp) = (cpu.gpr[reg::RDX], cpu.gpr[reg::RCX]);
    let bad_target = wide && !(is_canonical(rip) && is_canonical(rsp));
    if cpu.mode.real || base == 0 || cpu.mode.cpl != 0 || bad_target {
        return Err(Exception::gp(0));
    }
    let width = if wide { u64::MAX } else { 0xffff_ffff };
    cpu.rip = rip & width;
    cpu.gpr[reg::RSP] = rsp & width;
    let cs = base.wrapping_add(if wide { 32 } else { 16 }) | 3;
    set_flat(cpu, cs, cs.wrapping_add(8), 3, wide);
    Ok(())
}
