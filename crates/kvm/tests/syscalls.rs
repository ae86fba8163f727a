//! System calls, and what lies near: on a KVM that leaves SYSCALL unfinished as on all others.

mod support;

use iced_x86::{IcedError, code_asm::*};
use ruse_arch::{
    Segment, VcpuState,
    flags::{efer, rflags},
    msr,
};
use ruse_dbt::{DbtEngine, DbtOptions};
use ruse_engine::Engine;
use ruse_kvm::KvmEngine;
use support::*;

/// Where the kernel's parts lie; it runs them at [`KERNEL`], where users have no rights.
const ENTRY: u64 = 0x2000;
const FAULT: u64 = 0x3000;
const DEBUG: u64 = 0x4000;
const BOOT: u64 = 0x5000;
/// The task-state segment, and the kernel's stack, which it names.
const TSS: u64 = 0x7000;
const KERNEL_STACK: u64 = KERNEL + 0x7000;

type Program = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Tells where it was called from, on which stack, and of flags; goes back. The third call is the end.
fn entry(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut last = a.create_label();
    a.mov(eax, cs)?;
    a.out(PORT, eax)?;
    a.mov(eax, ss)?;
    a.out(PORT, eax)?;
    a.mov(rax, rcx)?;
    a.out(PORT, eax)?;
    a.mov(rax, rsp)?;
    a.out(PORT, eax)?;
    a.mov(rsp, KERNEL_STACK)?;
    a.pushfq()?;
    a.pop(rax)?;
    a.and(eax, (rflags::IF | rflags::DF) as i32)?;
    a.out(PORT, eax)?;
    a.inc(rdi)?;
    a.cmp(rdi, 3)?;
    a.je(last)?;
    a.mov(rsp, STACK)?;
    a.sysretq()?;
    a.set_label(&mut last)?;
    end(a)
}

/// Tells of a page fault, and goes on where R15 says if that is not zero.
fn fault(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut last = a.create_label();
    a.mov(rax, cr2)?;
    a.out(PORT, eax)?;
    a.test(r15, r15)?;
    a.jz(last)?;
    a.mov(qword_ptr(rsp + 8), r15)?;
    a.add(rsp, 8)?;
    a.iretq()?;
    a.set_label(&mut last)?;
    end(a)
}

/// Tells of a debug exception: DR6's bit for single steps, and where.
fn debug(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, dr6)?;
    a.and(eax, 1 << 14)?;
    a.out(PORT, eax)?;
    a.mov(rax, qword_ptr(rsp))?;
    a.out(PORT, eax)?;
    end(a)
}

/// A machine with this kernel, and a state before its user's program.
fn machine(engine: &dyn Engine, user: Program) -> (Rig, VcpuState) {
    let rig = Rig::new(engine);
    for (at, part) in [(ENTRY, entry as Program), (FAULT, fault), (DEBUG, debug)] {
        rig.put(at, &assemble(64, KERNEL + at, |a| part(a).unwrap()));
    }
    rig.put(CODE, &assemble(64, CODE, |a| user(a).unwrap()));
    let mut state = long_mode(&rig.ram, 3);
    put_gate(&rig.ram, 14, KERNEL + FAULT);
    put_gate(&rig.ram, 1, KERNEL + DEBUG);
    rig.put(TSS + 4, &KERNEL_STACK.to_le_bytes());
    state.tr = Segment { base: KERNEL + TSS, limit: 0x67, attr: 0x8b, selector: 0x18 };
    state.efer |= efer::SCE;
    state.star = 8 << 32 | 0x18 << 48;
    state.lstar = KERNEL + ENTRY;
    state.sfmask = rflags::IF | rflags::DF;
    (rig, state)
}

/// The state before a program of the kernel, which this machine runs before its user's.
fn before(
    rig: &Rig,
    user: VcpuState,
    boot: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> VcpuState {
    rig.put(BOOT, &assemble(64, KERNEL + BOOT, |a| boot(a).unwrap()));
    VcpuState { rip: KERNEL + BOOT, seg: long_mode(&rig.ram, 0).seg, ..user }
}

/// Goes to the user's program.
fn leave(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rcx, CODE)?;
    a.mov(r11, rflags::FIXED)?;
    a.mov(rsp, STACK)?;
    a.sysretq()
}

/// What a machine tells from this state on.
fn told(rig: &mut Rig, state: &VcpuState) -> Vec<u64> {
    rig.vcpu.set_state(state).unwrap();
    let bus = Recorder::default();
    bus.run(&mut *rig.vcpu);
    bus.written()
}

/// Calls the kernel three times, with a flag that it masks.
fn three_calls(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.std()?;
    a.syscall()?;
    a.syscall()?;
    a.syscall()
}

/// What the kernel tells of that.
fn calls() -> Vec<u64> {
    [3, 5, 7].map(|offset| [8, 0x10, CODE + offset, STACK, 0]).concat()
}

#[test]
fn a_system_call_enters_the_kernel_and_comes_back() {
    for engine in engines() {
        let (mut rig, state) = machine(&*engine, three_calls);
        assert_eq!(told(&mut rig, &state), calls(), "{}", engine.name());
    }
}

#[test]
fn an_entry_that_the_guest_sets_itself_is_taken() {
    for engine in engines() {
        let (mut rig, user) = machine(&*engine, three_calls);
        let state = before(&rig, VcpuState { lstar: 0, ..user }, |a| {
            a.mov(ecx, msr::LSTAR)?;
            a.mov(rax, KERNEL + ENTRY)?;
            a.xor(edx, edx)?;
            a.wrmsr()?;
            a.rdmsr()?;
            a.out(PORT, eax)?;
            leave(a)
        });
        let expected = [vec![KERNEL + ENTRY], calls()].concat();
        assert_eq!(told(&mut rig, &state), expected, "{}", engine.name());
    }
}

#[test]
fn an_entry_that_is_not_canonical_is_refused() {
    // Other KVMs leave that to the CPU, and QEMU's does not check it.
    let finishing = kvm().filter(KvmEngine::finishes_syscalls).map(|kvm| Box::new(kvm) as Box<dyn Engine>);
    let translator = Box::new(DbtEngine::new(DbtOptions::default())) as Box<dyn Engine>;
    for engine in [translator].into_iter().chain(finishing) {
        let (mut rig, user) = machine(&*engine, three_calls);
        put_gate(&rig.ram, 13, KERNEL + FAULT);
        let state = before(&rig, VcpuState { cr2: 0x77, ..user }, |a| {
            a.mov(ecx, msr::LSTAR)?;
            a.mov(edx, 0x4000_0000)?;
            a.wrmsr()?;
            a.out(PORT, eax)?;
            end(a)
        });
        assert_eq!(told(&mut rig, &state), [0x77], "{}", engine.name());
    }
}

#[test]
fn page_faults_are_the_guest_s_as_before() {
    const NOTHING: u64 = 2 << 30;
    for engine in engines() {
        let (mut rig, user) = machine(&*engine, three_calls);
        // The kernel's own: a return to user code would need descriptors for it.
        let state = before(&rig, user, |a| {
            for n in 0..3 {
                let mut after = a.create_label();
                a.lea(r15, ptr(after))?;
                a.mov(rbx, NOTHING + n)?;
                a.mov(rax, qword_ptr(rbx))?;
                a.set_label(&mut after)?;
                a.nop()?;
            }
            leave(a)
        });
        let expected = [vec![NOTHING, NOTHING + 1, NOTHING + 2], calls()].concat();
        assert_eq!(told(&mut rig, &state), expected, "{}", engine.name());
    }
}

#[test]
fn a_user_s_jump_to_the_entry_is_a_page_fault() {
    for engine in engines() {
        let (mut rig, state) = machine(&*engine, |a| {
            a.mov(rax, KERNEL + ENTRY)?;
            a.jmp(rax)
        });
        // With the flags that users have.
        let state = VcpuState { rflags: rflags::FIXED | rflags::IF, ..state };
        assert_eq!(told(&mut rig, &state), [KERNEL + ENTRY], "{}", engine.name());
    }
}

#[test]
fn a_user_s_single_steps_are_the_guest_s() {
    for engine in engines() {
        let (mut rig, state) = machine(&*engine, |a| {
            a.nop()?;
            a.nop()
        });
        let state = VcpuState { rflags: state.rflags | rflags::TF, ..state };
        assert_eq!(told(&mut rig, &state), [1 << 14, CODE + 1], "{}", engine.name());
    }
}

#[test]
fn system_calls_come_out_right_while_the_guest_moves() {
    const COUNT: u32 = 1_000_000;
    let Some(kvm) = kvm() else { return };
    let (first, state) = machine(&kvm, |a| {
        let mut again = a.create_label();
        a.mov(ebx, COUNT)?;
        a.set_label(&mut again)?;
        a.syscall()?;
        a.dec(ebx)?;
        a.jnz(again)?;
        a.inc(edi)?;
        a.syscall()
    });
    // The kernel adds up where it is called from, until RDI tells that it was the last time.
    let entry = assemble(64, KERNEL + ENTRY, |a| {
        let mut last = a.create_label();
        a.add(r8, rcx).unwrap();
        a.test(edi, edi).unwrap();
        a.jnz(last).unwrap();
        a.sysretq().unwrap();
        a.set_label(&mut last).unwrap();
        end(a).unwrap();
    });
    first.put(ENTRY, &entry);
    let second = Rig::over(&DbtEngine::new(DbtOptions::default()), first.ram.clone());
    let mut moves = 0;
    let after = move_at_random(&mut [first, second], state, |_, _| moves += 1);
    println!("{moves} moves");
    let (loop_return, last_return) = (CODE + 5 + 2, CODE + 5 + 2 + 2 + 2 + 2 + 2);
    assert_eq!(after.gpr[8], u64::from(COUNT) * loop_return + last_return);
}
