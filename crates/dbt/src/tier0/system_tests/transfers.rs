//! Selector loads, far transfers, system calls.

use ruse_arch::{
    Exception,
    flags::rflags,
    state::{reg, seg},
};

use super::*;
use crate::tier0::testing::{CODE, DATA, STACK};

/// MOV DS, AX with this selector.
fn mov_ds(m: &mut Machine, selector: u16) -> Result<(), Exception> {
    m.cpu.gpr[reg::RAX] = selector.into();
    m.load(&[0x8e, 0xd8]);
    m.step()
}

#[test]
fn data_selectors_are_checked() {
    let mut m = with_levels(Machine::long());
    mov_ds(&mut m, 0x10).unwrap();
    mov_ds(&mut m, DATA3).unwrap();
    assert_eq!(m.cpu.seg[seg::DS].selector, DATA3);
    m.write_u64(GDT + u64::from(FREE), 0x004f_1200_0000_ffff);
    assert_eq!(mov_ds(&mut m, FREE), Err(Exception::np(FREE.into())));
    assert_eq!(mov_ds(&mut m, TSS), Err(Exception::gp(TSS.into())));
    assert_eq!(mov_ds(&mut m, 0x108), Err(Exception::gp(0x108)));
    assert_eq!(mov_ds(&mut m, 0xc), Err(Exception::gp(0xc)), "no LDT");
    mov_ds(&mut m, 3).unwrap();
    assert_eq!((m.cpu.seg[seg::DS].selector, m.cpu.seg[seg::DS].attr), (3, 0));
    to_user(&mut m);
    assert_eq!(mov_ds(&mut m, 0x10), Err(Exception::gp(0x10)));
    // The accessed bit is set in the table.
    m.write_u64(GDT + u64::from(FREE), 0x00cf_f200_0000_ffff);
    mov_ds(&mut m, FREE | 3).unwrap();
    assert_eq!(m.read::<1>(GDT + u64::from(FREE) + 5), [0xf3]);
}

#[test]
fn ss_rules_and_the_shadow() {
    let mut m = with_levels(Machine::long());
    let mut mov_ss = |selector: u64| {
        m.cpu.gpr[reg::RAX] = selector;
        m.load(&[0x8e, 0xd0]);
        m.step().map(|()| m.cpu.interrupt_shadow)
    };
    assert_eq!(mov_ss(0x10), Ok(true));
    assert_eq!(mov_ss(0), Ok(true));
    assert_eq!(mov_ss(3), Err(Exception::gp(0)));
    assert_eq!(mov_ss(8), Err(Exception::gp(8)));
    assert_eq!(mov_ss(DATA3.into()), Err(Exception::gp(0x30)));
    let mut m = Machine::flat32();
    m.cpu.gpr[reg::RAX] = 0;
    m.load(&[0x8e, 0xd0]);
    assert_eq!(m.step(), Err(Exception::gp(0)));
    m.load(&[0x8e, 0xc8]);
    assert_eq!(m.step(), Err(Exception::UD), "mov cs");
}

#[test]
fn a_null_fs_clears_its_base() {
    let mut m = Machine::long();
    m.cpu.seg[seg::FS].base = 0x1234_5678_9000;
    m.load(&[0x8e, 0xe0]);
    m.step().unwrap();
    assert_eq!(m.cpu.seg[seg::FS].base, 0);
}

#[test]
fn unreal_mode_keeps_limits() {
    let mut m = Machine::real();
    m.cpu.seg[seg::DS].limit = 0xffff_ffff;
    m.cpu.gpr[reg::RAX] = 0x1234;
    m.load(&[0x8e, 0xd8]);
    m.step().unwrap();
    let ds = m.cpu.seg[seg::DS];
    assert_eq!((ds.base, ds.limit, ds.selector), (0x1_2340, 0xffff_ffff, 0x1234));
}

#[test]
fn far_call_and_return_in_compatibility_and_long_mode() {
    let mut m = with_levels(Machine::long());
    // call far [DATA]: 32-bit code at HANDLER; there: retf.
    m.write(DATA, &(HANDLER as u32).to_le_bytes());
    m.write(DATA + 4, &0x18u16.to_le_bytes());
    m.load(&[0xff, 0x1c, 0x25, 0, 0, 3, 0]);
    m.write(HANDLER, &[0xcb]);
    m.step().unwrap();
    assert!(!m.cpu.mode.code64 && m.cpu.mode.code32);
    assert_eq!((m.cpu.rip, m.cpu.gpr[reg::RSP]), (HANDLER, STACK - 8));
    m.step().unwrap();
    assert!(m.cpu.mode.code64);
    assert_eq!((m.cpu.rip, m.cpu.gpr[reg::RSP]), (CODE + 7, STACK));
}

#[test]
fn a_64_bit_call_gate_switches_stacks() {
    let mut m = with_levels(Machine::long());
    m.write_u64(GDT + u64::from(FREE), gate(8, HANDLER, 0xec));
    m.write_u64(GDT + u64::from(FREE) + 8, 0);
    to_user(&mut m);
    m.write(DATA + 4, &FREE.to_le_bytes());
    m.load(&[0xff, 0x1c, 0x25, 0, 0, 3, 0]);
    m.write(HANDLER, &[0x48, 0xcb]); // retfq
    m.step().unwrap();
    assert_eq!((m.cpu.mode.cpl, m.cpu.rip, m.cpu.gpr[reg::RSP]), (0, HANDLER, KERNEL_STACK - 32));
    m.step().unwrap();
    assert_eq!((m.cpu.mode.cpl, m.cpu.rip, m.cpu.gpr[reg::RSP]), (3, CODE + 7, STACK));
}

#[test]
fn a_32_bit_call_gate_copies_parameters() {
    let mut m = with_levels(Machine::flat32());
    m.write_u64(GDT + u64::from(FREE), gate(0x18, HANDLER, 0xec) | 2 << 32);
    to_user(&mut m);
    m.write(STACK, &[1, 0, 0, 0, 2, 0, 0, 0]);
    m.load(&[0x9a, 0, 0, 0, 0, FREE as u8, 0]);
    m.write(HANDLER, &[0xca, 8, 0]);
    m.step().unwrap();
    let frame: Vec<u64> = (0..6).map(|n| stacked(&m, n, 4)).collect();
    assert_eq!(frame, [CODE + 7, CODE3.into(), 1, 2, STACK, DATA3.into()]);
    m.step().unwrap();
    assert_eq!((m.cpu.mode.cpl, m.cpu.gpr[reg::RSP]), (3, STACK + 8));
}

#[test]
fn far_jumps_check_levels() {
    let mut m = with_levels(Machine::flat32());
    let jump = |m: &mut Machine, selector: u16| {
        let [a, b] = selector.to_le_bytes();
        m.load(&[0xea, 0, 0x80, 1, 0, a, b]);
        m.step()
    };
    assert_eq!(jump(&mut m, CODE3), Err(Exception::gp(0x28)));
    assert_eq!(jump(&mut m, 0), Err(Exception::gp(0)));
    assert_eq!(jump(&mut m, 0x10), Err(Exception::gp(0x10)));
    jump(&mut m, 0x18).unwrap();
    assert_eq!(m.cpu.rip, HANDLER);
}

#[test]
fn syscall_and_sysret() {
    let mut m = with_levels(Machine::long());
    m.cpu.star = 0x0023_0008 << 32;
    m.cpu.lstar = HANDLER;
    m.cpu.sfmask = rflags::IF;
    to_user(&mut m);
    m.cpu.rflags |= rflags::IF | rflags::CF;
    m.load(&[0x0f, 0x05]);
    m.write(HANDLER, &[0x48, 0x0f, 0x07]);
    m.step().unwrap();
    assert_eq!((m.cpu.rip, m.cpu.gpr[reg::RCX], m.cpu.mode.cpl), (HANDLER, CODE + 2, 0));
    assert_eq!(m.cpu.rflags & (rflags::IF | rflags::CF), rflags::CF);
    m.step().unwrap();
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl, m.cpu.seg[seg::CS].selector), (CODE + 2, 3, 0x33));
    assert_ne!(m.cpu.rflags & rflags::IF, 0);
    // Intel's way with a target that is not canonical.
    m.load(&[0x0f, 0x05]);
    m.step().unwrap();
    m.cpu.gpr[reg::RCX] = 1 << 47;
    assert_eq!(m.step(), Err(Exception::gp(0)));
    assert_eq!(m.cpu.mode.cpl, 0);
}

#[test]
fn sysenter_and_sysexit() {
    let mut m = with_levels(Machine::flat32());
    m.load(&[0x0f, 0x34]);
    assert_eq!(m.step(), Err(Exception::gp(0)));
    m.cpu.sysenter = [0x18, KERNEL_STACK, HANDLER];
    to_user(&mut m);
    m.step().unwrap();
    assert_eq!((m.cpu.rip, m.cpu.gpr[reg::RSP], m.cpu.mode.cpl), (HANDLER, KERNEL_STACK, 0));
    m.cpu.gpr[reg::RDX] = CODE;
    m.cpu.gpr[reg::RCX] = STACK;
    m.write(HANDLER, &[0x0f, 0x35]);
    m.step().unwrap();
    assert_eq!((m.cpu.rip, m.cpu.gpr[reg::RSP], m.cpu.mode.cpl), (CODE, STACK, 3));
}

#[test]
fn questions_about_descriptors() {
    let mut m = with_levels(Machine::long());
    let mut ask = |code: &[u8], selector: u64| {
        m.cpu.gpr[reg::RAX] = selector;
        m.cpu.gpr[reg::RBX] = 0;
        m.load(code);
        m.step().unwrap();
        (m.cpu.rflags & rflags::ZF != 0, m.cpu.gpr[reg::RBX])
    };
    assert_eq!(ask(&[0x0f, 0x02, 0xd8], 8), (true, 0x00af_9b00 & 0xffff00 | 0x00a0_0000));
    assert_eq!(ask(&[0x0f, 0x03, 0xd8], 0x10), (true, 0xffff_ffff));
    assert_eq!(ask(&[0x0f, 0x03, 0xd8], 0), (false, 0));
    assert!(ask(&[0x0f, 0x00, 0xe8], 0x10).0, "verw");
    assert!(!ask(&[0x0f, 0x00, 0xe8], 8).0, "verw of code");
    assert!(ask(&[0x0f, 0x00, 0xe0], 8).0, "verr of code");
}
