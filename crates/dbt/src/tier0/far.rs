//! Far jumps, calls and returns: other code segments, call gates, task gates, other privilege levels
//! (SDM volume 3, 5.8; volume 2, CALL, JMP and RET).

use iced_x86::{Code, OpKind};
use ruse_arch::{
    Exception, Segment,
    paging::{Access, is_canonical},
    state::seg,
};

use super::{
    Insn,
    operand::mask,
    segment::{
        System, code_of, drop_inner_segments, is_null, kind, rpl, set_stack, valid_code, valid_target,
    },
    stack::Stack,
    task::{self, Cause},
};
use crate::cpu::{Cpu, Who};

/// Executes far transfers; `Ok(false)` for other instructions.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Exception> {
    use Code::*;
    match insn.i.code() {
        Jmp_ptr1616 | Jmp_m1616 => jump(cpu, insn, 2)?,
        Jmp_ptr1632 | Jmp_m1632 => jump(cpu, insn, 4)?,
        Jmp_m1664 => jump(cpu, insn, 8)?,
        Call_ptr1616 | Call_m1616 => call(cpu, insn, 2)?,
        Call_ptr1632 | Call_m1632 => call(cpu, insn, 4)?,
        Call_m1664 => call(cpu, insn, 8)?,
        Retfw => far_return(cpu, 2, 0)?,
        Retfd => far_return(cpu, 4, 0)?,
        Retfq => far_return(cpu, 8, 0)?,
        Retfw_imm16 => far_return(cpu, 2, insn.i.immediate16())?,
        Retfd_imm16 => far_return(cpu, 4, insn.i.immediate16())?,
        Retfq_imm16 => far_return(cpu, 8, insn.i.immediate16())?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// Selector and offset of the target.
fn target(cpu: &mut Cpu, insn: &Insn, size: usize) -> Result<(u16, u64), Exception> {
    match insn.i.op0_kind() {
        OpKind::FarBranch16 => Ok((insn.i.far_branch_selector(), u64::from(insn.i.far_branch16()))),
        OpKind::FarBranch32 => Ok((insn.i.far_branch_selector(), u64::from(insn.i.far_branch32()))),
        _ => {
            let la = cpu.operand_address(insn, size + 2, Access::Read)?;
            let mut bytes = [0u8; 10];
            cpu.read_linear(la, &mut bytes[..size + 2], Who::Current)?;
            let selector = u16::from_le_bytes([bytes[size], bytes[size + 1]]);
            let offset = (0..size).rev().fold(0u64, |value, i| value << 8 | u64::from(bytes[i]));
            Ok((selector, offset))
        }
    }
}

/// What a far transfer's selector names in protected mode.
enum Target {
    Code(Segment),
    Gate(System),
    TaskGate(System),
    Tss,
}

/// Looks the selector of a JMP or CALL up and checks what both check.
fn look_up(cpu: &mut Cpu, selector: u16) -> Result<Target, Exception> {
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let found = cpu.descriptor(selector, Exception::gp, 0)?;
    let error = Exception::gp(code_of(selector, 0));
    if found.is_code() {
        return Ok(Target::Code(found));
    }
    let system = cpu.system_descriptor(selector, Exception::gp, 0)?;
    let target = match (system.kind(), cpu.mode.long) {
        (Some(kind::CALL32), _) | (Some(kind::CALL16), false) => Target::Gate(system),
        (Some(kind::TASK_GATE), false) => Target::TaskGate(system),
        (Some(kind::TSS16 | kind::TSS32), false) => Target::Tss,
        _ => return Err(error),
    };
    if rpl(selector).max(cpu.mode.cpl) > system.segment.dpl() {
        return Err(error);
    }
    if matches!(target, Target::Gate(_) | Target::TaskGate(_)) && !system.segment.is_present() {
        return Err(Exception::np(code_of(selector, 0)));
    }
    Ok(target)
}

/// The checks of a direct transfer to a code segment at the same level; the segment with RPL = CPL.
fn same_level(cpu: &mut Cpu, cs: Segment, rip: u64, use_rpl: bool) -> Result<Segment, Exception> {
    let (selector, cpl) = (cs.selector, cpu.mode.cpl);
    let conforming = cs.attr & Segment::EXPAND_DOWN != 0;
    let allowed =
        if conforming { cs.dpl() <= cpl } else { cs.dpl() == cpl && (!use_rpl || rpl(selector) <= cpl) };
    let mut cs = checked_code(cpu, cs, allowed, rip)?;
    cs.selector = selector & !3 | u16::from(cpl);
    Ok(cs)
}

/// A code segment to go to, marked as accessed; `allowed` says whether the levels let one go there.
fn checked_code(cpu: &mut Cpu, mut cs: Segment, allowed: bool, rip: u64) -> Result<Segment, Exception> {
    let error = code_of(cs.selector, 0);
    if !allowed || !valid_code(cpu, &cs) {
        return Err(Exception::gp(error));
    }
    if !cs.is_present() {
        return Err(Exception::np(error));
    }
    if !valid_target(cpu, &cs, rip) {
        return Err(Exception::gp(0));
    }
    cpu.mark_accessed(&mut cs)?;
    Ok(cs)
}

/// Goes on at `rip` in `cs`.
fn enter(cpu: &mut Cpu, cs: Segment, rip: u64) {
    cpu.seg[seg::CS] = cs;
    cpu.rip = rip;
    cpu.update_mode();
}

fn jump(cpu: &mut Cpu, insn: &Insn, size: usize) -> Result<(), Exception> {
    let (selector, offset) = target(cpu, insn, size)?;
    if cpu.mode.real || cpu.mode.vm86 {
        return real_jump(cpu, selector, offset);
    }
    match look_up(cpu, selector)? {
        Target::Code(cs) => {
            let cs = same_level(cpu, cs, offset, true)?;
            enter(cpu, cs, offset);
        }
        Target::Gate(gate) => {
            let (cs, rip) = gate_target(cpu, &gate)?;
            let cs = same_level(cpu, cs, rip, false)?;
            enter(cpu, cs, rip);
        }
        Target::TaskGate(gate) => task::switch(cpu, (gate.raw >> 16) as u16, Cause::Jump)?,
        Target::Tss => task::switch(cpu, selector, Cause::Jump)?,
    }
    Ok(())
}

fn real_jump(cpu: &mut Cpu, selector: u16, offset: u64) -> Result<(), Exception> {
    let cs = cpu.real_segment(seg::CS, selector, &cpu.seg[seg::CS]);
    if offset > u64::from(cs.limit) {
        return Err(Exception::gp(0));
    }
    enter(cpu, cs, offset);
    Ok(())
}

/// Code segment and entry point of a call gate.
fn gate_target(cpu: &mut Cpu, gate: &System) -> Result<(Segment, u64), Exception> {
    let selector = (gate.raw >> 16) as u16;
    let mut rip = gate.raw & 0xffff;
    if gate.kind() == Some(kind::CALL32) {
        rip |= gate.raw >> 32 & 0xffff_0000;
    }
    let error = Exception::gp(code_of(selector, 0));
    if cpu.mode.long {
        rip |= gate.high << 32;
        if gate.high >> 40 & 0x1f != 0 {
            return Err(Exception::gp(code_of(gate.segment.selector, 0)));
        }
    }
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let cs = cpu.descriptor(selector, Exception::gp, 0)?;
    let wrong_size = cpu.mode.long && cs.attr & (Segment::L | Segment::DB) != Segment::L;
    if !cs.is_code() || cs.dpl() > cpu.mode.cpl || wrong_size {
        return Err(error);
    }
    if !cs.is_present() {
        return Err(Exception::np(code_of(selector, 0)));
    }
    Ok((cs, rip))
}

fn call(cpu: &mut Cpu, insn: &Insn, size: usize) -> Result<(), Exception> {
    let (selector, offset) = target(cpu, insn, size)?;
    let back = (u64::from(cpu.seg[seg::CS].selector), cpu.rip);
    if cpu.mode.real || cpu.mode.vm86 {
        let mut stack = Stack::current(cpu);
        stack.push(cpu, back.0, size)?;
        stack.push(cpu, back.1, size)?;
        real_jump(cpu, selector, offset)?;
        stack.commit(cpu);
        return Ok(());
    }
    match look_up(cpu, selector)? {
        Target::Code(cs) => {
            let cs = same_level(cpu, cs, offset, true)?;
            let mut stack = Stack::current(cpu);
            stack.push(cpu, back.0, size)?;
            stack.push(cpu, back.1, size)?;
            stack.commit(cpu);
            enter(cpu, cs, offset);
        }
        Target::Gate(gate) => call_gate(cpu, &gate, back)?,
        Target::TaskGate(gate) => task::switch(cpu, (gate.raw >> 16) as u16, Cause::Call)?,
        Target::Tss => task::switch(cpu, selector, Cause::Call)?,
    }
    Ok(())
}

/// Bytes of a slot that a call through this gate pushes.
fn gate_size(cpu: &Cpu, gate: &System) -> usize {
    match gate.kind() {
        _ if cpu.mode.long => 8,
        Some(kind::CALL16) => 2,
        _ => 4,
    }
}

fn call_gate(cpu: &mut Cpu, gate: &System, back: (u64, u64)) -> Result<(), Exception> {
    let (mut cs, rip) = gate_target(cpu, gate)?;
    let size = gate_size(cpu, gate);
    let conforming = cs.attr & Segment::EXPAND_DOWN != 0;
    if conforming || cs.dpl() == cpu.mode.cpl {
        let cs = same_level(cpu, cs, rip, false)?;
        let mut stack = Stack::current(cpu);
        stack.push(cpu, back.0, size)?;
        stack.push(cpu, back.1, size)?;
        stack.commit(cpu);
        enter(cpu, cs, rip);
        return Ok(());
    }
    if !valid_target(cpu, &cs, rip) {
        return Err(Exception::gp(0));
    }
    let cpl = cs.dpl();
    let (ss, sp) = inner_stack(cpu, cpl, 0)?;
    let mut stack = Stack::new(ss, sp, cpu.mode.long, code_of(ss.selector, 0));
    let old = (u64::from(cpu.seg[seg::SS].selector), Stack::current(cpu));
    stack.push(cpu, old.0, size)?;
    stack.push(cpu, old.1.pointer() & mask(size), size)?;
    if !cpu.mode.long {
        let count = gate.raw >> 32 & 0x1f;
        let mut parameters = old.1;
        for i in (0..count).rev() {
            let value = parameters.peek(cpu, i * size as u64, size)?;
            stack.push(cpu, value, size)?;
        }
    }
    stack.push(cpu, back.0, size)?;
    stack.push(cpu, back.1, size)?;
    cpu.mark_accessed(&mut cs)?;
    cs.selector = cs.selector & !3 | u16::from(cpl);
    let wide = cpu.mode.long;
    set_stack(cpu, ss, stack.pointer(), wide);
    enter(cpu, cs, rip);
    Ok(())
}

/// SS and stack pointer for privilege level `cpl` from the TSS (SDM volume 3, 5.8.5 and 7.7); checked.
pub(super) fn inner_stack(cpu: &mut Cpu, cpl: u8, ext: u32) -> Result<(Segment, u64), Exception> {
    if cpu.mode.long {
        let sp = tss_stack64(cpu, 4 + 8 * u64::from(cpl), ext)?;
        return Ok((Cpu::null_stack(u16::from(cpl), cpl), sp));
    }
    let wide = cpu.tr.kind() & 8 != 0;
    let size = if wide { 4 } else { 2 };
    let offset = (2 * u64::from(cpl) + 1) * size;
    // ESP0 is followed by SS0, which has 16 bits in both formats.
    if !cpu.tr.is_present() || offset + size + 1 > u64::from(cpu.tr.limit) {
        return Err(Exception::ts(code_of(cpu.tr.selector, ext)));
    }
    let at = cpu.tr.base.wrapping_add(offset);
    let sp = cpu.read_value(at, size as usize, Who::System)?;
    let selector = cpu.read_value(at.wrapping_add(size), 2, Who::System)? as u16;
    Ok((cpu.stack_segment(selector, cpl, Exception::ts, ext)?, sp))
}

/// A stack pointer at `offset` of a 64-bit TSS.
pub(super) fn tss_stack64(cpu: &mut Cpu, offset: u64, ext: u32) -> Result<u64, Exception> {
    if !cpu.tr.is_present() || offset + 7 > u64::from(cpu.tr.limit) {
        return Err(Exception::ts(code_of(cpu.tr.selector, ext)));
    }
    let sp = cpu.read_value(cpu.tr.base.wrapping_add(offset), 8, Who::System)?;
    if is_canonical(sp) { Ok(sp) } else { Err(Exception::ss(ext)) }
}

/// The code segment of a return, checked (SDM volume 2, RET and IRET).
pub(super) fn return_segment(cpu: &mut Cpu, selector: u16, rip: u64) -> Result<Segment, Exception> {
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let cs = cpu.descriptor(selector, Exception::gp, 0)?;
    let conforming = cs.attr & Segment::EXPAND_DOWN != 0;
    let level = rpl(selector);
    let allowed = level >= cpu.mode.cpl && if conforming { cs.dpl() <= level } else { cs.dpl() == level };
    checked_code(cpu, cs, allowed, rip)
}

/// SS of a return to the level of `cs`, checked: null is allowed on the way to 64-bit code below level 3.
pub(super) fn return_stack(cpu: &mut Cpu, selector: u16, cs: &Segment) -> Result<Segment, Exception> {
    let level = rpl(cs.selector);
    let to64 = cpu.mode.long && cs.attr & Segment::L != 0;
    if is_null(selector) && to64 && level != 3 && rpl(selector) == level {
        return Ok(Cpu::null_stack(selector, level));
    }
    cpu.stack_segment(selector, level, Exception::gp, 0)
}

/// RET far, releasing `extra` bytes of parameters.
fn far_return(cpu: &mut Cpu, size: usize, extra: u16) -> Result<(), Exception> {
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    stack.skip(u64::from(extra));
    if cpu.mode.real || cpu.mode.vm86 {
        real_jump(cpu, selector, rip)?;
        stack.commit(cpu);
        return Ok(());
    }
    let cs = return_segment(cpu, selector, rip)?;
    if rpl(selector) == cpu.mode.cpl {
        stack.commit(cpu);
        enter(cpu, cs, rip);
        return Ok(());
    }
    let sp = stack.pop(cpu, size)?;
    let ss_selector = stack.pop(cpu, size)? as u16;
    let ss = return_stack(cpu, ss_selector, &cs)?;
    let wide = cpu.mode.long && cs.attr & Segment::L != 0;
    set_stack(cpu, ss, sp, wide);
    enter(cpu, cs, rip);
    let mut outer = Stack::current(cpu);
    outer.skip(u64::from(extra));
    outer.commit(cpu);
    drop_inner_segments(cpu);
    Ok(())
}
