//! Instructions of the vector group.

use ruse_arch::Exception;

use super::Insn;
use crate::cpu::Cpu;

/// Executes an instruction of this group; `false` if it is none.
pub(super) fn execute(_cpu: &mut Cpu, _insn: &Insn) -> Result<bool, Exception> {
    Ok(false)
}

/// Takes the x87 registers back from the host's unit, if they are there.
pub fn spill_x87(cpu: &mut Cpu) {
    #[repr(C, align(16))]
    struct Image([u8; 512]);
    if cpu.x87_resident == 0 {
        return;
    }
    let mut image = Image([0; 512]);
    // SAFETY: FXSAVE needs 512 bytes at a multiple of 16; every x86-64 CPU has it.
    unsafe { std::arch::x86_64::_fxsave64(image.0.as_mut_ptr()) };
    cpu.fpu.fxsave[..6].copy_from_slice(&image.0[..6]);
    // The host's instruction and data pointers mean nothing to the guest.
    cpu.fpu.fxsave[6..24].fill(0);
    cpu.fpu.fxsave[32..160].copy_from_slice(&image.0[32..160]);
    cpu.x87_resident = 0;
}
