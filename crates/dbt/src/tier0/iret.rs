//! IRET in all modes (SDM volume 2, IRET; volume 3, 6.12.1 and 6.14.3).

use iced_x86::Code;
use ruse_arch::{
    Exception, Segment,
    flags::rflags,
    state::{reg, seg},
};

use super::{
    Insn,
    control::interrupts_enabled,
    far::{return_segment, return_stack},
    segment::{code_of, drop_inner_segments, is_null, rpl, set_stack},
    stack::Stack,
    task::{self, Cause},
};
use crate::cpu::{Cpu, Who};

/// Flags that IRET takes at any privilege level.
const COMMON: u64 = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;
/// Flags above the low 16 that it takes with a wider operand.
const WIDE: u64 = rflags::RF | rflags::AC | rflags::ID;

/// Executes IRET; `Ok(false)` for other instructions.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Exception> {
    let size = match insn.i.code() {
        Code::Iretw => 2,
        Code::Iretd => 4,
        Code::Iretq => 8,
        _ => return Ok(false),
    };
    // NMIs are let through even if the instruction faults (SDM volume 3, 6.7.1).
    cpu.nmi_blocked = false;
    let before = cpu.rflags;
    if cpu.mode.real {
        real(cpu, size)?;
    } else if cpu.mode.vm86 {
        vm86(cpu, size)?;
    } else if cpu.rflags & rflags::NT != 0 {
        nested_task(cpu)?;
    } else {
        protected(cpu, size)?;
    }
    interrupts_enabled(cpu, before);
    Ok(true)
}

/// Replaces the flags in `mask` by those popped.
fn take_flags(cpu: &mut Cpu, popped: u64, mask: u64) {
    // RF never survives an instruction that ends without it.
    cpu.rflags = (cpu.rflags & !mask & !rflags::RF) | (popped & mask) | rflags::FIXED;
}

/// Flags that an IRET of this operand size takes at the current level.
fn flag_mask(cpu: &Cpu, size: usize) -> u64 {
    let cpl = u64::from(cpu.mode.cpl);
    let mut mask = COMMON;
    if size > 2 {
        mask |= WIDE;
    }
    if cpl <= cpu.rflags >> 12 & 3 {
        mask |= rflags::IF;
    }
    if cpl == 0 {
        mask |= rflags::IOPL | if size > 2 { rflags::VIF | rflags::VIP } else { 0 };
    }
    mask
}

/// Pops RIP, CS and the flags.
fn frame(cpu: &mut Cpu, size: usize) -> Result<(Stack, u64, u16, u64), Exception> {
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    let flags = stack.pop(cpu, size)?;
    Ok((stack, rip, selector, flags))
}

/// The new CS of real and virtual-8086 mode.
fn enter_real(cpu: &mut Cpu, stack: Stack, selector: u16, rip: u64) -> Result<(), Exception> {
    let cs = cpu.real_segment(seg::CS, selector, &cpu.seg[seg::CS]);
    if rip > u64::from(cs.limit) {
        return Err(Exception::gp(0));
    }
    stack.commit(cpu);
    cpu.seg[seg::CS] = cs;
    cpu.rip = rip;
    Ok(())
}

fn real(cpu: &mut Cpu, size: usize) -> Result<(), Exception> {
    let (stack, rip, selector, flags) = frame(cpu, size)?;
    enter_real(cpu, stack, selector, rip)?;
    let wide = if size > 2 { WIDE } else { 0 };
    take_flags(cpu, flags, COMMON | wide | rflags::IF | rflags::IOPL);
    cpu.update_mode();
    Ok(())
}

fn vm86(cpu: &mut Cpu, size: usize) -> Result<(), Exception> {
    if cpu.rflags & rflags::IOPL != rflags::IOPL {
        return Err(Exception::gp(0));
    }
    let (stack, rip, selector, flags) = frame(cpu, size)?;
    enter_real(cpu, stack, selector, rip)?;
    let wide = if size > 2 { WIDE } else { 0 };
    take_flags(cpu, flags, COMMON | wide | rflags::IF);
    cpu.update_mode();
    Ok(())
}

/// NT is set: back to the task that the TSS links to (SDM volume 3, 7.4).
fn nested_task(cpu: &mut Cpu) -> Result<(), Exception> {
    if cpu.mode.long {
        return Err(Exception::gp(0));
    }
    if !cpu.tr.is_present() || cpu.tr.limit < 1 {
        return Err(Exception::ts(code_of(cpu.tr.selector, 0)));
    }
    let link = cpu.read_value(cpu.tr.base, 2, Who::System)? as u16;
    task::switch(cpu, link, Cause::Return)
}

fn protected(cpu: &mut Cpu, size: usize) -> Result<(), Exception> {
    let (mut stack, rip, selector, flags) = frame(cpu, size)?;
    if flags & rflags::VM != 0 && cpu.mode.cpl == 0 && size == 4 && !cpu.mode.long {
        return to_vm86(cpu, stack, rip, selector, flags);
    }
    let cs = return_segment(cpu, selector, rip)?;
    let outer = rpl(selector) > cpu.mode.cpl;
    let mask = flag_mask(cpu, size);
    let wide = cpu.mode.long && cs.attr & Segment::L != 0;
    if outer || cpu.mode.code64 {
        let sp = stack.pop(cpu, size)?;
        let ss_selector = stack.pop(cpu, size)? as u16;
        let ss = return_stack(cpu, ss_selector, &cs)?;
        set_stack(cpu, ss, sp, wide);
    } else {
        stack.commit(cpu);
    }
    take_flags(cpu, flags, mask);
    cpu.seg[seg::CS] = cs;
    cpu.rip = rip;
    cpu.update_mode();
    if outer {
        drop_inner_segments(cpu);
    }
    Ok(())
}

/// From level 0 to virtual-8086 mode (SDM volume 3, 20.2.5).
fn to_vm86(cpu: &mut Cpu, mut stack: Stack, rip: u64, cs: u16, flags: u64) -> Result<(), Exception> {
    if rip > 0xffff {
        return Err(Exception::gp(0));
    }
    let mut values = [0u64; 6];
    for value in &mut values {
        *value = stack.pop(cpu, 4)?;
    }
    let [sp, ss, es, ds, fs, gs] = values;
    take_flags(cpu, flags, flag_mask(cpu, 4) | rflags::VM);
    let segments = [(seg::CS, u64::from(cs)), (seg::SS, ss), (seg::ES, es), (seg::DS, ds), (seg::FS, fs)];
    for (s, selector) in segments.into_iter().chain([(seg::GS, gs)]) {
        cpu.seg[s] = vm86_segment(selector as u16);
    }
    cpu.gpr[reg::RSP] = sp & 0xffff_ffff;
    cpu.rip = rip;
    cpu.update_mode();
    Ok(())
}

/// A segment register's content in virtual-8086 mode.
pub(super) fn vm86_segment(selector: u16) -> Segment {
    Segment { base: u64::from(selector) << 4, limit: 0xffff, attr: 0xf3, selector }
}

/// The link of a nested task must name a TSS in the GDT.
pub(super) fn valid_link(selector: u16) -> bool {
    !is_null(selector) && selector & 4 == 0
}
