//! Single flags, conversions of the accumulator, hints, fences, cache lines, BOUND.

use std::sync::atomic::{Ordering, fence};

use iced_x86::{Instruction, Mnemonic, Register};
use ruse_arch::{
    Exception,
    flags::rflags::{ARITH, CF, DF, FIXED, OF},
    paging::Access,
    state::reg::RAX,
};

use super::{access::size_of, flags::extend};
use crate::{
    cpu::{Cpu, Who},
    tier0::{Handler, Insn, operand::mask},
};

/// The handler of an instruction of this group.
pub fn handler(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Clc => |c, _| put(c, CF, 0),
        Mnemonic::Stc => |c, _| put(c, CF, CF),
        Mnemonic::Cmc => |c, _| put(c, CF, !c.rflags),
        Mnemonic::Cld => |c, _| put(c, DF, 0),
        Mnemonic::Std => |c, _| put(c, DF, DF),
        Mnemonic::Lahf => lahf,
        Mnemonic::Sahf => |c, _| put(c, ARITH & !OF, c.gpr[RAX] >> 8),
        Mnemonic::Salc => salc,
        Mnemonic::Cbw => |c, _| widen(c, Register::AL, Register::AX),
        Mnemonic::Cwde => |c, _| widen(c, Register::AX, Register::EAX),
        Mnemonic::Cdqe => |c, _| widen(c, Register::EAX, Register::RAX),
        Mnemonic::Cwd => |c, _| spread(c, Register::AX, Register::DX),
        Mnemonic::Cdq => |c, _| spread(c, Register::EAX, Register::EDX),
        Mnemonic::Cqo => |c, _| spread(c, Register::RAX, Register::RDX),
        Mnemonic::Bound => bound,
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => cache_line,
        Mnemonic::Mfence | Mnemonic::Sfence | Mnemonic::Lfence | Mnemonic::Serialize => |_, _| {
            fence(Ordering::SeqCst);
            Ok(())
        },
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Pause
        | Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Cldemote
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1 => |_, _| Ok(()),
        _ => return None,
    })
}

fn put(cpu: &mut Cpu, which: u64, value: u64) -> Result<(), Exception> {
    cpu.set_flags(which, value);
    Ok(())
}

fn lahf(cpu: &mut Cpu, _: &Insn) -> Result<(), Exception> {
    let image = cpu.rflags & (ARITH & !OF) | FIXED;
    cpu.set_reg(Register::AH, image);
    Ok(())
}

/// Undocumented but everywhere: AL is all copies of CF.
fn salc(cpu: &mut Cpu, _: &Insn) -> Result<(), Exception> {
    cpu.set_reg(Register::AL, (cpu.rflags & CF).wrapping_neg());
    Ok(())
}

fn widen(cpu: &mut Cpu, from: Register, to: Register) -> Result<(), Exception> {
    let value = extend(cpu.reg(from), from.size()) as u64;
    cpu.set_reg(to, value);
    Ok(())
}

/// Fills a register with the sign of another.
fn spread(cpu: &mut Cpu, from: Register, to: Register) -> Result<(), Exception> {
    let value = (extend(cpu.reg(from), from.size()) >> 63) as u64;
    cpu.set_reg(to, value);
    Ok(())
}

fn bound(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let size = size_of(&insn.i, 0);
    let index = extend(cpu.reg(insn.i.op0_register()), size);
    let la = cpu.operand_address(insn, 2 * size, Access::Read)?;
    let both = cpu.read_value(la, 2 * size, Who::Current)?;
    let lower = extend(both & mask(size), size);
    let upper = extend(both >> (size * 8), size);
    if (lower..=upper).contains(&index) { Ok(()) } else { Err(Exception::BR) }
}

/// Guest RAM is coherent: only the address is checked, as a load's (SDM volume 2, CLFLUSH).
fn cache_line(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let la = cpu.operand_address(insn, 1, Access::Read)?;
    cpu.probe_linear(la, 1, Access::Read, Who::Current)
}
