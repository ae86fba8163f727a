//! Hardware task switches (SDM volume 3, chapter 7).
//!
//! Checks that fail before the new task's state is in force are faults of the old task; later ones are faults of the
//! new task, left in [`Cpu::exception`] for delivery before its first instruction.

use ruse_arch::{
    Exception, Segment,
    flags::{cr0, cr4, rflags},
    paging::Access,
    state::seg,
};

use super::{
    control,
    iret::{valid_link, vm86_segment},
    segment::{Fault, code_of, is_null, kind, rpl, valid_code, valid_target},
    stack::Stack,
};
use crate::cpu::{Cpu, Who};

/// What makes the switch.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// JMP to a TSS or a task gate.
    Jump,
    /// CALL of a TSS or a task gate.
    Call,
    /// IRET with NT set.
    Return,
    /// An interrupt or exception through a task gate.
    Gate {
        /// EXT bit of error codes.
        ext: u32,
        /// Error code for the new task's stack.
        error: Option<u32>,
        /// RF in the old task's saved flags.
        resume: bool,
    },
}

impl Cause {
    fn ext(self) -> u32 {
        if let Self::Gate { ext, .. } = self { ext } else { 0 }
    }
    /// The new task links back to the old one.
    fn nests(self) -> bool {
        matches!(self, Self::Call | Self::Gate { .. })
    }
}

/// The registers of a TSS, of either size (SDM volume 3, figures 7-2 and 7-10).
#[derive(Clone, Copy, Default)]
struct Image {
    cr3: Option<u64>,
    rip: u64,
    flags: u64,
    gpr: [u64; 8],
    /// ES, CS, SS, DS, FS, GS.
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

/// Switches to the task of `selector`.
pub(super) fn switch(cpu: &mut Cpu, selector: u16, cause: Cause) -> Result<(), Exception> {
    let (mut tss, at) = find(cpu, selector, cause)?;
    let new_wide = tss.kind() & 8 != 0;
    let old_wide = cpu.tr.kind() & 8 != 0;
    let old_len = if old_wide { 0x60 } else { 0x2a };
    if !cpu.tr.is_present() || cpu.tr.limit < old_len - 1 {
        return Err(Exception::ts(code_of(cpu.tr.selector, cause.ext())));
    }
    let (old_selector, old_base) = (cpu.tr.selector, cpu.tr.base);
    cpu.probe_linear(old_base, old_len as usize, Access::Write, Who::System)?;
    let image = load(cpu, tss.base, new_wide)?;
    if cause.nests() {
        cpu.probe_linear(tss.base, 2, Access::Write, Who::System)?;
    }
    cpu.probe_linear(at, 8, Access::Write, Who::System)?;
    if !cause.nests() {
        // The old task is not busy any more.
        if let Some(old) = cpu.descriptor_address(old_selector & !4, 8) {
            cpu.set_busy(old, false)?;
        }
    }
    save(cpu, old_base, old_wide, cause)?;
    if cause.nests() {
        cpu.write_value(tss.base, u64::from(old_selector), 2, Who::System)?;
    }
    if cause != Cause::Return {
        cpu.set_busy(at, true)?;
    }
    tss.attr |= u16::from(kind::BUSY);
    cpu.tr = tss;
    commit(cpu, &image, new_wide, cause);
    let mut pending = load_segments(cpu, &image).err();
    cpu.update_mode();
    if pending.is_none() {
        pending = finish(cpu, &image, new_wide, cause).err();
    }
    cpu.exception = pending;
    Ok(())
}

/// The TSS descriptor of the new task and its address, checked.
fn find(cpu: &mut Cpu, selector: u16, cause: Cause) -> Result<(Segment, u64), Exception> {
    let back = cause == Cause::Return;
    let fault: Fault = if back { Exception::ts } else { Exception::gp };
    let code = code_of(selector, cause.ext());
    if !valid_link(selector) {
        return Err(fault(code));
    }
    let found = cpu.system_descriptor(selector, fault, cause.ext())?;
    let busy = if back { kind::BUSY } else { 0 };
    if !found.kind().is_some_and(|k| k == kind::TSS16 | busy || k == kind::TSS32 | busy) {
        return Err(fault(code));
    }
    if !found.segment.is_present() {
        return Err(Exception::np(code));
    }
    let least = if found.segment.kind() & 8 != 0 { 0x67 } else { 0x2b };
    if found.segment.limit < least {
        return Err(Exception::ts(code));
    }
    Ok((found.segment, found.at))
}

fn field(bytes: &[u8], at: usize, size: usize) -> u64 {
    (0..size).rev().fold(0, |value, i| value << 8 | u64::from(bytes[at + i]))
}

/// Reads the new task's registers.
fn load(cpu: &mut Cpu, base: u64, wide: bool) -> Result<Image, Exception> {
    let mut bytes = [0u8; 0x68];
    let len = if wide { 0x68 } else { 0x2c };
    cpu.read_linear(base, &mut bytes[..len], Who::System)?;
    let b = &bytes;
    Ok(if wide {
        Image {
            cr3: Some(field(b, 0x1c, 4)),
            rip: field(b, 0x20, 4),
            flags: field(b, 0x24, 4),
            gpr: std::array::from_fn(|i| field(b, 0x28 + 4 * i, 4)),
            selectors: std::array::from_fn(|i| field(b, 0x48 + 4 * i, 2) as u16),
            ldt: field(b, 0x60, 2) as u16,
            trap: b[0x64] & 1 != 0,
        }
    } else {
        Image {
            cr3: None,
            rip: field(b, 0x0e, 2),
            flags: field(b, 0x10, 2),
            gpr: std::array::from_fn(|i| field(b, 0x12 + 2 * i, 2) | 0xffff_0000),
            selectors: std::array::from_fn(|i| if i < 4 { field(b, 0x22 + 2 * i, 2) as u16 } else { 0 }),
            ldt: field(b, 0x2a, 2) as u16,
            trap: false,
        }
    })
}

/// Writes the old task's registers. The caller has probed the pages.
fn save(cpu: &mut Cpu, base: u64, wide: bool, cause: Cause) -> Result<(), Exception> {
    let mut flags = cpu.rflags;
    match cause {
        Cause::Return => flags &= !rflags::NT,
        Cause::Gate { resume: true, .. } => flags |= rflags::RF,
        _ => {}
    }
    let size = if wide { 4 } else { 2 };
    let mut bytes = Vec::with_capacity(64);
    let values = [cpu.rip, flags].into_iter().chain(cpu.gpr[..8].iter().copied());
    for value in values {
        bytes.extend_from_slice(&value.to_le_bytes()[..size]);
    }
    for segment in &cpu.seg[..if wide { 6 } else { 4 }] {
        bytes.extend_from_slice(&u64::from(segment.selector).to_le_bytes()[..size]);
    }
    let at = if wide { 0x20 } else { 0x0e };
    cpu.write_linear(base.wrapping_add(at), &bytes, Who::System)
}

/// The new task's registers come into force, its segments as yet only by name.
fn commit(cpu: &mut Cpu, image: &Image, wide: bool, cause: Cause) {
    let defined = rflags::ARITH | 0x3_7700 | rflags::AC | rflags::VIF | rflags::VIP | rflags::ID;
    let mask = if wide { defined } else { defined & 0xffff };
    cpu.rflags = image.flags & mask | rflags::FIXED;
    if cause.nests() {
        cpu.rflags |= rflags::NT;
    }
    cpu.paging.cr0 |= cr0::TS;
    if let Some(cr3) = image.cr3
        && cpu.paging.cr0 & cr0::PG != 0
        && cr3 != cpu.paging.cr3
    {
        cpu.paging.cr3 = cr3;
        if cpu.paging.cr4 & cr4::PAE != 0 {
            // Bad pointers leave the old ones; the SDM does not say what they do in a task switch.
            let _ = control::load_pdptes(cpu);
        }
        cpu.mmu.set_space(&cpu.paging);
        cpu.mmu.flush_current(true);
    }
    cpu.gpr[..8].copy_from_slice(&image.gpr);
    cpu.rip = image.rip;
    // Local breakpoints end with the task (SDM volume 3, 17.2.4).
    cpu.dr7 &= !0x155;
    let vm86 = cpu.rflags & rflags::VM != 0;
    for (segment, &selector) in cpu.seg.iter_mut().zip(&image.selectors) {
        *segment = if vm86 {
            vm86_segment(selector)
        } else {
            Segment { selector, attr: u16::from(rpl(image.selectors[seg::CS])) << 5, ..Segment::default() }
        };
    }
    cpu.ldtr = Segment { selector: image.ldt, ..Segment::default() };
    cpu.update_mode();
}

/// Loads the hidden parts of LDTR and the segment registers, with the checks of SDM volume 3, table 7-1.
fn load_segments(cpu: &mut Cpu, image: &Image) -> Result<(), Exception> {
    if !is_null(image.ldt) {
        let error = Exception::ts(code_of(image.ldt, 0));
        if image.ldt & 4 != 0 {
            return Err(error);
        }
        let found = cpu.system_descriptor(image.ldt, Exception::ts, 0)?;
        if found.kind() != Some(kind::LDT) || !found.segment.is_present() {
            return Err(error);
        }
        cpu.ldtr = found.segment;
    }
    if cpu.rflags & rflags::VM != 0 {
        return Ok(());
    }
    let cs = task_code(cpu, image.selectors[seg::CS])?;
    let cpl = rpl(cs.selector);
    cpu.seg[seg::CS] = cs;
    let ss = cpu.stack_segment(image.selectors[seg::SS], cpl, Exception::ts, 0)?;
    cpu.seg[seg::SS] = ss;
    for s in [seg::DS, seg::ES, seg::FS, seg::GS] {
        cpu.seg[s] = cpu.data_segment(image.selectors[s], cpl, Exception::ts, 0)?;
    }
    Ok(())
}

fn task_code(cpu: &mut Cpu, selector: u16) -> Result<Segment, Exception> {
    if is_null(selector) {
        return Err(Exception::ts(0));
    }
    let mut cs = cpu.descriptor(selector, Exception::ts, 0)?;
    let conforming = cs.attr & Segment::EXPAND_DOWN != 0;
    let level = rpl(selector);
    let level_ok = if conforming { cs.dpl() <= level } else { cs.dpl() == level };
    if !valid_code(cpu, &cs) || !level_ok {
        return Err(Exception::ts(code_of(selector, 0)));
    }
    if !cs.is_present() {
        return Err(Exception::np(code_of(selector, 0)));
    }
    cpu.mark_accessed(&mut cs)?;
    Ok(cs)
}

/// The error code on the new stack, the first instruction's address, the debug trap.
fn finish(cpu: &mut Cpu, image: &Image, wide: bool, cause: Cause) -> Result<(), Exception> {
    if let Cause::Gate { error: Some(error), .. } = cause {
        let mut stack = Stack::current(cpu);
        stack.push(cpu, u64::from(error), if wide { 4 } else { 2 })?;
        stack.commit(cpu);
    }
    if !valid_target(cpu, &cpu.seg[seg::CS], image.rip) {
        return Err(Exception::gp(0));
    }
    if image.trap {
        return Err(Exception::db(super::debug::DR6_BT));
    }
    Ok(())
}
