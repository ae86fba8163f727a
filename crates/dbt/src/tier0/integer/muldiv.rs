//! Multiplication and division.

use iced_x86::{Instruction, Mnemonic, Register};
use ruse_arch::{
    Exception,
    flags::rflags::{CF, OF},
    state::reg,
};

use super::{
    access::size_of,
    flags::{extend, flag, szp},
};
use crate::{
    cpu::Cpu,
    tier0::{Handler, Insn, operand::mask},
};

/// The handler of an instruction of this group.
pub fn handler(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Mul => mul,
        Mnemonic::Imul if i.op_count() == 1 => imul_wide,
        Mnemonic::Imul => imul,
        Mnemonic::Div => div,
        Mnemonic::Idiv => idiv,
        _ => return None,
    })
}

/// The double-width register pair: AX, DX:AX, EDX:EAX or RDX:RAX.
fn pair(cpu: &Cpu, size: usize) -> u128 {
    if size == 1 {
        return u128::from(cpu.gpr[reg::RAX] & 0xffff);
    }
    let half = |r: usize| u128::from(cpu.gpr[r] & mask(size));
    half(reg::RDX) << (size * 8) | half(reg::RAX)
}

/// Writes the pair of halves.
fn set_pair(cpu: &mut Cpu, size: usize, high: u64, low: u64) {
    let (d, a) = match size {
        1 => {
            cpu.set_reg(Register::AH, high);
            (Register::None, Register::AL)
        }
        2 => (Register::DX, Register::AX),
        4 => (Register::EDX, Register::EAX),
        _ => (Register::RDX, Register::RAX),
    };
    cpu.set_reg(a, low);
    cpu.set_reg(d, high);
}

/// Flags of a product: CF and OF say that the upper half counts. SF, ZF, AF and PF are undefined; SF and PF follow the
/// lower half, the others are clear, as on Intel's CPUs.
fn product_flags(cpu: &mut Cpu, low: u64, size: usize, overflow: bool) {
    let shown = szp(low, size) & !ruse_arch::flags::rflags::ZF;
    cpu.set_arith(flag(CF | OF, overflow) | shown);
}

fn mul(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let b = cpu.read_operand(insn, 0)?;
    let product = u128::from(cpu.gpr[reg::RAX] & mask(size)) * u128::from(b);
    let (low, high) = (product as u64 & mask(size), (product >> (size * 8)) as u64);
    set_pair(cpu, size, high, low);
    product_flags(cpu, low, size, high != 0);
    Ok(())
}

fn imul_wide(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let b = cpu.read_operand(insn, 0)?;
    let product = i128::from(extend(cpu.gpr[reg::RAX], size)) * i128::from(extend(b, size));
    let (low, high) = (product as u64 & mask(size), (product >> (size * 8)) as u64 & mask(size));
    set_pair(cpu, size, high, low);
    product_flags(cpu, low, size, i128::from(extend(low, size)) != product);
    Ok(())
}

/// IMUL with a destination register and one or two sources.
fn imul(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let first = if insn.i.op_count() == 3 { 2 } else { 0 };
    let a = cpu.read_operand(insn, first)?;
    let b = cpu.read_operand(insn, 1)?;
    let product = i128::from(extend(a, size)) * i128::from(extend(b, size));
    let low = product as u64 & mask(size);
    cpu.set_reg(insn.i.op0_register(), low);
    product_flags(cpu, low, size, i128::from(extend(low, size)) != product);
    Ok(())
}

/// The flags of a division are undefined; they stay.
fn div(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let divisor = u128::from(cpu.read_operand(insn, 0)?);
    let dividend = pair(cpu, size);
    let quotient = dividend.checked_div(divisor).ok_or(Exception::DE)?;
    if quotient > u128::from(mask(size)) {
        return Err(Exception::DE);
    }
    set_pair(cpu, size, (dividend % divisor) as u64, quotient as u64);
    Ok(())
}

fn idiv(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let divisor = i128::from(extend(cpu.read_operand(insn, 0)?, size));
    let unused = 128 - size as u32 * 16;
    let dividend = (pair(cpu, size) << unused) as i128 >> unused;
    let quotient = dividend.checked_div(divisor).ok_or(Exception::DE)?;
    if i128::from(extend(quotient as u64, size)) != quotient {
        return Err(Exception::DE);
    }
    set_pair(cpu, size, (dividend % divisor) as u64 & mask(size), quotient as u64 & mask(size));
    Ok(())
}
