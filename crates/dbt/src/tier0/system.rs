//! Instructions of the system group.

use ruse_arch::Exception;

use super::Insn;
use crate::cpu::Cpu;

/// Executes an instruction of this group; `false` if it is none.
pub(super) fn execute(_cpu: &mut Cpu, _insn: &Insn) -> Result<bool, Exception> {
    Ok(false)
}
