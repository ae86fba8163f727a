//! Near branches. The target is checked before anything is written (SDM volume 2, CALL, JMP, RET).

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use ruse_arch::{Exception, flags::rflags::ZF, paging::is_canonical, state::seg};

use super::flags::holds;
use crate::{
    cpu::Cpu,
    tier0::{Handler, Insn, operand::mask, stack::Stack},
};

/// The handler of an instruction of this group.
pub fn handler(i: &Instruction) -> Option<Handler> {
    if i.is_jcc_short_or_near() {
        return Some(jcc);
    }
    let near = i.op_count() == 1
        && match i.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => true,
            OpKind::Register => true,
            OpKind::Memory => i.is_jmp_near_indirect() || i.is_call_near_indirect(),
            _ => false,
        };
    Some(match i.mnemonic() {
        Mnemonic::Jmp if near => jmp,
        Mnemonic::Call if near => call,
        Mnemonic::Ret => ret,
        Mnemonic::Loop => |c, i| count_down(c, i, |_| true),
        Mnemonic::Loope => |c, i| count_down(c, i, |flags| flags & ZF != 0),
        Mnemonic::Loopne => |c, i| count_down(c, i, |flags| flags & ZF == 0),
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => jcxz,
        _ => return None,
    })
}

/// Whether a near branch may go there.
fn check(cpu: &Cpu, target: u64) -> Result<u64, Exception> {
    let inside =
        if cpu.mode.code64 { is_canonical(target) } else { target <= u64::from(cpu.seg[seg::CS].limit) };
    if inside { Ok(target) } else { Err(Exception::gp(0)) }
}

/// Target of a direct or indirect near branch.
fn target(cpu: &mut Cpu, insn: &Insn) -> Result<u64, Exception> {
    let target = match insn.i.op0_kind() {
        OpKind::Register | OpKind::Memory => cpu.read_operand(insn, 0)?,
        _ => insn.i.near_branch_target(),
    };
    check(cpu, target)
}

fn jmp(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    cpu.rip = target(cpu, insn)?;
    Ok(())
}

fn jcc(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    if holds(cpu.rflags, insn.i.condition_code()) {
        cpu.rip = check(cpu, insn.i.near_branch_target())?;
    }
    Ok(())
}

fn call(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let to = target(cpu, insn)?;
    let size = insn.i.stack_pointer_increment().unsigned_abs() as usize;
    let mut stack = Stack::current(cpu);
    stack.push(cpu, insn.next, size)?;
    stack.commit(cpu);
    cpu.rip = to;
    Ok(())
}

fn ret(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let size = match insn.i.code() {
        Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Retnd | Code::Retnd_imm16 => 4,
        _ => 8,
    };
    let mut stack = Stack::current(cpu);
    let to = stack.pop(cpu, size)?;
    let to = check(cpu, to)?;
    if insn.i.op_count() == 1 {
        stack.skip(u64::from(insn.i.immediate16()));
    }
    stack.commit(cpu);
    cpu.rip = to;
    Ok(())
}

/// The counter of LOOP and JCXZ: the address size chooses its width.
fn counter(i: &Instruction) -> Register {
    match i.code() {
        Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Jcxz_rel8_16
        | Code::Jcxz_rel8_32 => Register::CX,
        Code::Loopne_rel8_16_ECX
        | Code::Loopne_rel8_32_ECX
        | Code::Loopne_rel8_64_ECX
        | Code::Loope_rel8_16_ECX
        | Code::Loope_rel8_32_ECX
        | Code::Loope_rel8_64_ECX
        | Code::Loop_rel8_16_ECX
        | Code::Loop_rel8_32_ECX
        | Code::Loop_rel8_64_ECX
        | Code::Jecxz_rel8_16
        | Code::Jecxz_rel8_32
        | Code::Jecxz_rel8_64 => Register::ECX,
        _ => Register::RCX,
    }
}

fn count_down(cpu: &mut Cpu, insn: &Insn, more: impl Fn(u64) -> bool) -> Result<(), Exception> {
    let counter = counter(&insn.i);
    let left = cpu.reg(counter).wrapping_sub(1) & mask(counter.size());
    if left != 0 && more(cpu.rflags) {
        cpu.rip = check(cpu, insn.i.near_branch_target())?;
    }
    cpu.set_reg(counter, left);
    Ok(())
}

fn jcxz(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    if cpu.reg(counter(&insn.i)) == 0 {
        cpu.rip = check(cpu, insn.i.near_branch_target())?;
    }
    Ok(())
}
