//! Descriptor tables and questions about descriptors: LGDT and its like, LLDT, LTR, LAR, LSL, VERR, VERW, ARPL
//! (SDM volume 3, 2.4 and 5.10).

use iced_x86::{Code, Mnemonic};
use ruse_arch::{
    DescriptorTable, Exception, Segment,
    flags::{cr4, rflags},
    paging::{Access, is_canonical},
};

use super::{
    Insn,
    segment::{code_of, is_null, kind, rpl, store_word, word_operand},
};
use crate::cpu::{Cpu, Who};

/// Executes what belongs here.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Exception> {
    match insn.i.mnemonic() {
        Mnemonic::Lgdt => cpu.gdtr = load_table(cpu, insn)?,
        Mnemonic::Lidt => cpu.idtr = load_table(cpu, insn)?,
        Mnemonic::Sgdt => store_table(cpu, insn, cpu.gdtr)?,
        Mnemonic::Sidt => store_table(cpu, insn, cpu.idtr)?,
        Mnemonic::Sldt => store_register(cpu, insn, cpu.ldtr.selector)?,
        Mnemonic::Str => store_register(cpu, insn, cpu.tr.selector)?,
        Mnemonic::Lldt => lldt(cpu, insn)?,
        Mnemonic::Ltr => ltr(cpu, insn)?,
        Mnemonic::Lar => lar(cpu, insn)?,
        Mnemonic::Lsl => lsl(cpu, insn)?,
        Mnemonic::Verr => verify(cpu, insn, false)?,
        Mnemonic::Verw => verify(cpu, insn, true)?,
        Mnemonic::Arpl => arpl(cpu, insn)?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// #GP(0) above privilege level 0.
pub(super) fn privileged(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.mode.cpl == 0 { Ok(()) } else { Err(Exception::gp(0)) }
}

/// #GP(0) where user-mode instruction prevention forbids the instruction (SDM volume 3, 2.5).
pub(super) fn umip(cpu: &Cpu) -> Result<(), Exception> {
    let denied = cpu.paging.cr4 & cr4::UMIP != 0 && cpu.mode.cpl != 0;
    if denied { Err(Exception::gp(0)) } else { Ok(()) }
}

/// #UD in real and virtual-8086 mode, where the instruction does not exist.
fn protected(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.mode.real || cpu.mode.vm86 { Err(Exception::UD) } else { Ok(()) }
}

/// The pseudo-descriptor of LGDT and LIDT.
fn load_table(cpu: &mut Cpu, insn: &Insn) -> Result<DescriptorTable, Exception> {
    privileged(cpu)?;
    let size = if cpu.mode.code64 { 8 } else { 4 };
    let la = cpu.operand_address(insn, 2 + size, Access::Read)?;
    let mut bytes = [0u8; 10];
    cpu.read_linear(la, &mut bytes[..2 + size], Who::Current)?;
    let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
    let mut base = (2..10).rev().fold(0u64, |value, i| value << 8 | u64::from(bytes[i]));
    if matches!(insn.i.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0xff_ffff;
    }
    if cpu.mode.code64 && !is_canonical(base) {
        return Err(Exception::gp(0));
    }
    Ok(DescriptorTable { base, limit })
}

/// SGDT and SIDT. All CPUs since the 80386 store the whole base whatever the operand size is.
fn store_table(cpu: &mut Cpu, insn: &Insn, table: DescriptorTable) -> Result<(), Exception> {
    umip(cpu)?;
    let size = if cpu.mode.code64 { 8 } else { 4 };
    let mut bytes = [0u8; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let la = cpu.operand_address(insn, 2 + size, Access::Write)?;
    cpu.write_linear(la, &bytes[..2 + size], Who::Current)
}

fn store_register(cpu: &mut Cpu, insn: &Insn, selector: u16) -> Result<(), Exception> {
    protected(cpu)?;
    umip(cpu)?;
    store_word(cpu, insn, 0, u64::from(selector))
}

/// Finds the descriptor of an LDT or a TSS for LLDT and LTR, with the checks that both make.
fn system_segment(cpu: &mut Cpu, selector: u16, allowed: &[u8]) -> Result<(Segment, u64), Exception> {
    let error = Exception::gp(code_of(selector, 0));
    if selector & 4 != 0 {
        return Err(error);
    }
    let found = cpu.system_descriptor(selector, Exception::gp, 0)?;
    // The type field of a 16-byte descriptor's upper half must be zero (SDM volume 3, 3.5.2).
    let upper_ok = !cpu.mode.long || (found.high >> 40 & 0x1f == 0 && is_canonical(found.segment.base));
    if !found.kind().is_some_and(|k| allowed.contains(&k)) || !upper_ok {
        return Err(error);
    }
    if !found.segment.is_present() {
        return Err(Exception::np(code_of(selector, 0)));
    }
    Ok((found.segment, found.at))
}

fn lldt(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    protected(cpu)?;
    privileged(cpu)?;
    let selector = word_operand(cpu, insn, 0)?;
    cpu.ldtr = if is_null(selector) {
        Segment { selector, ..Segment::default() }
    } else {
        system_segment(cpu, selector, &[kind::LDT])?.0
    };
    Ok(())
}

fn ltr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    protected(cpu)?;
    privileged(cpu)?;
    let selector = word_operand(cpu, insn, 0)?;
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let allowed: &[u8] = if cpu.mode.long { &[kind::TSS32] } else { &[kind::TSS16, kind::TSS32] };
    let (mut segment, at) = system_segment(cpu, selector, allowed)?;
    cpu.set_busy(at, true)?;
    segment.attr |= u16::from(kind::BUSY);
    cpu.tr = segment;
    Ok(())
}

/// The descriptor that LAR and LSL may look at, if there is one that the current level sees.
fn visible(cpu: &mut Cpu, selector: u16, kinds: &[u8]) -> Result<Option<(Segment, u64)>, Exception> {
    if is_null(selector) || cpu.descriptor_address(selector, 8).is_none() {
        return Ok(None);
    }
    let found = match cpu.system_descriptor(selector, Exception::gp, 0) {
        // A 16-byte descriptor that the table cuts off.
        Err(e) if e.vector == 13 => return Ok(None),
        other => other?,
    };
    let conforming = found.segment.is_code() && found.segment.attr & Segment::EXPAND_DOWN != 0;
    let level = rpl(selector).max(cpu.mode.cpl);
    let allowed =
        found.kind().is_none_or(|k| kinds.contains(&k)) && (conforming || level <= found.segment.dpl());
    Ok(allowed.then_some((found.segment, found.raw)))
}

fn set_zf(cpu: &mut Cpu, on: bool) {
    cpu.rflags = cpu.rflags & !rflags::ZF | if on { rflags::ZF } else { 0 };
}

fn lar(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    protected(cpu)?;
    let selector = word_operand(cpu, insn, 1)?;
    let kinds: &[u8] = if cpu.mode.long { &[2, 9, 11, 12] } else { &[1, 2, 3, 4, 5, 9, 11, 12] };
    let found = visible(cpu, selector, kinds)?;
    if let Some((_, raw)) = found {
        cpu.set_reg(insn.i.op0_register(), raw >> 32 & 0x00ff_ff00);
    }
    set_zf(cpu, found.is_some());
    Ok(())
}

fn lsl(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    protected(cpu)?;
    let selector = word_operand(cpu, insn, 1)?;
    let kinds: &[u8] = if cpu.mode.long { &[2, 9, 11] } else { &[1, 2, 3, 9, 11] };
    let found = visible(cpu, selector, kinds)?;
    if let Some((segment, _)) = found {
        cpu.set_reg(insn.i.op0_register(), u64::from(segment.limit));
    }
    set_zf(cpu, found.is_some());
    Ok(())
}

/// VERR and VERW.
fn verify(cpu: &mut Cpu, insn: &Insn, write: bool) -> Result<(), Exception> {
    protected(cpu)?;
    let selector = word_operand(cpu, insn, 0)?;
    let ok = visible(cpu, selector, &[])?.is_some_and(|(segment, _)| {
        let bit = segment.attr & Segment::WRITABLE != 0;
        match (segment.is_code(), write) {
            (true, true) => false,
            (true, false) | (false, true) => bit,
            (false, false) => true,
        }
    });
    set_zf(cpu, ok);
    Ok(())
}

fn arpl(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    protected(cpu)?;
    let source = cpu.reg(insn.i.op1_register()) as u16;
    let target = word_operand(cpu, insn, 0)?;
    let raise = rpl(target) < rpl(source);
    if raise {
        let value = u64::from(target & !3 | source & 3);
        if insn.i.op0_kind() == iced_x86::OpKind::Register {
            let to = insn.i.op0_register();
            let kept = cpu.reg(to) & !0xffff;
            cpu.set_reg(to, kept | value);
        } else {
            store_word(cpu, insn, 0, value)?;
        }
    }
    set_zf(cpu, raise);
    Ok(())
}
