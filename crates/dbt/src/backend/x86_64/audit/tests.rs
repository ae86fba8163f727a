//! Code that must not be made is found.

use iced_x86::code_asm::*;

use super::*;
use crate::{cpu::Cpu, mmu::tlb::ENTRIES};

const AT: u64 = 0x7000_0000;
const THUNKS: Thunks = Thunks {
    enter: 1,
    exit_link: AT + 0x10_0000,
    lookup_link: AT + 0x10_0100,
    exit_poll: AT + 0x10_0200,
    exit_miss: AT + 0x10_0300,
    unforeseen_return: AT + 0x10_0400,
    forget_returns: AT + 0x10_0500,
    step: AT + 0x10_0600,
    interpret: AT + 0x10_0700,
    system_call: AT + 0x10_0800,
    system_return: AT + 0x10_0900,
    exit_fault: 1,
    slow_access: [[1; 2]; ACCESS_SIZES.len()],
    slow_group: AT + 0x10_0a00,
    load_vectors: AT + 0x10_0b00,
    load_x87: AT + 0x10_0c00,
};
const MASK: i32 = ((ENTRIES - 1) * size_of::<Entry>()) as i32;

fn gs(at: usize) -> AsmMemoryOperand {
    qword_ptr(at as u64).gs()
}

/// A probe for `size` bytes at RDI.
fn probe(a: &mut CodeAssembler, size: i32, write: bool, mask: i32) {
    a.mov(r14, rdi).unwrap();
    a.mov(r15, r14).unwrap();
    a.shr(r15, 7).unwrap();
    a.and(r15d, mask).unwrap();
    a.add(r15, gs(std::mem::offset_of!(Cpu, tlb))).unwrap();
    a.sub(r14, qword_ptr(r15 + Entry::tag_offset(write))).unwrap();
    a.cmp(r14, 4096 - size).unwrap();
    let mut missed = a.create_label();
    let mut over = a.create_label();
    a.ja(missed).unwrap();
    a.jmp(over).unwrap();
    a.set_label(&mut missed).unwrap();
    a.jmp(THUNKS.interpret).unwrap();
    a.set_label(&mut over).unwrap();
    a.add(r14, qword_ptr(r15 + Entry::HOST_OFFSET)).unwrap();
}

/// What is said of code, with a jump to tier 0 behind it. Jumps are long, as those of the back end.
fn said(code: impl FnOnce(&mut CodeAssembler)) -> Result<(), String> {
    let mut a = CodeAssembler::new(64).unwrap();
    a.set_prefer_short_branch(false);
    code(&mut a);
    a.jmp(THUNKS.interpret).unwrap();
    let options = iced_x86::BlockEncoderOptions::DONT_FIX_BRANCHES;
    let laid = a.assemble_options(AT, options).unwrap();
    let code = Code {
        bytes: laid.inner.code_buffer,
        links: Vec::new(),
        marks: Vec::new(),
        rounds: 0..0,
        relocations: Vec::new(),
    };
    audit(&code, AT, &THUNKS)
}

#[track_caller]
fn refused(why: &str, code: impl FnOnce(&mut CodeAssembler)) {
    let said = said(code).expect_err("it must be refused");
    assert!(said.contains(why), "{said}");
}

#[test]
fn accesses_are_within_what_a_probe_has_found() {
    said(|a| {
        probe(a, 8, true, MASK);
        a.mov(rax, qword_ptr(r14)).unwrap();
        a.mov(dword_ptr(r14 + 4), eax).unwrap();
        a.add(eax, gs(std::mem::offset_of!(Cpu, gpr) + 8 * 13)).unwrap();
    })
    .unwrap_or_else(|what| panic!("{what}"));
    let unasked = "that the probe has not asked for";
    refused(unasked, |a| {
        probe(a, 8, true, MASK);
        a.mov(rax, qword_ptr(r14 + 1)).unwrap();
    });
    refused(unasked, |a| {
        probe(a, 8, false, MASK);
        a.mov(qword_ptr(r14), rax).unwrap();
    });
    refused(unasked, |a| {
        probe(a, 8, false, MASK);
        a.movups(xmm0, xmmword_ptr(r14)).unwrap();
    });
    refused(unasked, |a| {
        probe(a, 8, true, MASK);
        a.bts(qword_ptr(r14), rax).unwrap();
    });
    let unfound = "no probe has found";
    refused(unfound, |a| a.mov(rax, qword_ptr(r14)).unwrap());
    refused(unfound, |a| {
        probe(a, 8, true, MASK);
        a.add(r14, 8).unwrap();
        a.mov(rax, qword_ptr(r14)).unwrap();
    });
    refused("no entry", |a| probe(a, 8, true, MASK + 32));
    refused("not T0's", |a| a.mov(rax, qword_ptr(rdi)).unwrap());
    refused("not T0's", |a| a.mov(rax, qword_ptr(0x1000u64)).unwrap());
    refused("a segment", |a| a.mov(rax, qword_ptr(0x1000u64).fs()).unwrap());
    refused("may leave its page", |a| a.rep().movsb().unwrap());
}

#[test]
fn what_is_known_holds_on_all_ways() {
    // A way round the comparison.
    refused("no probe has found", |a| {
        let mut over = a.create_label();
        a.test(eax, eax).unwrap();
        a.je(over).unwrap();
        probe(a, 8, true, MASK);
        a.set_label(&mut over).unwrap();
        a.mov(rax, qword_ptr(r14)).unwrap();
    });
    // The address of a group is another one in the second round.
    refused("no probe has found", |a| {
        let mut again = a.create_label();
        probe(a, 8, true, MASK);
        a.set_label(&mut again).unwrap();
        a.mov(rax, qword_ptr(r14)).unwrap();
        a.mov(r14, rbx).unwrap();
        a.jmp(again).unwrap();
    });
}

#[test]
fn the_vcpu_block_is_used_where_regions_use_it() {
    let leave = "regions leave alone";
    for at in [
        std::mem::offset_of!(Cpu, this),
        std::mem::offset_of!(Cpu, jumps),
        std::mem::offset_of!(Cpu, host_rsp),
    ] {
        refused(leave, |a| a.mov(gs(at), rax).unwrap());
    }
    refused(leave, |a| a.mov(gs(std::mem::offset_of!(Cpu, tlb)), r14).unwrap());
    refused(leave, |a| a.mov(rax, gs(std::mem::offset_of!(Cpu, mmu))).unwrap());
    refused(leave, |a| a.mov(gs(std::mem::offset_of!(Cpu, stack_limit)), rax).unwrap());
    // The page that a group remembers has to come from the TLB.
    refused("no probe has found", |a| {
        a.mov(gs(std::mem::offset_of!(Cpu, group_pages)), rax).unwrap();
        a.mov(gs(std::mem::offset_of!(Cpu, group_pages) + 8), rbx).unwrap();
        a.mov(r14, rdi).unwrap();
        a.sub(r14, gs(std::mem::offset_of!(Cpu, group_pages))).unwrap();
        a.cmp(r14, 4088).unwrap();
        a.ja(THUNKS.unforeseen_return).unwrap();
        a.add(r14, gs(std::mem::offset_of!(Cpu, group_pages) + 8)).unwrap();
        a.mov(rax, qword_ptr(r14)).unwrap();
    });
}

#[test]
fn nothing_of_the_system_runs_and_no_jump_leads_out() {
    let system: [fn(&mut CodeAssembler); 10] = [
        |a| a.syscall().unwrap(),
        |a| a.int3().unwrap(),
        |a| a.hlt().unwrap(),
        |a| a.cpuid().unwrap(),
        |a| a.out(dx, al).unwrap(),
        |a| a.std().unwrap(),
        |a| a.wrgsbase(rax).unwrap(),
        |a| a.mov(cr3, rax).unwrap(),
        |a| a.popfq().unwrap(),
        |a| a.ud2().unwrap(),
    ];
    for one in system {
        refused("", one);
    }
    refused("a register of the system", |a| a.mov(fs, eax).unwrap());
    refused("the host's stack", |a| a.mov(rsp, rax).unwrap());
    refused("the host's stack", |a| a.push(rax).unwrap());
    refused("on the stack", |a| a.pushfq().unwrap());
    refused("a jump to anywhere", |a| a.jmp(rax).unwrap());
    refused("a jump to anywhere", |a| a.call(gs(std::mem::offset_of!(Cpu, scratch))).unwrap());
    refused("a jump out of the region", |a| a.jmp(AT + 0x1000).unwrap());
    refused("no instruction begins", |a| a.jmp(AT + 1).unwrap());
}

#[test]
fn constants_lie_in_the_region_and_pass_by_the_stack() {
    let pushes = |a: &mut CodeAssembler, pops: bool| {
        let (mut constant, mut over) = (a.create_label(), a.create_label());
        probe(a, 8, true, MASK);
        a.push(qword_ptr(constant)).unwrap();
        if pops {
            a.pop(qword_ptr(r14)).unwrap();
        }
        a.cmp(r14, qword_ptr(constant)).unwrap();
        a.jmp(over).unwrap();
        a.set_label(&mut constant).unwrap();
        // None that may be executed: WBINVD, CLI.
        a.db(&[0x0f, 0x09, 0xfa, 0, 0, 0, 0, 0]).unwrap();
        a.set_label(&mut over).unwrap();
        a.nop().unwrap();
    };
    assert_eq!(said(|a| pushes(a, true)), Ok(()));
    refused("left on the stack", |a| pushes(a, false));
    // cmp r14, [rip + distance]
    for distance in [-8i32, 0x1000] {
        let [a, b, c, d] = distance.to_le_bytes();
        let bytes = [0x4c, 0x3b, 0x35, a, b, c, d];
        refused("no constant of the region", |a| a.db(&bytes).unwrap());
    }
    refused("that must not run", |a| {
        let mut constant = a.create_label();
        a.cmp(r14, qword_ptr(constant)).unwrap();
        a.set_label(&mut constant).unwrap();
        a.db(&[0x0f, 0x09, 0xfa, 0, 0, 0, 0, 0]).unwrap();
    });
}
