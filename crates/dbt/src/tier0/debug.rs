//! Debug registers and breakpoints (SDM volume 3, chapter 17).

use iced_x86::{Code, Register};
use ruse_arch::{
    Exception,
    flags::{cr4, rflags},
    state::seg,
};

use super::{Insn, table::privileged};
use crate::cpu::{Cpu, Who};

/// DR6: an access to a debug register while DR7.GD was set.
const DR6_BD: u64 = 1 << 13;
/// DR6: a switch to a task with its T flag set.
pub(super) const DR6_BT: u64 = 1 << 15;
/// DR7: accesses to debug registers fault.
pub(super) const DR7_GD: u64 = 1 << 13;
/// Bits of DR6 that can be changed, and those that read as one.
const DR6_MASK: u64 = 0xe00f;
const DR6_ONES: u64 = 0xffff_0ff0;
/// The same for DR7.
const DR7_MASK: u64 = 0xffff_23ff;
const DR7_ONES: u64 = 0x400;

/// Kind of access that a breakpoint watches for (SDM volume 3, 17.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Execution.
    Execute,
    /// A data read.
    Read,
    /// A data write.
    Write,
    /// A port access, with CR4.DE.
    Port,
}

/// MOV to and from debug registers; `Ok(false)` for other instructions.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Exception> {
    let (dr, to_dr) = match insn.i.code() {
        Code::Mov_r32_dr | Code::Mov_r64_dr => (insn.i.op1_register(), false),
        Code::Mov_dr_r32 | Code::Mov_dr_r64 => (insn.i.op0_register(), true),
        _ => return Ok(false),
    };
    let number = (dr as usize).wrapping_sub(Register::DR0 as usize);
    let aliased = matches!(number, 4 | 5);
    if number > 7 || (aliased && cpu.paging.cr4 & cr4::DE != 0) {
        return Err(Exception::UD);
    }
    privileged(cpu)?;
    if cpu.dr7 & DR7_GD != 0 {
        return Err(Exception::db(DR6_BD));
    }
    let number = if aliased { number + 2 } else { number };
    if to_dr {
        let value = cpu.reg(insn.i.op1_register());
        write(cpu, number, value)?;
    } else {
        let value = match number {
            6 => cpu.dr6,
            7 => cpu.dr7,
            n => cpu.dr[n & 3],
        };
        cpu.set_reg(insn.i.op0_register(), value);
    }
    Ok(true)
}

fn write(cpu: &mut Cpu, number: usize, value: u64) -> Result<(), Exception> {
    if number < 4 {
        cpu.dr[number] = value;
        return Ok(());
    }
    if value >> 32 != 0 {
        return Err(Exception::gp(0));
    }
    if number == 6 {
        cpu.dr6 = value & DR6_MASK | DR6_ONES;
    } else {
        cpu.dr7 = value & DR7_MASK | DR7_ONES;
    }
    Ok(())
}

/// Whether any breakpoint is enabled: then everything runs in tier 0.
pub fn breakpoints_enabled(cpu: &Cpu) -> bool {
    cpu.dr7 & 0xff != 0
}

/// DR6 bits of the breakpoints that an access of `len` bytes at linear address (or port) `at` meets.
pub fn matches(cpu: &Cpu, at: u64, len: u64, watch: Watch) -> u64 {
    if !breakpoints_enabled(cpu) {
        return 0;
    }
    (0..4).filter(|&n| one_matches(cpu, n, at, len, watch)).fold(0, |bits, n| bits | 1 << n)
}

fn one_matches(cpu: &Cpu, n: usize, at: u64, len: u64, watch: Watch) -> bool {
    if cpu.dr7 >> (2 * n) & 3 == 0 {
        return false;
    }
    let field = cpu.dr7 >> (16 + 4 * n) & 15;
    let kind_ok = match field & 3 {
        0 => watch == Watch::Execute,
        1 => watch == Watch::Write,
        2 => watch == Watch::Port && cpu.paging.cr4 & cr4::DE != 0,
        _ => matches!(watch, Watch::Read | Watch::Write),
    };
    // Lengths 1, 2, 8 and 4; the address is aligned to them.
    let size = [1u64, 2, 8, 4][(field >> 2) as usize];
    let first = cpu.dr[n] & !(size - 1);
    kind_ok && at <= first.wrapping_add(size - 1) && first <= at.wrapping_add(len.max(1) - 1)
}

/// Notes the breakpoints that a data access of the current instruction meets; they trap when it is complete.
#[inline]
pub fn note(cpu: &mut Cpu, la: u64, len: usize, watch: Watch, who: Who) {
    if breakpoints_enabled(cpu) && who == Who::Current {
        cpu.debug_hits |= matches(cpu, la, len as u64, watch);
    }
}

/// The start of an instruction: the fault of a breakpoint on it.
#[inline]
pub(super) fn before(cpu: &mut Cpu) -> Result<(), Exception> {
    cpu.debug_hits = 0;
    if !breakpoints_enabled(cpu) {
        return Ok(());
    }
    let la =
        if cpu.mode.code64 { cpu.rip } else { cpu.seg[seg::CS].base.wrapping_add(cpu.rip) & 0xffff_ffff };
    instruction_breakpoint(cpu, la).map_or(Ok(()), |bits| Err(Exception::db(bits)))
}

/// The debug fault that the instruction at linear address `la` raises before it runs, if a breakpoint is there and RF
/// does not hold it back: the bits of DR6.
pub fn instruction_breakpoint(cpu: &Cpu, la: u64) -> Option<u64> {
    if cpu.rflags & rflags::RF != 0 {
        return None;
    }
    Some(matches(cpu, la, 1, Watch::Execute)).filter(|&bits| bits != 0)
}
