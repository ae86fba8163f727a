//! Shifts and rotates. What the manual leaves undefined is as Intel's CPUs have it (measured on a Sapphire Rapids): OF
//! of several steps is that of the first (rotates by an immediate apart), AF is clear.

use iced_x86::{Instruction, Mnemonic};
use ruse_arch::{
    Exception,
    flags::rflags::{ARITH, CF, OF},
};

use super::{
    access::size_of,
    flags::{extend, flag, sign, szp},
};
use crate::{
    cpu::Cpu,
    tier0::{Handler, Insn, operand::mask},
};

/// The handler of an instruction of this group.
pub fn handler(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => |c, i| by_count(c, i, ARITH, shl),
        Mnemonic::Shr => |c, i| by_count(c, i, ARITH, shr),
        Mnemonic::Sar => |c, i| by_count(c, i, ARITH, sar),
        Mnemonic::Rol => |c, i| by_count(c, i, CF | OF, rol),
        Mnemonic::Ror => |c, i| by_count(c, i, CF | OF, ror),
        Mnemonic::Rcl => |c, i| through_carry(c, i, true),
        Mnemonic::Rcr => |c, i| through_carry(c, i, false),
        Mnemonic::Shld => |c, i| double(c, i, shld),
        Mnemonic::Shrd => |c, i| double(c, i, shrd),
        _ => return None,
    })
}

/// The count of an operand of `size` bytes (SDM volume 2, SAL/SAR/SHL/SHR).
fn masked(count: u64, size: usize) -> u32 {
    (count & if size == 8 { 63 } else { 31 }) as u32
}

/// A shift or rotate by a count; by zero it changes no flags.
#[inline]
fn by_count(
    cpu: &mut Cpu,
    insn: &Insn,
    which: u64,
    f: impl Fn(u64, u32, usize) -> (u64, u64),
) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let count = masked(cpu.read_operand(insn, 1)?, size);
    let mut flags = 0;
    cpu.modify(insn, |a| {
        if count == 0 {
            return a;
        }
        let (value, out) = f(a, count, size);
        flags = out;
        value
    })?;
    if count != 0 {
        cpu.set_flags(which, flags);
    }
    Ok(())
}

/// OF of a shift to the left: its first step changes the sign.
fn left_overflow(a: u64, size: usize) -> u64 {
    flag(OF, (a ^ a << 1) & sign(size) != 0)
}

/// OF of a shift to the right: its first step, with `enters` as the new sign, changes the sign.
fn right_overflow(a: u64, enters: bool, size: usize) -> u64 {
    flag(OF, (a & sign(size) != 0) != enters)
}

fn shl(a: u64, count: u32, size: usize) -> (u64, u64) {
    // Counts up to 31 of narrow operands: bits above the operand still show what went out last.
    let wide = u128::from(a) << count;
    let value = wide as u64 & mask(size);
    let carry = wide >> (size * 8) & 1 != 0;
    (value, szp(value, size) | flag(CF, carry) | left_overflow(a, size))
}

fn shr(a: u64, count: u32, size: usize) -> (u64, u64) {
    let value = a >> count;
    let flags = szp(value, size) | flag(CF, a >> (count - 1) & 1 != 0);
    (value, flags | right_overflow(a, false, size))
}

fn sar(a: u64, count: u32, size: usize) -> (u64, u64) {
    let a = extend(a, size);
    let value = (a >> count) as u64 & mask(size);
    // OF is clear: the sign stays.
    (value, szp(value, size) | flag(CF, a >> (count - 1) & 1 != 0))
}

/// Rotates the low `bits` bits to the left.
fn rotate(a: u128, count: u32, bits: u32) -> u128 {
    let count = count % bits;
    (a << count | a >> (bits - count)) & ((1 << bits) - 1)
}

fn rol(a: u64, count: u32, size: usize) -> (u64, u64) {
    let value = rotate(u128::from(a), count, size as u32 * 8) as u64;
    (value, flag(CF, value & 1 != 0) | left_overflow(a, size))
}

fn ror(a: u64, count: u32, size: usize) -> (u64, u64) {
    let bits = size as u32 * 8;
    let value = rotate(u128::from(a), bits - count % bits, bits) as u64;
    (value, flag(CF, value & sign(size) != 0) | right_overflow(a, a & 1 != 0, size))
}

/// RCL and RCR: CF is one more bit above the operand.
fn through_carry(cpu: &mut Cpu, insn: &Insn, left: bool) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let bits = size as u32 * 8;
    let carry = u128::from(cpu.rflags & CF);
    let count = masked(cpu.read_operand(insn, 1)?, size) % (bits + 1);
    let mut flags = 0;
    cpu.modify(insn, |a| {
        if count == 0 {
            return a;
        }
        let by = if left { count } else { bits + 1 - count };
        let wide = rotate(carry << bits | u128::from(a), by, bits + 1);
        let value = wide as u64 & mask(size);
        let overflow = if left { left_overflow(a, size) } else { right_overflow(a, carry != 0, size) };
        flags = flag(CF, wide >> bits & 1 != 0) | overflow;
        value
    })?;
    if count != 0 {
        cpu.set_flags(CF | OF, flags);
    }
    Ok(())
}

/// SHLD and SHRD.
#[inline]
fn double(
    cpu: &mut Cpu,
    insn: &Insn,
    f: impl Fn(u64, u64, u32, usize) -> (u64, u64),
) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let b = cpu.read_operand(insn, 1)?;
    let count = masked(cpu.read_operand(insn, 2)?, size);
    let mut flags = 0;
    cpu.modify(insn, |a| {
        if count == 0 {
            return a;
        }
        let (value, out) = f(a, b, count, size);
        flags = szp(value, size) | out;
        value
    })?;
    if count != 0 {
        cpu.set_arith(flags);
    }
    Ok(())
}

/// Counts above 16 of 16-bit operands are undefined; hardware then takes bits of the first operand again.
fn shld(a: u64, b: u64, count: u32, size: usize) -> (u64, u64) {
    let bits = size as u32 * 8;
    let (upper, lower) = (u128::from(a), u128::from(b));
    // The operands side by side, the result's place on top.
    let (wide, width) = if size == 8 {
        (upper << 64 | lower, 128)
    } else {
        ((upper << bits | lower) << bits | upper, 3 * bits)
    };
    let value = (wide << count >> (width - bits)) as u64 & mask(size);
    let carry = wide >> (width - count) & 1 != 0;
    (value, flag(CF, carry) | left_overflow(a, size))
}

fn shrd(a: u64, b: u64, count: u32, size: usize) -> (u64, u64) {
    let bits = size as u32 * 8;
    let (lower, upper) = (u128::from(a), u128::from(b));
    let wide = if size == 8 { upper << 64 | lower } else { (lower << bits | upper) << bits | lower };
    let value = (wide >> count) as u64 & mask(size);
    let carry = wide >> (count - 1) & 1 != 0;
    (value, flag(CF, carry) | right_overflow(a, b & 1 != 0, size))
}
