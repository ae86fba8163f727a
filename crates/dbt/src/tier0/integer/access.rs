//! Operands of general-purpose instructions: reading, writing, and changing in one go.

use iced_x86::{Instruction, OpKind, Register};
use ruse_arch::{Exception, paging::Access};

use super::atomic;
use crate::{
    cpu::{Cpu, Who},
    mmu::access::{Place, load, store},
    tier0::{Insn, debug, operand::mask},
};

/// Bytes of operand `n`, which is a register or memory.
#[inline]
pub fn size_of(i: &Instruction, n: u32) -> usize {
    match i.op_kind(n) {
        OpKind::Register => i.op_register(n).size(),
        _ => i.memory_size().size(),
    }
}

/// The register of so many bytes that instructions have as an operand without naming it.
pub fn accumulator(size: usize) -> Register {
    match size {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    }
}

impl Cpu {
    /// Reads operand `n`, zero-extended; immediates are sign-extended to 64 bits.
    #[inline]
    pub(super) fn read_operand(&mut self, insn: &Insn, n: u32) -> Result<u64, Exception> {
        match insn.i.op_kind(n) {
            OpKind::Register => Ok(self.reg(insn.i.op_register(n))),
            OpKind::Memory => {
                let size = insn.i.memory_size().size();
                let la = self.operand_address(insn, size, Access::Read)?;
                self.read_value(la, size.min(8), Who::Current)
            }
            _ => Ok(insn.i.immediate(n)),
        }
    }

    /// Writes operand `n`.
    #[inline]
    pub(super) fn write_operand(&mut self, insn: &Insn, n: u32, value: u64) -> Result<(), Exception> {
        if insn.i.op_kind(n) == OpKind::Register {
            self.set_reg(insn.i.op_register(n), value);
            return Ok(());
        }
        let size = insn.i.memory_size().size();
        let la = self.operand_address(insn, size, Access::Write)?;
        self.write_value(la, value, size.min(8), Who::Current)
    }

    /// Replaces the first operand by what `f` makes of it, atomically under LOCK; `f` may run more than once, its last
    /// run counts. Returns the old value.
    #[inline]
    pub(super) fn modify(&mut self, insn: &Insn, f: impl FnMut(u64) -> u64) -> Result<u64, Exception> {
        self.modify_operand(insn, insn.i.has_lock_prefix(), f)
    }

    /// [`Cpu::modify`] where the instruction itself may imply LOCK.
    #[inline]
    pub(super) fn modify_operand(
        &mut self,
        insn: &Insn,
        lock: bool,
        mut f: impl FnMut(u64) -> u64,
    ) -> Result<u64, Exception> {
        if insn.i.op0_kind() == OpKind::Register {
            let register = insn.i.op0_register();
            let old = self.reg(register);
            self.set_reg(register, f(old));
            return Ok(old);
        }
        let size = insn.i.memory_size().size().min(8);
        let la = self.operand_address(insn, size, Access::Write)?;
        self.modify_memory(la, size, lock, f)
    }

    /// Replaces `size` (at most 8) bytes at a linear address by what `f` makes of them. All of it is checked for
    /// writing first.
    pub(super) fn modify_memory(
        &mut self,
        la: u64,
        size: usize,
        lock: bool,
        f: impl FnMut(u64) -> u64,
    ) -> Result<u64, Exception> {
        let la = self.wrap(la);
        if la % 4096 + size as u64 > 4096 {
            return self.modify_parts(la, size, lock, f);
        }
        debug::note(self, la, size, debug::Watch::Write, Who::Current);
        match self.place(la, size, Access::Write, Who::Current)? {
            Place::Ram(host) | Place::Code(host) if atomic::is_whole(host, size) || !lock => {
                let old = change(host, size, lock, f);
                self.ram_written(host, size);
                Ok(old)
            }
            _ => self.modify_parts(la, size, lock, f),
        }
    }

    /// The change as a read and a write: over a page's end, of a device, or where the host cannot lock.
    #[cold]
    fn modify_parts(
        &mut self,
        la: u64,
        size: usize,
        lock: bool,
        mut f: impl FnMut(u64) -> u64,
    ) -> Result<u64, Exception> {
        let _alone = lock.then(|| self.mmu.code.alone(self.id));
        self.probe_linear(la, size, Access::Write, Who::Current)?;
        let old = self.read_value(la, size, Who::Current)?;
        self.write_value(la, f(old) & mask(size), size, Who::Current)?;
        Ok(old)
    }
}

/// Changes RAM in place.
#[inline]
fn change(host: *mut u8, size: usize, lock: bool, mut f: impl FnMut(u64) -> u64) -> u64 {
    if lock {
        return atomic::update(host, size, f);
    }
    let mut buf = [0; 8];
    load(host, &mut buf[..size]);
    let old = u64::from_le_bytes(buf);
    store(host, &f(old).to_le_bytes()[..size]);
    old
}
