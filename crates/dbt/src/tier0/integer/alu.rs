//! Addition, subtraction, logic and comparison.

use iced_x86::{Instruction, Mnemonic};
use ruse_arch::{
    Exception,
    flags::rflags::{AF, ARITH, CF, OF},
};

use super::{
    access::size_of,
    flags::{add, logic, sub},
};
use crate::{
    cpu::Cpu,
    tier0::{Handler, Insn, operand::mask},
};

/// The handler of an instruction of this group.
pub fn handler(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Add => |c, i| binary(c, i, |a, b, _, size| add(a, b, 0, size)),
        Mnemonic::Adc => |c, i| binary(c, i, add),
        Mnemonic::Sub => |c, i| binary(c, i, |a, b, _, size| sub(a, b, 0, size)),
        Mnemonic::Sbb => |c, i| binary(c, i, sub),
        Mnemonic::And => |c, i| binary(c, i, |a, b, _, size| logic(a & b, size)),
        Mnemonic::Or => |c, i| binary(c, i, |a, b, _, size| logic(a | b, size)),
        Mnemonic::Xor => |c, i| binary(c, i, |a, b, _, size| logic(a ^ b, size)),
        Mnemonic::Cmp => |c, i| compare(c, i, |a, b, size| sub(a, b, 0, size).1),
        Mnemonic::Test => |c, i| compare(c, i, |a, b, size| logic(a & b, size).1),
        Mnemonic::Inc => |c, i| unary(c, i, ARITH & !CF, |a, size| add(a, 1, 0, size)),
        Mnemonic::Dec => |c, i| unary(c, i, ARITH & !CF, |a, size| sub(a, 1, 0, size)),
        Mnemonic::Neg => |c, i| unary(c, i, ARITH, |a, size| sub(0, a, 0, size)),
        Mnemonic::Not => |c, i| unary(c, i, 0, |a, size| (!a & mask(size), 0)),
        Mnemonic::Adcx => |c, i| add_with(c, i, CF),
        Mnemonic::Adox => |c, i| add_with(c, i, OF),
        _ => return None,
    })
}

/// `first = f(first, second, CF, size)`.
#[inline]
fn binary(
    cpu: &mut Cpu,
    insn: &Insn,
    f: impl Fn(u64, u64, u64, usize) -> (u64, u64),
) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let b = cpu.read_operand(insn, 1)? & mask(size);
    let carry = cpu.rflags & CF;
    let mut flags = 0;
    cpu.modify(insn, |a| {
        let (value, out) = f(a, b, carry, size);
        flags = out;
        value
    })?;
    cpu.set_arith(flags);
    Ok(())
}

/// Flags of two operands.
#[inline]
fn compare(cpu: &mut Cpu, insn: &Insn, f: impl Fn(u64, u64, usize) -> u64) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let a = cpu.read_operand(insn, 0)?;
    let b = cpu.read_operand(insn, 1)? & mask(size);
    cpu.set_arith(f(a, b, size));
    Ok(())
}

/// `first = f(first)`, with the flags in `which`.
#[inline]
fn unary(
    cpu: &mut Cpu,
    insn: &Insn,
    which: u64,
    f: impl Fn(u64, usize) -> (u64, u64),
) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let mut flags = 0;
    cpu.modify(insn, |a| {
        let (value, out) = f(a, size);
        flags = out;
        value
    })?;
    cpu.set_flags(which, flags);
    Ok(())
}

/// ADCX and ADOX: an addition with a carry of its own.
fn add_with(cpu: &mut Cpu, insn: &Insn, carry: u64) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let b = cpu.read_operand(insn, 1)?;
    let a = cpu.reg(insn.i.op0_register());
    let (sum, flags) = add(a, b, u64::from(cpu.rflags & carry != 0), size);
    cpu.set_reg(insn.i.op0_register(), sum);
    cpu.set_flags(carry, if flags & CF != 0 { carry } else { 0 });
    Ok(())
}

/// BCD corrections (SDM volume 2, AAA to AAS, DAA, DAS); not in 64-bit mode.
pub fn decimal_handler(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Daa => |c, _| packed(c, false),
        Mnemonic::Das => |c, _| packed(c, true),
        Mnemonic::Aaa => |c, _| unpacked(c, 0x106),
        Mnemonic::Aas => |c, _| unpacked(c, 0x106u16.wrapping_neg()),
        Mnemonic::Aam => aam,
        Mnemonic::Aad => aad,
        _ => return None,
    })
}

fn packed(cpu: &mut Cpu, subtract: bool) -> Result<(), Exception> {
    let old = cpu.gpr[0] as u8;
    let carry = cpu.rflags & CF != 0;
    let mut al = old;
    let mut flags = 0;
    let correct = |al: u8, by: u8| if subtract { al.wrapping_sub(by) } else { al.wrapping_add(by) };
    if old & 15 > 9 || cpu.rflags & AF != 0 {
        al = correct(al, 6);
        flags |= AF;
        // DAS reports the borrow of this step, DAA a carry out of it.
        if carry || (if subtract { old < 6 } else { old > 0xf9 }) {
            flags |= CF;
        }
    }
    if old > 0x99 || carry {
        al = correct(al, 0x60);
        flags |= CF;
    }
    cpu.set_reg(iced_x86::Register::AL, u64::from(al));
    cpu.set_arith(flags | super::flags::szp(u64::from(al), 1));
    Ok(())
}

fn unpacked(cpu: &mut Cpu, by: u16) -> Result<(), Exception> {
    let ax = cpu.gpr[0] as u16;
    let adjust = ax & 15 > 9 || cpu.rflags & AF != 0;
    let ax = if adjust { ax.wrapping_add(by) } else { ax } & 0xff0f;
    cpu.set_reg(iced_x86::Register::AX, u64::from(ax));
    // SF, ZF and PF are undefined; hardware sets them by AL.
    let flags = super::flags::szp(u64::from(ax as u8), 1);
    cpu.set_arith(flags | if adjust { AF | CF } else { 0 });
    Ok(())
}

fn aam(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let (al, base) = (cpu.gpr[0] as u8, insn.i.immediate8());
    let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else {
        return Err(Exception::DE);
    };
    cpu.set_reg(iced_x86::Register::AX, u64::from(high) << 8 | u64::from(low));
    cpu.set_arith(logic(u64::from(low), 1).1);
    Ok(())
}

fn aad(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let [al, ah] = (cpu.gpr[0] as u16).to_le_bytes();
    let al = al.wrapping_add(ah.wrapping_mul(insn.i.immediate8()));
    cpu.set_reg(iced_x86::Register::AX, u64::from(al));
    cpu.set_arith(logic(u64::from(al), 1).1);
    Ok(())
}
