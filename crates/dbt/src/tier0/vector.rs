//! x87, MMX, SSE and AVX instructions: whether they are available, and who executes them.

use iced_x86::{EncodingKind, Mnemonic, OpKind};
use ruse_arch::{
    Exception,
    flags::{cr0, cr4},
};

use super::{Insn, lane, lane_stub, masked, x87, xsave};
use crate::cpu::Cpu;

/// XCR0: SSE and AVX.
const XCR0_AVX: u64 = 6;

/// Kinds of instructions by the rules of their availability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    X87,
    /// Saves or restores state.
    State,
    /// Touches MMX registers, perhaps XMM registers too.
    Mmx {
        xmm: bool,
    },
    Sse,
    Avx,
}

/// Executes an instruction of this group; `false` if it is none.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Exception> {
    let Some(class) = classify(insn) else { return Ok(false) };
    spill_x87(cpu);
    match class {
        Class::X87 => x87::execute(cpu, insn)?,
        Class::State => xsave::execute(cpu, insn)?,
        Class::Mmx { xmm } => {
            check_sse(cpu, xmm)?;
            if !x87::check_pending(cpu, insn)? {
                return Ok(true);
            }
            // Without NE a pending exception stays pending while the instruction runs.
            let pending = cpu.fpu.take_pending();
            let result = simd(cpu, insn, true);
            cpu.fpu.set_fsw(cpu.fpu.fsw() | pending);
            result?;
        }
        Class::Sse => {
            check_sse(cpu, true)?;
            simd(cpu, insn, false)?;
        }
        Class::Avx => {
            check_avx(cpu)?;
            simd(cpu, insn, false)?;
        }
    }
    Ok(true)
}

/// Takes the x87 registers out of the host's unit, if they are there, into `cpu.fpu`.
pub fn spill_x87(cpu: &mut Cpu) {
    if cpu.x87_resident != 0 {
        cpu.x87_resident = 0;
        lane_stub::take_host_x87(&mut cpu.fpu);
    }
}

fn classify(insn: &Insn) -> Option<Class> {
    let i = &insn.i;
    match i.mnemonic() {
        m if xsave::is_state(m) => return Some(Class::State),
        Mnemonic::Emms => return Some(Class::Mmx { xmm: false }),
        Mnemonic::Vzeroall | Mnemonic::Vzeroupper => return Some(Class::Avx),
        _ => {}
    }
    if x87::opcode(insn).is_some() {
        return Some(Class::X87);
    }
    let registers =
        || (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register).map(|n| i.op_register(n));
    let vector = registers().any(|r| r.is_xmm() || r.is_ymm());
    match i.encoding() {
        EncodingKind::Legacy if registers().any(|r| r.is_mm()) => Some(Class::Mmx { xmm: vector }),
        EncodingKind::Legacy if vector || is_to_general(i.mnemonic()) => Some(Class::Sse),
        EncodingKind::VEX if vector || is_to_general(i.mnemonic()) => Some(Class::Avx),
        _ => None,
    }
}

/// Instructions that may have no vector register: from memory to a general register.
fn is_to_general(m: Mnemonic) -> bool {
    matches!(
        m,
        Mnemonic::Cvtsd2si
            | Mnemonic::Cvtss2si
            | Mnemonic::Cvttsd2si
            | Mnemonic::Cvttss2si
            | Mnemonic::Vcvtsd2si
            | Mnemonic::Vcvtss2si
            | Mnemonic::Vcvttsd2si
            | Mnemonic::Vcvttss2si
    )
}

/// SDM volume 2, table 2-18 and those after it; volume 3, 12.1 and 13.1.
pub(super) fn check_sse(cpu: &Cpu, xmm: bool) -> Result<(), Exception> {
    let paging = &cpu.paging;
    if paging.cr0 & cr0::EM != 0 || xmm && paging.cr4 & cr4::OSFXSR == 0 {
        return Err(Exception::UD);
    }
    check_ts(cpu)
}

/// SDM volume 2, table 2-18 and those after it.
pub(super) fn check_avx(cpu: &Cpu) -> Result<(), Exception> {
    let enabled = cpu.paging.cr4 & cr4::OSXSAVE != 0 && cpu.xcr0 & XCR0_AVX == XCR0_AVX;
    if cpu.mode.real || cpu.mode.vm86 || !enabled {
        return Err(Exception::UD);
    }
    check_ts(cpu)
}

/// The task-switched flag.
pub(super) fn check_ts(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.paging.cr0 & cr0::TS != 0 { Err(Exception::NM) } else { Ok(()) }
}

fn simd(cpu: &mut Cpu, insn: &Insn, touches_x87: bool) -> Result<(), Exception> {
    match insn.i.mnemonic() {
        Mnemonic::Vzeroall => zero(cpu, 0),
        Mnemonic::Vzeroupper => zero(cpu, 16),
        _ if masked::execute(cpu, insn, touches_x87)? => {}
        _ => lane::run_simd(cpu, insn, touches_x87)?,
    }
    Ok(())
}

/// Zeroes the vector registers that the mode has, from a byte on.
fn zero(cpu: &mut Cpu, from: usize) {
    for i in 0..vector_registers(cpu) {
        let mut value = cpu.fpu.ymm(i);
        value[from..].fill(0);
        cpu.fpu.set_ymm(i, &value);
    }
}

/// How many vector registers the current mode has.
pub(super) fn vector_registers(cpu: &Cpu) -> usize {
    if cpu.mode.code64 { 16 } else { 8 }
}
