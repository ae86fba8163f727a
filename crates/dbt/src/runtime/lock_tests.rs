//! Locked accesses that the host cannot make in one, beside accesses of another vCPU to a part of the same bytes.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use iced_x86::{IcedError, code_asm::*};
use ruse_arch::{Exception, state::reg};
use ruse_engine::Bus;

use super::{
    cross_tests::{assemble, second_cpu},
    engine::DbtOptions,
    vcpu::DbtVcpu,
};
use crate::{
    cpu::Who,
    mmu::access::load,
    tier0::testing::{CODE, DATA, Machine, NullBus},
};

/// How often the one vCPU accesses all of the bytes. The other accesses its part of them all the time.
const TIMES: u32 = 600;
/// Where the programs of the vCPUs are.
const WHOLE: u64 = CODE;
const PART: u64 = CODE + 0x1000;
/// 1 when the other vCPU has begun, 2 when all accesses are made.
const TURN: u64 = DATA + 0x3000;
/// A function that gives the number behind its first byte, on a page of its own.
const FUNCTION: u64 = CODE + 0x2000;

/// An access to what RDI leads to; the round is in ECX. What goes wrong is counted in R15.
type Access = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Additions of 1 to eight bytes.
const WHOLES: [(&str, Access); 4] = [
    ("lock inc", |a| a.lock().inc(qword_ptr(rdi))),
    ("lock xadd", |a| {
        a.mov(eax, 1)?;
        a.lock().xadd(qword_ptr(rdi), rax)
    }),
    ("lock cmpxchg", |a| {
        let mut again = a.create_label();
        a.mov(rax, qword_ptr(rdi))?;
        a.set_label(&mut again)?;
        a.lea(rbx, qword_ptr(rax + 1))?;
        a.lock().cmpxchg(qword_ptr(rdi), rbx)?;
        a.jne(again)
    }),
    // Elision is a hint, but generated code leaves what has it to tier 0.
    ("xacquire lock inc", |a| a.xacquire().lock().inc(qword_ptr(rdi))),
];

/// Additions of 1 to the upper four of them. Nobody else changes those: what a plain store leaves there, stays.
const PARTS: [(&str, Access); 3] = [
    ("lock add", |a| a.lock().add(dword_ptr(rdi + 4), 1)),
    ("lock xadd of a byte, and one with what it carries", |a| {
        a.mov(al, 1)?;
        a.lock().xadd(byte_ptr(rdi + 4), al)?;
        a.inc(al)?;
        a.setz(al)?;
        a.movzx(eax, al)?;
        a.shl(eax, 8)?;
        a.lock().add(dword_ptr(rdi + 4), eax)
    }),
    ("mov", |a| {
        a.mov(eax, dword_ptr(rdi + 4))?;
        a.lea(edx, dword_ptr(rcx - 1))?;
        a.cmp(eax, edx)?;
        a.setne(al)?;
        a.movzx(eax, al)?;
        a.add(r15, rax)?;
        a.mov(dword_ptr(rdi + 4), ecx)
    }),
];

/// Repeats an access to the bytes at `at` when the other program has begun, [`TIMES`] times.
fn whole(at: u64, access: Access) -> impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError> {
    move |a| {
        let (mut wait, mut next) = (a.create_label(), a.create_label());
        a.mov(r8, TURN)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(r8), 0)?;
        a.je(wait)?;
        a.mov(rdi, at)?;
        a.mov(ecx, TIMES)?;
        a.set_label(&mut next)?;
        access(a)?;
        a.dec(ecx)?;
        a.jne(next)?;
        a.mov(dword_ptr(r8), 2)?;
        a.ud2()
    }
}

/// Repeats an access until the other program has ended; ECX counts the rounds.
fn part(at: u64, access: Access) -> impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError> {
    move |a| {
        let mut next = a.create_label();
        a.mov(r8, TURN)?;
        a.mov(rdi, at)?;
        a.mov(dword_ptr(r8), 1)?;
        a.xor(ecx, ecx)?;
        a.set_label(&mut next)?;
        a.inc(ecx)?;
        access(a)?;
        a.cmp(dword_ptr(r8), 2)?;
        a.jne(next)?;
        a.ud2()
    }
}

/// Runs both programs, each in a tier. Gives how many additions to the lower and to the upper half are not there, and how
/// many stores were not.
fn lost(at: u64, accesses: [Access; 2], tiers: [Option<u8>; 2]) -> (u32, u32, u64) {
    let mut machine = Machine::long();
    machine.write(WHOLE, &assemble(WHOLE, whole(at, accesses[0])));
    machine.write(PART, &assemble(PART, part(at, accesses[1])));
    machine.write(FUNCTION, &[0xb8, 0, 0, 0, 0, 0xc3]);
    let mut second = second_cpu(&mut machine);
    second.gpr[reg::RSP] -= 0x1000;
    (machine.cpu.rip, second.rip) = (WHOLE, PART);
    let [mut first, mut second] = [(machine.cpu, tiers[0]), (second, tiers[1])]
        .map(|(cpu, tier)| DbtVcpu::new(cpu, DbtOptions { tier, ..DbtOptions::default() }).unwrap());
    thread::scope(|scope| {
        scope.spawn(|| assert_eq!(first.run_until_fault(&NullBus), Exception::UD));
        assert_eq!(second.run_until_fault(&NullBus), Exception::UD);
    });
    let found = first.cpu_mut().with_bus(&NullBus, |cpu| cpu.read_value(at, 8, Who::Current)).unwrap();
    let second = second.cpu();
    let rounds = second.gpr[reg::RCX] as u32;
    (TIMES.wrapping_sub(found as u32), rounds.wrapping_sub((found >> 32) as u32), second.gpr[15])
}

/// A device behind the end of RAM that notices whether a counter in RAM changes while it is read.
struct Watching {
    /// Its host address.
    counter: usize,
    changed: AtomicBool,
}

impl Bus for Watching {
    fn mmio_read(&self, _: u32, _: u64, data: &mut [u8]) {
        let counter = || {
            let mut bytes = [0; 4];
            load(self.counter as *const u8, &mut bytes);
            bytes
        };
        let before = counter();
        thread::sleep(Duration::from_millis(30));
        self.changed.store(counter() != before, Ordering::Relaxed);
        data.fill(0);
    }
}

/// Whether the other vCPU executes anything while one executes an instruction with an operand half in RAM, half behind it.
fn others_go_on_during(instruction: Access, other_tier: Option<u8>) -> bool {
    const END: u64 = 16 << 20;
    let mut machine = Machine::long();
    let once = |a: &mut CodeAssembler| {
        let mut wait = a.create_label();
        a.mov(r8, TURN)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(r8), 0)?;
        a.je(wait)?;
        a.mov(rdi, END - 4)?;
        instruction(a)?;
        a.mov(dword_ptr(r8), 2)?;
        a.ud2()
    };
    machine.write(WHOLE, &assemble(WHOLE, once));
    machine.write(PART, &assemble(PART, part(DATA, |a| a.inc(dword_ptr(rdi)))));
    let counter = machine.ram.host_page(DATA).unwrap() as usize;
    let bus = Watching { counter, changed: AtomicBool::new(false) };
    let mut second = second_cpu(&mut machine);
    (machine.cpu.rip, second.rip) = (WHOLE, PART);
    let mut first = DbtVcpu::new(machine.cpu, DbtOptions::default()).unwrap();
    let mut second = DbtVcpu::new(second, DbtOptions { tier: other_tier, ..DbtOptions::default() }).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| assert_eq!(first.run_until_fault(&bus), Exception::UD));
        assert_eq!(second.run_until_fault(&NullBus), Exception::UD);
    });
    bus.changed.into_inner()
}

#[test]
fn others_stand_still_during_a_locked_access_in_parts() {
    let unlocked: Access = |a| a.inc(qword_ptr(rdi));
    for tier in [None, Some(0)] {
        for (name, access) in WHOLES {
            assert!(!others_go_on_during(access, tier), "{name}, the other vCPU in tier {tier:?}");
        }
        assert!(others_go_on_during(unlocked, tier), "without LOCK, the other vCPU in tier {tier:?}");
    }
}

#[test]
fn a_locked_access_over_a_line_or_a_page_is_one_for_other_vcpus() {
    for (place, at) in
        [("page", DATA + 4096 - 4), ("page, unevenly", DATA + 4096 - 3), ("line", DATA + 64 - 4)]
    {
        for (whole, first) in WHOLES {
            for (part, second) in PARTS {
                for tiers in [[None, None], [Some(0), None], [None, Some(0)]] {
                    assert_eq!(
                        lost(at, [first, second], tiers),
                        (0, 0, 0),
                        "{whole} over a {place}, {part} by the other vCPU, in tiers {tiers:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_vcpu_that_waits_to_translate_does_not_keep_one_from_being_alone() {
    // Tier 0 executes the addition within a call of generated code, which may write to the function's page.
    let whole: Access = |a| {
        a.mov(rbx, FUNCTION + 0x800)?;
        a.mov(dword_ptr(rbx), ecx)?;
        a.xacquire().lock().inc(qword_ptr(rdi))
    };
    // The function is changed, so that it has to be translated, for which the other's writes have to end.
    let part: Access = |a| {
        a.mov(rbx, FUNCTION)?;
        a.mov(dword_ptr(rbx + 1), ecx)?;
        a.call(rbx)?;
        a.xor(eax, ecx)?;
        a.add(r15, rax)?;
        a.lock().add(dword_ptr(rdi + 4), 1)
    };
    // It takes both at once.
    for _ in 0..100 {
        assert_eq!(lost(DATA + 4096 - 4, [whole, part], [None, None]), (0, 0, 0));
    }
}
