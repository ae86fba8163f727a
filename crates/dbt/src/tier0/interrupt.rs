//! Delivery of interrupts and exceptions through the IDT (SDM volume 3, chapter 6), and INT n, INT3, INTO and INT1.

use iced_x86::Mnemonic;
use ruse_arch::{
    Exception, MpState, Segment,
    flags::rflags,
    state::{reg, seg},
};

use super::{
    Insn,
    far::{inner_stack, tss_stack64},
    operand::mask,
    segment::{code_of, is_null, valid_code, valid_target},
    stack::Stack,
    task::{self, Cause},
};
use crate::cpu::{Cpu, Who};

/// What is to be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An exception; RIP is where the handler is to return.
    Exception(Exception),
    /// A maskable interrupt that was acknowledged.
    Interrupt(u8),
    /// The non-maskable interrupt.
    Nmi,
    /// INT n; RIP is behind the instruction.
    Software(u8),
    /// INT3; RIP is behind the instruction.
    Int3,
    /// INTO with OF set; RIP is behind the instruction.
    Into,
    /// INT1; RIP is behind the instruction.
    Icebp,
}

/// A fault during the delivery of a double fault: only a reset helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shutdown;

/// An event as delivery needs it.
#[derive(Clone, Copy)]
struct Request {
    vector: u8,
    error: Option<u32>,
    /// The gate's DPL is checked.
    software: bool,
    /// EXT bit of error codes.
    ext: u32,
    /// RF in the saved flags: the event is a fault, and its instruction will run again.
    resume: bool,
}

impl Request {
    fn of(event: Event) -> Self {
        let bare = |vector, software| Self {
            vector,
            error: None,
            software,
            ext: u32::from(!software),
            resume: false,
        };
        match event {
            Event::Exception(e) => Self {
                error: e.error,
                // Debug exceptions, breakpoints, overflow and the aborts are no faults (SDM volume 3, 6.5).
                resume: !matches!(e.vector, 1..=4 | 8 | 18),
                ..bare(e.vector, false)
            },
            Event::Interrupt(vector) => bare(vector, false),
            Event::Nmi => bare(2, false),
            Event::Software(vector) => bare(vector, true),
            Event::Int3 => bare(3, true),
            Event::Into => bare(4, true),
            Event::Icebp => bare(1, false),
        }
    }

    /// The error code that names this event's gate.
    fn gate_code(&self) -> u32 {
        u32::from(self.vector) << 3 | 2 | self.ext
    }
}

/// Delivers an event. Faults on the way are delivered in its place, as the double-fault rules say.
pub fn deliver(cpu: &mut Cpu, event: Event) -> Result<(), Shutdown> {
    cpu.interrupt_shadow = false;
    if cpu.mp_state == MpState::Halted {
        cpu.mp_state = MpState::Running;
    }
    if event == Event::Nmi {
        cpu.nmi_blocked = true;
    }
    let mut event = event;
    // Each round is worse than the one before, so that few are enough.
    for _ in 0..5 {
        if let Event::Exception(e) = &event {
            note(cpu, e);
        }
        let Err(second) = enter(cpu, &Request::of(event)) else { return Ok(()) };
        let Some(next) = combine(event, second) else { break };
        if next.vector == 8 {
            // The page fault that became a double fault has written CR2 all the same.
            note(cpu, &second);
        }
        event = Event::Exception(next);
    }
    cpu.mp_state = MpState::Shutdown;
    Err(Shutdown)
}

/// What an exception writes besides the stack: CR2, or DR6 and DR7 (SDM volume 3, 17.2).
fn note(cpu: &mut Cpu, e: &Exception) {
    match e.vector {
        14 => cpu.cr2 = e.payload,
        1 => {
            cpu.dr6 = cpu.dr6 & !0xf | e.payload;
            cpu.dr7 &= !super::debug::DR7_GD;
        }
        _ => {}
    }
}

/// What two exceptions together make; `None` is a shutdown (SDM volume 3, table 6-5).
fn combine(first: Event, second: Exception) -> Option<Exception> {
    let Event::Exception(first) = first else { return Some(second) };
    let (page, contributory) = (second.vector == 14, second.is_contributory());
    match first.vector {
        8 if page || contributory => None,
        14 if page || contributory => Some(Exception::df()),
        _ if first.is_contributory() && contributory => Some(Exception::df()),
        _ => Some(second),
    }
}

/// INT n, INT3, INTO and INT1. What fails on the way is a fault of the instruction.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Exception> {
    let event = match insn.i.mnemonic() {
        Mnemonic::Int => {
            let low = cpu.mode.vm86 && cpu.rflags & rflags::IOPL != rflags::IOPL;
            if low {
                return Err(Exception::gp(0));
            }
            Event::Software(insn.i.immediate8())
        }
        Mnemonic::Int3 => Event::Int3,
        Mnemonic::Into if cpu.rflags & rflags::OF == 0 => return Ok(true),
        Mnemonic::Into => Event::Into,
        Mnemonic::Int1 => Event::Icebp,
        _ => return Ok(false),
    };
    enter(cpu, &Request::of(event))?;
    if event == Event::Icebp {
        cpu.dr7 &= !super::debug::DR7_GD;
    }
    cpu.interrupt_shadow = false;
    Ok(true)
}

/// One attempt at delivery. On an error nothing has changed.
fn enter(cpu: &mut Cpu, r: &Request) -> Result<(), Exception> {
    if cpu.mode.real {
        enter_real(cpu, r)
    } else if cpu.mode.long {
        enter_long(cpu, r)
    } else {
        enter_protected(cpu, r)
    }
}

/// Through the interrupt vector table (SDM volume 3, 20.1.4).
fn enter_real(cpu: &mut Cpu, r: &Request) -> Result<(), Exception> {
    let at = 4 * u64::from(r.vector);
    if at + 3 > u64::from(cpu.idtr.limit) {
        return Err(Exception::gp(r.gate_code()));
    }
    let entry = cpu.read_value(cpu.idtr.base.wrapping_add(at), 4, Who::System)?;
    let mut stack = Stack::current(cpu);
    stack.push(cpu, cpu.rflags, 2)?;
    stack.push(cpu, u64::from(cpu.seg[seg::CS].selector), 2)?;
    stack.push(cpu, cpu.rip, 2)?;
    stack.commit(cpu);
    cpu.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
    cpu.seg[seg::CS] = cpu.real_segment(seg::CS, (entry >> 16) as u16, &cpu.seg[seg::CS]);
    cpu.rip = entry & 0xffff;
    cpu.update_mode();
    Ok(())
}

/// A gate of the IDT.
struct Gate {
    raw: u64,
    high: u64,
}

impl Gate {
    fn kind(&self) -> u8 {
        (self.raw >> 40 & 0x1f) as u8
    }
    fn selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }
    /// A trap gate leaves IF as it is.
    fn is_trap(&self) -> bool {
        self.kind() & 1 != 0
    }
    /// The entry point; 16-bit gates have no upper half.
    fn offset(&self) -> u64 {
        let upper = if self.kind() & 8 != 0 { self.raw >> 32 & 0xffff_0000 } else { 0 };
        self.raw & 0xffff | upper | self.high << 32
    }
}

/// Reads the event's gate and checks its type, DPL and presence.
fn gate(cpu: &mut Cpu, r: &Request) -> Result<Gate, Exception> {
    let size = if cpu.mode.long { 16 } else { 8 };
    let at = size * u64::from(r.vector);
    if at + size - 1 > u64::from(cpu.idtr.limit) {
        return Err(Exception::gp(r.gate_code()));
    }
    let la = cpu.idtr.base.wrapping_add(at);
    let raw = cpu.read_value(la, 8, Who::System)?;
    let high =
        if cpu.mode.long { cpu.read_value(la.wrapping_add(8), 8, Who::System)? & 0xffff_ffff } else { 0 };
    let found = Gate { raw, high };
    let allowed: &[u8] = if cpu.mode.long { &[14, 15] } else { &[5, 6, 7, 14, 15] };
    let dpl = (raw >> 45 & 3) as u8;
    if !allowed.contains(&found.kind()) || (r.software && dpl < cpu.mode.cpl) {
        return Err(Exception::gp(r.gate_code()));
    }
    if raw >> 47 & 1 == 0 {
        return Err(Exception::np(r.gate_code()));
    }
    Ok(found)
}

/// The handler's code segment, checked, and the privilege level that it runs at.
fn handler(cpu: &mut Cpu, gate: &Gate, ext: u32) -> Result<(Segment, u8), Exception> {
    let selector = gate.selector();
    if is_null(selector) {
        return Err(Exception::gp(ext));
    }
    let error = Exception::gp(code_of(selector, ext));
    let mut cs = cpu.descriptor(selector, Exception::gp, ext)?;
    let wrong_size = cpu.mode.long && cs.attr & Segment::L == 0;
    if !valid_code(cpu, &cs) || cs.dpl() > cpu.mode.cpl || wrong_size {
        return Err(error);
    }
    if !cs.is_present() {
        return Err(Exception::np(code_of(selector, ext)));
    }
    let conforming = cs.attr & Segment::EXPAND_DOWN != 0;
    let cpl = if conforming { cpu.mode.cpl } else { cs.dpl() };
    if cpu.mode.vm86 && cpl != 0 {
        return Err(error);
    }
    if !valid_target(cpu, &cs, gate.offset()) {
        return Err(Exception::gp(ext));
    }
    cpu.mark_accessed(&mut cs)?;
    cs.selector = selector & !3 | u16::from(cpl);
    Ok((cs, cpl))
}

/// Goes on in the handler.
fn arrive(cpu: &mut Cpu, cs: Segment, gate: &Gate) {
    let clear = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
    cpu.rflags &= !(clear | if gate.is_trap() { 0 } else { rflags::IF });
    cpu.seg[seg::CS] = cs;
    cpu.rip = gate.offset();
    cpu.update_mode();
}

fn saved_flags(cpu: &Cpu, r: &Request) -> u64 {
    cpu.rflags | if r.resume { rflags::RF } else { 0 }
}

/// Through an interrupt, trap or task gate of 32-bit protected mode (SDM volume 3, 6.12).
fn enter_protected(cpu: &mut Cpu, r: &Request) -> Result<(), Exception> {
    let gate = gate(cpu, r)?;
    if gate.kind() == 5 {
        let cause = Cause::Gate { ext: r.ext, error: r.error, resume: r.resume };
        return task::switch(cpu, gate.selector(), cause);
    }
    let size = if gate.kind() & 8 != 0 { 4 } else { 2 };
    let (cs, cpl) = handler(cpu, &gate, r.ext)?;
    let inner = cpl != cpu.mode.cpl;
    let mut stack = Stack::current(cpu);
    let mut ss = cpu.seg[seg::SS];
    if inner {
        let sp;
        (ss, sp) = inner_stack(cpu, cpl, r.ext)?;
        stack = Stack::new(ss, sp, false, code_of(ss.selector, r.ext));
        if cpu.mode.vm86 {
            for s in [seg::GS, seg::FS, seg::DS, seg::ES] {
                stack.push(cpu, u64::from(cpu.seg[s].selector), size)?;
            }
        }
        stack.push(cpu, u64::from(cpu.seg[seg::SS].selector), size)?;
        stack.push(cpu, cpu.gpr[reg::RSP] & mask(size), size)?;
    }
    stack.push(cpu, saved_flags(cpu, r), size)?;
    stack.push(cpu, u64::from(cpu.seg[seg::CS].selector), size)?;
    stack.push(cpu, cpu.rip, size)?;
    if let Some(error) = r.error {
        stack.push(cpu, u64::from(error), size)?;
    }
    if cpu.mode.vm86 {
        for s in [seg::GS, seg::FS, seg::DS, seg::ES] {
            cpu.seg[s] = Segment::default();
        }
    }
    cpu.seg[seg::SS] = ss;
    if inner {
        super::segment::set_stack(cpu, ss, stack.pointer(), false);
    } else {
        stack.commit(cpu);
    }
    arrive(cpu, cs, &gate);
    Ok(())
}

/// Through a gate of the 64-bit IDT (SDM volume 3, 6.14).
fn enter_long(cpu: &mut Cpu, r: &Request) -> Result<(), Exception> {
    let gate = gate(cpu, r)?;
    let (cs, cpl) = handler(cpu, &gate, r.ext)?;
    let inner = cpl != cpu.mode.cpl;
    let ist = gate.raw >> 32 & 7;
    let (old_ss, old_sp) = (cpu.seg[seg::SS], cpu.gpr[reg::RSP]);
    let sp = match (ist, inner) {
        (0, false) => old_sp,
        (0, true) => tss_stack64(cpu, 4 + 8 * u64::from(cpl), r.ext)?,
        _ => tss_stack64(cpu, 0x24 + 8 * (ist - 1), r.ext)?,
    };
    let ss = if inner { Cpu::null_stack(u16::from(cpl), cpl) } else { old_ss };
    let mut stack = Stack::new(ss, sp & !15, true, r.ext);
    if !inner {
        stack = stack.at_current_level();
    }
    stack.push(cpu, u64::from(old_ss.selector), 8)?;
    stack.push(cpu, old_sp, 8)?;
    stack.push(cpu, saved_flags(cpu, r), 8)?;
    stack.push(cpu, u64::from(cpu.seg[seg::CS].selector), 8)?;
    stack.push(cpu, cpu.rip, 8)?;
    if let Some(error) = r.error {
        stack.push(cpu, u64::from(error), 8)?;
    }
    cpu.seg[seg::SS] = ss;
    stack.commit(cpu);
    arrive(cpu, cs, &gate);
    Ok(())
}
