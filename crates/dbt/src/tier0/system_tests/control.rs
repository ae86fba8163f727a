//! Control and debug registers, MSRs, ports, entering long mode.

use ruse_arch::{
    Exception, MpState, VcpuState,
    flags::{cr0, cr4, efer, rflags},
    msr,
    state::{reg, seg},
};

use super::*;
use crate::tier0::{
    debug,
    testing::{CODE, DATA},
};

fn wrmsr(m: &mut Machine, number: u32, value: u64) -> Result<(), Exception> {
    m.cpu.gpr[reg::RCX] = number.into();
    m.cpu.gpr[reg::RAX] = value & 0xffff_ffff;
    m.cpu.gpr[reg::RDX] = value >> 32;
    m.load(&[0x0f, 0x30]);
    m.step()
}

fn rdmsr(m: &mut Machine, number: u32) -> Result<u64, Exception> {
    m.cpu.gpr[reg::RCX] = number.into();
    m.load(&[0x0f, 0x32]);
    m.step()?;
    Ok(m.cpu.gpr[reg::RDX] << 32 | m.cpu.gpr[reg::RAX])
}

/// MOV CRn, RAX.
fn set_cr(m: &mut Machine, n: u8, value: u64) -> Result<(), Exception> {
    m.cpu.gpr[reg::RAX] = value;
    m.load(&[0x0f, 0x22, 0xc0 | n << 3]);
    m.step()
}

#[test]
fn from_32_bit_to_long_mode_and_back() {
    let mut m = Machine::flat32();
    set_cr(&mut m, 4, cr4::PAE | cr4::OSFXSR).unwrap();
    set_cr(&mut m, 3, 0x1000).unwrap();
    wrmsr(&mut m, msr::EFER, efer::LME | efer::NXE).unwrap();
    let on = m.cpu.paging.cr0 | cr0::PG;
    set_cr(&mut m, 0, on).unwrap();
    assert_eq!(rdmsr(&mut m, msr::EFER), Ok(efer::LME | efer::NXE | efer::LMA));
    assert!(m.cpu.mode.long && m.cpu.mode.code32);
    // jmp 8:HANDLER, to 64-bit code.
    m.load(&[0xea, 0, 0x80, 1, 0, 8, 0]);
    m.step().unwrap();
    assert!(m.cpu.mode.code64);
    let off = m.cpu.paging.cr0 & !cr0::PG;
    assert_eq!(set_cr(&mut m, 0, off), Err(Exception::gp(0)), "in 64-bit code");
    assert_eq!(wrmsr(&mut m, msr::EFER, 0), Err(Exception::gp(0)), "LME under paging");
    assert_eq!(set_cr(&mut m, 4, 0), Err(Exception::gp(0)), "PAE in long mode");
}

#[test]
fn control_registers_refuse_nonsense() {
    let mut m = Machine::long();
    let (c0, c4) = (m.cpu.paging.cr0, m.cpu.paging.cr4);
    let gp = Err(Exception::gp(0));
    assert_eq!(set_cr(&mut m, 0, c0 | 1 << 32), gp);
    assert_eq!(set_cr(&mut m, 0, c0 & !cr0::PE), gp);
    assert_eq!(set_cr(&mut m, 0, c0 | cr0::NW), gp);
    assert_eq!(set_cr(&mut m, 4, c4 | cr4::LA57), gp);
    assert_eq!(set_cr(&mut m, 3, 1 << 46), gp);
    assert_eq!(set_cr(&mut m, 3, 1 << 63 | 0x1000), gp, "no PCIDE");
    assert_eq!(set_cr(&mut m, 1, 0), Err(Exception::UD));
    set_cr(&mut m, 4, c4 | cr4::PCIDE).unwrap();
    set_cr(&mut m, 3, 1 << 63 | 0x1005).unwrap();
    assert_eq!(m.cpu.paging.cr3, 0x1005);
    assert_eq!(set_cr(&mut m, 0, c0 & !cr0::PG), gp);
    to_user(&mut m);
    assert_eq!(set_cr(&mut m, 3, 0x1000), gp);
}

#[test]
fn pae_pointers_are_checked() {
    let mut m = Machine::flat32();
    set_cr(&mut m, 4, cr4::PAE).unwrap();
    m.write_u64(DATA, 0x3003);
    set_cr(&mut m, 3, DATA).unwrap();
    let on = m.cpu.paging.cr0 | cr0::PG;
    assert_eq!(set_cr(&mut m, 0, on), Err(Exception::gp(0)));
    m.write_u64(DATA, 0x3001);
    set_cr(&mut m, 0, on).unwrap();
    assert_eq!(m.cpu.paging.pdpte, [0x3001, 0, 0, 0]);
    assert!(!m.cpu.mode.long);
    m.load(&[0x90]);
    m.step().unwrap();
}

#[test]
fn model_specific_registers() {
    let mut m = Machine::long();
    let gp = Err(Exception::gp(0));
    assert_eq!(rdmsr(&mut m, 0xdead).map(|_| ()), gp);
    assert_eq!(wrmsr(&mut m, msr::LSTAR, 1 << 47), gp);
    assert_eq!(wrmsr(&mut m, msr::FS_BASE, 1 << 63), gp);
    wrmsr(&mut m, msr::GS_BASE, 0xffff_8000_0000_1000).unwrap();
    assert_eq!(m.cpu.seg[seg::GS].base, 0xffff_8000_0000_1000);
    m.load(&[0x0f, 0x01, 0xf8]); // swapgs
    m.step().unwrap();
    assert_eq!(rdmsr(&mut m, msr::KERNEL_GS_BASE), Ok(0xffff_8000_0000_1000));
    assert_eq!(wrmsr(&mut m, msr::PAT, 2), gp);
    wrmsr(&mut m, msr::PAT, 0x0407_0506_0007_0106).unwrap();
    wrmsr(&mut m, msr::TSC, 5_000).unwrap();
    assert!(rdmsr(&mut m, msr::TSC).unwrap() - 5_000 < 100_000_000_000);
    wrmsr(&mut m, msr::MTRR_FIX4K_C0000 + 7, 0x0606_0606_0606_0606).unwrap();
    assert_eq!(rdmsr(&mut m, msr::MTRR_FIX4K_C0000 + 7), Ok(0x0606_0606_0606_0606));
    assert_eq!(wrmsr(&mut m, msr::MTRR_DEF_TYPE, 3), gp);
    assert_eq!(wrmsr(&mut m, msr::MTRR_CAP, 0), gp);
    to_user(&mut m);
    assert_eq!(rdmsr(&mut m, msr::TSC).map(|_| ()), gp);
}

#[test]
fn halt_sti_and_their_levels() {
    let mut m = Machine::long();
    m.load(&[0xfb, 0xf4]); // sti; hlt
    m.step().unwrap();
    assert!(m.cpu.interrupt_shadow && m.cpu.rflags & rflags::IF != 0);
    m.step().unwrap();
    assert!(!m.cpu.interrupt_shadow && m.cpu.mp_state == MpState::Halted);
    to_user(&mut m);
    for code in [[0xfa].as_slice(), &[0xfb], &[0xf4], &[0x0f, 0x06], &[0x0f, 0x09], &[0x0f, 0x01, 0x38]] {
        m.load(code);
        assert_eq!(m.step(), Err(Exception::gp(0)), "{code:x?}");
    }
}

#[test]
fn debug_registers() {
    let mut m = Machine::long();
    m.cpu.gpr[reg::RAX] = CODE;
    m.load(&[0x0f, 0x23, 0xc0]);
    m.step().unwrap();
    m.cpu.gpr[reg::RAX] = 0;
    m.load(&[0x0f, 0x23, 0xf8]);
    m.step().unwrap();
    assert_eq!(m.cpu.dr7, 0x400);
    m.cpu.dr7 |= 1;
    assert_eq!(debug::instruction_breakpoint(&m.cpu, CODE), Some(1));
    assert_eq!(debug::instruction_breakpoint(&m.cpu, CODE + 1), None);
    m.cpu.dr7 = 0x400 | 1 | 0xd << 16; // four bytes, writes
    assert_eq!(debug::matches(&m.cpu, CODE - 1, 2, debug::Watch::Write), 1);
    assert_eq!(debug::matches(&m.cpu, CODE + 4, 2, debug::Watch::Write), 0);
    m.cpu.dr7 = 0x400 | debug::DR7_GD;
    m.load(&[0x0f, 0x21, 0xc0]);
    assert_eq!(m.step(), Err(Exception::db(1 << 13)));
    m.cpu.dr7 = 0x400;
    // DR4 is DR6 without CR4.DE.
    m.load(&[0x0f, 0x21, 0xe0]);
    m.step().unwrap();
    assert_eq!(m.cpu.gpr[reg::RAX], VcpuState::default().dr6);
    m.cpu.paging.cr4 |= cr4::DE;
    m.load(&[0x0f, 0x21, 0xe0]);
    assert_eq!(m.step(), Err(Exception::UD));
}

#[test]
fn breakpoints_fault_before_code_and_trap_after_data() {
    let mut m = Machine::long();
    m.cpu.dr[0] = CODE;
    m.cpu.dr[1] = DATA;
    m.cpu.dr7 = 0x400 | 1 | 4 | 0xf << 20;
    m.cpu.gpr[reg::RDI] = DATA + 3;
    m.load(&[0xc6, 0x07, 0x5a]); // mov byte [rdi], 5ah
    assert_eq!(m.step(), Err(Exception::db(1)));
    assert_eq!((m.cpu.rip, m.read::<1>(DATA + 3)), (CODE, [0]));
    m.cpu.rflags |= rflags::RF;
    assert_eq!(m.step(), Err(Exception::db(2)));
    assert_eq!((m.cpu.rip, m.read::<1>(DATA + 3)), (CODE + 3, [0x5a]));
    assert_eq!(m.cpu.rflags & rflags::RF, 0);
}

#[test]
fn ports_obey_the_bitmap() {
    let mut m = with_levels(Machine::long());
    m.write(TSS_BASE + 0x66, &[0x68, 0]);
    m.write(TSS_BASE + 0x68, &[0xff; 0x2000]);
    m.write(TSS_BASE + 0x68 + 0x80 / 8, &[0b1111_0000]);
    to_user(&mut m);
    let mut out = |port: u64, code: &[u8]| {
        m.cpu.gpr[reg::RDX] = port;
        m.load(code);
        m.step()
    };
    out(0x80, &[0xee]).unwrap();
    out(0x80, &[0xef]).unwrap();
    assert_eq!(out(0x81, &[0xef]), Err(Exception::gp(0)));
    assert_eq!(out(0xffff, &[0xee]), Err(Exception::gp(0)));
    m.cpu.rflags |= rflags::IOPL;
    m.cpu.gpr[reg::RDX] = 0xffff;
    m.load(&[0xee]);
    m.step().unwrap();
}

#[test]
fn string_input_goes_on_after_a_fault() {
    let mut m = Machine::long();
    m.unmap(DATA + 0x1000);
    m.cpu.gpr[reg::RDI] = DATA + 0xff0;
    m.cpu.gpr[reg::RCX] = 100;
    m.load(&[0xf3, 0x6c]);
    assert_eq!(m.step(), Err(Exception::pf(DATA + 0x1000, 2)));
    assert_eq!((m.cpu.gpr[reg::RCX], m.cpu.gpr[reg::RDI], m.cpu.rip), (84, DATA + 0x1000, CODE));
    assert_eq!(m.read_u64(DATA + 0xff8), u64::MAX);
    // A long one comes back to itself.
    m.cpu.gpr[reg::RDI] = 0x20_0000;
    m.cpu.gpr[reg::RCX] = 1500;
    m.step().unwrap();
    assert_eq!((m.cpu.rip, m.cpu.gpr[reg::RCX]), (CODE, 1500 - 1024));
    m.step().unwrap();
    assert_eq!((m.cpu.rip, m.cpu.gpr[reg::RCX]), (CODE + 2, 0));
}

#[test]
fn random_numbers_differ() {
    let mut seen = std::collections::HashSet::new();
    let mut m = Machine::long();
    for _ in 0..8 {
        m.load(&[0x48, 0x0f, 0xc7, 0xf0]);
        m.step().unwrap();
        assert_eq!(m.cpu.rflags & rflags::ARITH, rflags::CF);
        assert!(seen.insert(m.cpu.gpr[reg::RAX]));
    }
}
