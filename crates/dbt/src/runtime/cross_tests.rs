//! Code that one vCPU writes and another executes (cross-modifying code, SDM volume 3, 9.1.3).

use iced_x86::{IcedError, code_asm::*};
use ruse_arch::{Exception, state::reg};

use super::{engine::DbtOptions, vcpu::DbtVcpu};
use crate::{
    cpu::CpuBox,
    mmu::Mmu,
    tier0::testing::{CODE, DATA, Machine, NullBus},
};

/// Where the programs of the vCPUs are, and a function that the one writes and the other calls.
const WRITER: u64 = CODE;
const EXECUTOR: u64 = CODE + 0x1000;
const FUNCTION: u64 = CODE + 0x2000;
/// The version that has been written.
const PUBLISHED: u64 = DATA;
/// How often the code that is written was about to be executed.
const CALLS: u64 = DATA + 0x1000;

/// The code of a program at an address.
pub(super) fn assemble(
    at: u64,
    program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    program(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// Writes versions 1 to `versions` of the operand by `write` (the version is in EAX, RDI leads to where it goes), each
/// when the other vCPU is about to execute the code.
fn writer(
    versions: u32,
    operand: u64,
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
        a.mov(rdi, operand)?;
        write(a)?;
        a.mov(dword_ptr(r8), r10d)?;
        a.cmp(r10d, versions)?;
        a.jb(next)?;
        a.ud2()
    }
}

/// Gets the version from `code` into EAX over and over, until the last one is published. R15D counts how often it was
/// older than what had been published before.
fn executor(
    versions: u32,
    code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError> {
    move |a| {
        let mut again = a.create_label();
        a.mov(r8, PUBLISHED)?;
        a.mov(r9, CALLS)?;
        a.mov(r10, FUNCTION)?;
        a.xor(r15d, r15d)?;
        a.set_label(&mut again)?;
        a.inc(dword_ptr(r9))?;
        a.mov(esi, dword_ptr(r8))?;
        // The serializing instruction that the manual asks for.
        a.xor(eax, eax)?;
        a.cpuid()?;
        code(a)?;
        a.cmp(eax, esi)?;
        a.adc(r15d, 0)?;
        a.cmp(esi, versions)?;
        a.jb(again)?;
        a.ud2()
    }
}

/// The executor with the code right behind the serializing instruction, and where its operand is, which is aligned.
fn straight_executor(versions: u32) -> (Vec<u8>, u64) {
    let marker = 0x5a5a_5a5au32;
    let aligned = |padding| {
        let mut code = assemble(
            EXECUTOR,
            executor(versions, |a| {
                (0..padding).try_for_each(|_| a.nop())?;
                a.mov(eax, marker)
            }),
        );
        let at = code.windows(4).position(|bytes| bytes == marker.to_le_bytes())?;
        code[at..at + 4].fill(0);
        at.is_multiple_of(4).then_some((code, EXECUTOR + at as u64))
    };
    (0..4).find_map(aligned).unwrap()
}

/// The second vCPU of a machine, in the same state.
pub(super) fn second_cpu(machine: &mut Machine) -> CpuBox {
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

/// How often the executor got an old version. The versions are written in this tier.
fn stale(versions: u32, write: Write, tier: Option<u8>, (code, operand): (&[u8], u64)) -> u64 {
    let mut machine = Machine::long();
    machine.write(WRITER, &assemble(WRITER, writer(versions, operand, write)));
    machine.write(EXECUTOR, code);
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
    second.cpu().gpr[15]
}

/// `RUSE_CROSS_VERSIONS` says how many versions each kind of write makes.
#[test]
fn published_code_is_executed_after_a_serializing_instruction() {
    let versions = std::env::var("RUSE_CROSS_VERSIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(100);
    let called = (assemble(EXECUTOR, executor(versions, |a| a.call(r10))), FUNCTION + 4);
    for (place, (code, operand)) in [("called", called), ("ahead", straight_executor(versions))] {
        for tier in [Some(0), None] {
            for (name, write) in WRITES {
                let stale = stale(versions, write, tier, (&code, operand));
                assert_eq!(
                    stale, 0,
                    "old versions of code that is {place}, written by {name} in tier {tier:?}"
                );
            }
        }
    }
}
