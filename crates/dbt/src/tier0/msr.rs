//! RDMSR and WRMSR: exactly the registers that CPUID promises; all others raise #GP(0) (SDM volume 4).

use iced_x86::{Mnemonic, Register};
use ruse_arch::{
    Exception,
    flags::{cr0, efer},
    msr,
    paging::{PHYS_BITS, is_canonical},
    state::seg,
};

use super::{Insn, table::privileged};
use crate::{cpu::Cpu, paravirt};

/// Eight variable-range MTRRs, the fixed ranges and write-combining.
const MTRR_CAP: u64 = 0x508;
/// Microcode revision, in the upper half.
const MICROCODE: u64 = 1 << 32;
/// Number of variable-range MTRRs.
const MTRRS: u32 = 8;

/// IA32_ARCH_CAPABILITIES: the engine's guests cannot reach the host's predictors and buffers by these ways, so that
/// they need none of the costly mitigations. RDCL, enhanced IBRS, L1D flush, SSB, MDS, page size change, TAA, the four
/// of processor MMIO, BHI, PBRSB, GDS, RFDS and ITS.
const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// IA32_MISC_ENABLE: bits that can be set (fast strings, thermal control, performance monitoring, enhanced SpeedStep,
/// MONITOR, CPUID limit, xTPR, XD disable), and those that always are: no branch trace, no PEBS.
const MISC_ENABLE_KNOWN: u64 =
    1 | 1 << 3 | 1 << 7 | 1 << 11 | 1 << 12 | 1 << 16 | 1 << 18 | 1 << 22 | 1 << 23 | 1 << 34;
const MISC_ENABLE_ONES: u64 = 1 << 11 | 1 << 12;

/// SPEC_CTRL: IBRS, STIBP, SSBD, BHI_DIS_S.
const SPEC_CTRL_KNOWN: u64 = 7 | 1 << 10;

const BAD: Exception = Exception::gp(0);

/// Executes RDMSR and WRMSR; `Ok(false)` for other instructions.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Exception> {
    let number = cpu.gpr[1] as u32;
    match insn.i.mnemonic() {
        Mnemonic::Rdmsr => {
            privileged(cpu)?;
            let value = read(cpu, number)?;
            cpu.set_reg(Register::EAX, value);
            cpu.set_reg(Register::EDX, value >> 32);
        }
        Mnemonic::Wrmsr => {
            privileged(cpu)?;
            let value = cpu.reg(Register::EDX) << 32 | cpu.reg(Register::EAX);
            write(cpu, number, value)?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// Whether CPUID offers speculation control, in Intel's way or in AMD's.
fn has_spec_ctrl(cpu: &Cpu) -> bool {
    let (intel, amd) = (cpu.cpuid.get(7, 0)[3], cpu.cpuid.get(0x8000_0008, 0)[1]);
    intel & (1 << 26 | 1 << 27 | 1 << 31) != 0 || amd & (1 << 12 | 1 << 14 | 1 << 15 | 1 << 24) != 0
}

/// Whether CPUID offers IA32_ARCH_CAPABILITIES.
fn has_arch_capabilities(cpu: &Cpu) -> bool {
    cpu.cpuid.get(7, 0)[3] >> 29 & 1 != 0
}

/// Whether CPUID offers IA32_FLUSH_CMD.
fn has_flush_cmd(cpu: &Cpu) -> bool {
    cpu.cpuid.get(7, 0)[3] >> 28 & 1 != 0
}

fn is_apic(number: u32) -> bool {
    matches!(number, msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_BASE..=msr::X2APIC_LAST)
}

/// Index in the fixed-range MTRRs.
fn fixed_mtrr(number: u32) -> Option<usize> {
    Some(match number {
        msr::MTRR_FIX64K_00000 => 0,
        n if n.wrapping_sub(msr::MTRR_FIX16K_80000) < 2 => (n - msr::MTRR_FIX16K_80000) as usize + 1,
        n if n.wrapping_sub(msr::MTRR_FIX4K_C0000) < 8 => (n - msr::MTRR_FIX4K_C0000) as usize + 3,
        _ => return None,
    })
}

/// Index in the variable-range MTRRs, and whether it is the mask.
fn variable_mtrr(number: u32) -> Option<(usize, bool)> {
    let n = number.wrapping_sub(msr::MTRR_PHYS_BASE0);
    (n < 2 * MTRRS).then_some(((n / 2) as usize, n & 1 != 0))
}

/// Reads a model-specific register.
pub(super) fn read(cpu: &mut Cpu, number: u32) -> Result<u64, Exception> {
    if is_apic(number) {
        let value = cpu.bus().apic_msr(cpu.id, number).map_err(|_| BAD)?;
        let armed = number == msr::TSC_DEADLINE && value != 0;
        return Ok(if armed { value.wrapping_add(cpu.tsc_lead()) } else { value });
    }
    if paravirt::msr::is_one(number) {
        return paravirt::msr::read(cpu, number);
    }
    if let Some(i) = fixed_mtrr(number) {
        return Ok(cpu.mtrr_fixed[i]);
    }
    if let Some((i, is_mask)) = variable_mtrr(number) {
        let (base, mask) = cpu.mtrr_variable[i];
        return Ok(if is_mask { mask } else { base });
    }
    Ok(match number {
        msr::TSC => cpu.tsc(),
        msr::TSC_ADJUST => cpu.tsc_adjust,
        msr::TSC_AUX => cpu.tsc_aux,
        // Locked, with nothing enabled: there is no VMX.
        msr::FEATURE_CONTROL => 1,
        msr::BIOS_SIGN_ID => MICROCODE,
        msr::MTRR_CAP => MTRR_CAP,
        msr::MTRR_DEF_TYPE => cpu.mtrr_def_type,
        msr::PAT => cpu.pat,
        msr::MISC_ENABLE => cpu.misc_enable | MISC_ENABLE_ONES,
        msr::MCG_CAP | msr::MCG_STATUS => 0,
        msr::ARCH_CAPABILITIES if has_arch_capabilities(cpu) => ARCH_CAPABILITIES,
        msr::SPEC_CTRL if has_spec_ctrl(cpu) => cpu.spec_ctrl,
        msr::SYSENTER_CS => cpu.sysenter[0],
        msr::SYSENTER_ESP => cpu.sysenter[1],
        msr::SYSENTER_EIP => cpu.sysenter[2],
        msr::EFER => cpu.paging.efer,
        msr::STAR => cpu.star,
        msr::LSTAR => cpu.lstar,
        msr::CSTAR => cpu.cstar,
        msr::SFMASK => cpu.sfmask,
        msr::FS_BASE => cpu.seg[seg::FS].base,
        msr::GS_BASE => cpu.seg[seg::GS].base,
        msr::KERNEL_GS_BASE => cpu.kernel_gs_base,
        _ => return Err(BAD),
    })
}

/// A memory type of an MTRR; PAT has one more.
fn is_memory_type(value: u64) -> bool {
    matches!(value, 0 | 1 | 4 | 5 | 6)
}

/// Writes a model-specific register.
pub(super) fn write(cpu: &mut Cpu, number: u32, value: u64) -> Result<(), Exception> {
    if is_apic(number) {
        let value = if number == msr::TSC_DEADLINE { deadline_of_clock(cpu, value) } else { value };
        return cpu.bus().set_apic_msr(cpu.id, number, value).map_err(|_| BAD);
    }
    if paravirt::msr::is_one(number) {
        return paravirt::msr::write(cpu, number, value);
    }
    if fixed_mtrr(number).is_some() || variable_mtrr(number).is_some() || number == msr::MTRR_DEF_TYPE {
        return write_mtrr(cpu, number, value);
    }
    match number {
        msr::TSC => {
            let adjust = cpu.tsc_adjust.wrapping_add(value.wrapping_sub(cpu.tsc()));
            return set_tsc_adjust(cpu, adjust);
        }
        msr::TSC_ADJUST => return set_tsc_adjust(cpu, value),
        msr::TSC_AUX if value >> 32 == 0 => cpu.tsc_aux = value,
        // A microcode update would be loaded here; the revision stays what it is.
        msr::BIOS_SIGN_ID => {}
        msr::MCG_STATUS if value == 0 => {}
        msr::PAT if value.to_le_bytes().iter().all(|&t| is_memory_type(t.into()) || t == 7) => {
            cpu.pat = value
        }
        msr::MISC_ENABLE if value & !MISC_ENABLE_KNOWN == 0 => cpu.misc_enable = value,
        msr::SPEC_CTRL if has_spec_ctrl(cpu) && value & !SPEC_CTRL_KNOWN == 0 => cpu.spec_ctrl = value,
        msr::PRED_CMD if has_spec_ctrl(cpu) && value & !1 == 0 => {}
        msr::FLUSH_CMD if has_flush_cmd(cpu) && value & !1 == 0 => {}
        msr::SYSENTER_CS => cpu.sysenter[0] = value & 0xffff_ffff,
        msr::SYSENTER_ESP if is_canonical(value) => cpu.sysenter[1] = value,
        msr::SYSENTER_EIP if is_canonical(value) => cpu.sysenter[2] = value,
        msr::EFER => return set_efer(cpu, value),
        msr::STAR => cpu.star = value,
        msr::LSTAR if is_canonical(value) => cpu.lstar = value,
        msr::CSTAR if is_canonical(value) => cpu.cstar = value,
        msr::SFMASK if value >> 32 == 0 => cpu.sfmask = value,
        msr::FS_BASE if is_canonical(value) => cpu.seg[seg::FS].base = value,
        msr::GS_BASE if is_canonical(value) => cpu.seg[seg::GS].base = value,
        msr::KERNEL_GS_BASE if is_canonical(value) => cpu.kernel_gs_base = value,
        _ => return Err(BAD),
    }
    Ok(())
}

/// A deadline of the vCPU's TSC as the machine's clock tells it, by which the local APIC's timer goes. One before the clock's start is in the past, too; zero
/// would disarm the timer.
fn deadline_of_clock(cpu: &Cpu, deadline: u64) -> u64 {
    if deadline == 0 {
        return 0;
    }
    let at = i128::from(deadline) - i128::from(cpu.tsc_lead() as i64);
    at.clamp(1, u64::MAX.into()) as u64
}

/// A change of IA32_TSC_ADJUST moves the TSC (SDM volume 3, 17.17.3), which now reaches an armed deadline at another
/// time.
fn set_tsc_adjust(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    let deadline = read(cpu, msr::TSC_DEADLINE).unwrap_or(0);
    cpu.tsc_adjust = value;
    paravirt::clock::write(cpu);
    if deadline == 0 { Ok(()) } else { write(cpu, msr::TSC_DEADLINE, deadline) }
}

/// The MTRRs keep what is written, and change nothing: RAM is write-back (SDM volume 3, 11.11).
fn write_mtrr(cpu: &mut Cpu, number: u32, value: u64) -> Result<(), Exception> {
    let high = !((1 << PHYS_BITS) - 1);
    if number == msr::MTRR_DEF_TYPE {
        if value & !0xcff != 0 || !is_memory_type(value & 0xff) {
            return Err(BAD);
        }
        cpu.mtrr_def_type = value;
    } else if let Some(i) = fixed_mtrr(number) {
        if !value.to_le_bytes().iter().all(|&t| is_memory_type(t.into())) {
            return Err(BAD);
        }
        cpu.mtrr_fixed[i] = value;
    } else if let Some((i, is_mask)) = variable_mtrr(number) {
        let reserved = if is_mask { 0x7ff } else { 0xf00 };
        if value & (high | reserved) != 0 || (!is_mask && !is_memory_type(value & 0xff)) {
            return Err(BAD);
        }
        let pair = &mut cpu.mtrr_variable[i];
        *(if is_mask { &mut pair.1 } else { &mut pair.0 }) = value;
    }
    Ok(())
}

/// IA32_EFER: what CPUID offers may be set; LMA follows from LME and paging (SDM volume 3, 2.2.1).
fn set_efer(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    let edx = cpu.cpuid.get(0x8000_0001, 0)[3];
    let offered = [(11, efer::SCE), (29, efer::LME), (20, efer::NXE)]
        .into_iter()
        .filter(|(bit, _)| edx >> bit & 1 != 0)
        .fold(efer::LMA, |all, (_, flag)| all | flag);
    let old = cpu.paging.efer;
    let paging = cpu.paging.cr0 & cr0::PG != 0;
    if value & !offered != 0 || (paging && (value ^ old) & efer::LME != 0) {
        return Err(BAD);
    }
    cpu.paging.efer = value & !efer::LMA | old & efer::LMA;
    if (value ^ old) & efer::NXE != 0 {
        cpu.mmu.set_space(&cpu.paging);
        cpu.mmu.flush_all();
    }
    cpu.update_mode();
    Ok(())
}
