//! Blocks that are copied for the same code at another linear address.

use iced_x86::{IcedError, code_asm::*};
use ruse_arch::{Exception, state::reg};
use ruse_cases::{case::CODE as CASE, generate::Generator, pools::Pools, program::program};
use ruse_engine::Vcpu;

use super::*;
use crate::{
    DbtOptions,
    runtime::{enter, vcpu::DbtVcpu},
    tier0::testing::{CODE, DATA, Machine, NullBus, PAGE_TABLE},
};

/// Where all memory is once more, and once more: in the lower half, and where no code can be copied to.
const ALIASES: [u64; 2] = [0x5500_0000_0000, 0x7f00_0000_0000];
const UPPER: u64 = 0xffff_8000_0000_0000;

/// A vCPU with a program, and the same memory at [`ALIASES`] and [`UPPER`].
fn vcpu(program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> DbtVcpu {
    let mut machine = Machine::long();
    for alias in [ALIASES[0], ALIASES[1], UPPER] {
        machine.write_u64(0x1000 + (alias >> 39 & 0x1ff) * 8, 0x2007);
    }
    machine.load(&assemble(program));
    DbtVcpu::new(machine.cpu, DbtOptions { audit: true, ..DbtOptions::default() }).unwrap()
}

fn assemble(program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    program(&mut a).unwrap();
    a.ud2().unwrap();
    a.assemble(CODE).unwrap()
}

/// Runs the program so much higher: the exception at its end, how far behind its beginning, and RAX.
fn run(vcpu: &mut DbtVcpu, higher: u64) -> (Exception, u64, u64) {
    vcpu.cpu_mut().rip = CODE + higher;
    let fault = vcpu.run_until_fault(&NullBus);
    (fault, vcpu.cpu().rip.wrapping_sub(CODE + higher), vcpu.cpu().gpr[reg::RAX])
}

/// How many blocks were made and copied.
fn counts(vcpu: &DbtVcpu) -> (u64, u64) {
    let counters = vcpu.counters();
    (counters.get("blocks.made"), counters.get("blocks.copied"))
}

#[test]
fn code_at_another_address_is_copied_and_knows_where_it_is() {
    let mut vcpu = vcpu(|a| {
        let (mut function, mut over, mut again, mut data) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.xor(eax, eax)?;
        a.mov(ecx, 10)?;
        a.set_label(&mut again)?;
        a.call(function)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.add(rax, qword_ptr(data))?;
        a.mov(rbx, qword_ptr(rsp))?;
        a.ret()?;
        a.set_label(&mut data)?;
        a.dq(&[1000])?;
        a.set_label(&mut over)?;
        a.lea(rdx, ptr(again))?;
        a.sub(rbx, rdx)?;
        a.add(rax, rbx)?;
        // The address of the code, as far as it is not everywhere the same.
        a.shr(rdx, 39)?;
        a.add(rax, rdx)
    });
    let expected = |alias: u64| (Exception::UD, 10_005 + (alias >> 39));
    let mut end = None;
    for alias in ALIASES {
        let (fault, at, result) = run(&mut vcpu, alias);
        assert_eq!((fault, result), expected(alias));
        assert_eq!(*end.get_or_insert(at), at);
    }
    let (made, copied) = counts(&vcpu);
    assert_eq!(made, copied);
    // The copies stay, and so do the blocks that they are of.
    ALIASES.into_iter().for_each(|alias| _ = run(&mut vcpu, alias));
    assert_eq!(counts(&vcpu), (made, copied));
}

#[test]
fn code_is_not_copied_to_where_addresses_look_different() {
    let mut vcpu = vcpu(|a| {
        let mut end = a.create_label();
        a.lea(rax, ptr(end))?;
        a.set_label(&mut end)?;
        a.nop()
    });
    for higher in [ALIASES[0], UPPER, 0] {
        assert_eq!(run(&mut vcpu, higher).2, CODE + 7 + higher);
    }
    assert_eq!(counts(&vcpu), (3, 0));
    // Nor are those copied that were made there.
    assert_eq!(run(&mut vcpu, ALIASES[1]).2, CODE + 7 + ALIASES[1]);
    assert_eq!(counts(&vcpu), (3, 1));
}

#[test]
fn faults_in_copies_are_precise() {
    let mut vcpu = vcpu(|a| {
        a.mov(rax, qword_ptr(DATA))?;
        a.mov(ecx, 7)?;
        a.test(rax, rax)?;
        let mut over = a.create_label();
        a.jne(over)?;
        a.div(rax)?;
        a.set_label(&mut over)?;
        a.mov(rax, qword_ptr(DATA + 0x1000))
    });
    let tables = vcpu.cpu().mmu.host_page(PAGE_TABLE).unwrap();
    crate::mmu::access::store(tables.wrapping_add(((DATA + 0x1000) >> 12) as usize * 8), &[0]);
    let page_fault = Exception::pf(DATA + 0x1000, 0);
    let mut seen = Vec::new();
    for alias in ALIASES {
        for (value, expected) in [(0u8, Exception::DE), (1, page_fault)] {
            let data = vcpu.cpu().mmu.host_page(DATA).unwrap();
            crate::mmu::access::store(data, &[value]);
            let (fault, at, _) = run(&mut vcpu, alias);
            assert_eq!(fault, expected);
            seen.push(at);
        }
    }
    assert_eq!(seen[..2], seen[2..]);
    let (made, copied) = counts(&vcpu);
    assert_eq!(made, copied);
}

#[test]
fn code_that_was_changed_is_not_copied() {
    let mut vcpu = vcpu(|a| a.mov(eax, 1));
    assert_eq!(run(&mut vcpu, ALIASES[0]).2, 1);
    assert_eq!(run(&mut vcpu, ALIASES[1]).2, 1);
    assert_eq!(counts(&vcpu), (1, 1));
    let code = vcpu.cpu().mmu.host_page(CODE).unwrap();
    crate::mmu::access::store(code.wrapping_add(CODE as usize % 4096 + 1), &[2]);
    vcpu.cpu().mmu.code.written(CODE, None);
    assert_eq!(run(&mut vcpu, ALIASES[1]).2, 2);
    assert_eq!(counts(&vcpu), (2, 1));
    assert_eq!(run(&mut vcpu, ALIASES[0]).2, 2);
    assert_eq!(counts(&vcpu), (2, 2));
}

/// A store of blocks without a vCPU.
fn store() -> Blocks {
    let calls = Calls {
        slow_access: enter::slow_access,
        slow_group: enter::slow_group,
        step: enter::step,
        interpret: Some(enter::INTERPRET),
    };
    Blocks::new(calls, Lifter::new(Box::new(|_| true), true), true).unwrap()
}

#[test]
fn a_copy_is_what_a_translation_would_be() {
    let mode = CodeMode { x87: true, sse: true, avx: true, tsc: true, bases: true, ..CodeMode::default() };
    let (mut blocks, pools) = (store(), Pools::new(&Generator::default().codes));
    let page = 0x1000;
    let mut copies = 0;
    for seed in 0..400 {
        let case = program(&pools, seed, 0);
        for offset in case.starts[..case.count].iter().map(|&at| u64::from(at)).filter(|&at| at < 4096) {
            let bytes = &case.code[..4096];
            let lift =
                |blocks: &mut Blocks, at: u64| blocks.lift(at + offset, Piece { start: at, bytes }, mode);
            let Some(region) = lift(&mut blocks, CASE + ALIASES[0]) else { continue };
            let source = Source { page, second: None };
            let own = blocks.links.len() as u32;
            let template = blocks.translate(&region, source, mode).unwrap();
            let links = blocks.links.len() as u32;
            // What was linked is not in the copy.
            (own..links).for_each(|link| blocks.resolve(link, template, 7));
            let copy = blocks.copy_one(CASE + ALIASES[1] + offset, page, mode).unwrap();
            let host = blocks.blocks[copy.block as usize].host;
            let region = lift(&mut blocks, CASE + ALIASES[1]).unwrap();
            let base = blocks.memory.rx_ptr() as u64 + u64::from(host);
            let emitter = Emitter::new(base, links, &mut blocks.encoder, &mut blocks.info, &blocks.thunks);
            let code = emitter.emit(&region, true);
            let mut bytes = vec![0; code.bytes.len()];
            blocks.memory.read(host as usize, &mut bytes);
            assert_eq!(bytes, code.bytes, "seed {seed}, offset {offset}");
            assert_eq!(copy.links.1.len(), code.links.len());
            for (link, made) in blocks.links[links as usize..].iter().zip(&code.links) {
                assert_eq!((link.target, link.ahead), (made.target, made.ahead));
                assert_eq!([link.site - host, link.unresolved - host], [made.site, made.unresolved]);
            }
            copies += 1;
        }
        blocks.invalidate(page, 0..4096);
    }
    assert!(copies > 4000, "{copies} copies");
}

#[test]
fn what_a_copied_block_leads_to_comes_along() {
    let mut vcpu = vcpu(|a| {
        for _ in 0..10 {
            let mut next = a.create_label();
            a.add(eax, 1)?;
            a.jmp(next)?;
            a.nop()?;
            a.set_label(&mut next)?;
            a.nop()?;
        }
        Ok(())
    });
    let dispatches = ALIASES.map(|alias| {
        let before = vcpu.cpu().counters.dispatches;
        run(&mut vcpu, alias);
        vcpu.cpu().counters.dispatches - before
    });
    assert_eq!(dispatches, [11, 1]);
    let (made, copied) = counts(&vcpu);
    assert_eq!(made, copied);
}

/// A vCPU that has run a program of two blocks. The second one reads no flags, and changes all of them.
fn two_blocks() -> DbtVcpu {
    let mut vcpu = vcpu(|a| {
        let mut far = a.create_label();
        a.mov(ecx, 5)?;
        a.cmp(ecx, 5)?;
        a.jmp(far)?;
        a.nops_with_size(BETWEEN)?;
        a.set_label(&mut far)?;
        a.add(ecx, 1)?;
        a.mov(eax, ecx)
    });
    assert_eq!(run(&mut vcpu, ALIASES[0]).2, 6);
    vcpu
}

/// Offset of the second block, and bytes between the two.
const FAR: usize = 5 + 3 + 2 + BETWEEN;
const BETWEEN: usize = 100;

/// Changes code. Says whether blocks were dropped for it.
fn change(vcpu: &mut DbtVcpu, offset: usize, code: &[u8]) -> bool {
    let page = vcpu.cpu().mmu.host_page(CODE).unwrap();
    crate::mmu::access::store(page.wrapping_add(offset), code);
    vcpu.blocks.invalidate(page as u64, offset as u32..(offset + code.len()) as u32)
}

#[test]
fn what_was_made_before_a_change_of_what_it_depends_on_is_not_copied() {
    let mut vcpu = two_blocks();
    // SETE CL.
    assert!(change(&mut vcpu, FAR, &[0x0f, 0x94, 0xc1]));
    assert_eq!(run(&mut vcpu, ALIASES[1]).2, 1);
    assert_eq!(counts(&vcpu).1, 0);
}

#[test]
fn a_change_elsewhere_on_the_page_leaves_blocks_to_be_copied() {
    let mut vcpu = two_blocks();
    let (made, _) = counts(&vcpu);
    // Farther behind the second block than is looked at for flags.
    assert!(!change(&mut vcpu, FAR + 300, &[0xcc]));
    assert_eq!(run(&mut vcpu, ALIASES[1]).2, 6);
    assert_eq!(counts(&vcpu), (made, made));
}
