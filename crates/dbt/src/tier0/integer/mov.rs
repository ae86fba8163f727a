//! Moves, extensions, addresses, conditional moves and sets.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use ruse_arch::{
    Exception,
    paging::Access,
    state::{reg, seg},
};

use super::{
    access::size_of,
    flags::{extend, holds},
};
use crate::{
    cpu::{Cpu, Who},
    tier0::{
        Handler, Insn,
        operand::{address_size, mask, segment_index},
    },
};

/// The handler of an instruction of this group.
pub fn handler(i: &Instruction) -> Option<Handler> {
    let special = |n: u32| i.op_kind(n) == OpKind::Register && !i.op_register(n).is_gpr();
    Some(match i.mnemonic() {
        // Segment, control and debug registers are the system group's.
        Mnemonic::Mov if special(0) || special(1) => return None,
        Mnemonic::Mov if i.op0_kind() == OpKind::Register && i.op1_kind() == OpKind::Register => |c, i| {
            let value = c.reg(i.i.op1_register());
            c.set_reg(i.i.op0_register(), value);
            Ok(())
        },
        Mnemonic::Mov | Mnemonic::Movnti | Mnemonic::Movzx => copy,
        Mnemonic::Movsx | Mnemonic::Movsxd => sign_extend,
        Mnemonic::Movbe => movbe,
        Mnemonic::Movdiri => copy,
        Mnemonic::Movdir64b => movdir64b,
        Mnemonic::Lea => lea,
        Mnemonic::Bswap => bswap,
        Mnemonic::Xlatb => xlat,
        m if is_cmov(m) => cmov,
        m if is_set(m) => set,
        _ => return None,
    })
}

fn is_cmov(m: Mnemonic) -> bool {
    use Mnemonic::{
        Cmova, Cmovae, Cmovb, Cmovbe, Cmove, Cmovg, Cmovge, Cmovl, Cmovle, Cmovne, Cmovno, Cmovnp, Cmovns,
        Cmovo, Cmovp, Cmovs,
    };
    matches!(
        m,
        Cmova
            | Cmovae
            | Cmovb
            | Cmovbe
            | Cmove
            | Cmovg
            | Cmovge
            | Cmovl
            | Cmovle
            | Cmovne
            | Cmovno
            | Cmovnp
            | Cmovns
            | Cmovo
            | Cmovp
            | Cmovs
    )
}

fn is_set(m: Mnemonic) -> bool {
    use Mnemonic::{
        Seta, Setae, Setb, Setbe, Sete, Setg, Setge, Setl, Setle, Setne, Setno, Setnp, Setns, Seto, Setp,
        Sets,
    };
    matches!(
        m,
        Seta | Setae
            | Setb
            | Setbe
            | Sete
            | Setg
            | Setge
            | Setl
            | Setle
            | Setne
            | Setno
            | Setnp
            | Setns
            | Seto
            | Setp
            | Sets
    )
}

fn copy(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let value = cpu.read_operand(insn, 1)?;
    cpu.write_operand(insn, 0, value)
}

fn sign_extend(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let value = extend(cpu.read_operand(insn, 1)?, size_of(&insn.i, 1));
    cpu.set_reg(insn.i.op0_register(), value as u64);
    Ok(())
}

fn movbe(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let value = cpu.read_operand(insn, 1)?.swap_bytes() >> (64 - size * 8);
    cpu.write_operand(insn, 0, value)
}

/// A 64-byte store to ES at the address in the register (SDM volume 2, MOVDIR64B).
fn movdir64b(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let from = cpu.operand_address(insn, 64, Access::Read)?;
    let to = cpu.reg(insn.i.op0_register()) & mask(address_size(&insn.i));
    let to = cpu.linear(seg::ES, to, 64, Access::Write)?;
    if !to.is_multiple_of(64) {
        return Err(Exception::gp(0));
    }
    let mut bytes = [0; 64];
    cpu.read_linear(from, &mut bytes, Who::Current)?;
    cpu.write_linear(to, &bytes, Who::Current)
}

fn lea(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let address = cpu.effective_address(insn);
    cpu.set_reg(insn.i.op0_register(), address);
    Ok(())
}

/// BSWAP of a 16-bit register is undefined; CPUs clear it.
fn bswap(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let register = insn.i.op0_register();
    let value = cpu.reg(register);
    let swapped = match register.size() {
        8 => value.swap_bytes(),
        4 => u64::from((value as u32).swap_bytes()),
        _ => 0,
    };
    cpu.set_reg(register, swapped);
    Ok(())
}

fn xlat(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    debug_assert_eq!(insn.i.code(), Code::Xlat_m8);
    let address = cpu.reg(insn.i.memory_base()).wrapping_add(cpu.gpr[reg::RAX] & 0xff);
    let address = address & mask(address_size(&insn.i));
    let la = cpu.linear(segment_index(insn.i.memory_segment()), address, 1, Access::Read)?;
    let value = cpu.read_value(la, 1, Who::Current)?;
    cpu.set_reg(iced_x86::Register::AL, value);
    Ok(())
}

/// The source is read, and a 32-bit destination's upper half cleared, whether the condition holds or not.
fn cmov(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let source = cpu.read_operand(insn, 1)?;
    let register = insn.i.op0_register();
    let value = if holds(cpu.rflags, insn.i.condition_code()) { source } else { cpu.reg(register) };
    cpu.set_reg(register, value);
    Ok(())
}

fn set(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let value = u64::from(holds(cpu.rflags, insn.i.condition_code()));
    cpu.write_operand(insn, 0, value)
}
