//! A stack pointer on its way: pushes and pops of instructions that may still fault. Nothing but memory below the
//! stack changes before [`Stack::commit`].

use ruse_arch::{
    Exception, Segment,
    paging::is_canonical,
    state::{reg, seg},
};

use crate::cpu::{Cpu, Who};

/// A stack with a pointer of its own.
#[derive(Clone, Copy)]
pub(super) struct Stack {
    ss: Segment,
    /// Stack pointer, all 64 bits.
    sp: u64,
    /// Bits of `sp` that the stack's size lets change.
    mask: u64,
    /// A 64-bit stack: no limit, canonical addresses.
    wide: bool,
    who: Who,
    /// Error code of a stack fault.
    error: u32,
}

/// Bits of the stack pointer that a stack of this segment uses (SDM volume 1, 6.2.3).
fn pointer_mask(ss: &Segment, wide: bool) -> u64 {
    match (wide, ss.attr & Segment::DB != 0) {
        (true, _) => u64::MAX,
        (false, true) => 0xffff_ffff,
        (false, false) => 0xffff,
    }
}

impl Stack {
    /// The stack in use.
    pub fn current(cpu: &Cpu) -> Self {
        let ss = cpu.seg[seg::SS];
        let wide = cpu.mode.code64;
        let mask = pointer_mask(&ss, wide);
        Self { ss, sp: cpu.gpr[reg::RSP], mask, wide, who: Who::Current, error: 0 }
    }

    /// The stack of an inner level, or of an interrupt; faults report `error`.
    pub fn new(ss: Segment, sp: u64, wide: bool, error: u32) -> Self {
        Self { ss, sp, mask: pointer_mask(&ss, wide), wide, who: Who::System, error }
    }

    /// The same stack with accesses at the current privilege level.
    pub fn at_current_level(self) -> Self {
        Self { who: Who::Current, ..self }
    }

    /// The pointer as it stands.
    pub fn pointer(&self) -> u64 {
        self.sp
    }

    fn moved(&self, by: u64) -> u64 {
        let to = self.sp.wrapping_add(by);
        if self.mask == 0xffff_ffff { to & self.mask } else { self.sp & !self.mask | to & self.mask }
    }

    /// Linear address of `size` bytes at `sp` (SDM volume 3, 5.3).
    fn linear(&self, cpu: &Cpu, sp: u64, size: u64) -> Result<u64, Exception> {
        let fault = Exception::ss(self.error);
        if self.wide {
            let ok = is_canonical(sp) && is_canonical(sp.wrapping_add(size - 1));
            return if ok { Ok(sp) } else { Err(fault) };
        }
        let offset = sp & self.mask;
        let last = offset + size - 1;
        let protected = !cpu.mode.real && !cpu.mode.vm86;
        let (ss, limit) = (&self.ss, u64::from(self.ss.limit));
        let inside = if protected && !ss.is_code() && ss.attr & Segment::EXPAND_DOWN != 0 {
            offset > limit && last <= self.mask
        } else {
            last <= limit
        };
        let usable = !protected || (ss.is_present() && ss.attr & Segment::WRITABLE != 0);
        if !inside || !usable {
            return Err(fault);
        }
        Ok(ss.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Pushes the low `size` bytes of a value.
    pub fn push(&mut self, cpu: &mut Cpu, value: u64, size: usize) -> Result<(), Exception> {
        self.push_part(cpu, value, size, size)
    }

    /// Moves the pointer by `size` but writes only `part` bytes.
    pub fn push_part(
        &mut self,
        cpu: &mut Cpu,
        value: u64,
        size: usize,
        part: usize,
    ) -> Result<(), Exception> {
        let sp = self.moved((size as u64).wrapping_neg());
        let la = self.linear(cpu, sp, part as u64)?;
        cpu.write_value(la, value, part, self.who)?;
        self.sp = sp;
        Ok(())
    }

    /// Pops a value of `size` bytes.
    pub fn pop(&mut self, cpu: &mut Cpu, size: usize) -> Result<u64, Exception> {
        let value = self.peek(cpu, 0, size)?;
        self.skip(size as u64);
        Ok(value)
    }

    /// Reads a value of `size` bytes at `offset` bytes above the pointer.
    pub fn peek(&mut self, cpu: &mut Cpu, offset: u64, size: usize) -> Result<u64, Exception> {
        let la = self.linear(cpu, self.moved(offset), size as u64)?;
        cpu.read_value(la, size, self.who)
    }

    /// Moves the pointer up.
    pub fn skip(&mut self, bytes: u64) {
        self.sp = self.moved(bytes);
    }

    /// Makes the pointer the CPU's.
    pub fn commit(self, cpu: &mut Cpu) {
        cpu.gpr[reg::RSP] = self.sp;
    }
}

/// The stack pointer's value after a load of `ss` and `sp` together: a 16-bit stack keeps the upper bits, as hardware
/// does.
pub(super) fn loaded_pointer(cpu: &Cpu, ss: &Segment, sp: u64, wide: bool) -> u64 {
    match pointer_mask(ss, wide) {
        0xffff => cpu.gpr[reg::RSP] & !0xffff | sp & 0xffff,
        mask => sp & mask,
    }
}
