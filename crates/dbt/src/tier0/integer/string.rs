//! String instructions but those of ports: MOVS, STOS, LODS, CMPS, SCAS with their prefixes.

use iced_x86::{Code, Instruction, OpKind};
use ruse_arch::{
    Exception,
    flags::rflags::{DF, TF, ZF},
    paging::Access,
    state::{
        reg::{RAX, RCX, RDI, RSI},
        seg,
    },
};

use super::{access::accumulator, flags::sub};
use crate::{
    cpu::{Cpu, Who},
    mmu::access::{self, Place},
    tier0::{
        Handler, Insn, debug,
        operand::{address_size, mask, segment_index},
    },
};

/// The most bytes that one call of the executor moves, so that interrupts get their turn.
const BUDGET: u64 = 64 << 10;
/// What an element by itself costs of it, in elements that are moved together: it may be one of a device.
const ALONE: u64 = 16;
const PAGE: u64 = 4096;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Movs,
    Stos,
    Lods,
    Cmps,
    Scas,
}

fn kind(code: Code) -> Option<Kind> {
    Some(match code {
        Code::Movsb_m8_m8 | Code::Movsw_m16_m16 | Code::Movsd_m32_m32 | Code::Movsq_m64_m64 => Kind::Movs,
        Code::Stosb_m8_AL | Code::Stosw_m16_AX | Code::Stosd_m32_EAX | Code::Stosq_m64_RAX => Kind::Stos,
        Code::Lodsb_AL_m8 | Code::Lodsw_AX_m16 | Code::Lodsd_EAX_m32 | Code::Lodsq_RAX_m64 => Kind::Lods,
        Code::Cmpsb_m8_m8 | Code::Cmpsw_m16_m16 | Code::Cmpsd_m32_m32 | Code::Cmpsq_m64_m64 => Kind::Cmps,
        Code::Scasb_AL_m8 | Code::Scasw_AX_m16 | Code::Scasd_EAX_m32 | Code::Scasq_RAX_m64 => Kind::Scas,
        _ => return None,
    })
}

/// The handler of an instruction of this group.
pub fn handler(i: &Instruction) -> Option<Handler> {
    kind(i.code()).map(|_| execute as Handler)
}

/// One string instruction under way.
struct Op {
    kind: Kind,
    /// Bytes of an element.
    size: usize,
    /// Bits of the index and count registers that count.
    mask: u64,
    /// Segment of the source.
    source: usize,
    /// What an index register goes up by; negative with DF.
    step: u64,
}

impl Op {
    fn new(cpu: &Cpu, i: &Instruction, kind: Kind) -> Self {
        let size = i.memory_size().size();
        let mut source = seg::DS;
        for n in 0..i.op_count() {
            if matches!(i.op_kind(n), OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI) {
                source = segment_index(i.memory_segment());
            }
        }
        let step = if cpu.rflags & DF != 0 { (size as u64).wrapping_neg() } else { size as u64 };
        Self { kind, size, mask: mask(address_size(i)), source, step }
    }

    /// Adds to an index or count register: 16 bits keep what is above, 32 clear it.
    fn advance(&self, cpu: &mut Cpu, register: usize, by: u64) {
        let old = cpu.gpr[register];
        let new = old.wrapping_add(by) & self.mask;
        cpu.gpr[register] = if self.mask == 0xffff { old & !0xffff | new } else { new };
    }

    fn from(&self, cpu: &Cpu, bytes: usize) -> Result<u64, Exception> {
        cpu.linear(self.source, cpu.gpr[RSI] & self.mask, bytes, Access::Read)
    }

    fn to(&self, cpu: &Cpu, bytes: usize, access: Access) -> Result<u64, Exception> {
        cpu.linear(seg::ES, cpu.gpr[RDI] & self.mask, bytes, access)
    }

    /// One element; registers change only if nothing faults.
    fn element(&self, cpu: &mut Cpu) -> Result<(), Exception> {
        match self.kind {
            Kind::Movs => self.copy_element(cpu)?,
            Kind::Stos => {
                let la = self.to(cpu, self.size, Access::Write)?;
                cpu.write_value(la, cpu.gpr[RAX], self.size, Who::Current)?;
            }
            Kind::Lods => {
                let la = self.from(cpu, self.size)?;
                let value = cpu.read_value(la, self.size, Who::Current)?;
                cpu.set_reg(accumulator(self.size), value);
            }
            Kind::Cmps => {
                // The destination first, as the host does.
                let b = self.to(cpu, self.size, Access::Read)?;
                cpu.probe_linear(b, self.size, Access::Read, Who::Current)?;
                let a = self.from(cpu, self.size)?;
                let a = cpu.read_value(a, self.size, Who::Current)?;
                let b = cpu.read_value(b, self.size, Who::Current)?;
                cpu.set_arith(sub(a, b, 0, self.size).1);
            }
            Kind::Scas => {
                let la = self.to(cpu, self.size, Access::Read)?;
                let b = cpu.read_value(la, self.size, Who::Current)?;
                cpu.set_arith(sub(cpu.gpr[RAX] & mask(self.size), b, 0, self.size).1);
            }
        }
        self.finish(cpu, 1);
        Ok(())
    }

    /// Moves the index registers behind `count` elements.
    fn finish(&self, cpu: &mut Cpu, count: u64) {
        let by = self.step.wrapping_mul(count);
        if matches!(self.kind, Kind::Movs | Kind::Lods | Kind::Cmps) {
            self.advance(cpu, RSI, by);
        }
        if self.kind != Kind::Lods {
            self.advance(cpu, RDI, by);
        }
    }

    /// The destination is checked before the source is read, which may be a device.
    fn copy_element(&self, cpu: &mut Cpu) -> Result<(), Exception> {
        let from = self.from(cpu, self.size)?;
        cpu.probe_linear(from, self.size, Access::Read, Who::Current)?;
        let to = self.to(cpu, self.size, Access::Write)?;
        cpu.probe_linear(to, self.size, Access::Write, Who::Current)?;
        let value = cpu.read_value(from, self.size, Who::Current)?;
        cpu.write_value(to, value, self.size, Who::Current)
    }

    fn backwards(&self) -> bool {
        self.step >> 63 != 0
    }

    /// How many elements at an index register, whose linear address is `la`, lie in one page before the register wraps.
    fn room(&self, cpu: &Cpu, register: usize, la: u64) -> u64 {
        let (offset, size) = (cpu.gpr[register] & self.mask, self.size as u64);
        if !self.backwards() {
            let wrap = (self.mask - offset).saturating_add(1);
            return (PAGE - la % PAGE).min(wrap) / size;
        }
        if la % PAGE + size > PAGE { 0 } else { (la % PAGE).min(offset) / size + 1 }
    }

    /// Linear address of the lowest of `count` elements at an index register, for which there is room.
    fn lowest(&self, cpu: &Cpu, segment: usize, register: usize, count: u64, access: Access) -> Option<u64> {
        let below = if self.backwards() { (count - 1) * self.size as u64 } else { 0 };
        let offset = (cpu.gpr[register] & self.mask) - below;
        cpu.linear(segment, offset, count as usize * self.size, access).ok()
    }

    /// As many elements at once as lie in one page on each side, in RAM: how many were done. None where that would differ
    /// from one after the other, or where the first would fault: then the plain way tells how.
    fn chunk(&self, cpu: &mut Cpu, most: u64) -> u64 {
        if !matches!(self.kind, Kind::Movs | Kind::Stos) || debug::breakpoints_enabled(cpu) {
            return 0;
        }
        self.try_chunk(cpu, most).unwrap_or(0)
    }

    fn try_chunk(&self, cpu: &mut Cpu, most: u64) -> Option<u64> {
        let copies = self.kind == Kind::Movs;
        let mut count = most.min(self.room(cpu, RDI, self.to(cpu, self.size, Access::Write).ok()?));
        if copies {
            count = count.min(self.room(cpu, RSI, self.from(cpu, self.size).ok()?));
        }
        if count < 2 {
            return None;
        }
        let len = count as usize * self.size;
        let from = if copies {
            let la = self.lowest(cpu, self.source, RSI, count, Access::Read)?;
            match cpu.place(la, len, Access::Read, Who::Current) {
                Ok(Place::Ram(host) | Place::Code(host)) => Some(host),
                _ => return None,
            }
        } else {
            None
        };
        let la = self.lowest(cpu, seg::ES, RDI, count, Access::Write)?;
        let Ok(Place::Ram(to) | Place::Code(to)) = cpu.place(la, len, Access::Write, Who::Current) else {
            return None;
        };
        // A destination ahead within the source repeats what was just written.
        let ahead = from.map_or(0, |from| (to as usize).wrapping_sub(from as usize));
        let ahead = if self.backwards() { ahead.wrapping_neg() } else { ahead };
        if (1..len).contains(&ahead) {
            return None;
        }
        self.move_bytes(cpu, from, to, len);
        self.finish(cpu, count);
        Some(count)
    }

    /// Copies or fills `len` bytes of RAM within a page on each side.
    fn move_bytes(&self, cpu: &mut Cpu, from: Option<*mut u8>, to: *mut u8, len: usize) {
        let element = cpu.gpr[RAX].to_le_bytes();
        let element = &element[..self.size];
        match from {
            Some(from) => access::copy(from, to, len),
            None if element.iter().all(|b| *b == element[0]) => access::fill(to, element[0], len),
            None => {
                let mut buf = [0; PAGE as usize];
                buf[..len].chunks_exact_mut(self.size).for_each(|c| c.copy_from_slice(element));
                access::store(to, &buf[..len]);
            }
        }
        cpu.ram_written(to, len);
    }
}

fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let Some(kind) = kind(insn.i.code()) else { return Err(Exception::UD) };
    let op = Op::new(cpu, &insn.i, kind);
    let (equal, not_equal) = (insn.i.has_rep_prefix(), insn.i.has_repne_prefix());
    if !equal && !not_equal {
        return op.element(cpu);
    }
    // MOVS, STOS and LODS repeat with either prefix.
    let compares = matches!(kind, Kind::Cmps | Kind::Scas);
    let flags = cpu.rflags;
    // Single steps and breakpoints stop after each iteration.
    let single = cpu.rflags & TF != 0 || debug::breakpoints_enabled(cpu);
    let mut budget = if single { 1 } else { BUDGET / op.size as u64 };
    loop {
        let left = cpu.gpr[RCX] & op.mask;
        if left == 0 {
            return Ok(());
        }
        if budget == 0 {
            cpu.rip = insn.rip;
            return Ok(());
        }
        let mut done = op.chunk(cpu, left.min(budget));
        let mut cost = done;
        if done == 0 {
            if let Err(fault) = op.element(cpu) {
                // A fault gives the flags of the start back (SDM volume 2, REP).
                cpu.rflags = flags;
                return Err(fault);
            }
            // Comparisons are always made one by one; a fault at a later one is to give the flags of the start back.
            (done, cost) = (1, if compares { 1 } else { ALONE });
        }
        op.advance(cpu, RCX, done.wrapping_neg());
        budget = budget.saturating_sub(cost);
        if compares && (cpu.rflags & ZF != 0) != equal {
            return Ok(());
        }
    }
}
