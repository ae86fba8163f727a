//! Tier 0: a complete, plain executor of single instructions. It runs 16-bit and rare code, steps, is the oracle of the
//! translator, and finishes instructions that hardware assistance gave up on.

mod control;
pub mod debug;
mod far;
mod features;
mod fetch;
mod fpu_regs;
mod info;
mod integer;
pub mod interrupt;
mod io;
mod iret;
mod lane;
mod lane_stub;
mod masked;
mod msr;
pub mod operand;
mod segment;
mod stack;
mod syscall;
mod system;
#[cfg(test)]
pub(crate) mod system_tests;
mod table;
mod task;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod vector;
#[cfg(test)]
mod vector_tests;
mod x87;
mod xsave;

use iced_x86::{Instruction, Mnemonic};
use ruse_arch::{Exception, flags::rflags};

pub(crate) use self::control::CR4_KNOWN;
pub(crate) use self::features::Features;
pub use self::fetch::DecodeCache;
pub(crate) use self::integer::bit_string_address;
pub use operand::Insn;
pub(crate) use syscall::{system_call, system_return};

use crate::cpu::Cpu;

/// Executes one instruction: reads its operands from the CPU and memory, changes nothing if it fails. RIP already is
/// behind the instruction.
type Handler = fn(&mut Cpu, &Insn) -> Result<(), Exception>;

/// DR6.BS: a single step.
pub(crate) const DR6_BS: u64 = 1 << 14;

/// Executes the instruction at CS:RIP.
///
/// On `Err` the architectural state is as before the instruction (completed iterations of a string instruction and
/// accessed and dirty bits apart), with RIP at the instruction; a single-step or breakpoint trap is an `Err` too, but
/// with the instruction complete. A repeated string instruction may return `Ok` with RIP at itself before it is done, so that
/// interrupts get their turn.
pub fn step(cpu: &mut Cpu) -> Result<(), Exception> {
    cpu.counters.tier0 += 1;
    let flags = cpu.rflags;
    cpu.interrupt_shadow = false;
    debug::before(cpu)?;
    fetch::with_instruction(cpu, |cpu, insn, handler| {
        cpu.counters.by_mnemonic[insn.i.mnemonic() as usize] += 1;
        cpu.rip = insn.next;
        // Cleared by every instruction that completes; IRET and a task switch load it (SDM volume 3, 17.3.1.1).
        cpu.rflags &= !rflags::RF;
        if let Err(fault) = handler(cpu, insn) {
            cpu.rip = insn.rip;
            cpu.rflags |= flags & rflags::RF;
            return Err(fault);
        }
        let step = if flags & rflags::TF != 0 && traps(cpu, &insn.i) { DR6_BS } else { 0 };
        let met = step | cpu.debug_hits;
        if met == 0 { Ok(()) } else { Err(Exception::db(met)) }
    })?
}

/// Executes an instruction of `len` bytes that translated code has come to and that is known to be `handler`'s: as [`step`],
/// but nothing is fetched, and nothing traps, for no code is translated to be stepped or with breakpoints.
pub(crate) fn step_known(
    cpu: &mut Cpu,
    mnemonic: Mnemonic,
    len: u64,
    handler: impl FnOnce(&mut Cpu) -> Result<(), Exception>,
) -> Result<(), Exception> {
    cpu.counters.tier0 += 1;
    cpu.counters.by_mnemonic[mnemonic as usize] += 1;
    let rip = cpu.rip;
    cpu.rip = rip.wrapping_add(len);
    let result = handler(cpu);
    if result.is_err() {
        cpu.rip = rip;
    }
    result
}

/// The instruction at CS:RIP, decoded, with all that fetching it may raise.
pub fn decode(cpu: &mut Cpu) -> Result<Insn, Exception> {
    fetch::with_instruction(cpu, |_, insn, _| *insn)
}

/// Whether a single-step trap follows the instruction: not after one that loads SS, whose shadow holds it back, and not
/// after those that enter a handler and clear TF themselves (SDM volume 3, 6.8.3 and 17.3.1.4).
fn traps(cpu: &Cpu, i: &Instruction) -> bool {
    match i.mnemonic() {
        Mnemonic::Int | Mnemonic::Int1 | Mnemonic::Int3 | Mnemonic::Into | Mnemonic::Syscall => false,
        Mnemonic::Sti => true,
        _ => !cpu.interrupt_shadow,
    }
}

/// The handler of an instruction.
fn handler(i: &Instruction) -> Handler {
    integer::handler(i).unwrap_or(other)
}

/// Instructions of the other groups, which look for themselves.
fn other(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    if system::execute(cpu, insn)? || vector::execute(cpu, insn)? { Ok(()) } else { Err(Exception::UD) }
}
