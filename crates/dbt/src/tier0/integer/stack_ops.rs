//! Instructions on the stack, segment registers apart: PUSH, POP, PUSHF, POPF, PUSHA, POPA, ENTER, LEAVE.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use ruse_arch::{
    Exception, Segment,
    flags::rflags,
    paging::Access,
    state::{
        reg::{RBP, RSP},
        seg,
    },
};

use crate::{
    cpu::{Cpu, Who},
    tier0::{
        Handler, Insn,
        operand::mask,
        stack::{Stack, loaded_pointer},
    },
};

/// The handler of an instruction of this group.
pub fn handler(i: &Instruction) -> Option<Handler> {
    let segment = i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register();
    Some(match i.mnemonic() {
        Mnemonic::Push | Mnemonic::Pop if segment => return None,
        Mnemonic::Push => push,
        Mnemonic::Pop => pop,
        Mnemonic::Pushf => |c, _| pushf(c, 2),
        Mnemonic::Pushfd => |c, _| pushf(c, 4),
        Mnemonic::Pushfq => |c, _| pushf(c, 8),
        Mnemonic::Popf => |c, _| popf(c, 2),
        Mnemonic::Popfd => |c, _| popf(c, 4),
        Mnemonic::Popfq => |c, _| popf(c, 8),
        Mnemonic::Pusha => |c, _| pusha(c, 2),
        Mnemonic::Pushad => |c, _| pusha(c, 4),
        Mnemonic::Popa => |c, _| popa(c, 2),
        Mnemonic::Popad => |c, _| popa(c, 4),
        Mnemonic::Enter => enter,
        Mnemonic::Leave => leave,
        _ => return None,
    })
}

/// Bytes that PUSH or POP moves.
fn size(insn: &Insn) -> usize {
    insn.i.stack_pointer_increment().unsigned_abs() as usize
}

fn push(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let value = cpu.read_operand(insn, 0)?;
    let mut stack = Stack::current(cpu);
    stack.push(cpu, value, size(insn))?;
    stack.commit(cpu);
    Ok(())
}

/// An address by RSP in the destination uses the incremented value (SDM volume 2, POP).
fn pop(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let before = cpu.gpr[RSP];
    let mut stack = Stack::current(cpu);
    let value = stack.pop(cpu, size(insn))?;
    stack.commit(cpu);
    let result = cpu.write_operand(insn, 0, value);
    if result.is_err() {
        cpu.gpr[RSP] = before;
    }
    result
}

/// In virtual-8086 mode PUSHF and POPF need IOPL 3 (SDM volume 3, 20.2.7).
fn check_vm86(cpu: &Cpu) -> Result<(), Exception> {
    let denied = cpu.mode.vm86 && cpu.rflags & rflags::IOPL != rflags::IOPL;
    if denied { Err(Exception::gp(0)) } else { Ok(()) }
}

fn pushf(cpu: &mut Cpu, size: usize) -> Result<(), Exception> {
    check_vm86(cpu)?;
    let image = cpu.rflags & !(rflags::VM | rflags::RF);
    let mut stack = Stack::current(cpu);
    stack.push(cpu, image, size)?;
    stack.commit(cpu);
    Ok(())
}

fn popf(cpu: &mut Cpu, size: usize) -> Result<(), Exception> {
    check_vm86(cpu)?;
    let mut stack = Stack::current(cpu);
    let image = stack.pop(cpu, size)?;
    stack.commit(cpu);
    let mut which = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        which |= rflags::AC | rflags::ID;
    }
    let iopl = ((cpu.rflags & rflags::IOPL) >> 12) as u8;
    if cpu.mode.cpl == 0 {
        which |= rflags::IOPL;
    }
    if cpu.mode.cpl <= iopl {
        which |= rflags::IF;
    }
    let before = cpu.rflags;
    cpu.set_flags(which, image);
    if (before ^ cpu.rflags) & rflags::AC != 0 {
        cpu.select_view();
    }
    Ok(())
}

fn pusha(cpu: &mut Cpu, size: usize) -> Result<(), Exception> {
    let mut stack = Stack::current(cpu);
    // SP goes as it was before.
    for value in cpu.gpr.into_iter().take(8) {
        stack.push(cpu, value, size)?;
    }
    stack.commit(cpu);
    Ok(())
}

fn popa(cpu: &mut Cpu, size: usize) -> Result<(), Exception> {
    let mut stack = Stack::current(cpu);
    let mut values = [0; 8];
    for value in values.iter_mut().rev() {
        *value = stack.pop(cpu, size)?;
    }
    for (i, value) in values.into_iter().enumerate().filter(|v| v.0 != RSP) {
        // Not in 64-bit mode: upper halves do not matter.
        cpu.gpr[i] = cpu.gpr[i] & !mask(size) | value;
    }
    stack.commit(cpu);
    Ok(())
}

/// Operand size of ENTER and LEAVE.
fn frame_size(insn: &Insn) -> usize {
    match insn.i.code() {
        Code::Enterw_imm16_imm8 | Code::Leavew => 2,
        Code::Enterd_imm16_imm8 | Code::Leaved => 4,
        _ => 8,
    }
}

fn frame_register(size: usize) -> Register {
    match size {
        2 => Register::BP,
        4 => Register::EBP,
        _ => Register::RBP,
    }
}

/// All pushes come first; BP and SP change when nothing can fault any more (SDM volume 2, ENTER).
fn enter(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let size = frame_size(insn);
    let (room, level) = (insn.i.immediate16(), insn.i.immediate8_2nd() & 31);
    let mut stack = Stack::current(cpu);
    stack.push(cpu, cpu.gpr[RBP], size)?;
    let frame = stack.pointer();
    let address_mask = match (cpu.mode.code64, cpu.seg[seg::SS].attr & Segment::DB != 0) {
        (true, _) => u64::MAX,
        (_, true) => 0xffff_ffff,
        _ => 0xffff,
    };
    let mut pointer = cpu.gpr[RBP];
    for _ in 1..level {
        pointer = pointer.wrapping_sub(size as u64);
        let la = cpu.linear(seg::SS, pointer & address_mask, size, Access::Read)?;
        let value = cpu.read_value(la, size, Who::Current)?;
        stack.push(cpu, value, size)?;
    }
    if level > 0 {
        stack.push(cpu, frame, size)?;
    }
    stack.skip(u64::from(room).wrapping_neg());
    // The new top must be writable.
    let la = cpu.linear(seg::SS, stack.pointer() & address_mask, size, Access::Write)?;
    cpu.probe_linear(la, size, Access::Write, Who::Current)?;
    stack.commit(cpu);
    cpu.set_reg(frame_register(size), frame);
    Ok(())
}

fn leave(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let size = frame_size(insn);
    let (ss, wide) = (cpu.seg[seg::SS], cpu.mode.code64);
    let pointer = loaded_pointer(cpu, &ss, cpu.gpr[RBP], wide);
    let mut stack = Stack::new(ss, pointer, wide, 0).at_current_level();
    let value = stack.pop(cpu, size)?;
    stack.commit(cpu);
    cpu.set_reg(frame_register(size), value);
    Ok(())
}
