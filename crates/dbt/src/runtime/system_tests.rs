//! The CPU's own state in translated code: system calls, interrupts let in, segment bases, control registers, bit strings.

use std::sync::atomic::{AtomicBool, Ordering};

use iced_x86::code_asm::*;
use ruse_arch::{
    Exception,
    flags::rflags,
    state::{reg, seg},
};
use ruse_engine::{Bus, Halt, Vcpu};

use super::{engine::DbtOptions, vcpu::DbtVcpu};
use crate::tier0::{
    system_tests::{CODE3, HANDLER, to_user, with_levels},
    testing::{CODE, DATA, Machine, NullBus, PAGE_TABLE},
};

/// Where no page is mapped after [`Machine::unmap`].
const HOLE: u64 = DATA + 0x4000;

fn assemble(at: u64, program: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    program(&mut a);
    a.assemble(at).unwrap()
}

/// Makes the next exception a triple fault, and raises it.
fn stop(a: &mut CodeAssembler) {
    a.lidt(ptr(DATA + 0x8000)).unwrap();
    a.ud2().unwrap();
}

/// What a program has left.
#[derive(Debug, PartialEq)]
struct Left {
    fault: Exception,
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    bases: [u64; 3],
    selectors: [u16; 2],
    data: Vec<u8>,
}

/// Runs a program until it faults, by tier 0 and by the translator, which must agree.
fn same(machine: impl Fn() -> Machine, program: &[u8]) -> (Left, DbtVcpu) {
    let run = |tier| {
        let mut machine = machine();
        machine.load(program);
        let ram = machine.ram.clone();
        let mut vcpu = DbtVcpu::new(machine.cpu, DbtOptions { tier, ..DbtOptions::default() }).unwrap();
        let fault = vcpu.run_until_fault(&NullBus);
        let cpu = vcpu.cpu();
        let mut data = vec![0; 256];
        crate::mmu::access::load(ram.host_page(DATA).unwrap(), &mut data);
        let left = Left {
            fault,
            gpr: cpu.gpr,
            rip: cpu.rip,
            rflags: cpu.rflags,
            bases: [cpu.seg[seg::FS].base, cpu.seg[seg::GS].base, cpu.kernel_gs_base],
            selectors: [seg::CS, seg::SS].map(|s| cpu.seg[s].selector),
            data,
        };
        (left, vcpu)
    };
    let (plain, translated) = (run(Some(0)), run(None));
    assert_eq!(plain.0, translated.0);
    translated
}

#[test]
fn bases_and_control_registers_are_those_of_the_cpu() {
    let machine = || {
        let mut machine = Machine::long();
        (machine.cpu.cr2, machine.cpu.tsc_aux) = (0x1234_5678_9abc, 0x77);
        machine
    };
    let program = assemble(CODE, |a| {
        a.mov(rax, 0xffff_8888_1234_5678u64).unwrap();
        a.mov(r13, rax).unwrap();
        a.wrfsbase(r13).unwrap();
        a.rdfsbase(r14).unwrap();
        a.rdfsbase(ebx).unwrap();
        a.mov(r15, DATA).unwrap();
        a.mov(qword_ptr(r15).gs(), r15).unwrap();
        a.wrgsbase(r15d).unwrap();
        a.mov(qword_ptr(0x40u64).gs(), rax).unwrap();
        a.rdgsbase(r8).unwrap();
        a.mov(r9, cr0).unwrap();
        a.mov(r10, cr2).unwrap();
        a.mov(r15, cr3).unwrap();
        a.mov(r11, cr4).unwrap();
        a.std().unwrap();
        a.pushfq().unwrap();
        a.cld().unwrap();
        a.pushfq().unwrap();
        a.pop(rsi).unwrap();
        a.pop(rdi).unwrap();
        a.rdtscp().unwrap();
        a.mov(rax, 0u64).unwrap();
        a.mov(rdx, 0u64).unwrap();
        a.ud2().unwrap();
    });
    let (left, vcpu) = same(machine, &program);
    assert_eq!((left.gpr[10], left.gpr[15], left.gpr[reg::RCX]), (0x1234_5678_9abc, 0x1000, 0x77));
    assert_ne!(left.gpr[reg::RDI] & rflags::DF, 0);
    assert!(vcpu.cpu().counters.dispatches <= 2, "the region is not left");
}

#[test]
fn a_base_that_is_no_address_faults() {
    let program = assemble(CODE, |a| {
        a.mov(rax, 1u64 << 47).unwrap();
        a.wrgsbase(rax).unwrap();
    });
    assert_eq!(same(Machine::long, &program).0.fault, Exception::gp(0));
}

#[test]
fn the_bits_of_a_bit_string_lie_on_both_sides_of_the_operand() {
    let program = assemble(CODE, |a| {
        a.mov(rbx, DATA + 0x80).unwrap();
        a.wrgsbase(rbx).unwrap();
        for offset in [0i64, 1, 63, 64, 65, 200, -1, -64, -65, -200] {
            a.mov(r13, offset).unwrap();
            a.mov(rcx, offset).unwrap();
            a.xor(eax, eax).unwrap();
            a.lock().bts(qword_ptr(rbx), r13).unwrap();
            // ZF is the XOR's.
            a.setz(al).unwrap();
            a.adc(r12, r12).unwrap();
            a.add(rsi, rax).unwrap();
            a.bts(qword_ptr(rbx + 8), rcx).unwrap();
            a.adc(r12, r12).unwrap();
            a.bt(dword_ptr(rbx), ecx).unwrap();
            a.adc(r12, r12).unwrap();
            a.lock().btc(dword_ptr(r13 * 1).gs(), r13d).unwrap();
            a.adc(r12, r12).unwrap();
            a.lock().btr(qword_ptr(rbx - 8), r13).unwrap();
            a.adc(r12, r12).unwrap();
        }
        a.ud2().unwrap();
    });
    let machine = || {
        let mut machine = Machine::long();
        machine.write(DATA, &[0xa5; 256]);
        machine
    };
    let (left, vcpu) = same(machine, &program);
    assert_eq!(left.gpr[reg::RSI], 10);
    assert!(vcpu.cpu().counters.tier0 < 5, "tier 0 executes none of them");
}

/// Level 3, with SYSCALL leading to [`HANDLER`].
fn with_system_calls(handler: &[u8]) -> Machine {
    let mut machine = with_levels(Machine::long());
    to_user(&mut machine);
    machine.cpu.star = u64::from(CODE3 - 16) << 48 | 8 << 32;
    machine.cpu.lstar = HANDLER;
    machine.cpu.sfmask = rflags::IF | rflags::DF | rflags::CF;
    machine.write(HANDLER, handler);
    machine
}

#[test]
fn system_calls_go_and_come_back_without_leaving_generated_code() {
    let handler = assemble(HANDLER, |a| {
        a.mov(r8, r11).unwrap();
        a.setc(r9b).unwrap();
        a.mov(r10d, cs).unwrap();
        a.add(qword_ptr(DATA), 3).unwrap();
        a.stc().unwrap();
        a.sysretq().unwrap();
    });
    let program = assemble(CODE, |a| {
        let mut again = a.create_label();
        a.mov(ebx, 1000).unwrap();
        a.set_label(&mut again).unwrap();
        a.stc().unwrap();
        a.mov(r12d, ss).unwrap();
        a.syscall().unwrap();
        a.adc(rsi, 0).unwrap();
        a.sub(ebx, 1).unwrap();
        a.jnz(again).unwrap();
        a.ud2().unwrap();
    });
    let (left, vcpu) = same(|| with_system_calls(&handler), &program);
    assert_eq!(left.data[..8], 3000u64.to_le_bytes());
    // CF is masked on the way in and comes back by R11.
    assert_eq!((left.gpr[9] & 0xff, left.gpr[reg::RSI], left.gpr[10]), (0, 1000, 8));
    assert_eq!(left.gpr[8] & rflags::CF, 1);
    assert!(vcpu.cpu().counters.dispatches < 20);
}

#[test]
fn returns_lead_on_behind_system_calls_made_within_calls() {
    let handler = assemble(HANDLER, |a| {
        let mut function = a.create_label();
        a.mov(r12, rcx).unwrap();
        a.call(function).unwrap();
        a.mov(rcx, r12).unwrap();
        a.sysretq().unwrap();
        a.set_label(&mut function).unwrap();
        a.add(rax, 1).unwrap();
        a.ret().unwrap();
    });
    let program = assemble(CODE, |a| {
        let (mut again, mut outer, mut inner) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(ebx, 100).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(outer).unwrap();
        a.sub(ebx, 1).unwrap();
        a.jnz(again).unwrap();
        a.ud2().unwrap();
        a.set_label(&mut outer).unwrap();
        a.call(inner).unwrap();
        a.syscall().unwrap();
        a.ret().unwrap();
        a.set_label(&mut inner).unwrap();
        a.syscall().unwrap();
        a.ret().unwrap();
    });
    let (left, vcpu) = same(|| with_system_calls(&handler), &program);
    assert_eq!(left.gpr[reg::RAX], 200);
    assert!(vcpu.cpu().counters.dispatches < 20);
}

#[test]
fn a_return_of_the_kernel_does_not_lead_into_user_code() {
    // The kernel returns to where the user's function would.
    let handler = assemble(HANDLER, |a| a.ret().unwrap());
    let machine = || {
        let mut machine = with_system_calls(&handler);
        machine.write_u64(PAGE_TABLE + HANDLER / 4096 * 8, HANDLER | 3);
        machine.cpu.paging.cr4 |= ruse_arch::flags::cr4::SMEP;
        machine
    };
    let program = assemble(CODE, |a| {
        let mut function = a.create_label();
        a.call(function).unwrap();
        a.set_label(&mut function).unwrap();
        a.syscall().unwrap();
    });
    let (left, _) = same(machine, &program);
    assert_eq!((left.fault, left.rip), (Exception::pf(CODE + 5, 0x11), CODE + 5));
}

#[test]
fn a_system_call_that_is_not_enabled_is_undefined() {
    let machine = || {
        let mut machine = with_system_calls(&[]);
        machine.cpu.paging.efer &= !ruse_arch::flags::efer::SCE;
        machine
    };
    let program = assemble(CODE, |a| {
        a.mov(ecx, 5).unwrap();
        a.syscall().unwrap();
    });
    let (left, _) = same(machine, &program);
    assert_eq!((left.fault, left.rip, left.gpr[reg::RCX]), (Exception::UD, CODE + 5, 5));
    // sysretq to where no code can be
    let handler = assemble(HANDLER, |a| {
        a.mov(rcx, 1u64 << 63).unwrap();
        a.sysretq().unwrap();
    });
    let (left, _) = same(|| with_system_calls(&handler), &program);
    assert_eq!((left.fault, left.rip), (Exception::gp(0), HANDLER + 10));
}

/// A bus with one interrupt.
struct Waiting(AtomicBool);

impl Bus for Waiting {
    fn interrupt_pending(&self, _: u32) -> bool {
        self.0.load(Ordering::SeqCst)
    }
    fn acknowledge_interrupt(&self, _: u32) -> Option<u8> {
        self.0.swap(false, Ordering::SeqCst).then_some(0x40)
    }
}

#[test]
fn interrupts_come_in_behind_the_instruction_after_sti() {
    type Next = (fn(&mut CodeAssembler, CodeLabel), Option<u64>);
    // What comes behind STI, and how long it is where the interrupt returns to behind it, not to the label.
    let cases: [Next; 6] = [
        (|a, _| a.nop().unwrap(), Some(1)),
        (|a, _| a.hlt().unwrap(), Some(1)),
        (|a, _| a.rdtscp().unwrap(), Some(3)),
        (|a, to| a.jmp(to).unwrap(), None),
        (|a, to| a.call(to).unwrap(), None),
        (|a, _| a.ret().unwrap(), None),
    ];
    for (n, (next, len)) in cases.into_iter().enumerate() {
        let mut target = 0;
        let program = assemble(CODE, |a| {
            let mut label = a.create_label();
            a.lea(rax, ptr(label)).unwrap();
            a.push(rax).unwrap();
            a.sti().unwrap();
            next(a, label);
            // Nothing of this is seen by the handler.
            a.mov(ebx, 1).unwrap();
            a.cli().unwrap();
            stop(a);
            a.set_label(&mut label).unwrap();
            a.mov(ebx, 2).unwrap();
            a.cli().unwrap();
            stop(a);
        });
        let mut machine = with_levels(Machine::long());
        machine.load(&program);
        machine.write(
            HANDLER,
            &assemble(HANDLER, |a| {
                a.mov(rdi, qword_ptr(rsp)).unwrap();
                stop(a);
            }),
        );
        let mut vcpu = DbtVcpu::new(machine.cpu, DbtOptions::default()).unwrap();
        assert_eq!(vcpu.run(&Waiting(AtomicBool::new(true))).unwrap(), Halt::TripleFault);
        let gpr = &vcpu.cpu().gpr;
        target += gpr[reg::RAX];
        let sti = CODE + 8;
        let expected = len.map_or(target, |len| sti + 1 + len);
        assert_eq!((gpr[reg::RDI], gpr[reg::RBX]), (expected, 0), "case {n}");
    }
}

#[test]
fn a_region_goes_on_behind_sti_where_no_interrupt_waits() {
    let program = assemble(CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 1000).unwrap();
        a.set_label(&mut again).unwrap();
        a.sti().unwrap();
        a.add(rax, 1).unwrap();
        a.cli().unwrap();
        a.sub(ecx, 1).unwrap();
        a.jnz(again).unwrap();
        a.sti().unwrap();
        a.ud2().unwrap();
    });
    let (left, vcpu) = same(Machine::long, &program);
    assert_eq!((left.gpr[reg::RAX], left.rflags & rflags::IF), (1000, rflags::IF));
    assert!(vcpu.cpu().counters.dispatches < 10);
}

#[test]
fn what_faulted_goes_on_in_translated_code() {
    let mut machine = with_levels(Machine::long());
    machine.unmap(HOLE);
    machine.load(&assemble(CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 100).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(qword_ptr(PAGE_TABLE + HOLE / 4096 * 8), 0).unwrap();
        a.invlpg(ptr(HOLE)).unwrap();
        a.stc().unwrap();
        a.mov(rax, qword_ptr(HOLE + 8)).unwrap();
        a.adc(rbx, 0).unwrap();
        a.sub(ecx, 1).unwrap();
        a.jnz(again).unwrap();
        stop(a);
    }));
    machine.write(
        HANDLER,
        &assemble(HANDLER, |a| {
            // RF of the frame is set: the instruction may have a breakpoint.
            a.mov(r8, qword_ptr(rsp + 24)).unwrap();
            a.add(rsp, 8).unwrap();
            a.mov(qword_ptr(PAGE_TABLE + HOLE / 4096 * 8), HOLE as i32 | 7).unwrap();
            a.iretq().unwrap();
        }),
    );
    let mut vcpu = DbtVcpu::new(machine.cpu, DbtOptions::default()).unwrap();
    assert_eq!(vcpu.run(&NullBus).unwrap(), Halt::TripleFault);
    let cpu = vcpu.cpu();
    assert_eq!((cpu.gpr[reg::RBX], cpu.gpr[8] & rflags::RF), (100, rflags::RF));
    // The fault, the write to the table's page, INVLPG and IRET.
    assert!(cpu.counters.tier0 < 450, "{}", cpu.counters.tier0);
}
