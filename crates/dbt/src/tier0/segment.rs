//! Loading selectors: descriptors with all their checks (SDM volume 3, 3.4 and 5.5 to 5.8), and the instructions that
//! move segment registers.

use iced_x86::{Code, Mnemonic, OpKind, Register};
use ruse_arch::{
    Exception, Segment,
    paging::{Access, is_canonical},
    state::seg,
};

use super::{
    Insn,
    operand::segment_index,
    stack::{Stack, loaded_pointer},
};
use crate::cpu::{Cpu, Who};

/// Makes the exception that a check raises out of its error code.
pub(super) type Fault = fn(u32) -> Exception;

/// Types of system descriptors (SDM volume 3, table 3-2).
pub(super) mod kind {
    /// 16-bit TSS, available.
    pub const TSS16: u8 = 1;
    /// Local descriptor table.
    pub const LDT: u8 = 2;
    /// 16-bit call gate.
    pub const CALL16: u8 = 4;
    /// Task gate.
    pub const TASK_GATE: u8 = 5;
    /// 32-bit (in long mode 64-bit) TSS, available.
    pub const TSS32: u8 = 9;
    /// 32-bit (in long mode 64-bit) call gate.
    pub const CALL32: u8 = 12;
    /// Set in the type of a busy TSS.
    pub const BUSY: u8 = 2;
}

/// Whether a selector is null.
pub(super) const fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// The error code that names a selector.
pub(super) const fn code_of(selector: u16, ext: u32) -> u32 {
    (selector & !3) as u32 | ext
}

/// Requested privilege level.
pub(super) const fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// A system descriptor: the segment it describes (all of the base) and its raw first half.
#[derive(Clone, Copy)]
pub(super) struct System {
    pub segment: Segment,
    /// Low 8 bytes.
    pub raw: u64,
    /// High 8 bytes, in long mode.
    pub high: u64,
    /// Its linear address.
    pub at: u64,
}

impl System {
    /// The type where this is a system descriptor.
    pub fn kind(&self) -> Option<u8> {
        (self.segment.attr & Segment::S == 0).then(|| self.segment.kind())
    }
}

impl Cpu {
    /// Linear address of the descriptor that `selector` names; `None` outside of its table.
    pub(super) fn descriptor_address(&self, selector: u16, size: u64) -> Option<u64> {
        let offset = u64::from(selector & !7);
        let (base, limit, usable) = if selector & 4 != 0 {
            (self.ldtr.base, u64::from(self.ldtr.limit), self.ldtr.is_present())
        } else {
            (self.gdtr.base, u64::from(self.gdtr.limit), true)
        };
        (usable && offset + size - 1 <= limit).then(|| self.wrap(base.wrapping_add(offset)))
    }

    /// Reads the 8-byte descriptor of a code or data segment.
    pub(super) fn descriptor(&mut self, selector: u16, fault: Fault, ext: u32) -> Result<Segment, Exception> {
        let at = self.descriptor_address(selector, 8).ok_or(fault(code_of(selector, ext)))?;
        Ok(Segment::from_descriptor(selector, self.read_value(at, 8, Who::System)?))
    }

    /// Reads a descriptor that may be a system one, of 16 bytes in long mode.
    pub(super) fn system_descriptor(
        &mut self,
        selector: u16,
        fault: Fault,
        ext: u32,
    ) -> Result<System, Exception> {
        let error = fault(code_of(selector, ext));
        let at = self.descriptor_address(selector, 8).ok_or(error)?;
        let raw = self.read_value(at, 8, Who::System)?;
        let mut segment = Segment::from_descriptor(selector, raw);
        let mut high = 0;
        if self.mode.long && segment.attr & Segment::S == 0 {
            let at = self.descriptor_address(selector, 16).ok_or(error)?;
            high = self.read_value(at.wrapping_add(8), 8, Who::System)?;
            segment.base |= high << 32;
        }
        Ok(System { segment, raw, high, at })
    }

    /// Sets the accessed bit of a code or data segment, in the table and in `segment`.
    pub(super) fn mark_accessed(&mut self, segment: &mut Segment) -> Result<(), Exception> {
        if segment.attr & 1 == 0
            && let Some(at) = self.descriptor_address(segment.selector, 8)
        {
            self.update_byte(at.wrapping_add(5), 1, 0, Who::System)?;
            segment.attr |= 1;
        }
        Ok(())
    }

    /// Sets or clears the busy bit of a TSS descriptor at `at`.
    pub(super) fn set_busy(&mut self, at: u64, busy: bool) -> Result<(), Exception> {
        let (set, clear) = if busy { (kind::BUSY, 0) } else { (0, kind::BUSY) };
        self.update_byte(at.wrapping_add(5), set, clear, Who::System)
    }

    /// What a selector means in real and virtual-8086 mode; `old` is the register's content.
    pub(super) fn real_segment(&self, s: usize, selector: u16, old: &Segment) -> Segment {
        let base = u64::from(selector) << 4;
        if self.mode.vm86 {
            return Segment { base, limit: 0xffff, attr: 0xf3, selector };
        }
        // The limit stays what protected mode left there, which is what "unreal" mode lives on.
        let attr = if s == seg::CS { 0x9b | old.attr & Segment::G } else { old.attr };
        Segment { base, limit: old.limit, attr, selector }
    }

    /// The content of DS, ES, FS or GS after a load of `selector` at privilege level `cpl`.
    pub(super) fn data_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        fault: Fault,
        ext: u32,
    ) -> Result<Segment, Exception> {
        if is_null(selector) {
            return Ok(Segment { selector, ..Segment::default() });
        }
        let mut found = self.descriptor(selector, fault, ext)?;
        let error = fault(code_of(selector, ext));
        let readable = !found.is_code() || found.attr & Segment::WRITABLE != 0;
        if found.attr & Segment::S == 0 || !readable {
            return Err(error);
        }
        let conforming = found.is_code() && found.attr & Segment::EXPAND_DOWN != 0;
        if !conforming && rpl(selector).max(cpl) > found.dpl() {
            return Err(error);
        }
        if !found.is_present() {
            return Err(Exception::np(code_of(selector, ext)));
        }
        self.mark_accessed(&mut found)?;
        Ok(found)
    }

    /// The content of SS after a load of `selector` for privilege level `cpl`. The caller has dealt with null.
    pub(super) fn stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        fault: Fault,
        ext: u32,
    ) -> Result<Segment, Exception> {
        if is_null(selector) {
            return Err(fault(ext));
        }
        let mut found = self.descriptor(selector, fault, ext)?;
        let error = fault(code_of(selector, ext));
        let writable =
            found.attr & (Segment::S | Segment::CODE | Segment::WRITABLE) == Segment::S | Segment::WRITABLE;
        if rpl(selector) != cpl || !writable || found.dpl() != cpl {
            return Err(error);
        }
        if !found.is_present() {
            return Err(Exception::ss(code_of(selector, ext)));
        }
        self.mark_accessed(&mut found)?;
        Ok(found)
    }

    /// A null SS for 64-bit mode; its DPL is the privilege level.
    pub(super) fn null_stack(selector: u16, cpl: u8) -> Segment {
        Segment { base: 0, limit: 0, attr: u16::from(cpl) << 5, selector }
    }

    /// MOV, POP and the like to a segment register other than CS: what the register becomes.
    fn loaded(&mut self, s: usize, selector: u16) -> Result<Segment, Exception> {
        if self.mode.real || self.mode.vm86 {
            return Ok(self.real_segment(s, selector, &self.seg[s]));
        }
        let cpl = self.mode.cpl;
        if s != seg::SS {
            return self.data_segment(selector, cpl, Exception::gp, 0);
        }
        if is_null(selector) && self.mode.code64 && cpl != 3 && rpl(selector) == cpl {
            return Ok(Self::null_stack(selector, cpl));
        }
        self.stack_segment(selector, cpl, Exception::gp, 0)
    }

    /// Sets a segment register, and what depends on it.
    fn set_segment(&mut self, s: usize, value: Segment) {
        self.seg[s] = value;
        if s == seg::SS {
            self.update_mode();
        }
    }
}

/// Whether a code segment descriptor can be run in the current mode: L and D exclude each other in long mode.
pub(super) fn valid_code(cpu: &Cpu, cs: &Segment) -> bool {
    let both = Segment::L | Segment::DB;
    cs.is_code() && !(cpu.mode.long && cs.attr & both == both)
}

/// Whether `rip` can be executed in the code segment `cs`: canonical in 64-bit code, else within the limit.
pub(super) fn valid_target(cpu: &Cpu, cs: &Segment, rip: u64) -> bool {
    if cpu.mode.long && cs.attr & Segment::L != 0 { is_canonical(rip) } else { rip <= u64::from(cs.limit) }
}

/// After a return to an outer level, data segments that it may not use become null (SDM volume 2, RET).
pub(super) fn drop_inner_segments(cpu: &mut Cpu) {
    for s in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let found = &cpu.seg[s];
        let conforming = found.is_code() && found.attr & Segment::EXPAND_DOWN != 0;
        if found.is_present() && !conforming && found.dpl() < cpu.mode.cpl {
            cpu.seg[s] = Segment::default();
        }
    }
}

/// Reads a 16-bit register or memory operand.
pub(super) fn word_operand(cpu: &mut Cpu, insn: &Insn, op: u32) -> Result<u16, Exception> {
    if insn.i.op_kind(op) == OpKind::Register {
        return Ok(cpu.reg(insn.i.op_register(op)) as u16);
    }
    let la = cpu.operand_address(insn, 2, Access::Read)?;
    Ok(cpu.read_value(la, 2, Who::Current)? as u16)
}

/// Writes a selector or the like: to a register of any width zero-extended, to memory always 16 bits.
pub(super) fn store_word(cpu: &mut Cpu, insn: &Insn, op: u32, value: u64) -> Result<(), Exception> {
    if insn.i.op_kind(op) == OpKind::Register {
        cpu.set_reg(insn.i.op_register(op), value);
        return Ok(());
    }
    let la = cpu.operand_address(insn, 2, Access::Write)?;
    cpu.write_value(la, value, 2, Who::Current)
}

/// MOV, PUSH and POP of segment registers, and LDS and its like.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Exception> {
    use Code::*;
    match insn.i.mnemonic() {
        Mnemonic::Lds => load_far_pointer(cpu, insn, seg::DS)?,
        Mnemonic::Les => load_far_pointer(cpu, insn, seg::ES)?,
        Mnemonic::Lfs => load_far_pointer(cpu, insn, seg::FS)?,
        Mnemonic::Lgs => load_far_pointer(cpu, insn, seg::GS)?,
        Mnemonic::Lss => load_far_pointer(cpu, insn, seg::SS)?,
        _ => match insn.i.code() {
            Mov_Sreg_rm16 | Mov_Sreg_r32m16 | Mov_Sreg_r64m16 => mov_to(cpu, insn)?,
            Mov_rm16_Sreg | Mov_r32m16_Sreg | Mov_r64m16_Sreg => {
                let value = cpu.seg[segment_index(insn.i.op_register(1))].selector;
                store_word(cpu, insn, 0, u64::from(value))?;
            }
            Pushw_ES | Pushw_CS | Pushw_SS | Pushw_DS | Pushw_FS | Pushw_GS => push(cpu, insn, 2, 2)?,
            Pushd_ES | Pushd_CS | Pushd_SS | Pushd_DS | Pushd_FS | Pushd_GS => push(cpu, insn, 4, 2)?,
            Pushq_FS | Pushq_GS => push(cpu, insn, 8, 8)?,
            Popw_ES | Popw_SS | Popw_DS | Popw_FS | Popw_GS => pop(cpu, insn, 2)?,
            Popd_ES | Popd_SS | Popd_DS | Popd_FS | Popd_GS => pop(cpu, insn, 4)?,
            Popq_FS | Popq_GS => pop(cpu, insn, 8)?,
            _ => return Ok(false),
        },
    }
    Ok(true)
}

fn mov_to(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    if insn.i.op_register(0) == Register::CS {
        return Err(Exception::UD);
    }
    let s = segment_index(insn.i.op_register(0));
    let selector = word_operand(cpu, insn, 1)?;
    let value = cpu.loaded(s, selector)?;
    cpu.set_segment(s, value);
    cpu.interrupt_shadow |= s == seg::SS;
    Ok(())
}

/// PUSH of a segment register; with a 32-bit operand only the low half of the slot is written, as on all recent CPUs.
fn push(cpu: &mut Cpu, insn: &Insn, size: usize, part: usize) -> Result<(), Exception> {
    let value = cpu.seg[segment_index(insn.i.op_register(0))].selector;
    let mut stack = Stack::current(cpu);
    stack.push_part(cpu, u64::from(value), size, part)?;
    stack.commit(cpu);
    Ok(())
}

fn pop(cpu: &mut Cpu, insn: &Insn, size: usize) -> Result<(), Exception> {
    let s = segment_index(insn.i.op_register(0));
    let mut stack = Stack::current(cpu);
    let selector = stack.peek(cpu, 0, 2)? as u16;
    stack.skip(size as u64);
    let value = cpu.loaded(s, selector)?;
    stack.commit(cpu);
    cpu.set_segment(s, value);
    cpu.interrupt_shadow |= s == seg::SS;
    Ok(())
}

/// LDS, LES, LFS, LGS and LSS.
fn load_far_pointer(cpu: &mut Cpu, insn: &Insn, s: usize) -> Result<(), Exception> {
    if insn.i.op1_kind() != OpKind::Memory {
        return Err(Exception::UD);
    }
    let to = insn.i.op0_register();
    let size = to.size();
    let la = cpu.operand_address(insn, size + 2, Access::Read)?;
    let mut bytes = [0u8; 10];
    cpu.read_linear(la, &mut bytes[..size + 2], Who::Current)?;
    let selector = u16::from_le_bytes([bytes[size], bytes[size + 1]]);
    bytes[size..].fill(0);
    let mut offset = [0; 8];
    offset.copy_from_slice(&bytes[..8]);
    let value = cpu.loaded(s, selector)?;
    cpu.set_reg(to, u64::from_le_bytes(offset));
    cpu.set_segment(s, value);
    Ok(())
}

/// Sets SS with its pointer, and the privilege level with them. The caller updates the mode.
pub(super) fn set_stack(cpu: &mut Cpu, ss: Segment, sp: u64, wide: bool) {
    cpu.gpr[ruse_arch::state::reg::RSP] = loaded_pointer(cpu, &ss, sp, wide);
    cpu.seg[seg::SS] = ss;
}
