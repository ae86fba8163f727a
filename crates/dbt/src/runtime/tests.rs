//! Translated programs: what they compute, how they fault, and that changed code is noticed.

use iced_x86::code_asm::*;
use ruse_arch::{
    Exception, MpState,
    state::{reg, seg},
};
use ruse_engine::{Halt, Vcpu};

use super::{
    engine::DbtOptions,
    profile::{Profile, ProfileOptions},
    vcpu::DbtVcpu,
};
use crate::tier0::testing::{CODE, DATA, Machine, NullBus};

/// A vCPU with the program at [`CODE`], and the exception with which it ended (they end with UD2).
fn run(program: impl FnOnce(&mut CodeAssembler)) -> (DbtVcpu, Exception) {
    run_in(Machine::long(), program)
}

fn run_in(mut machine: Machine, program: impl FnOnce(&mut CodeAssembler)) -> (DbtVcpu, Exception) {
    machine.load(&assemble(program));
    let mut vcpu = DbtVcpu::new(machine.cpu, DbtOptions::default()).unwrap();
    let fault = vcpu.run_until_fault(&NullBus);
    (vcpu, fault)
}

/// The program with UD2 behind it, for [`CODE`].
fn assemble(program: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    program(&mut a);
    a.ud2().unwrap();
    a.assemble(CODE).unwrap()
}

fn result(vcpu: &DbtVcpu) -> u64 {
    vcpu.cpu().gpr[reg::RAX]
}

#[test]
fn loops_calls_and_returns() {
    // fib(20), recursively, through the guest's stack.
    let (vcpu, fault) = run(|a| {
        let (mut fib, mut base, mut done) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(rdi, 20u64).unwrap();
        a.call(fib).unwrap();
        a.jmp(done).unwrap();
        a.set_label(&mut fib).unwrap();
        a.cmp(rdi, 2).unwrap();
        a.jb(base).unwrap();
        a.push(rdi).unwrap();
        a.sub(rdi, 1).unwrap();
        a.call(fib).unwrap();
        a.pop(rdi).unwrap();
        a.push(rax).unwrap();
        a.sub(rdi, 2).unwrap();
        a.call(fib).unwrap();
        a.pop(rcx).unwrap();
        a.add(rax, rcx).unwrap();
        a.ret().unwrap();
        a.set_label(&mut base).unwrap();
        a.mov(rax, rdi).unwrap();
        a.ret().unwrap();
        a.set_label(&mut done).unwrap();
        a.nop().unwrap();
    });
    assert_eq!(fault, Exception::UD);
    assert_eq!(result(&vcpu), 6765);
    assert!(vcpu.cpu().counters.dispatches < 100, "blocks are linked");
}

#[test]
fn every_register_works_with_memory() {
    let (vcpu, _) = run(|a| {
        a.mov(r13, DATA).unwrap();
        a.mov(r14, 2u64).unwrap();
        a.mov(r15, 0x1122_3344_5566_7788u64).unwrap();
        a.mov(qword_ptr(r13 + r14 * 8 + 8), r15).unwrap();
        a.add(qword_ptr(r13 + 24), r14).unwrap();
        a.mov(rax, qword_ptr(r13 + r14 * 4 + 16)).unwrap();
        a.lea(r15, qword_ptr(r14 + r14 * 2 + 1)).unwrap();
        a.add(rax, r15).unwrap();
        a.mov(r14b, byte_ptr(r13 + 24)).unwrap();
        a.movzx(rcx, r14b).unwrap();
        a.add(rax, rcx).unwrap();
        a.mov(rsp, r13).unwrap();
        a.push(r14).unwrap();
        a.pop(r15).unwrap();
        a.add(rax, r15).unwrap();
    });
    let stored = 0x1122_3344_5566_778au64;
    assert_eq!(result(&vcpu), stored + 7 + 0x8a + 0x8a);
}

#[test]
fn high_bytes_and_memory_need_no_tier_0() {
    let (vcpu, _) = run(|a| {
        let mut again = a.create_label();
        a.mov(rbx, DATA).unwrap();
        a.mov(rsi, 1000u64).unwrap();
        a.mov(rax, 0u64).unwrap();
        a.mov(rdx, 0x1234_5678u64).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(byte_ptr(rbx), dh).unwrap();
        a.stc().unwrap();
        a.adc(ah, byte_ptr(rbx)).unwrap();
        a.xchg(byte_ptr(rbx + 1), dh).unwrap();
        a.mov(dh, byte_ptr(rbx)).unwrap();
        a.mov(rax, qword_ptr(rbx)).unwrap();
        a.sub(rsi, 1).unwrap();
        a.jne(again).unwrap();
    });
    assert_eq!(result(&vcpu), 0x5656);
    assert_eq!(vcpu.cpu().gpr[reg::RDX], 0x1234_5678);
    assert_eq!(vcpu.counters().get("tier0.adc"), 0);
    assert_eq!(vcpu.counters().get("tier0.mov"), 0);
}

#[test]
fn flags_survive_memory_accesses_and_exits() {
    let (vcpu, _) = run(|a| {
        let (mut carry, mut out) = (a.create_label(), a.create_label());
        a.mov(rbx, DATA).unwrap();
        a.mov(rax, u64::MAX).unwrap();
        a.add(rax, 1).unwrap();
        a.mov(rcx, qword_ptr(rbx)).unwrap();
        a.adc(rcx, 0).unwrap();
        a.stc().unwrap();
        a.jmp(carry).unwrap();
        a.set_label(&mut carry).unwrap();
        a.mov(rdx, qword_ptr(rbx)).unwrap();
        a.adc(rdx, 0).unwrap();
        a.cmp(rdx, 1).unwrap();
        a.inc(qword_ptr(rbx)).unwrap();
        a.jb(out).unwrap();
        a.lea(rax, qword_ptr(rcx + rdx * 2 + 0x10)).unwrap();
        a.set_label(&mut out).unwrap();
        a.nop().unwrap();
    });
    assert_eq!(result(&vcpu), 0x13);
}

#[test]
fn vectors_stay_in_host_registers() {
    let (vcpu, _) = run(|a| {
        a.mov(rbx, DATA).unwrap();
        a.mov(rax, 3u64).unwrap();
        a.cvtsi2sd(xmm1, rax).unwrap();
        a.sqrtsd(xmm2, xmm1).unwrap();
        a.mulsd(xmm2, xmm2).unwrap();
        a.movsd_2(qword_ptr(rbx), xmm2).unwrap();
        a.addsd(xmm2, qword_ptr(rbx)).unwrap();
        a.cvtsd2si(rax, xmm2).unwrap();
    });
    assert_eq!(result(&vcpu), 6);
}

#[test]
fn x87_stays_in_the_host_unit() {
    let (vcpu, _) = run(|a| {
        a.mov(rbx, DATA).unwrap();
        a.mov(dword_ptr(rbx), 0x37f).unwrap();
        a.fldcw(word_ptr(rbx)).unwrap();
        a.mov(dword_ptr(rbx), 7).unwrap();
        a.fild(dword_ptr(rbx)).unwrap();
        a.fadd_2(st0, st0).unwrap();
        a.fistp(qword_ptr(rbx)).unwrap();
        a.mov(rax, qword_ptr(rbx)).unwrap();
    });
    assert_eq!(result(&vcpu), 14);
}

#[test]
fn conversions_to_mmx_registers_obey_and_change_mxcsr() {
    let (vcpu, _) = run(|a| {
        let (mut alone, mut after) = (a.create_label(), a.create_label());
        a.mov(rbx, DATA).unwrap();
        // Round up.
        a.mov(dword_ptr(rbx), 0x5f80).unwrap();
        a.ldmxcsr(dword_ptr(rbx)).unwrap();
        a.mov(dword_ptr(rbx), 1.25f32.to_bits()).unwrap();
        a.mov(dword_ptr(rbx + 4), 2.25f32.to_bits()).unwrap();
        a.jmp(alone).unwrap();
        a.set_label(&mut alone).unwrap();
        a.cvtps2pi(mm0, qword_ptr(rbx)).unwrap();
        a.jmp(after).unwrap();
        a.set_label(&mut after).unwrap();
        a.movq(rax, mm0).unwrap();
        a.emms().unwrap();
        a.stmxcsr(dword_ptr(rbx)).unwrap();
        a.mov(rcx, qword_ptr(rbx)).unwrap();
    });
    assert_eq!(result(&vcpu), 3 << 32 | 2);
    assert_eq!(vcpu.cpu().gpr[reg::RCX] as u32, 0x5fa0, "the precision flag is set");
}

#[test]
fn a_page_fault_is_precise() {
    let mut machine = Machine::long();
    machine.unmap(DATA + 0x1000);
    let (vcpu, fault) = run_in(machine, |a| {
        a.mov(rbx, DATA + 0xff8).unwrap();
        a.mov(rax, 1u64).unwrap();
        a.mov(qword_ptr(rbx), rax).unwrap();
        a.mov(rax, 2u64).unwrap();
        a.mov(qword_ptr(rbx + 4), rax).unwrap();
        a.mov(rax, 3u64).unwrap();
    });
    assert_eq!(fault, Exception::pf(DATA + 0x1000, 2));
    assert_eq!(result(&vcpu), 2);
}

#[test]
fn division_by_zero_is_the_guests_fault() {
    let (vcpu, fault) = run(|a| {
        a.mov(rax, 5u64).unwrap();
        a.xor(edx, edx).unwrap();
        a.xor(ecx, ecx).unwrap();
        a.div(rcx).unwrap();
        a.mov(rax, 9u64).unwrap();
    });
    assert_eq!(fault, Exception::DE);
    assert_eq!(result(&vcpu), 5);
}

#[test]
fn an_unaligned_movaps_is_the_guests_fault() {
    let (_, fault) = run(|a| {
        a.mov(rbx, DATA + 8).unwrap();
        a.movaps(xmm0, xmmword_ptr(rbx)).unwrap();
    });
    assert_eq!(fault, Exception::gp(0));
}

#[test]
fn code_that_rewrites_itself_is_noticed() {
    let program = assemble(|a| {
        let (mut again, mut patch) = (a.create_label(), a.create_label());
        a.xor(eax, eax).unwrap();
        a.mov(ecx, 100).unwrap();
        a.lea(rbx, ptr(patch)).unwrap();
        a.set_label(&mut again).unwrap();
        // The immediate of the next ADD becomes the counter.
        a.mov(dword_ptr(rbx + 1), ecx).unwrap();
        a.set_label(&mut patch).unwrap();
        a.add(eax, 0x7fff_ffff).unwrap();
        a.dec(ecx).unwrap();
        a.jne(again).unwrap();
    });
    // After some times it is no longer translated each time.
    for (tier, translations) in [(Some(1), 100..=300), (None, 1..=50)] {
        let mut machine = Machine::long();
        machine.load(&program);
        let options = DbtOptions { tier, ..DbtOptions::default() };
        let mut vcpu = DbtVcpu::new(machine.cpu, options).unwrap();
        assert_eq!(vcpu.run_until_fault(&NullBus), Exception::UD);
        assert_eq!(result(&vcpu), 5050);
        let made = vcpu.counters().get("blocks.made");
        assert!(translations.contains(&made), "{made} in tier {tier:?}");
    }
}

#[test]
fn code_that_comes_to_read_flags_finds_them() {
    let (vcpu, _) = run(|a| {
        let (mut again, mut target, mut done) = (a.create_label(), a.create_label(), a.create_label());
        a.xor(eax, eax).unwrap();
        a.xor(edx, edx).unwrap();
        a.mov(ecx, 5).unwrap();
        a.mov(ebx, 10).unwrap();
        a.lea(rdi, ptr(target)).unwrap();
        a.set_label(&mut again).unwrap();
        // Nobody needs this carry as long as ADD is what comes next.
        a.cmp(ecx, ebx).unwrap();
        a.jne(target).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut target).unwrap();
        a.add(eax, edx).unwrap();
        a.dec(ecx).unwrap();
        a.je(done).unwrap();
        a.cmp(ecx, 3).unwrap();
        a.jne(again).unwrap();
        // ADD becomes ADC.
        a.mov(byte_ptr(rdi), 0x11).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut done).unwrap();
    });
    assert_eq!(result(&vcpu), 3);
}

#[test]
fn reads_that_leave_a_page_are_gathered() {
    let (vcpu, _) = run(|a| {
        a.mov(rbx, DATA + 0xffc).unwrap();
        a.mov(dword_ptr(rbx), 0x1111_1111).unwrap();
        a.mov(dword_ptr(rbx + 4), 0x2222_2222).unwrap();
        a.mov(rax, qword_ptr(rbx)).unwrap();
        a.movdqu(xmm0, xmmword_ptr(rbx - 8)).unwrap();
        a.pextrq(rcx, xmm0, 1).unwrap();
        a.sub(rax, rcx).unwrap();
    });
    assert_eq!(result(&vcpu), 0x2222_2222_1111_1111 - 0x2222_2222_1111_1111);
}

#[test]
fn check_mode_finds_a_translation_that_is_wrong() {
    let mut machine = Machine::long();
    machine.load(&assemble(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 3).unwrap();
        a.set_label(&mut again).unwrap();
        a.push(rcx).unwrap();
        a.pop(rdx).unwrap();
        a.add(rax, 5).unwrap();
        a.dec(ecx).unwrap();
        a.jne(again).unwrap();
    }));
    let ram = machine.ram.clone();
    let options = DbtOptions { check: true, ..DbtOptions::default() };
    let mut vcpu = DbtVcpu::new(machine.cpu, options).unwrap();
    // There is no interrupt table: UD2 ends in a triple fault.
    assert_eq!(vcpu.run(&NullBus).unwrap(), Halt::TripleFault);
    assert_eq!(result(&vcpu), 15);
    // The constant of the addition changes without notice: tier 0 sees the new one, the translation has the old one.
    let constant = ram.host_page(CODE).unwrap().wrapping_add((CODE % 4096) as usize + 9);
    crate::mmu::access::store(constant, &[6]);
    let cpu = vcpu.cpu_mut();
    (cpu.rip, cpu.mp_state) = (CODE, MpState::Running);
    let text = vcpu.run(&NullBus).unwrap_err().to_string();
    assert!(text.contains("add rax,6") && text.contains("register 0: 0x15 / 0x14"), "{text}");
}

#[test]
fn the_time_stamp_counter_runs_on_over_an_init() {
    let mut machine = Machine::long();
    machine.load(&assemble(|_| ()));
    let mut vcpu = DbtVcpu::new(machine.cpu, DbtOptions::default()).unwrap();
    let offset = vcpu.cpu().tsc_offset;
    vcpu.cpu_mut().tsc_adjust = 5;
    vcpu.handle().init();
    vcpu.handle().kick();
    assert_eq!(vcpu.run(&NullBus).unwrap(), Halt::Kicked);
    assert_eq!(vcpu.cpu().seg[seg::CS].selector, 0xf000, "INIT has come");
    // Kernels compare the counters of their CPUs to the cycle.
    assert_eq!((vcpu.cpu().tsc_offset, vcpu.cpu().tsc_adjust), (offset, 5));
}

#[test]
fn a_branch_out_of_the_address_space_faults_where_it_is() {
    const OUTSIDE: u64 = 1 << 63;
    let branches: [fn(&mut CodeAssembler); 4] = [
        |a| a.jmp(rbx).unwrap(),
        |a| a.call(rbx).unwrap(),
        |a| a.call(qword_ptr(rsp)).unwrap(),
        |a| a.ret_1(16).unwrap(),
    ];
    for branch in branches {
        let (vcpu, fault) = run(|a| {
            a.mov(rbx, OUTSIDE).unwrap();
            a.push(rbx).unwrap();
            a.mov(qword_ptr(rsp - 8), 7).unwrap();
            a.lea(rax, ptr(rsp)).unwrap();
            branch(a);
        });
        assert_eq!(fault, Exception::gp(0));
        assert_eq!(vcpu.cpu().gpr[reg::RSP], result(&vcpu));
        assert!((CODE..CODE + 64).contains(&vcpu.cpu().rip));
    }
}

#[test]
fn regions_go_on_behind_what_tier_0_executes() {
    let (vcpu, fault) = run(|a| {
        a.mov(rdi, DATA).unwrap();
        a.mov(rcx, 100u64).unwrap();
        a.mov(eax, 7u32).unwrap();
        a.vmovd(xmm1, eax).unwrap();
        a.cmp(eax, 9).unwrap();
        a.rep().stosq().unwrap();
        // The flags are those of the comparison, the vector register is what it was.
        a.setb(bl).unwrap();
        a.vmovd(r8d, xmm1).unwrap();
        a.mov(rax, qword_ptr(DATA + 8 * 99)).unwrap();
        a.mov(r9d, cs).unwrap();
        a.mov(r13, u64::MAX).unwrap();
        a.mov(r13d, ss).unwrap();
    });
    assert_eq!(fault, Exception::UD);
    let gpr = &vcpu.cpu().gpr;
    assert_eq!((result(&vcpu), gpr[reg::RBX] & 0xff, gpr[8]), (7, 1, 7));
    assert_eq!([gpr[9], gpr[13]], [seg::CS, seg::SS].map(|s| u64::from(vcpu.cpu().seg[s].selector)));
    assert_eq!(gpr[reg::RCX], 0);
    assert!(vcpu.cpu().counters.dispatches <= 2, "the region is not left");
}

#[test]
fn a_fault_of_what_tier_0_executes_in_a_region_is_precise() {
    let mut machine = Machine::long();
    machine.unmap(DATA + 0x1000);
    let (vcpu, fault) = run_in(machine, |a| {
        a.mov(rax, 5u64).unwrap();
        a.mov(rdi, DATA + 0x1000 - 24).unwrap();
        a.mov(rcx, 100u64).unwrap();
        a.rep().stosq().unwrap();
        a.mov(rax, 6u64).unwrap();
    });
    assert_eq!(fault, Exception::pf(DATA + 0x1000, 2));
    let gpr = &vcpu.cpu().gpr;
    assert_eq!((result(&vcpu), gpr[reg::RDI], gpr[reg::RCX]), (5, DATA + 0x1000, 97));
}

#[test]
fn code_that_tier_0_writes_from_within_the_region_is_noticed() {
    let (vcpu, _) = run(|a| {
        let mut patched = a.create_label();
        // The operand of the last instruction, which lies behind the store.
        a.lea(rdi, ptr(patched)).unwrap();
        a.add(rdi, 1).unwrap();
        a.mov(eax, 42u32).unwrap();
        a.stosb().unwrap();
        a.set_label(&mut patched).unwrap();
        a.mov(eax, 1u32).unwrap();
    });
    assert_eq!(result(&vcpu), 42);
}

#[test]
fn what_happens_is_counted() {
    let mut machine = Machine::long();
    machine.unmap(DATA + 0x1000);
    let (vcpu, _) = run_in(machine, |a| {
        a.mov(rbx, DATA).unwrap();
        a.mov(rax, qword_ptr(rbx)).unwrap();
        a.mov(rax, qword_ptr(rbx + 0x400)).unwrap();
        a.mov(qword_ptr(rbx + 0x400), rax).unwrap();
        a.mov(qword_ptr(rbx + 0x4000), rax).unwrap();
        a.mov(rsi, rbx).unwrap();
        a.lodsb().unwrap();
        a.lodsb().unwrap();
        a.mov(qword_ptr(rbx + 0x1000), rax).unwrap();
    });
    let counters = vcpu.counters();
    let expected = [
        ("tlb.misses.read.kernel", 1),
        ("tlb.misses.fetch.kernel", 1),
        ("tlb.misses.read.user", 0),
        ("tier0.lodsb", 2),
        ("tier0.mov", 1),
        ("helpers.step", 2),
        ("helpers.step.left", 0),
        ("helpers.access.refused", 1),
        ("exits.fault", 1),
        ("translation.instructions", 10),
    ];
    for (name, count) in expected {
        assert_eq!(counters.get(name), count, "{name} of {counters:?}");
    }
    assert!(counters.get("translation.host_bytes") > counters.get("translation.guest_bytes"));
    assert!(counters.get("translation.ns") > 0);
}

#[test]
fn a_dump_names_what_is_translated() {
    let directory = tempfile::tempdir().unwrap();
    let options = ProfileOptions { jitdump: Some(directory.path().to_owned()), ..ProfileOptions::default() };
    let mut machine = Machine::long();
    machine.load(&assemble(|a| a.mov(eax, 7u32).unwrap()));
    let mut vcpu = DbtVcpu::new(machine.cpu, DbtOptions::default()).unwrap();
    vcpu.blocks.tell(Profile::start(&options).unwrap().unwrap());
    vcpu.run_until_fault(&NullBus);
    let file = directory.path().join(format!("jit-{}.dump", std::process::id()));
    let bytes = std::fs::read(file).unwrap();
    let has = |what: &[u8]| bytes.windows(what.len()).any(|window| window == what);
    assert!(has(b"shared_code\0"));
    // mov eax, 7
    assert!(has(format!("kernel_{CODE:x}\0").as_bytes()) && has(&[0xb8, 7, 0, 0, 0]));
}
