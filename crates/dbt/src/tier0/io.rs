//! Port input and output with its protection (SDM volume 1, chapter 19).

use iced_x86::{Mnemonic, OpKind};
use ruse_arch::{
    Exception, Segment,
    flags::rflags,
    paging::Access,
    state::{reg, seg},
};

use super::{
    Insn,
    debug::{self, Watch},
    operand::{address_size, mask, segment_index},
    segment::kind,
};
use crate::cpu::{Cpu, Who};

/// Iterations of a repeated instruction before interrupts get their turn.
const BURST: u64 = 1024;

/// Executes what belongs here; `Ok(false)` for other instructions.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Exception> {
    match insn.i.mnemonic() {
        Mnemonic::In => input(cpu, insn)?,
        Mnemonic::Out => output(cpu, insn)?,
        Mnemonic::Insb => string(cpu, insn, 1, true)?,
        Mnemonic::Insw => string(cpu, insn, 2, true)?,
        Mnemonic::Insd => string(cpu, insn, 4, true)?,
        Mnemonic::Outsb => string(cpu, insn, 1, false)?,
        Mnemonic::Outsw => string(cpu, insn, 2, false)?,
        Mnemonic::Outsd => string(cpu, insn, 4, false)?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// Whether IOPL or the bitmap of the TSS allows `size` bytes at `port` (SDM volume 1, 19.5).
fn check(cpu: &mut Cpu, port: u16, size: usize) -> Result<(), Exception> {
    let by_level = u64::from(cpu.mode.cpl) <= cpu.rflags >> 12 & 3;
    if cpu.mode.real || (by_level && !cpu.mode.vm86) {
        return Ok(());
    }
    let denied = Err(Exception::gp(0));
    let tss = cpu.tr;
    let right_kind =
        tss.is_present() && tss.attr & Segment::S == 0 && tss.kind() & !kind::BUSY == kind::TSS32;
    if !right_kind || tss.limit < 0x67 {
        return denied;
    }
    let bitmap = cpu.read_value(tss.base.wrapping_add(0x66), 2, Who::System)?;
    let at = bitmap + u64::from(port / 8);
    if at + 1 > u64::from(tss.limit) {
        return denied;
    }
    let bits = cpu.read_value(tss.base.wrapping_add(at), 2, Who::System)?;
    let wanted = ((1 << size) - 1) << (port % 8);
    if bits & wanted == 0 { Ok(()) } else { denied }
}

/// Notes breakpoints on a port.
fn watch(cpu: &mut Cpu, port: u16, size: usize) {
    debug::note(cpu, port.into(), size, Watch::Port, Who::Current);
}

/// The port that an operand names.
fn port(cpu: &Cpu, insn: &Insn, op: u32) -> u16 {
    if insn.i.op_kind(op) == OpKind::Register {
        cpu.gpr[reg::RDX] as u16
    } else {
        u16::from(insn.i.immediate8())
    }
}

fn input(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let to = insn.i.op0_register();
    let port = port(cpu, insn, 1);
    check(cpu, port, to.size())?;
    watch(cpu, port, to.size());
    let mut bytes = [0u8; 4];
    cpu.bus().pio_read(cpu.id, port, &mut bytes[..to.size()]);
    cpu.set_reg(to, u64::from(u32::from_le_bytes(bytes)));
    Ok(())
}

fn output(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let from = insn.i.op1_register();
    let port = port(cpu, insn, 0);
    check(cpu, port, from.size())?;
    watch(cpu, port, from.size());
    let bytes = cpu.reg(from).to_le_bytes();
    cpu.port_write(port, &bytes[..from.size()]);
    Ok(())
}

/// INS and OUTS, repeated or not. Registers always say how far it has come, so that a fault or the end of a burst in
/// the middle leaves an instruction that goes on where it stopped.
fn string(cpu: &mut Cpu, insn: &Insn, size: usize, into: bool) -> Result<(), Exception> {
    let i = &insn.i;
    let width = address_size(i);
    let repeated = i.has_rep_prefix() || i.has_repne_prefix();
    let port = cpu.gpr[reg::RDX] as u16;
    check(cpu, port, size)?;
    watch(cpu, port, size);
    let count = if repeated { cpu.gpr[reg::RCX] & mask(width) } else { 1 };
    let burst = if cpu.rflags & rflags::TF != 0 || debug::breakpoints_enabled(cpu) { 1 } else { BURST };
    for _ in 0..count.min(burst) {
        if into {
            ins_once(cpu, port, size, width)?;
        } else {
            let s = segment_index(i.memory_segment());
            outs_once(cpu, s, port, size, width)?;
        }
        if repeated {
            let left = cpu.gpr[reg::RCX].wrapping_sub(1);
            put(cpu, reg::RCX, left, width);
        }
    }
    if count > burst {
        cpu.rip = insn.rip;
    }
    Ok(())
}

/// Writes an index or count register at the address size.
fn put(cpu: &mut Cpu, r: usize, value: u64, width: usize) {
    cpu.gpr[r] = match width {
        8 => value,
        4 => value & 0xffff_ffff,
        _ => cpu.gpr[r] & !0xffff | value & 0xffff,
    };
}

fn advance(cpu: &mut Cpu, r: usize, size: usize, width: usize) {
    let by = if cpu.rflags & rflags::DF != 0 { (size as u64).wrapping_neg() } else { size as u64 };
    let to = cpu.gpr[r].wrapping_add(by);
    put(cpu, r, to, width);
}

fn ins_once(cpu: &mut Cpu, port: u16, size: usize, width: usize) -> Result<(), Exception> {
    let offset = cpu.gpr[reg::RDI] & mask(width);
    let la = cpu.linear(seg::ES, offset, size, Access::Write)?;
    // What the port gives is lost if memory cannot take it.
    cpu.probe_linear(la, size, Access::Write, Who::Current)?;
    let mut bytes = [0u8; 4];
    cpu.bus().pio_read(cpu.id, port, &mut bytes[..size]);
    cpu.write_linear(la, &bytes[..size], Who::Current)?;
    advance(cpu, reg::RDI, size, width);
    Ok(())
}

fn outs_once(cpu: &mut Cpu, s: usize, port: u16, size: usize, width: usize) -> Result<(), Exception> {
    let offset = cpu.gpr[reg::RSI] & mask(width);
    let la = cpu.linear(s, offset, size, Access::Read)?;
    let mut bytes = [0u8; 4];
    cpu.read_linear(la, &mut bytes[..size], Who::Current)?;
    cpu.port_write(port, &bytes[..size]);
    advance(cpu, reg::RSI, size, width);
    Ok(())
}
