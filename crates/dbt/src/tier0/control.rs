//! Control registers, the invalidation of translations, and the state that only the system changes
//! (SDM volume 3, 2.5, 2.8 and 4.10.4).

use iced_x86::{Code, Mnemonic, Register};
use ruse_arch::{
    Exception, MpState, Segment,
    flags::{cr0, cr4, efer, rflags},
    paging::{Access, PHYS_BITS, is_canonical, pte},
    state::seg,
};

use super::{
    Insn,
    segment::{store_word, word_operand},
    table::{privileged, umip},
};
use crate::{
    cpu::{Cpu, Who, request},
    mmu::access::Place,
};

/// Bit 63 of CR3's source: translations stay (SDM volume 3, 4.10.4.1).
const CR3_NO_FLUSH: u64 = 1 << 63;

/// Executes what belongs here.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Exception> {
    match insn.i.code() {
        Code::Mov_r32_cr | Code::Mov_r64_cr => read(cpu, insn)?,
        Code::Mov_cr_r32 | Code::Mov_cr_r64 => write(cpu, insn)?,
        _ => match insn.i.mnemonic() {
            Mnemonic::Clts => {
                privileged(cpu)?;
                cpu.paging.cr0 &= !cr0::TS;
                cpu.update_mode();
            }
            Mnemonic::Smsw => {
                umip(cpu)?;
                store_word(cpu, insn, 0, cpu.paging.cr0)?;
            }
            Mnemonic::Lmsw => lmsw(cpu, insn)?,
            Mnemonic::Invlpg => invlpg(cpu, insn)?,
            Mnemonic::Invpcid => invpcid(cpu, insn)?,
            Mnemonic::Wbinvd | Mnemonic::Invd | Mnemonic::Wbnoinvd => privileged(cpu)?,
            Mnemonic::Cli => {
                allowed_to_mask(cpu)?;
                cpu.rflags &= !rflags::IF;
            }
            Mnemonic::Sti => sti(cpu)?,
            Mnemonic::Hlt => {
                privileged(cpu)?;
                cpu.mp_state = MpState::Halted;
            }
            Mnemonic::Stac => access_flag(cpu, true)?,
            Mnemonic::Clac => access_flag(cpu, false)?,
            Mnemonic::Swapgs => {
                privileged(cpu)?;
                std::mem::swap(&mut cpu.seg[seg::GS].base, &mut cpu.kernel_gs_base);
            }
            Mnemonic::Rdfsbase => read_base(cpu, insn, seg::FS)?,
            Mnemonic::Rdgsbase => read_base(cpu, insn, seg::GS)?,
            Mnemonic::Wrfsbase => write_base(cpu, insn, seg::FS)?,
            Mnemonic::Wrgsbase => write_base(cpu, insn, seg::GS)?,
            Mnemonic::Xgetbv => xgetbv(cpu)?,
            Mnemonic::Xsetbv => xsetbv(cpu)?,
            _ => return Ok(false),
        },
    }
    Ok(true)
}

/// After an instruction that may have set IF: the dispatcher has to look for interrupts that waited.
pub(super) fn interrupts_enabled(cpu: &mut Cpu, before: u64) {
    if cpu.rflags & !before & rflags::IF != 0 {
        cpu.shared().raise(request::SELF);
    }
}

/// CLI and STI above IOPL fault; virtual interrupts (CR4.VME and PVI) are not offered.
fn allowed_to_mask(cpu: &Cpu) -> Result<(), Exception> {
    let ok = cpu.mode.real || u64::from(cpu.mode.cpl) <= cpu.rflags >> 12 & 3;
    if ok { Ok(()) } else { Err(Exception::gp(0)) }
}

fn sti(cpu: &mut Cpu) -> Result<(), Exception> {
    allowed_to_mask(cpu)?;
    if cpu.rflags & rflags::IF == 0 {
        let before = cpu.rflags;
        cpu.rflags |= rflags::IF;
        cpu.interrupt_shadow = true;
        interrupts_enabled(cpu, before);
    }
    Ok(())
}

/// STAC and CLAC choose another view of the TLB; nothing is flushed.
fn access_flag(cpu: &mut Cpu, on: bool) -> Result<(), Exception> {
    if cpu.mode.cpl != 0 {
        return Err(Exception::UD);
    }
    cpu.rflags = cpu.rflags & !rflags::AC | if on { rflags::AC } else { 0 };
    cpu.select_view();
    Ok(())
}

fn bases_enabled(cpu: &Cpu) -> Result<(), Exception> {
    let ok = cpu.mode.code64 && cpu.paging.cr4 & cr4::FSGSBASE != 0;
    if ok { Ok(()) } else { Err(Exception::UD) }
}

fn read_base(cpu: &mut Cpu, insn: &Insn, s: usize) -> Result<(), Exception> {
    bases_enabled(cpu)?;
    cpu.set_reg(insn.i.op0_register(), cpu.seg[s].base);
    Ok(())
}

fn write_base(cpu: &mut Cpu, insn: &Insn, s: usize) -> Result<(), Exception> {
    bases_enabled(cpu)?;
    let base = cpu.reg(insn.i.op0_register());
    if !is_canonical(base) {
        return Err(Exception::gp(0));
    }
    cpu.seg[s].base = base;
    Ok(())
}

fn xgetbv(cpu: &mut Cpu) -> Result<(), Exception> {
    if cpu.paging.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    // Index 1 is the components in use: all enabled ones may be reported (SDM volume 1, 13.2).
    let in_use = cpu.cpuid.get(0xd, 1)[0] & 4 != 0;
    match cpu.gpr[1] as u32 {
        0 => {}
        1 if in_use => {}
        _ => return Err(Exception::gp(0)),
    }
    cpu.set_reg(Register::EAX, cpu.xcr0);
    cpu.set_reg(Register::EDX, cpu.xcr0 >> 32);
    Ok(())
}

fn xsetbv(cpu: &mut Cpu) -> Result<(), Exception> {
    if cpu.paging.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    privileged(cpu)?;
    let value = cpu.reg(Register::EDX) << 32 | cpu.reg(Register::EAX);
    let leaf = cpu.cpuid.get(0xd, 0);
    let known = u64::from(leaf[3]) << 32 | u64::from(leaf[0]);
    let avx_alone = value & 4 != 0 && value & 2 == 0;
    if cpu.gpr[1] as u32 != 0 || value & 1 == 0 || value & !known != 0 || avx_alone {
        return Err(Exception::gp(0));
    }
    cpu.xcr0 = value;
    cpu.update_mode();
    Ok(())
}

fn read(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let from = insn.i.op1_register();
    let value = match from {
        Register::CR0 => cpu.paging.cr0,
        Register::CR2 => cpu.cr2,
        Register::CR3 => cpu.paging.cr3,
        Register::CR4 => cpu.paging.cr4,
        Register::CR8 => 0,
        _ => return Err(Exception::UD),
    };
    privileged(cpu)?;
    let value = if from == Register::CR8 { u64::from(cpu.bus().cr8(cpu.id)) } else { value };
    cpu.set_reg(insn.i.op0_register(), value);
    Ok(())
}

fn write(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let value = cpu.reg(insn.i.op1_register());
    let to = insn.i.op0_register();
    if !matches!(to, Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 | Register::CR8) {
        return Err(Exception::UD);
    }
    privileged(cpu)?;
    match to {
        Register::CR0 => set_cr0(cpu, value),
        Register::CR2 => {
            cpu.cr2 = value;
            Ok(())
        }
        Register::CR3 => set_cr3(cpu, value),
        Register::CR4 => set_cr4(cpu, value),
        _ if value > 15 => Err(Exception::gp(0)),
        _ => {
            cpu.bus().set_cr8(cpu.id, value as u8);
            // A lower priority may let an interrupt through.
            cpu.shared().raise(request::SELF);
            Ok(())
        }
    }
}

fn lmsw(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    privileged(cpu)?;
    let value = u64::from(word_operand(cpu, insn, 0)?);
    let low = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    // LMSW cannot leave protected mode.
    let sticky = cpu.paging.cr0 & cr0::PE;
    set_cr0(cpu, cpu.paging.cr0 & !low | value & low | sticky)
}

/// MOV to CR0 (SDM volume 2, MOV; volume 3, 4.1.2 and 9.8.5).
pub(super) fn set_cr0(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    if value >> 32 != 0 {
        return Err(Exception::gp(0));
    }
    let old = cpu.paging.cr0;
    let new = value & cr0::DEFINED | cr0::ET;
    let (on, off) = (new & !old, old & !new);
    if (new & cr0::PG != 0 && new & cr0::PE == 0) || (new & cr0::NW != 0 && new & cr0::CD == 0) {
        return Err(Exception::gp(0));
    }
    let mut mode = cpu.paging;
    mode.cr0 = new;
    if on & cr0::PG != 0 && mode.efer & efer::LME != 0 {
        let tss16 = cpu.tr.is_present() && cpu.tr.kind() & 8 == 0;
        if mode.cr4 & cr4::PAE == 0 || cpu.seg[seg::CS].attr & Segment::L != 0 || tss16 {
            return Err(Exception::gp(0));
        }
        mode.efer |= efer::LMA;
    }
    if off & cr0::PG != 0 {
        if cpu.mode.code64 || mode.cr4 & cr4::PCIDE != 0 {
            return Err(Exception::gp(0));
        }
        mode.efer &= !efer::LMA;
    }
    let pae = new & cr0::PG != 0 && mode.cr4 & cr4::PAE != 0 && mode.efer & efer::LMA == 0;
    if pae && (new ^ old) & (cr0::PG | cr0::CD | cr0::NW) != 0 {
        mode.pdpte = pdptes(cpu, mode.cr3)?;
    }
    cpu.paging = mode;
    if (new ^ old) & (cr0::PG | cr0::PE | cr0::WP) != 0 {
        cpu.mmu.set_space(&cpu.paging);
        cpu.mmu.flush_all();
    }
    cpu.update_mode();
    Ok(())
}

/// MOV to CR3.
pub(super) fn set_cr3(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    let mode = &cpu.paging;
    let pcide = mode.cr4 & cr4::PCIDE != 0;
    let keep = pcide && value & CR3_NO_FLUSH != 0;
    let new = if pcide { value & !CR3_NO_FLUSH } else { value };
    if new >> PHYS_BITS != 0 {
        return Err(Exception::gp(0));
    }
    let pae = mode.cr0 & cr0::PG != 0 && mode.cr4 & cr4::PAE != 0 && mode.efer & efer::LMA == 0;
    if pae {
        cpu.paging.pdpte = pdptes(cpu, new)?;
    }
    cpu.paging.cr3 = new;
    cpu.mmu.set_space(&cpu.paging);
    if !keep {
        cpu.mmu.flush_current(true);
    }
    cpu.update_mode();
    Ok(())
}

/// All bits of CR4 that mean something here.
pub const CR4_KNOWN: u64 = cr4::DE
    | cr4::PSE
    | cr4::TSD
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::UMIP
    | cr4::FSGSBASE
    | cr4::PCIDE
    | cr4::OSXSAVE
    | cr4::SMEP
    | cr4::SMAP;

/// Bits of CR4 that CPUID promises.
fn cr4_allowed(cpu: &Cpu) -> u64 {
    let [_, _, ecx1, edx1] = cpu.cpuid.get(1, 0);
    let [_, ebx7, ecx7, _] = cpu.cpuid.get(7, 0);
    let rules = [
        (edx1, 2, cr4::DE),
        (edx1, 3, cr4::PSE),
        (edx1, 4, cr4::TSD),
        (edx1, 6, cr4::PAE),
        (edx1, 7, cr4::MCE),
        (edx1, 13, cr4::PGE),
        (edx1, 24, cr4::OSFXSR),
        (edx1, 25, cr4::OSXMMEXCPT),
        (ecx1, 17, cr4::PCIDE),
        (ecx1, 26, cr4::OSXSAVE),
        (ebx7, 0, cr4::FSGSBASE),
        (ebx7, 7, cr4::SMEP),
        (ebx7, 20, cr4::SMAP),
        (ecx7, 2, cr4::UMIP),
    ];
    rules
        .into_iter()
        .filter(|(word, bit, _)| word >> bit & 1 != 0)
        .fold(cr4::PCE, |all, (_, _, flag)| all | flag)
}

/// MOV to CR4.
pub(super) fn set_cr4(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    let old = cpu.paging.cr4;
    let long = cpu.paging.efer & efer::LMA != 0;
    let (on, off) = (value & !old, old & !value);
    let bad_pcid = on & cr4::PCIDE != 0 && (!long || cpu.paging.cr3 & 0xfff != 0);
    if value & !cr4_allowed(cpu) != 0 || (long && value & cr4::PAE == 0) || bad_pcid {
        return Err(Exception::gp(0));
    }
    let changed = on | off;
    let mut mode = cpu.paging;
    mode.cr4 = value;
    let pae = mode.cr0 & cr0::PG != 0 && value & cr4::PAE != 0 && !long;
    if pae && changed & (cr4::PGE | cr4::PSE | cr4::PAE | cr4::SMEP) != 0 {
        mode.pdpte = pdptes(cpu, mode.cr3)?;
    }
    cpu.paging = mode;
    cpu.mmu.set_space(&cpu.paging);
    if changed & (cr4::PGE | cr4::PSE | cr4::PAE | cr4::PCIDE | cr4::SMEP | cr4::SMAP) != 0 {
        cpu.mmu.flush_all();
    }
    cpu.update_mode();
    Ok(())
}

/// Reads the four pointers of PAE paging (SDM volume 3, 4.4.1).
fn pdptes(cpu: &mut Cpu, cr3: u64) -> Result<[u64; 4], Exception> {
    let at = cr3 & 0xffff_ffe0;
    let mut bytes = [0xffu8; 32];
    if let Some(page) = cpu.mmu.host_page(at) {
        // One aligned load each: the guest may write them at the same time.
        for (i, part) in bytes.chunks_exact_mut(8).enumerate() {
            let host = page.wrapping_add((at & 0xfff) as usize + 8 * i);
            cpu.read_place(Place::Ram(host), part);
        }
    }
    let mut entries = [0u64; 4];
    let reserved = 0x1e6 | !((1 << PHYS_BITS) - 1);
    for (entry, part) in entries.iter_mut().zip(bytes.chunks_exact(8)) {
        *entry = part.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        if *entry & pte::P != 0 && *entry & reserved != 0 {
            return Err(Exception::gp(0));
        }
    }
    Ok(entries)
}

/// Loads the pointers of PAE paging from where CR3 says.
pub(super) fn load_pdptes(cpu: &mut Cpu) -> Result<(), Exception> {
    cpu.paging.pdpte = pdptes(cpu, cpu.paging.cr3)?;
    Ok(())
}

fn invlpg(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    privileged(cpu)?;
    let s = super::operand::segment_index(insn.i.memory_segment());
    let base = if cpu.mode.code64 && s < seg::FS { 0 } else { cpu.seg[s].base };
    let la = base.wrapping_add(cpu.effective_address(insn));
    let la = if cpu.mode.code64 { la } else { la & 0xffff_ffff };
    if is_canonical(la) {
        cpu.mmu.flush_page(la);
        cpu.update_mode();
    }
    Ok(())
}

fn invpcid(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    privileged(cpu)?;
    let kind = cpu.reg(insn.i.op0_register());
    let la = cpu.operand_address(insn, 16, Access::Read)?;
    let pcid = cpu.read_value(la, 8, Who::Current)?;
    let address = cpu.read_value(la.wrapping_add(8), 8, Who::Current)?;
    let pcide = cpu.paging.cr4 & cr4::PCIDE != 0;
    let bad = pcid >> 12 != 0 || (kind < 2 && pcid != 0 && !pcide) || (kind == 0 && !is_canonical(address));
    if bad || kind > 3 {
        return Err(Exception::gp(0));
    }
    match kind {
        0 => cpu.mmu.flush_page(address),
        1 => cpu.mmu.flush_pcid(pcid as u16),
        2 => cpu.mmu.flush_all(),
        _ => cpu.mmu.flush_all_non_global(),
    }
    cpu.update_mode();
    Ok(())
}
