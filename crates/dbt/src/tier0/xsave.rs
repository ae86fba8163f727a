//! Saving and restoring the vector state: FXSAVE and FXRSTOR, the XSAVE family, LDMXCSR and STMXCSR
//! (SDM volume 1, chapter 13).

use iced_x86::Mnemonic;
use ruse_arch::{
    Exception,
    flags::{cr0, cr4},
    paging::Access,
    state::reg,
};

use super::{
    Insn,
    fpu_regs::{FCW_INIT, mxcsr},
    vector::{check_avx, check_sse, check_ts, vector_registers},
};
use crate::cpu::{Cpu, Who};

/// State components.
const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
/// XCOMP_BV: the compacted format.
const COMPACTED: u64 = 1 << 63;
/// Legacy region, and the header behind it.
const LEGACY: usize = 512;
const HEADER: usize = 64;
/// Where the AVX component lies in both formats.
const AVX_AT: usize = LEGACY + HEADER;

/// Whether an instruction belongs here.
pub(super) fn is_state(m: Mnemonic) -> bool {
    is_fxsave(m)
        || is_xsave(m)
        || matches!(m, Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr | Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr)
}

fn is_fxsave(m: Mnemonic) -> bool {
    matches!(m, Mnemonic::Fxsave | Mnemonic::Fxsave64 | Mnemonic::Fxrstor | Mnemonic::Fxrstor64)
}

fn is_xsave(m: Mnemonic) -> bool {
    is_xrstor(m)
        || matches!(
            m,
            Mnemonic::Xsave
                | Mnemonic::Xsave64
                | Mnemonic::Xsaveopt
                | Mnemonic::Xsaveopt64
                | Mnemonic::Xsavec
                | Mnemonic::Xsavec64
        )
}

fn is_xrstor(m: Mnemonic) -> bool {
    matches!(m, Mnemonic::Xrstor | Mnemonic::Xrstor64)
}

/// Whether the image has 64-bit instruction and data pointers.
fn is_wide(m: Mnemonic) -> bool {
    matches!(
        m,
        Mnemonic::Fxsave64
            | Mnemonic::Fxrstor64
            | Mnemonic::Xsave64
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xsavec64
            | Mnemonic::Xrstor64
    )
}

/// Executes an instruction of this group.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let m = insn.i.mnemonic();
    match m {
        Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr => check_sse(cpu, true)?,
        Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr => check_avx(cpu)?,
        _ if is_fxsave(m) => {
            if cpu.paging.cr0 & (cr0::EM | cr0::TS) != 0 {
                return Err(Exception::NM);
            }
        }
        _ => {
            if cpu.paging.cr4 & cr4::OSXSAVE == 0 {
                return Err(Exception::UD);
            }
            check_ts(cpu)?;
        }
    }
    match m {
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => load_mxcsr(cpu, insn),
        Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr => {
            let la = cpu.operand_address(insn, 4, Access::Write)?;
            let value = cpu.fpu.mxcsr();
            cpu.write_value(la, u64::from(value), 4, Who::Current)
        }
        Mnemonic::Fxsave | Mnemonic::Fxsave64 => fxsave(cpu, insn),
        Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => fxrstor(cpu, insn),
        _ if is_xrstor(m) => xrstor(cpu, insn),
        _ => xsave(cpu, insn),
    }
}

fn load_mxcsr(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let la = cpu.operand_address(insn, 4, Access::Read)?;
    let value = cpu.read_value(la, 4, Who::Current)? as u32;
    cpu.fpu.set_mxcsr(checked_mxcsr(value)?);
    Ok(())
}

fn checked_mxcsr(value: u32) -> Result<u32, Exception> {
    if value & !mxcsr::DEFINED != 0 { Err(Exception::gp(0)) } else { Ok(value) }
}

/// Address of the area, which must be aligned.
fn area(cpu: &Cpu, insn: &Insn, size: usize, align: u64, access: Access) -> Result<u64, Exception> {
    if !cpu.unchecked_address(insn).is_multiple_of(align) {
        return Err(Exception::gp(0));
    }
    cpu.operand_address(insn, size, access)
}

/// The x87 part of the legacy region in the instruction's format: words and pointers, registers. Selectors of the
/// narrow format read as zero: CPUID says that they are not kept.
fn legacy_image(cpu: &Cpu, insn: &Insn) -> [u8; LEGACY] {
    let mut image = cpu.fpu.fxsave;
    image[5] = 0;
    image[28..32].copy_from_slice(&mxcsr::DEFINED.to_le_bytes());
    if !is_wide(insn.i.mnemonic()) {
        image[12..16].fill(0);
        image[20..24].fill(0);
    }
    for i in 0..8 {
        image[42 + 16 * i..48 + 16 * i].fill(0);
    }
    image
}

/// End of the XMM registers of the current mode in the legacy region.
fn xmm_end(cpu: &Cpu) -> usize {
    160 + 16 * vector_registers(cpu)
}

fn fxsave(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let la = area(cpu, insn, LEGACY, 16, Access::Write)?;
    cpu.probe_linear(la, LEGACY, Access::Write, Who::Current)?;
    let image = legacy_image(cpu, insn);
    let end = xmm_end(cpu);
    cpu.write_linear(la, &image[..end], Who::Current)
}

fn fxrstor(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let la = area(cpu, insn, LEGACY, 16, Access::Read)?;
    let mut image = [0; LEGACY];
    cpu.read_linear(la, &mut image, Who::Current)?;
    let value = checked_mxcsr(u32_at(&image, 24))?;
    load_x87(cpu, insn, &image);
    cpu.fpu.set_mxcsr(value);
    let end = xmm_end(cpu);
    cpu.fpu.fxsave[160..end].copy_from_slice(&image[160..end]);
    Ok(())
}

fn load_x87(cpu: &mut Cpu, insn: &Insn, image: &[u8]) {
    let fpu = &mut cpu.fpu;
    fpu.set_fcw(u16::from_le_bytes([image[0], image[1]]));
    fpu.set_fsw(u16::from_le_bytes([image[2], image[3]]));
    fpu.fxsave[4] = image[4];
    fpu.fxsave[6..24].copy_from_slice(&image[6..24]);
    if !is_wide(insn.i.mnemonic()) {
        fpu.fxsave[12..16].fill(0);
        fpu.fxsave[20..24].fill(0);
    }
    let fop = fpu.fop();
    fpu.set_fop(fop);
    for i in 0..8 {
        let at = 32 + 16 * i;
        fpu.fxsave[at..at + 10].copy_from_slice(&image[at..at + 10]);
    }
    fpu.update_summary();
}

/// Components that are not in their initial state (SDM volume 1, 13.6).
fn in_use(cpu: &Cpu) -> u64 {
    let fpu = &cpu.fpu;
    let zero = |bytes: &[u8]| bytes.iter().all(|&b| b == 0);
    let stack = (0..8).all(|i| zero(&fpu.fxsave[32 + 16 * i..][..10]));
    let x87 = fpu.fcw() == FCW_INIT && zero(&fpu.fxsave[2..5]) && zero(&fpu.last_x87()) && stack;
    let sse = zero(&fpu.fxsave[160..416]);
    let avx = fpu.ymm_high.iter().all(|high| *high == [0; 2]);
    (if x87 { 0 } else { X87 }) | (if sse { 0 } else { SSE }) | (if avx { 0 } else { AVX })
}

/// The components that the instruction asks for.
fn requested(cpu: &Cpu) -> u64 {
    let asked = cpu.gpr[reg::RDX] << 32 | cpu.gpr[reg::RAX] & 0xffff_ffff;
    asked & cpu.xcr0
}

/// Bytes of the area that the instruction may access.
fn extent(components: u64) -> usize {
    if components & AVX != 0 { AVX_AT + 256 } else { AVX_AT }
}

/// XSAVE, XSAVEOPT, XSAVEC (SDM volume 1, 13.7, 13.9 and 13.10).
fn xsave(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let m = insn.i.mnemonic();
    let compact = matches!(m, Mnemonic::Xsavec | Mnemonic::Xsavec64);
    let optimised = compact || matches!(m, Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64);
    let asked = requested(cpu);
    let la = area(cpu, insn, extent(asked), 64, Access::Write)?;
    cpu.probe_linear(la, extent(asked), Access::Write, Who::Current)?;
    let mut used = in_use(cpu);
    if compact && cpu.fpu.mxcsr() != mxcsr::DEFAULT {
        used |= SSE;
    }
    let written = if optimised { asked & used } else { asked };
    let image = legacy_image(cpu, insn);
    let put = |cpu: &mut Cpu, at: usize, bytes: &[u8]| {
        cpu.write_linear(la.wrapping_add(at as u64), bytes, Who::Current)
    };
    if written & X87 != 0 {
        put(cpu, 0, &image[..24])?;
        put(cpu, 32, &image[32..160])?;
    }
    if (if compact { written & SSE } else { asked & (SSE | AVX) }) != 0 {
        put(cpu, 24, &image[24..32])?;
    }
    if written & SSE != 0 {
        put(cpu, 160, &image[160..xmm_end(cpu)])?;
    }
    if written & AVX != 0 {
        put(cpu, AVX_AT, &high_bytes(cpu)[..16 * vector_registers(cpu)])?;
    }
    if compact {
        put(cpu, LEGACY, &(asked & used).to_le_bytes())?;
        return put(cpu, LEGACY + 8, &(asked | COMPACTED).to_le_bytes());
    }
    let old = cpu.read_value(la.wrapping_add(LEGACY as u64), 8, Who::Current)?;
    put(cpu, LEGACY, &(old & !asked | asked & used).to_le_bytes())
}

/// The AVX component.
fn high_bytes(cpu: &Cpu) -> [u8; 256] {
    let mut bytes = [0; 256];
    for (i, high) in cpu.fpu.ymm_high.iter().enumerate() {
        bytes[16 * i..][..8].copy_from_slice(&high[0].to_le_bytes());
        bytes[16 * i + 8..][..8].copy_from_slice(&high[1].to_le_bytes());
    }
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// XRSTOR (SDM volume 1, 13.8).
fn xrstor(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let asked = requested(cpu);
    let mut image = [0; AVX_AT + 256];
    let la = area(cpu, insn, AVX_AT, 64, Access::Read)?;
    cpu.read_linear(la, &mut image[..AVX_AT], Who::Current)?;
    let (present, layout) = (u64_at(&image, LEGACY), u64_at(&image, LEGACY + 8));
    let compact = layout & COMPACTED != 0;
    check_header(cpu, present, layout, &image[LEGACY + 16..AVX_AT])?;
    let loaded = asked & present;
    if loaded & AVX != 0 {
        let whole = cpu.operand_address(insn, AVX_AT + 256, Access::Read)?;
        cpu.read_linear(whole + AVX_AT as u64, &mut image[AVX_AT..], Who::Current)?;
    }
    let takes_mxcsr = if compact { loaded & SSE != 0 } else { asked & (SSE | AVX) != 0 };
    let value = u32_at(&image, 24);
    if takes_mxcsr {
        cpu.fpu.set_mxcsr(checked_mxcsr(value)?);
    } else if compact && asked & SSE != 0 {
        cpu.fpu.set_mxcsr(mxcsr::DEFAULT);
    }
    if loaded & X87 != 0 {
        load_x87(cpu, insn, &image);
    } else if asked & X87 != 0 {
        cpu.fpu.init_x87();
        cpu.fpu.fxsave[32..160].fill(0);
    }
    if asked & SSE != 0 {
        let end = xmm_end(cpu);
        if loaded & SSE == 0 {
            image[160..end].fill(0);
        }
        cpu.fpu.fxsave[160..end].copy_from_slice(&image[160..end]);
    }
    if asked & AVX != 0 {
        // Zeroes where the component is not there.
        for i in 0..vector_registers(cpu) {
            let at = AVX_AT + 16 * i;
            cpu.fpu.ymm_high[i] = [u64_at(&image, at), u64_at(&image, at + 8)];
        }
    }
    Ok(())
}

/// The rules of the header; `rest` is what follows XCOMP_BV.
fn check_header(cpu: &Cpu, present: u64, layout: u64, rest: &[u8]) -> Result<(), Exception> {
    let has_compact = cpu.cpuid.get(0xd, 1)[0] >> 1 & 1 != 0;
    let valid = if layout & COMPACTED != 0 {
        let components = layout & !COMPACTED;
        has_compact
            && components & !cpu.xcr0 == 0
            && present & !components == 0
            && rest.iter().all(|&b| b == 0)
    } else {
        // Bytes 8 to 23 of the header only.
        layout == 0 && present & !cpu.xcr0 == 0 && rest[..8].iter().all(|&b| b == 0)
    };
    if valid { Ok(()) } else { Err(Exception::gp(0)) }
}
