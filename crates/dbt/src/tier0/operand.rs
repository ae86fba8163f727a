//! Operands: registers by name, effective and linear addresses with the checks of segmentation, memory operands.

use iced_x86::{Instruction, OpKind, Register};
use ruse_arch::{Exception, Segment, paging::Access, state::seg};

use crate::cpu::{Cpu, Who};

/// A decoded instruction with what execution needs beside it.
#[derive(Clone, Copy)]
pub struct Insn {
    /// The decoder's view.
    pub i: Instruction,
    /// Its bytes; only the first `i.len()` count.
    pub bytes: [u8; 15],
    /// RIP of this instruction.
    pub rip: u64,
    /// RIP of the instruction behind it, wrapped to the code size.
    pub next: u64,
}

/// Index (0 to 15) of a general register of any width; `None` for AH, CH, DH, BH and other kinds of registers.
pub fn gpr_index(r: Register) -> Option<usize> {
    if matches!(r, Register::AH | Register::CH | Register::DH | Register::BH) || !r.is_gpr() {
        return None;
    }
    Some(r.full_register() as usize - Register::RAX as usize)
}

/// Index of a segment register in [`Cpu::seg`].
pub fn segment_index(r: Register) -> usize {
    match r {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}

/// All ones in the low `size` bytes.
pub const fn mask(size: usize) -> u64 {
    if size >= 8 { u64::MAX } else { (1 << (size * 8)) - 1 }
}

/// Where a general register lies within the whole ones.
struct Part {
    index: usize,
    shift: u32,
    mask: u64,
}

impl Part {
    /// By the decoder's numbers, which run through each width in encoding order.
    #[inline]
    fn of(r: Register) -> Option<Self> {
        const HIGH: usize = Register::AH as usize;
        const NEW_LOW: usize = Register::SPL as usize;
        const WORD: usize = Register::AX as usize;
        const DWORD: usize = Register::EAX as usize;
        const QWORD: usize = Register::RAX as usize;
        const LOW: usize = Register::AL as usize;
        let n = r as usize;
        let part = |index, shift, mask| Some(Self { index, shift, mask });
        match n {
            QWORD.. if n < QWORD + 16 => part(n - QWORD, 0, u64::MAX),
            DWORD.. if n < DWORD + 16 => part(n - DWORD, 0, 0xffff_ffff),
            WORD.. if n < WORD + 16 => part(n - WORD, 0, 0xffff),
            NEW_LOW..WORD => part(n - NEW_LOW + 4, 0, 0xff),
            HIGH..NEW_LOW => part(n - HIGH, 8, 0xff),
            LOW..HIGH => part(n - LOW, 0, 0xff),
            _ => None,
        }
    }
}

impl Cpu {
    /// Reads a general register of any width, zero-extended; anything else reads as zero.
    #[inline]
    pub fn reg(&self, r: Register) -> u64 {
        match Part::of(r) {
            Some(part) => self.gpr[part.index & 15] >> part.shift & part.mask,
            None => 0,
        }
    }

    /// Writes a general register of any width: 32-bit writes clear the upper half, narrower ones keep the rest.
    #[inline]
    pub fn set_reg(&mut self, r: Register, value: u64) {
        let Some(part) = Part::of(r) else { return };
        let whole = &mut self.gpr[part.index & 15];
        let value = value & part.mask;
        // 32-bit and 64-bit masks leave nothing to keep.
        let kept = if part.mask > 0xffff { 0 } else { !(part.mask << part.shift) };
        *whole = *whole & kept | value << part.shift;
    }

    /// Offset of the instruction's memory operand within its segment, wrapped to the address size.
    pub fn effective_address(&self, insn: &Insn) -> u64 {
        let i = &insn.i;
        let base = i.memory_base();
        if base == Register::RIP || base == Register::EIP {
            // The decoder has made the address absolute.
            return i.memory_displacement64();
        }
        let index = self.reg(i.memory_index()).wrapping_mul(u64::from(i.memory_index_scale()));
        let sum = self.reg(base).wrapping_add(index).wrapping_add(i.memory_displacement64());
        sum & mask(address_size(i))
    }

    /// Linear address of `offset` in segment `s` (index into [`Cpu::seg`]) after the checks for an access of `size`
    /// bytes: type, limit and null checks outside 64-bit mode, canonical form in it (SDM volume 3, 5.3 to 5.5).
    pub fn linear(&self, s: usize, offset: u64, size: usize, access: Access) -> Result<u64, Exception> {
        let fault = if s == seg::SS { Exception::ss(0) } else { Exception::gp(0) };
        let segment = &self.seg[s];
        if self.mode.code64 {
            let base = if s >= seg::FS { segment.base } else { 0 };
            let la = base.wrapping_add(offset);
            let last = la.wrapping_add(size as u64 - 1);
            let canonical = ruse_arch::paging::is_canonical(la) && ruse_arch::paging::is_canonical(last);
            return if canonical { Ok(la) } else { Err(fault) };
        }
        if !self.mode.real && !self.mode.vm86 {
            let denied = match access {
                Access::Write => segment.is_code() || segment.attr & Segment::WRITABLE == 0,
                Access::Read => segment.is_code() && segment.attr & Segment::WRITABLE == 0,
                Access::Fetch => false,
            };
            if !segment.is_present() || denied {
                return Err(fault);
            }
        }
        let last = offset.wrapping_add(size as u64 - 1);
        let expand_down =
            !segment.is_code() && segment.attr & Segment::S != 0 && segment.attr & Segment::EXPAND_DOWN != 0;
        let inside = if expand_down {
            let top = if segment.attr & Segment::DB != 0 { 0xffff_ffff } else { 0xffff };
            offset > u64::from(segment.limit) && last <= top && last >= offset
        } else {
            last <= u64::from(segment.limit) && last >= offset
        };
        if !inside {
            return Err(fault);
        }
        Ok(segment.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Linear address of the instruction's memory operand before any check: for checks of alignment, which come before
    /// those of the segment.
    pub fn unchecked_address(&self, insn: &Insn) -> u64 {
        let s = segment_index(insn.i.memory_segment());
        let based = !self.mode.code64 || s >= seg::FS;
        self.effective_address(insn).wrapping_add(if based { self.seg[s].base } else { 0 })
    }

    /// Linear address of the instruction's memory operand for an access of `size` bytes.
    pub fn operand_address(&self, insn: &Insn, size: usize, access: Access) -> Result<u64, Exception> {
        let s = segment_index(insn.i.memory_segment());
        self.linear(s, self.effective_address(insn), size, access)
    }

    /// Reads `size` (at most 8) bytes of guest memory, zero-extended.
    pub fn read_value(&mut self, la: u64, size: usize, who: Who) -> Result<u64, Exception> {
        let mut buf = [0; 8];
        self.read_linear(la, &mut buf[..size], who)?;
        Ok(u64::from_le_bytes(buf))
    }

    /// Writes the low `size` (at most 8) bytes of a value to guest memory.
    pub fn write_value(&mut self, la: u64, value: u64, size: usize, who: Who) -> Result<(), Exception> {
        self.write_linear(la, &value.to_le_bytes()[..size], who)
    }
}

/// Size in bytes of the addresses that the instruction computes.
pub fn address_size(i: &Instruction) -> usize {
    let of = |r: Register| (r != Register::None).then(|| r.size());
    if let Some(size) = of(i.memory_base()).or(of(i.memory_index())) {
        return size;
    }
    (0..i.op_count())
        .find_map(|op| match i.op_kind(op) {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => Some(2),
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => Some(4),
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => Some(8),
            OpKind::Memory => {
                Some(if i.memory_displ_size() == 0 { 8 } else { i.memory_displ_size() as usize })
            }
            _ => None,
        })
        .unwrap_or(8)
}
