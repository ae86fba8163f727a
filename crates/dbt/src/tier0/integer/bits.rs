//! Single bits and counting: BT and its kin, bit scans, POPCNT, CRC32.

use iced_x86::{Instruction, Mnemonic, OpKind};
use ruse_arch::{
    Exception,
    flags::rflags::{ARITH, CF, PF, ZF},
    paging::Access,
};

use super::{
    access::size_of,
    flags::{extend, flag, szp},
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
    Some(match i.mnemonic() {
        Mnemonic::Bt => bt,
        Mnemonic::Bts => |c, i| change(c, i, |a, bit| a | bit),
        Mnemonic::Btr => |c, i| change(c, i, |a, bit| a & !bit),
        Mnemonic::Btc => |c, i| change(c, i, |a, bit| a ^ bit),
        Mnemonic::Bsf => |c, i| scan(c, i, u64::trailing_zeros),
        Mnemonic::Bsr => |c, i| scan(c, i, |a| 63 - a.leading_zeros()),
        Mnemonic::Tzcnt => |c, i| count_zeros(c, i, |a, bits| a.trailing_zeros().min(bits)),
        Mnemonic::Lzcnt => |c, i| count_zeros(c, i, |a, bits| a.leading_zeros() - (64 - bits)),
        Mnemonic::Popcnt => popcnt,
        Mnemonic::Crc32 => crc32,
        _ => return None,
    })
}

/// Linear address and bit of a memory operand: a register's bit offset reaches beyond the operand in both directions
/// (SDM volume 2, BT).
fn bit_in_memory(cpu: &mut Cpu, insn: &Insn, access: Access) -> Result<(u64, u32), Exception> {
    let size = size_of(&insn.i, 0);
    let bits = size as i64 * 8;
    let offset = extend(cpu.read_operand(insn, 1)?, size);
    let mut address = cpu.effective_address(insn);
    if insn.i.op1_kind() == OpKind::Register {
        let elements = offset.div_euclid(bits) * size as i64;
        address = address.wrapping_add(elements as u64) & mask(address_size(&insn.i));
    }
    let la = cpu.linear(segment_index(insn.i.memory_segment()), address, size, access)?;
    Ok((la, offset.rem_euclid(bits) as u32))
}

/// Linear address that BT and its kin access with a bit offset in a register; `None` for other instructions.
pub(crate) fn bit_string_address(cpu: &mut Cpu, insn: &Insn) -> Option<u64> {
    let i = &insn.i;
    let tests = matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    let string = tests && i.op0_kind() == OpKind::Memory && i.op1_kind() == OpKind::Register;
    if !string {
        return None;
    }
    bit_in_memory(cpu, insn, Access::Read).ok().map(|(la, _)| la)
}

/// CF takes the bit; ZF stays and so do, undefined, the others.
fn bt(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let (value, bit) = if insn.i.op0_kind() == OpKind::Register {
        let bit = cpu.read_operand(insn, 1)? % (size as u64 * 8);
        (cpu.reg(insn.i.op0_register()), bit as u32)
    } else {
        let (la, bit) = bit_in_memory(cpu, insn, Access::Read)?;
        (cpu.read_value(la, size, Who::Current)?, bit)
    };
    cpu.set_flags(CF, value >> bit & 1);
    Ok(())
}

fn change(cpu: &mut Cpu, insn: &Insn, f: impl Fn(u64, u64) -> u64) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let (old, bit) = if insn.i.op0_kind() == OpKind::Register {
        let bit = cpu.read_operand(insn, 1)? % (size as u64 * 8);
        (cpu.modify(insn, |a| f(a, 1 << bit))?, bit as u32)
    } else {
        let (la, bit) = bit_in_memory(cpu, insn, Access::Write)?;
        (cpu.modify_memory(la, size, insn.i.has_lock_prefix(), |a| f(a, 1 << bit))?, bit)
    };
    cpu.set_flags(CF, old >> bit & 1);
    Ok(())
}

/// BSF and BSR: zero has no bit to find and leaves the destination alone. The flags but ZF are undefined; Intel's CPUs
/// set PF by the result and clear the others.
fn scan(cpu: &mut Cpu, insn: &Insn, f: impl Fn(u64) -> u32) -> Result<(), Exception> {
    let value = cpu.read_operand(insn, 1)?;
    let mut found = 0;
    if value != 0 {
        found = u64::from(f(value));
        cpu.set_reg(insn.i.op0_register(), found);
    }
    cpu.set_arith(flag(ZF, value == 0) | szp(found, 8) & PF);
    Ok(())
}

fn count_zeros(cpu: &mut Cpu, insn: &Insn, f: impl Fn(u64, u32) -> u32) -> Result<(), Exception> {
    let bits = size_of(&insn.i, 0) as u32 * 8;
    let value = cpu.read_operand(insn, 1)?;
    let count = f(value, bits);
    cpu.set_reg(insn.i.op0_register(), u64::from(count));
    // The others are undefined, and clear on Intel's CPUs.
    cpu.set_arith(flag(CF, value == 0) | flag(ZF, count == 0));
    Ok(())
}

fn popcnt(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let value = cpu.read_operand(insn, 1)?;
    cpu.set_reg(insn.i.op0_register(), u64::from(value.count_ones()));
    cpu.set_flags(ARITH, flag(ZF, value == 0));
    Ok(())
}

/// Remainders of single bytes for the polynomial 11EDC6F41h, bits reflected.
const CRC32C: [u32; 256] = {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        let mut crc = n as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 != 0 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[n] = crc;
        n += 1;
    }
    table
};

fn crc32(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let size = size_of(&insn.i, 1);
    let value = cpu.read_operand(insn, 1)?;
    let start = cpu.reg(insn.i.op0_register()) as u32;
    let crc = value.to_le_bytes()[..size]
        .iter()
        .fold(start, |crc, &byte| crc >> 8 ^ CRC32C[usize::from(crc as u8 ^ byte)]);
    cpu.set_reg(insn.i.op0_register(), u64::from(crc));
    Ok(())
}
