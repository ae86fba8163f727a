//! Delivery and IRET.

use ruse_arch::{
    DescriptorTable, Exception, MpState, Segment,
    flags::{cr0, rflags},
    state::{reg, seg},
};

use super::*;
use crate::{
    cpu::Cpu,
    tier0::{
        interrupt::{Event, Shutdown, deliver},
        testing::{CODE, NullBus, STACK},
    },
};

fn send(m: &mut Machine, event: Event) -> Result<(), Shutdown> {
    m.cpu.with_bus(&NullBus, |cpu: &mut Cpu| deliver(cpu, event))
}

#[test]
fn real_mode_int_and_iret() {
    let mut m = Machine::real();
    m.cpu.idtr = DescriptorTable { base: 0, limit: 0x3ff };
    m.write(4 * 0x21, &[0x00, 0x80, 0x00, 0x10]); // 1000:8000
    m.write(0x1_8000, &[0xcf]); // iret
    m.load(&[0xcd, 0x21]);
    m.cpu.rflags |= rflags::IF | rflags::CF;
    m.step().unwrap();
    assert_eq!((m.cpu.rip, m.cpu.seg[seg::CS].selector), (0x8000, 0x1000));
    assert_eq!(m.cpu.rflags & (rflags::IF | rflags::CF), rflags::CF);
    assert_eq!(m.cpu.gpr[reg::RSP], 0x7ffa);
    m.step().unwrap();
    assert_eq!((m.cpu.rip, m.cpu.seg[seg::CS].base), (2, CODE));
    assert_ne!(m.cpu.rflags & rflags::IF, 0);
    assert_eq!(m.cpu.gpr[reg::RSP], 0x8000);
    m.cpu.idtr.limit = 3;
    m.load(&[0xcd, 0x21]);
    assert_eq!(m.step().unwrap_err().vector, 13);
    assert_eq!(m.cpu.rip, 0);
}

#[test]
fn a_fault_in_user_code_switches_stacks_in_32_bit_mode() {
    let mut m = with_levels(Machine::flat32());
    to_user(&mut m);
    m.cpu.rflags |= rflags::IF | rflags::TF | rflags::NT;
    let flags = m.cpu.rflags;
    send(&mut m, Event::Exception(Exception::pf(0x1234, 6))).unwrap();
    assert_eq!((m.cpu.cr2, m.cpu.rip, m.cpu.mode.cpl), (0x1234, HANDLER, 0));
    assert_eq!(m.cpu.gpr[reg::RSP], KERNEL_STACK - 24);
    let frame: Vec<u64> = (0..6).map(|n| stacked(&m, n, 4)).collect();
    assert_eq!(frame, [6, CODE, CODE3.into(), flags | rflags::RF, STACK, DATA3.into()]);
    assert_eq!(m.cpu.rflags & (rflags::IF | rflags::TF | rflags::NT | rflags::RF), 0);
    // And back: add esp, 4; iret.
    m.write(HANDLER, &[0x83, 0xc4, 4, 0xcf]);
    m.step().unwrap();
    m.step().unwrap();
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl, m.cpu.gpr[reg::RSP]), (CODE, 3, STACK));
    assert_eq!(m.cpu.rflags, flags | rflags::RF);
}

#[test]
fn software_interrupts_obey_the_gate() {
    for mut m in [with_levels(Machine::flat32()), with_levels(Machine::long())] {
        to_user(&mut m);
        m.load(&[0xcd, 0x80]);
        let before = m.cpu.save_state();
        assert_eq!(m.step(), Err(Exception::gp(0x80 << 3 | 2)));
        assert_eq!((m.cpu.rip, m.cpu.gpr, m.cpu.seg), (before.rip, before.gpr, before.seg));
        let (at, cs) = if m.cpu.mode.long { (IDT + 0x800, 8) } else { (IDT + 0x400, 0x18) };
        m.write_u64(at, gate(cs, HANDLER, 0xef));
        m.cpu.rflags |= rflags::IF;
        m.step().unwrap();
        assert_eq!((m.cpu.rip, m.cpu.mode.cpl), (HANDLER, 0));
        assert_ne!(m.cpu.rflags & rflags::IF, 0, "a trap gate");
        // Not present.
        to_user(&mut m);
        m.load(&[0xcd, 0x80]);
        m.write_u64(at, gate(cs, HANDLER, 0x6e));
        assert_eq!(m.step(), Err(Exception::np(0x80 << 3 | 2)));
    }
}

#[test]
fn long_mode_aligns_and_uses_the_ist() {
    let mut m = with_levels(Machine::long());
    m.cpu.gpr[reg::RSP] = STACK - 3;
    send(&mut m, Event::Interrupt(0x40)).unwrap();
    assert_eq!(m.cpu.gpr[reg::RSP], ((STACK - 3) & !15) - 40);
    assert_eq!([stacked(&m, 0, 8), stacked(&m, 3, 8)], [CODE, STACK - 3]);
    m.write_u64(IDT + 14 * 16, gate(8, HANDLER, 0x8e) | 1 << 32);
    send(&mut m, Event::Exception(Exception::pf(1, 2))).unwrap();
    assert_eq!(m.cpu.gpr[reg::RSP], KERNEL_STACK - 0x1000 - 48);
    m.write(HANDLER, &[0x48, 0x83, 0xc4, 8, 0x48, 0xcf]); // add rsp, 8; iretq
    m.step().unwrap();
    m.step().unwrap();
    assert_eq!((m.cpu.rip, m.cpu.gpr[reg::RSP]), (HANDLER, ((STACK - 3) & !15) - 40));
}

#[test]
fn user_and_back_in_long_mode() {
    let mut m = with_levels(Machine::long());
    to_user(&mut m);
    m.cpu.mp_state = MpState::Halted;
    send(&mut m, Event::Nmi).unwrap();
    assert!(m.cpu.nmi_blocked && m.cpu.mp_state == MpState::Running);
    assert_eq!((m.cpu.mode.cpl, m.cpu.seg[seg::SS].selector), (0, 0));
    m.write(HANDLER, &[0x48, 0xcf]);
    m.step().unwrap();
    assert!(!m.cpu.nmi_blocked);
    assert_eq!((m.cpu.mode.cpl, m.cpu.seg[seg::SS].selector, m.cpu.rip), (3, DATA3, CODE));
}

#[test]
fn faults_in_delivery_double_and_triple() {
    let mut m = with_levels(Machine::long());
    // The gate of #GP is not present: #NP during #GP is a double fault.
    m.write_u64(IDT + 13 * 16, 0);
    send(&mut m, Event::Exception(Exception::gp(0))).unwrap();
    assert_eq!((m.cpu.rip, stacked(&m, 0, 8)), (HANDLER, 0));
    // An interrupt without a gate is a plain #GP, which now doubles too.
    m.cpu.idtr.limit = 9 * 16 - 1;
    send(&mut m, Event::Interrupt(0x80)).unwrap();
    m.cpu.idtr.limit = 0;
    assert_eq!(send(&mut m, Event::Interrupt(0x80)), Err(Shutdown));
    assert_eq!(m.cpu.mp_state, MpState::Shutdown);
}

#[test]
fn a_page_fault_of_the_stack_push_doubles() {
    let mut m = with_levels(Machine::long());
    to_user(&mut m);
    m.unmap(KERNEL_STACK - 0x1000);
    m.write_u64(IDT + 8 * 16, gate(8, HANDLER + 8, 0x8e) | 1 << 32);
    m.write_u64(TSS_BASE + 0x24, 0x2_8000);
    send(&mut m, Event::Exception(Exception::pf(5, 0))).unwrap();
    assert_eq!((m.cpu.rip, m.cpu.gpr[reg::RSP]), (HANDLER + 8, 0x2_8000 - 48));
    assert_eq!(m.cpu.cr2, KERNEL_STACK - 8, "of the second fault");
}

#[test]
fn virtual_8086_mode() {
    let mut m = with_levels(Machine::flat32());
    // iretd to 1000:0123 with IOPL 0.
    let frame = [0x123u32, 0x1000, 0x2_0202, 0x800, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000];
    let bytes: Vec<u8> = frame.iter().flat_map(|v| v.to_le_bytes()).collect();
    m.write(STACK, &bytes);
    m.load(&[0xcf]);
    m.step().unwrap();
    assert!(m.cpu.mode.vm86 && m.cpu.mode.cpl == 3);
    assert_eq!((m.cpu.rip, m.cpu.seg[seg::CS].base), (0x123, 0x1_0000));
    assert_eq!((m.cpu.seg[seg::ES].selector, m.cpu.seg[seg::GS].selector), (0x3000, 0x6000));
    m.write(0x1_0123, &[0xcd, 0x21]);
    assert_eq!(m.step(), Err(Exception::gp(0)));
    send(&mut m, Event::Exception(Exception::gp(0))).unwrap();
    assert!(!m.cpu.mode.vm86 && m.cpu.mode.cpl == 0);
    let words: Vec<u64> = (0..10).map(|n| stacked(&m, n, 4)).collect();
    assert_eq!(words[..6], [0, 0x123, 0x1000, 0x3_0202, 0x800, 0x2000]);
    assert_eq!(words[6..], [0x3000, 0x4000, 0x5000, 0x6000]);
    assert_eq!(m.cpu.seg[seg::DS], Segment::default());
    m.write(HANDLER, &[0x83, 0xc4, 4, 0xcf]);
    m.step().unwrap();
    m.step().unwrap();
    assert!(m.cpu.mode.vm86);
    assert_eq!((m.cpu.rip, m.cpu.seg[seg::SS].base), (0x123, 0x2_0000));
}

#[test]
fn a_task_gate_switches_and_iret_returns() {
    let mut m = with_levels(Machine::flat32());
    let other = 0x8000u64;
    m.write_u64(GDT + u64::from(FREE), tss_descriptor(other));
    m.write_u64(IDT + 8 * 8, gate(FREE, 0, 0x85));
    let put = |m: &mut Machine, at: u64, v: u32| m.write(other + at, &v.to_le_bytes());
    put(&mut m, 0x20, HANDLER as u32);
    put(&mut m, 0x24, 2);
    put(&mut m, 0x38, KERNEL_STACK as u32);
    for (i, s) in [0x10, 0x18, 0x10, 0x10, 0, 0].into_iter().enumerate() {
        put(&mut m, 0x48 + 4 * i as u64, s);
    }
    m.cpu.gpr[reg::RBX] = 77;
    send(&mut m, Event::Exception(Exception::df())).unwrap();
    assert_eq!((m.cpu.exception, m.cpu.tr.selector, m.cpu.rip), (None, FREE, HANDLER));
    assert_eq!((m.cpu.gpr[reg::RSP], m.cpu.gpr[reg::RBX]), (KERNEL_STACK - 4, 0));
    assert_ne!(m.cpu.rflags & rflags::NT, 0);
    assert_ne!(m.cpu.paging.cr0 & cr0::TS, 0);
    assert_eq!(m.read::<2>(other), TSS.to_le_bytes());
    assert_eq!(m.read::<1>(GDT + u64::from(FREE) + 5), [0x8b]);
    m.write_u64(GDT + u64::from(TSS), tss_descriptor(TSS_BASE) | 2 << 40);
    m.write(TSS_BASE + 0x1c, &[0; 4]);
    m.write(HANDLER, &[0xcf]);
    m.step().unwrap();
    assert_eq!((m.cpu.rip, m.cpu.gpr[reg::RBX], m.cpu.tr.selector), (CODE, 77, TSS));
    assert_eq!(m.read::<1>(GDT + u64::from(FREE) + 5), [0x89]);
}
