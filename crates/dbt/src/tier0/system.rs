//! The system instructions, by subject.

use ruse_arch::Exception;

use super::{Insn, control, debug, far, info, interrupt, io, iret, msr, segment, syscall, table};
use crate::{cpu::Cpu, paravirt::hypercall};

/// A module's executor: `Ok(false)` if the instruction is none of its own.
type Group = fn(&mut Cpu, &Insn) -> Result<bool, Exception>;

/// The modules, those with frequent instructions first.
const GROUPS: [Group; 12] = [
    io::execute,
    control::execute,
    info::execute,
    msr::execute,
    syscall::execute,
    segment::execute,
    iret::execute,
    interrupt::execute,
    far::execute,
    debug::execute,
    table::execute,
    hypercall::execute,
];

/// Executes an instruction of this group; `false` if it is none.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Exception> {
    for group in GROUPS {
        if group(cpu, insn)? {
            return Ok(true);
        }
    }
    Ok(false)
}
