//! Code that one vCPU writes and another executes (cross-modifying code, SDM volume 3, 9.1.3).

use iced_x86::{IcedError, code_asm::*};
use ruse_arch::{Exception, state::reg};

use super::{engine::DbtOptions, vcpu::DbtVcpu};
use crate::{
    cpu::CpuBox,
    mmu::Mmu,
    tier0::testing::{CODE, DATA, Machine, NullBus},
};

/// Where the programs of the vCPUs are. What the one writes and the other executes has a page of its own.
const WRITER: u64 = CODE;
const EXECUTOR: u64 = CODE + 0x1000;
const FUNCTION: u64 = CODE + 0x2000;
/// The operand of the function's only MOV: which version it is.
const OPERAND: u64 = FUNCTION + 4;

/// The version that has been written.
const PUBLISHED: u64 = DATA;
/// How often the function was called.
const CALLS: u64 = DATA + 0x1000;

fn assemble(at: u64, program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    program(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// Writes version 1 to `versions` of the function by `write` (the version is in EAX, RDI leads to where it goes), each
/// after another call has begun.
fn writer(
    versions: u32,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError> {
    move |a| {
        let (mut next, mut delay) = (a.create_label(), a.create_label());
        a.mov(r8, PUBLISHED)?;
        a.mov(r9, CALLS)?;
        a.xor(r12d, r12d)?;
        a.xor(r10d, r10d)?;
        a.set_label(&mut next)?;
        a.pause()?;
        a.mov(r11d, dword_ptr(r9))?;
        a.cmp(r11d, r12d)?;
        a.je(next)?;
        a.mov(r12d, r11d)?;
        a.inc(r10d)?;
        a.mov(ecx, r10d)?;
        a.and(ecx, 63)?;
        a.inc(ecx)?;
        a.set_label(&mut delay)?;
        a.dec(ecx)?;
        a.jne(delay)?;
        a.mov(eax, r10d)?;
        a.mov(rdi, OPERAND)?;
        write(a)?;
        a.mov(dword_ptr(r8), r10d)?;
        a.cmp(r10d, versions)?;
        a.jb(next)?;
        a.ud2()
    }
}

/// Calls the function over and over, until the last version is published. R15D counts the calls of a version older than
/// what was published before.
fn executor(versions: u32) -> impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError> {
    move |a| {
        let mut again = a.create_label();
        a.mov(r8, PUBLISHED)?;
        a.mov(r9, CALLS)?;
        a.mov(r10, FUNCTION)?;
        a.xor(r15d, r15d)?;
        a.set_label(&mut again)?;
        a.mov(esi, dword_ptr(r8))?;
        // The serializing instruction that the manual asks for.
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.inc(dword_ptr(r9))?;
        a.call(r10)?;
        a.cmp(eax, esi)?;
        a.adc(r15d, 0)?;
        a.cmp(esi, versions)?;
        a.jb(again)?;
        a.ud2()
    }
}

/// The second vCPU of a machine, in the same state.
fn second_cpu(machine: &mut Machine) -> CpuBox {
    let mmu = Mmu::new(machine.ram.clone(), machine.cpu.mmu.code.clone(), 1);
    let mut cpu = CpuBox::new(1, machine.cpu.cpuid.clone(), machine.cpu.clock.clone(), mmu);
    cpu.load_state(&machine.cpu.save_state());
    cpu
}

/// Ways to write EAX to where RDI leads.
type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

const WRITES: [(&str, Write); 5] = [
    ("mov", |a| a.mov(dword_ptr(rdi), eax)),
    ("xchg", |a| a.xchg(dword_ptr(rdi), eax)),
    ("lock inc", |a| a.lock().inc(dword_ptr(rdi))),
    ("stosd", |a| a.stosd()),
    ("rep stosd", |a| {
        a.mov(ecx, 1)?;
        a.rep().stosd()
    }),
];

/// `RUSE_CROSS_VERSIONS` says how many versions of the function each kind of write makes.
#[test]
fn a_published_version_of_a_function_is_executed_after_a_serializing_instruction() {
    let versions = std::env::var("RUSE_CROSS_VERSIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(200);
    for tier in [Some(0), None] {
        for (name, write) in WRITES {
            let mut machine = Machine::long();
            machine.write(WRITER, &assemble(WRITER, writer(versions, write)));
            machine.write(EXECUTOR, &assemble(EXECUTOR, executor(versions)));
            // NOP of three bytes; MOV EAX, version; RET. The operand is aligned.
            machine.write(FUNCTION, &[0x0f, 0x1f, 0x00, 0xb8, 0, 0, 0, 0, 0xc3]);
            let mut second = second_cpu(&mut machine);
            second.gpr[reg::RSP] -= 0x1000;
            (machine.cpu.rip, second.rip) = (WRITER, EXECUTOR);
            let mut first = DbtVcpu::new(machine.cpu, DbtOptions { tier, ..DbtOptions::default() }).unwrap();
            let mut second = DbtVcpu::new(second, DbtOptions::default()).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| assert_eq!(first.run_until_fault(&NullBus), Exception::UD));
                assert_eq!(second.run_until_fault(&NullBus), Exception::UD);
            });
            let stale = second.cpu().gpr[15];
            println!("{name}, tier {tier:?}: {} blocks made", second.blocks.made);
            assert_eq!(stale, 0, "calls of old versions, written by {name} in tier {tier:?}");
        }
    }
}
