//! BMI1 and BMI2.

use iced_x86::{Instruction, Mnemonic};
use ruse_arch::{
    Exception,
    flags::rflags::{CF, SF, ZF},
    state::reg,
};

use super::{
    access::size_of,
    flags::{extend, flag, sign},
};
use crate::{
    cpu::Cpu,
    tier0::{Handler, Insn, operand::mask},
};

/// The handler of an instruction of this group.
pub fn handler(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Andn => |c, i| two(c, i, true, |a, b, _| (!a & b, false)),
        Mnemonic::Bextr => bextr,
        Mnemonic::Blsi => |c, i| lowest(c, i, |a| (a & a.wrapping_neg(), a != 0)),
        Mnemonic::Blsmsk => |c, i| lowest(c, i, |a| (a ^ a.wrapping_sub(1), a == 0)),
        Mnemonic::Blsr => |c, i| lowest(c, i, |a| (a & a.wrapping_sub(1), a == 0)),
        Mnemonic::Bzhi => |c, i| two(c, i, true, bzhi),
        Mnemonic::Mulx => mulx,
        Mnemonic::Pdep => |c, i| two(c, i, false, |a, b, _| (deposit(a, b), false)),
        Mnemonic::Pext => |c, i| two(c, i, false, |a, b, _| (extract(a, b), false)),
        Mnemonic::Rorx => rorx,
        Mnemonic::Sarx => {
            |c, i| two(c, i, false, |a, b, size| ((extend(a, size) >> count(b, size)) as u64, false))
        }
        Mnemonic::Shlx => |c, i| two(c, i, false, |a, b, size| (a << count(b, size), false)),
        Mnemonic::Shrx => |c, i| two(c, i, false, |a, b, size| (a >> count(b, size), false)),
        _ => return None,
    })
}

fn count(value: u64, size: usize) -> u64 {
    value % (size as u64 * 8)
}

/// Flags of the group: SF and ZF by the result, OF clear, CF as given. AF and PF are undefined, and clear on Intel's
/// CPUs.
fn set_result_flags(cpu: &mut Cpu, value: u64, size: usize, carry: bool) {
    let shown = flag(SF, value & sign(size) != 0) | flag(ZF, value == 0);
    cpu.set_arith(shown | flag(CF, carry));
}

/// `first = f(second, third)`.
fn two(
    cpu: &mut Cpu,
    insn: &Insn,
    flags: bool,
    f: impl Fn(u64, u64, usize) -> (u64, bool),
) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let a = cpu.read_operand(insn, 1)?;
    let b = cpu.read_operand(insn, 2)?;
    let (value, carry) = f(a, b, size);
    let value = value & mask(size);
    cpu.set_reg(insn.i.op0_register(), value);
    if flags {
        set_result_flags(cpu, value, size, carry);
    }
    Ok(())
}

/// `first = f(second)`, over the lowest set bit.
fn lowest(cpu: &mut Cpu, insn: &Insn, f: impl Fn(u64) -> (u64, bool)) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let (value, carry) = f(cpu.read_operand(insn, 1)?);
    let value = value & mask(size);
    cpu.set_reg(insn.i.op0_register(), value);
    set_result_flags(cpu, value, size, carry);
    Ok(())
}

fn bextr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let a = cpu.read_operand(insn, 1)?;
    let [start, len, ..] = cpu.read_operand(insn, 2)?.to_le_bytes();
    let shifted = a.checked_shr(u32::from(start)).unwrap_or(0);
    let value = if len < 64 { shifted & ((1 << len) - 1) } else { shifted };
    cpu.set_reg(insn.i.op0_register(), value);
    // SF is undefined here, and clear on Intel's CPUs.
    cpu.set_arith(flag(ZF, value == 0));
    Ok(())
}

fn bzhi(a: u64, b: u64, size: usize) -> (u64, bool) {
    let index = b as u8;
    if usize::from(index) < size * 8 { (a & ((1 << index) - 1), false) } else { (a, true) }
}

fn mulx(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let b = cpu.read_operand(insn, 2)?;
    let product = u128::from(cpu.gpr[reg::RDX] & mask(size)) * u128::from(b);
    // The upper half counts where both destinations are the same register.
    cpu.set_reg(insn.i.op1_register(), product as u64 & mask(size));
    cpu.set_reg(insn.i.op0_register(), (product >> (size * 8)) as u64);
    Ok(())
}

fn rorx(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let a = cpu.read_operand(insn, 1)?;
    let by = insn.i.immediate8();
    let value =
        if size == 8 { a.rotate_right(by.into()) } else { u64::from((a as u32).rotate_right(by.into())) };
    cpu.set_reg(insn.i.op0_register(), value);
    Ok(())
}

/// The low bits of `a` at the set bits of `to`.
fn deposit(mut a: u64, mut to: u64) -> u64 {
    let mut value = 0;
    while to != 0 {
        let bit = to & to.wrapping_neg();
        if a & 1 != 0 {
            value |= bit;
        }
        a >>= 1;
        to ^= bit;
    }
    value
}

/// The bits of `a` at the set bits of `from`, side by side.
fn extract(a: u64, mut from: u64) -> u64 {
    let (mut value, mut at) = (0, 1u64);
    while from != 0 {
        let bit = from & from.wrapping_neg();
        if a & bit != 0 {
            value |= at;
        }
        at <<= 1;
        from ^= bit;
    }
    value
}
