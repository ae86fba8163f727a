//! Exchanges: XCHG, XADD, CMPXCHG and its wide forms.

use iced_x86::{Instruction, Mnemonic, OpKind};
use ruse_arch::{
    Exception,
    flags::rflags::ZF,
    paging::Access,
    state::reg::{RAX, RBX, RCX, RDX},
};

use super::{
    access::{accumulator, size_of},
    atomic,
    flags::{add, flag, sub},
};
use crate::{
    cpu::{Cpu, Who},
    mmu::access::Place,
    tier0::{Handler, Insn},
};

/// The handler of an instruction of this group.
pub fn handler(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Xchg => xchg,
        Mnemonic::Xadd => xadd,
        Mnemonic::Cmpxchg => cmpxchg,
        Mnemonic::Cmpxchg8b => cmpxchg8b,
        Mnemonic::Cmpxchg16b => cmpxchg16b,
        _ => return None,
    })
}

/// With memory it is locked always (SDM volume 2, XCHG).
fn xchg(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let value = cpu.read_operand(insn, 1)?;
    let old = cpu.modify_operand(insn, true, |_| value)?;
    cpu.set_reg(insn.i.op1_register(), old);
    Ok(())
}

fn xadd(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let b = cpu.read_operand(insn, 1)?;
    let a = if insn.i.op0_kind() == OpKind::Register {
        let a = cpu.reg(insn.i.op0_register());
        cpu.set_reg(insn.i.op1_register(), a);
        // Last, so that the sum counts where both are the same register.
        cpu.set_reg(insn.i.op0_register(), add(a, b, 0, size).0);
        a
    } else {
        let a = cpu.modify(insn, |a| add(a, b, 0, size).0)?;
        cpu.set_reg(insn.i.op1_register(), a);
        a
    };
    cpu.set_arith(add(a, b, 0, size).1);
    Ok(())
}

fn cmpxchg(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let new = cpu.read_operand(insn, 1)?;
    let expected = cpu.reg(accumulator(size));
    let old = if insn.i.op0_kind() == OpKind::Register {
        // A register is left alone if they differ, its upper half too.
        let old = cpu.reg(insn.i.op0_register());
        if old == expected {
            cpu.set_reg(insn.i.op0_register(), new);
        }
        old
    } else {
        cpu.modify(insn, |old| if old == expected { new } else { old })?
    };
    if old != expected {
        cpu.set_reg(accumulator(size), old);
    }
    cpu.set_arith(sub(expected, old, 0, size).1);
    Ok(())
}

fn cmpxchg8b(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let two = |high: u64, low: u64| high << 32 | low & 0xffff_ffff;
    let expected = two(cpu.gpr[RDX], cpu.gpr[RAX]);
    let new = two(cpu.gpr[RCX], cpu.gpr[RBX]);
    let old = cpu.modify(insn, |old| if old == expected { new } else { old })?;
    if old != expected {
        cpu.gpr[RDX] = old >> 32;
        cpu.gpr[RAX] = old & 0xffff_ffff;
    }
    cpu.set_flags(ZF, flag(ZF, old == expected));
    Ok(())
}

fn cmpxchg16b(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let two = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
    let expected = two(cpu.gpr[RDX], cpu.gpr[RAX]);
    let new = two(cpu.gpr[RCX], cpu.gpr[RBX]);
    if !cpu.unchecked_address(insn).is_multiple_of(16) {
        return Err(Exception::gp(0));
    }
    let la = cpu.operand_address(insn, 16, Access::Write)?;
    let result = match cpu.place(la, 16, Access::Write, Who::Current)? {
        Place::Ram(host) | Place::Code(host) => {
            let result = atomic::exchange16(host, expected, new);
            cpu.ram_written(host, 16);
            result
        }
        Place::Device(_) => None,
    };
    let result = match result {
        Some(result) => result,
        None => exchange16_parts(cpu, la, expected, new)?,
    };
    if let Err(old) = result {
        cpu.gpr[RDX] = (old >> 64) as u64;
        cpu.gpr[RAX] = old as u64;
    }
    cpu.set_flags(ZF, flag(ZF, result.is_ok()));
    Ok(())
}

/// As a read and a write; the place has been checked for writing.
#[cold]
fn exchange16_parts(
    cpu: &mut Cpu,
    la: u64,
    expected: u128,
    new: u128,
) -> Result<Result<(), u128>, Exception> {
    let _alone = cpu.mmu.code.alone(cpu.id);
    let mut buf = [0; 16];
    cpu.read_linear(la, &mut buf, Who::Current)?;
    let old = u128::from_le_bytes(buf);
    let equal = old == expected;
    cpu.write_linear(la, &if equal { new } else { old }.to_le_bytes(), Who::Current)?;
    Ok(if equal { Ok(()) } else { Err(old) })
}
