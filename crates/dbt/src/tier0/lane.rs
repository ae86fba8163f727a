//! The native lane: vector and x87 instructions are executed by the host's CPU. The instruction is encoded again with
//! its memory operand led to a buffer that is read from guest memory before and written back after; the guest's
//! registers are loaded around it (see [`super::lane_stub`]).

use std::cell::RefCell;

use iced_x86::{
    Encoder, EncodingKind, Instruction, InstructionInfoFactory, InstructionInfoOptions, MemorySize, Mnemonic,
    OpAccess, OpKind, Register,
};
use ruse_arch::{
    Exception,
    flags::{cr4, rflags},
    paging::Access,
    state::reg,
};

use super::{
    Insn,
    fpu_regs::{FCW_INIT, fsw, mxcsr},
    lane_stub::{Io, OPERAND_FROM_RSP, Stubs},
};
use crate::cpu::{Cpu, Who};

/// The memory operand of an instruction in the lane.
#[derive(Clone, Copy)]
struct Operand {
    size: usize,
    read: bool,
    write: bool,
    /// Must be a multiple of its size.
    aligned: bool,
}

/// What the lane knows of an instruction.
#[derive(Clone, Copy)]
pub(super) struct Meta {
    memory: Option<Operand>,
    /// Register that stands for RSP.
    substitute: Option<usize>,
}

thread_local! {
    /// The stubs of the thread; made with the first instruction.
    static STUBS: RefCell<Option<Stubs<Meta>>> = const { RefCell::new(None) };
}

/// Executes an SSE, AVX or MMX instruction. Floating-point exceptions that are not masked become #XM, with nothing
/// changed but the flags of MXCSR (SDM volume 1, 11.5.2 and 11.5.3).
pub(super) fn run_simd(cpu: &mut Cpu, insn: &Insn, touches_x87: bool) -> Result<(), Exception> {
    with_stub(cpu, insn, |cpu, stubs, stub| {
        let (mut io, at) = load(cpu, insn, &stub.meta)?;
        let guest = cpu.fpu.mxcsr();
        let all_masked = guest & mxcsr::MASKS == mxcsr::MASKS;
        let before = (!all_masked).then_some(cpu.fpu);
        let mut control = guest & mxcsr::DEFINED;
        if !all_masked {
            control = control & !mxcsr::FLAGS | mxcsr::MASKS;
        }
        if guest & mxcsr::UE << mxcsr::MASK_SHIFT == 0 {
            // Unmasked, every tiny result is an underflow; masked, only an inexact one, unless results are flushed.
            control |= mxcsr::FTZ;
        }
        cpu.fpu.set_mxcsr(control);
        let last = cpu.fpu.last_x87();
        let x87 = (!touches_x87).then(|| set_x87_aside(cpu));
        stubs.run(stub, &mut io, &mut cpu.fpu);
        if let Some(x87) = x87 {
            cpu.fpu.fxsave[..5].copy_from_slice(&x87);
        }
        cpu.fpu.set_last_x87(last);
        let mut raised = cpu.fpu.mxcsr() & mxcsr::FLAGS;
        if insn.i.mnemonic() == Mnemonic::Vcvtps2ph && has_tiny_half(cpu, insn, &io) {
            raised |= mxcsr::UE & !(guest >> mxcsr::MASK_SHIFT);
        }
        let unmasked = raised & !(guest >> mxcsr::MASK_SHIFT);
        if unmasked != 0
            && let Some(before) = before
        {
            cpu.fpu = before;
            let seen = if unmasked & mxcsr::BEFORE != 0 { raised & mxcsr::BEFORE } else { raised };
            cpu.fpu.set_mxcsr(guest | seen);
            let handled = cpu.paging.cr4 & cr4::OSXMMEXCPT != 0;
            return Err(if handled { Exception::XM } else { Exception::UD });
        }
        // The flags of a conversion stay where its store faults, and MMX mode is entered (seen on Intel's CPUs).
        cpu.fpu.set_mxcsr(guest | raised);
        let at = settle(cpu, insn, &stub.meta, at)?;
        commit(cpu, &io, &stub.meta);
        store(cpu, &io, &stub.meta, at)
    })
}

/// Whether a conversion to half precision, which knows no flushing, has made a subnormal number: an underflow if that
/// is not masked, exact or not.
fn has_tiny_half(cpu: &Cpu, insn: &Insn, io: &Io) -> bool {
    let halves = if insn.i.op1_register().is_ymm() { 16 } else { 8 };
    let register = cpu.fpu.ymm((insn.i.op0_register() as usize).wrapping_sub(Register::XMM0 as usize) % 16);
    let bytes = if insn.i.op0_kind() == OpKind::Memory { &io.memory[..halves] } else { &register[..halves] };
    bytes.chunks_exact(2).any(|h| h[1] & 0x7c == 0 && (h[0] != 0 || h[1] & 3 != 0))
}

/// Executes an x87 instruction under the guest's control word; no exception is pending. Returns whether it has an
/// operand in memory.
pub(super) fn run_x87(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Exception> {
    with_stub(cpu, insn, |cpu, stubs, stub| {
        let (mut io, mut at) = load(cpu, insn, &stub.meta)?;
        let stores = stub.meta.memory.is_some_and(|operand| operand.write);
        let all_masked = cpu.fpu.fcw() & fsw::FLAGS == fsw::FLAGS;
        if all_masked {
            at = settle(cpu, insn, &stub.meta, at)?;
        }
        let image = (stores && !all_masked).then_some(cpu.fpu);
        let guest = cpu.fpu.mxcsr();
        cpu.fpu.set_mxcsr(mxcsr::DEFAULT);
        cpu.fpu.update_summary();
        let before = cpu.fpu.fsw();
        let last = cpu.fpu.last_x87();
        stubs.run(stub, &mut io, &mut cpu.fpu);
        cpu.fpu.set_last_x87(last);
        cpu.fpu.set_mxcsr(guest);
        // An unmasked exception keeps the result of a store back (SDM volume 1, 8.5); memory is not looked at then.
        let raised = cpu.fpu.fsw() & !before & !cpu.fpu.fcw();
        if stores && raised & fsw::NO_STORE == 0 {
            if let Some(image) = image {
                at = settle(cpu, insn, &stub.meta, at).inspect_err(|_| cpu.fpu = image)?;
            }
            store(cpu, &io, &stub.meta, at)?;
        }
        commit(cpu, &io, &stub.meta);
        Ok(stub.meta.memory.is_some())
    })
}

/// Gives the host an x87 unit in which nothing is pending, for instructions that have nothing to do with it.
fn set_x87_aside(cpu: &mut Cpu) -> [u8; 5] {
    let kept = cpu.fpu.fxsave[..5].try_into().expect("five bytes");
    cpu.fpu.set_fcw(FCW_INIT);
    cpu.fpu.set_fsw(cpu.fpu.fsw() & !(fsw::FLAGS | fsw::SUMMARY));
    kept
}

fn with_stub<R>(
    cpu: &mut Cpu,
    insn: &Insn,
    body: impl FnOnce(&mut Cpu, &Stubs<Meta>, &super::lane_stub::Stub<Meta>) -> Result<R, Exception>,
) -> Result<R, Exception> {
    STUBS.with_borrow_mut(|stubs| {
        if stubs.is_none() {
            // Without memory for code there is no lane: the instruction is unknown.
            *stubs = Stubs::new().ok();
        }
        let stubs = stubs.as_mut().ok_or(Exception::UD)?;
        let key = key(cpu, insn);
        let stub = match stubs.get(key) {
            Some(stub) => stub,
            None => {
                let (code, meta) = translate(&insn.i).ok_or(Exception::UD)?;
                stubs.insert(key, &code, meta).ok_or(Exception::UD)?
            }
        };
        body(cpu, stubs, &stub)
    })
}

/// The instruction's bytes with what else its meaning depends on.
fn key(cpu: &Cpu, insn: &Insn) -> u128 {
    let mut key = [0; 16];
    let len = insn.i.len().min(15);
    key[..len].copy_from_slice(&insn.bytes[..len]);
    key[15] = (len as u8) << 2 | u8::from(cpu.mode.code64) << 1 | u8::from(cpu.mode.code32);
    u128::from_le_bytes(key)
}

/// Encodes the instruction for the lane.
fn translate(i: &Instruction) -> Option<(Vec<u8>, Meta)> {
    let mut host = *i;
    let substitute = replace_rsp(&mut host);
    let memory = memory_operand(i);
    if memory.is_some() {
        host.set_memory_base(Register::RSP);
        host.set_memory_index(Register::None);
        host.set_memory_index_scale(1);
        host.set_memory_displacement64(OPERAND_FROM_RSP);
        host.set_memory_displ_size(1);
        host.set_segment_prefix(Register::None);
    }
    let mut encoder = Encoder::new(64);
    encoder.encode(&host, 0).ok()?;
    Some((encoder.take_buffer(), Meta { memory, substitute }))
}

/// Replaces RSP as an operand by a register that the instruction does not use.
fn replace_rsp(i: &mut Instruction) -> Option<usize> {
    let full =
        |i: &Instruction, op| (i.op_kind(op) == OpKind::Register).then(|| i.op_register(op).full_register());
    let ops = i.op_count();
    let op = (0..ops).find(|&op| full(i, op) == Some(Register::RSP))?;
    let (index, _) = [(reg::RSI, Register::RSI), (reg::RDI, Register::RDI)]
        .into_iter()
        .find(|&(_, r)| (0..ops).all(|op| full(i, op) != Some(r)))?;
    let family = match i.op_register(op).size() {
        8 => Register::RAX,
        4 => Register::EAX,
        _ => Register::AX,
    };
    i.set_op_register(op, Register::try_from(family as usize + index).ok()?);
    Some(index)
}

fn memory_operand(i: &Instruction) -> Option<Operand> {
    let op = (0..i.op_count()).find(|&op| i.op_kind(op) == OpKind::Memory)?;
    let mut info = InstructionInfoFactory::new();
    let access = info
        .info_options(i, InstructionInfoOptions::NO_MEMORY_USAGE | InstructionInfoOptions::NO_REGISTER_USAGE)
        .op_access(op);
    let size = i.memory_size().size().min(64);
    let write = matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    );
    let read = !matches!(access, OpAccess::Write | OpAccess::None | OpAccess::NoMemAccess);
    Some(Operand { size, read, write, aligned: is_aligned(i, size) })
}

/// Whether the memory operand must be aligned (SDM volume 2, 2.4 and table 2-18).
fn is_aligned(i: &Instruction, size: usize) -> bool {
    match i.encoding() {
        EncodingKind::Legacy => {
            size == 16
                && !matches!(
                    i.mnemonic(),
                    Mnemonic::Movups
                        | Mnemonic::Movupd
                        | Mnemonic::Movdqu
                        | Mnemonic::Lddqu
                        | Mnemonic::Pcmpestri
                        | Mnemonic::Pcmpestrm
                        | Mnemonic::Pcmpestri64
                        | Mnemonic::Pcmpestrm64
                        | Mnemonic::Pcmpistri
                        | Mnemonic::Pcmpistrm
                )
                && i.memory_size() != MemorySize::Unknown
        }
        _ => matches!(
            i.mnemonic(),
            Mnemonic::Vmovaps
                | Mnemonic::Vmovapd
                | Mnemonic::Vmovdqa
                | Mnemonic::Vmovntps
                | Mnemonic::Vmovntpd
                | Mnemonic::Vmovntdq
                | Mnemonic::Vmovntdqa
        ),
    }
}

/// Linear address of the memory operand after all checks.
fn locate(cpu: &mut Cpu, insn: &Insn, operand: &Operand) -> Result<u64, Exception> {
    let access = if operand.write { Access::Write } else { Access::Read };
    if operand.aligned && !cpu.unchecked_address(insn).is_multiple_of(operand.size as u64) {
        return Err(Exception::gp(0));
    }
    let la = cpu.operand_address(insn, operand.size, access)?;
    if operand.write {
        cpu.probe_linear(la, operand.size, access, Who::Current)?;
    }
    Ok(la)
}

/// Sets up the registers and reads the memory operand. One that is only written is not looked at yet: exceptions of the
/// operation come first.
fn load(cpu: &mut Cpu, insn: &Insn, meta: &Meta) -> Result<(Io, Option<u64>), Exception> {
    let mut io = Io::new(cpu.gpr, cpu.rflags & rflags::ARITH | rflags::FIXED);
    if let Some(index) = meta.substitute {
        io.gpr[index] = cpu.gpr[reg::RSP];
    }
    let Some(operand) = meta.memory.filter(|operand| operand.read) else { return Ok((io, None)) };
    let la = locate(cpu, insn, &operand)?;
    cpu.read_linear(la, &mut io.memory[..operand.size], Who::Current)?;
    Ok((io, Some(la)))
}

/// The address of the memory operand, if it is to be written.
fn settle(cpu: &mut Cpu, insn: &Insn, meta: &Meta, at: Option<u64>) -> Result<Option<u64>, Exception> {
    match meta.memory {
        Some(operand) if operand.write && at.is_none() => locate(cpu, insn, &operand).map(Some),
        _ => Ok(at),
    }
}

/// Takes general registers and flags over.
fn commit(cpu: &mut Cpu, io: &Io, meta: &Meta) {
    let mut gpr = io.gpr;
    gpr[reg::RSP] = cpu.gpr[reg::RSP];
    if let Some(index) = meta.substitute {
        gpr[reg::RSP] = io.gpr[index];
        gpr[index] = cpu.gpr[index];
    }
    cpu.gpr = gpr;
    cpu.rflags = cpu.rflags & !rflags::ARITH | io.flags & rflags::ARITH;
}

/// Writes the memory operand; that it can be written was checked.
fn store(cpu: &mut Cpu, io: &Io, meta: &Meta, at: Option<u64>) -> Result<(), Exception> {
    match (meta.memory, at) {
        (Some(operand), Some(la)) if operand.write => {
            cpu.write_linear(la, &io.memory[..operand.size], Who::Current)
        }
        _ => Ok(()),
    }
}
