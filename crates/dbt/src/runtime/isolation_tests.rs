//! Guests that try to reach what is not theirs: by tier 0 and by the translator the same comes of it, and nothing is touched
//! around their RAM.

use std::sync::Arc;

use iced_x86::code_asm::*;
use ruse_arch::{
    Exception, VcpuState,
    flags::rflags,
    state::{reg, seg},
};
use ruse_engine::{Clock, Halt, Vcpu};
use ruse_memory::GuestRam;
use ruse_random::Random;

use super::{engine::DbtOptions, vcpu::DbtVcpu};
use crate::{
    cpu::CpuBox,
    cpuid,
    mmu::{Mmu, watch::CodeMap},
    tier0::{
        system_tests::{HANDLER, to_user, with_levels},
        testing::{CODE, DATA, Machine, NullBus, PAGE_TABLE},
    },
};

const PAGE: u64 = 4096;
/// Tables of the hostile address space, behind the RAM that is compared.
const TABLES: u64 = 0x80_0000;
/// Pages of linear addresses, and what they are mapped to: the ends of the lower half and of the upper one, neighbours of
/// pages that are not there, pages without some right, and pages behind RAM and where no memory can be.
const PAGES: [(u64, u64); 14] = [
    (0, DATA | 7 | NO_CODE),
    (CODE, CODE | 7),
    (0x4000_0000, (DATA + 0x1000) | 7 | NO_CODE),
    (0x4000_1000, (DATA + 0x2000) | 7 | NO_CODE),
    (0x4000_3000, (DATA + 0x3000) | 5 | NO_CODE),
    (0x4000_4000, (DATA + 0x4000) | 3 | NO_CODE),
    (0x4000_6000, LAST | 7 | NO_CODE),
    (0x4000_7000, RAM | 7 | NO_CODE),
    (0x4000_8000, 0xfee0_0000 | 7 | NO_CODE),
    (0x4000_9000, 0x3f_ffff_f000 | 7 | NO_CODE),
    (0x7fff_ffff_f000, (DATA + 0x5000) | 7 | NO_CODE),
    (0xffff_8000_0000_0000, (DATA + 0x6000) | 7 | NO_CODE),
    (0xffff_ffff_8000_0000, (DATA + 0x7000) | 7 | NO_CODE),
    (0xffff_ffff_ffff_f000, (DATA + 0x8000) | 7 | NO_CODE),
];
const NO_CODE: u64 = 1 << 63;
/// Bytes of RAM of a [`Machine`]; the part that is compared; its last page.
const RAM: u64 = 16 << 20;
const COMPARED: u64 = TABLES;
const LAST: u64 = COMPARED - PAGE;

/// A vCPU whose RAM lies between two others, which cannot be touched.
struct Guarded {
    vcpu: DbtVcpu,
    ram: GuestRam,
    _guards: [GuestRam; 2],
}

impl Guarded {
    fn new(tier: Option<u8>) -> Self {
        let start = |ram: &GuestRam| ram.regions()[0].host as u64;
        // The host puts one mapping beside the other, mostly.
        let mut all: Vec<GuestRam> = (0..24).map(|_| GuestRam::new(RAM).unwrap()).collect();
        all.sort_by_key(start);
        let beside = |rams: &[GuestRam]| rams.windows(2).all(|two| start(&two[0]) + RAM == start(&two[1]));
        let first = all.windows(3).position(beside).expect("three of them lie side by side");
        let [before, ram, behind] = [0, 1, 2].map(|n| all[first + n].clone());
        for guard in [&before, &behind] {
            // SAFETY: nobody uses this RAM.
            let done = unsafe { libc::mprotect(start(guard) as *mut _, RAM as usize, libc::PROT_NONE) };
            assert_eq!(done, 0);
        }
        let mmu = Mmu::new(ram.clone(), CodeMap::new(ram.clone()), 0);
        let clock = Arc::new(Clock::with_frequency(2_000_000_000));
        let cpu = CpuBox::new(0, cpuid::supported(), clock, mmu);
        let options = DbtOptions { tier, audit: true, ..DbtOptions::default() };
        Self { vcpu: DbtVcpu::new(cpu, options).unwrap(), ram, _guards: [before, behind] }
    }

    fn write(&mut self, gpa: u64, bytes: &[u8]) {
        let at = self.ram.host_page(gpa).expect("RAM").wrapping_add((gpa % PAGE) as usize);
        crate::mmu::access::store(at, bytes);
        self.vcpu.cpu().mmu.code.written(gpa, None);
    }

    /// RAM that is compared.
    fn ram(&self) -> &[u8] {
        // SAFETY: mapped as long as `self`, and nobody runs.
        unsafe { std::slice::from_raw_parts(self.ram.regions()[0].host, COMPARED as usize) }
    }

    /// Maps [`PAGES`], and fills what they show.
    fn fill(&mut self, random: &mut Random) {
        let mut next = TABLES + PAGE;
        for at in (TABLES..RAM).step_by(PAGE as usize).take(64) {
            self.write(at, &[0; PAGE as usize]);
        }
        for (va, entry) in PAGES {
            let mut table = TABLES;
            for shift in [39, 30, 21] {
                let at = table + (va >> shift & 511) * 8;
                let mut word = [0; 8];
                crate::mmu::access::load(
                    self.ram.host_page(at).unwrap().wrapping_add((at % PAGE) as usize),
                    &mut word,
                );
                table = match u64::from_le_bytes(word) & !0xfff {
                    0 => {
                        self.write(at, &(next | 7).to_le_bytes());
                        next += PAGE;
                        next - PAGE
                    }
                    known => known,
                };
            }
            self.write(table + (va >> 12 & 511) * 8, &entry.to_le_bytes());
        }
        for gpa in (DATA..DATA + 0x9000).step_by(8).chain((LAST..COMPARED).step_by(8)) {
            let value = if random.chance(30) { hostile(random) } else { random.word() };
            self.write(gpa, &value.to_le_bytes());
        }
    }
}

/// An address that is at the edge of something, or none at all.
fn hostile(random: &mut Random) -> u64 {
    const EDGES: [u64; 12] = [
        0,
        0x4000_0000,
        0x4000_1000,
        0x4000_2000,
        0x4000_3000,
        0x4000_7000,
        0x4000_9000,
        0x8000_0000_0000,
        0xffff_8000_0000_0000,
        0xffff_ffff_8000_0000,
        1 << 63,
        RAM,
    ];
    let near = [0, 1, 2, 4, 7, 8, 15, 16, 31, 32, 33, 64, 127, 128, 129, 0x7f8];
    let page = PAGES[random.below(PAGES.len() as u64) as usize].0;
    // A jump to the program's own beginning might never end.
    let edge = if random.chance(10) && page != CODE { page } else { random.pick(&EDGES) };
    let distance = random.pick(&near);
    match random.below(10) {
        0..=4 => edge.wrapping_sub(distance),
        5..=7 => edge.wrapping_add(distance),
        8 => 0x4000_0800 + random.below(64) * 8,
        _ => random.word(),
    }
}

type Attempt = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Accesses by RBX, RBP, RSP, R13 and the like, which hold hostile addresses.
const ATTEMPTS: [Attempt; 44] = [
    |a| a.mov(rax, qword_ptr(rbx)),
    |a| a.mov(rax, qword_ptr(rbx + rsi * 8 + 0x7fff_fff0)),
    |a| a.mov(qword_ptr(rbx), rax),
    |a| a.mov(byte_ptr(rbx - 1), al),
    |a| a.mov(dword_ptr(r13 + r14 * 4 - 4), eax),
    |a| a.mov(rax, qword_ptr(r14 + i32::MIN)),
    |a| {
        a.mov(rax, qword_ptr(rbx + 0x38))?;
        a.mov(qword_ptr(rbx - 0x40), rax)
    },
    |a| {
        a.mov(qword_ptr(rbp - 8), rax)?;
        a.mov(rcx, qword_ptr(rbp - 0x70))?;
        a.add(qword_ptr(rbp + 8), rcx)
    },
    |a| {
        a.sub(rbx, 0x28)?;
        a.add(dword_ptr(rbx + 0x24), 5)?;
        a.mov(rax, qword_ptr(rbx))
    },
    |a| a.mov(eax, dword_ptr(ebx + esi * 2)),
    |a| a.mov(rax, qword_ptr(rbx).fs()),
    |a| a.mov(qword_ptr(rdi + 0x10).gs(), rax),
    |a| {
        a.mov(rax, qword_ptr(rdi).gs())?;
        a.mov(rax, qword_ptr(rdi + 8).gs())
    },
    |a| a.mov(rax, qword_ptr(0xffff_ffff_ffff_fff8u64)),
    |a| a.xchg(qword_ptr(rbx), r13),
    |a| a.lock().xadd(qword_ptr(rbp), r14),
    |a| a.lock().cmpxchg16b(xmmword_ptr(rsi)),
    |a| a.lock().bts(qword_ptr(rbx), rsi),
    |a| a.btc(dword_ptr(rbp - 0x10), edi),
    |a| a.bt(qword_ptr(rdi), r15),
    |a| a.push(rax),
    |a| a.pop(r15),
    |a| a.push(qword_ptr(rbx)),
    |a| a.pop(qword_ptr(rsi)),
    |a| {
        a.mov(rsp, rbx)?;
        a.push(r14)?;
        a.push(rsi)?;
        a.pop(rcx)
    },
    |a| {
        a.mov(rbp, rdi)?;
        a.leave()
    },
    |a| a.enter(0x20, 0),
    |a| a.pushfq(),
    |a| a.movaps(xmm1, xmmword_ptr(rbx)),
    |a| a.movups(xmmword_ptr(rsi + 8), xmm2),
    |a| a.vmovdqu(ymm3, ymmword_ptr(rdi - 0x10)),
    |a| a.vmovdqu(ymmword_ptr(rbp), ymm4),
    |a| a.vpgatherqq_3(ymm0, qword_ptr(rbx + ymm1 * 8), ymm2),
    |a| a.vpmaskmovd(ymmword_ptr(rsi), ymm5, ymm6),
    |a| a.maskmovdqu(xmm1, xmm2),
    |a| a.rep().movsb(),
    |a| a.rep().movsq(),
    |a| a.rep().stosq(),
    |a| a.rep().stosb(),
    |a| a.repe().cmpsb(),
    |a| a.lodsq(),
    |a| a.xlatb(),
    |a| a.stmxcsr(dword_ptr(rbx)),
    |a| a.movnti(qword_ptr(rsi - 3), r15),
];

/// Ways to elsewhere, one of which may stand at the end of a program.
const WAYS_OUT: [Attempt; 8] = [
    |a| a.jmp(rbx),
    |a| a.call(rsi),
    |a| a.jmp(qword_ptr(rbp)),
    |a| a.call(qword_ptr(rdi)),
    |a| a.ret(),
    |a| a.ret_1(0x18),
    |a| {
        // A call that never returns, and a return to elsewhere.
        let mut next = a.create_label();
        a.call(next)?;
        a.set_label(&mut next)?;
        a.mov(qword_ptr(rsp), rbx)?;
        a.ret()
    },
    |a| a.ud2(),
];

/// A program of a few attempts, often in a loop.
fn program(random: &mut Random) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut again = a.create_label();
    let loops = random.chance(60);
    a.set_label(&mut again).unwrap();
    a.nop().unwrap();
    for _ in 0..1 + random.below(5) {
        random.pick(&ATTEMPTS)(&mut a).unwrap();
    }
    if loops {
        for register in [rbx, rsi, rbp] {
            if random.chance(70) {
                a.add(register, random.pick(&[1, 8, 0x20, 0x1000, -8])).unwrap();
            }
        }
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
    }
    random.pick(&WAYS_OUT)(&mut a).unwrap();
    a.ud2().unwrap();
    a.assemble(CODE).unwrap()
}

/// The state in which a program begins.
fn beginning(random: &mut Random, user: bool) -> VcpuState {
    let mut machine = Machine::long();
    if user {
        to_user(&mut machine);
    }
    let mut state = machine.cpu.save_state();
    state.cr3 = TABLES;
    state.rip = CODE;
    for register in &mut state.gpr {
        *register = hostile(random);
    }
    if random.chance(70) {
        state.gpr[reg::RSP] = 0x4000_0800 + random.below(0x100) * 8;
    }
    if random.chance(70) {
        state.gpr[reg::RCX] = random.below(700);
    }
    state.gpr[12] = 1 + random.below(12);
    state.rflags = rflags::FIXED | if random.chance(20) { rflags::DF } else { 0 };
    for segment in [seg::FS, seg::GS] {
        state.seg[segment].base = hostile(random);
    }
    for ymm in &mut state.fpu.ymm {
        *ymm = std::array::from_fn(|_| hostile(random));
    }
    state
}

/// What is compared of a state: flags that nobody reads may be anything after a fault.
fn visible(state: VcpuState) -> VcpuState {
    VcpuState { tsc: 0, rflags: state.rflags & !rflags::ARITH, ..state }
}

#[test]
fn hostile_programs_do_what_they_do_in_tier_0_and_nothing_more() {
    if !std::is_x86_feature_detected!("avx2") {
        println!("skipped: this CPU has no AVX2, which the programs use");
        return;
    }
    let setting = |name: &str, default| std::env::var(name).map_or(default, |v| v.parse().expect("a number"));
    let (cases, seed): (u64, u64) = (setting("RUSE_ISOLATION_CASES", 3000), setting("RUSE_DIFF_SEED", 0));
    let mut both = [Guarded::new(Some(0)), Guarded::new(None)];
    for n in 0..cases {
        let mut random = Random::new(seed.wrapping_add(n));
        if n % 64 == 0 {
            both.iter_mut().for_each(|machine| machine.fill(&mut random.clone()));
        }
        let code = program(&mut random);
        let state = beginning(&mut random, n % 128 < 64);
        // Twice, with the code that was made the first time.
        for _ in 0..2 {
            let [plain, translated] = [0, 1].map(|n| {
                let machine = &mut both[n];
                machine.write(CODE, &code);
                machine.vcpu.set_state(&state).unwrap();
                let fault = machine.vcpu.run_until_fault(&NullBus);
                (fault, visible(machine.vcpu.state().unwrap()))
            });
            assert_eq!(plain, translated, "seed {n}: {}", listing(&code));
            assert!(both[0].ram() == both[1].ram(), "seed {n}: {}", listing(&code));
        }
    }
}

fn listing(code: &[u8]) -> String {
    let decoder = iced_x86::Decoder::with_ip(64, code, CODE, 0);
    decoder.into_iter().map(|i| format!("\n{:x} {i}", i.ip())).collect()
}

fn assemble(program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    program(&mut a).and_then(|()| a.ud2()).unwrap();
    a.assemble(CODE).unwrap()
}

/// Runs a program by tier 0 and by the translator, until `run` gives something, which has to be the same, as have the
/// states.
fn same<R: PartialEq + std::fmt::Debug>(
    machine: impl Fn() -> Machine,
    program: &[u8],
    run: fn(&mut DbtVcpu) -> R,
) -> (R, VcpuState) {
    let [plain, translated] = [Some(0), None].map(|tier| {
        let mut machine = machine();
        machine.load(program);
        let options = DbtOptions { tier, audit: true, ..DbtOptions::default() };
        let mut vcpu = DbtVcpu::new(machine.cpu, options).unwrap();
        (run(&mut vcpu), visible(vcpu.state().unwrap()))
    });
    assert_eq!(plain, translated, "{}", listing(program));
    plain
}

fn to_fault(vcpu: &mut DbtVcpu) -> Exception {
    vcpu.run_until_fault(&NullBus)
}

#[test]
fn an_access_over_the_end_of_the_lower_half_is_none_of_the_upper() {
    for write in [false, true] {
        let program =
            assemble(|a| if write { a.mov(qword_ptr(rbx), rax) } else { a.mov(rax, qword_ptr(rbx)) });
        for tier in [Some(0), None] {
            let mut machine = Guarded::new(tier);
            let mut random = Random::new(1);
            machine.fill(&mut random);
            machine.write(CODE, &program);
            let mut state = beginning(&mut random, true);
            state.gpr[reg::RBX] = 0x7fff_ffff_fffc;
            machine.vcpu.set_state(&state).unwrap();
            assert_eq!(machine.vcpu.run_until_fault(&NullBus), Exception::gp(0), "{tier:?} {write}");
        }
    }
}

#[test]
fn pages_that_lose_their_rights_are_lost_to_loops() {
    // What becomes of the page's entry, and the fault that follows; another page is no fault.
    let changes = [(0, Some(2)), (5, Some(3)), (7 | (DATA + 0x4000), None), (7 | RAM, None)];
    for (entry, error) in changes {
        let program = assemble(|a| {
            let (mut round, mut again) = (a.create_label(), a.create_label());
            a.mov(r8d, 2)?;
            a.set_label(&mut round)?;
            a.mov(rbx, DATA)?;
            a.mov(ecx, 40)?;
            a.set_label(&mut again)?;
            a.add(qword_ptr(rbx + 0x20), rcx)?;
            a.mov(rax, qword_ptr(rbx + 0x28))?;
            a.mov(qword_ptr(rbx + 0x30), rcx)?;
            a.add(rbx, 0x18)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.mov(rdx, entry)?;
            a.mov(qword_ptr(PAGE_TABLE + (DATA >> 12) * 8), rdx)?;
            a.invlpg(ptr(DATA))?;
            a.dec(r8d)?;
            a.jnz(round)
        });
        let (fault, state) = same(Machine::long, &program, to_fault);
        match error {
            Some(error) => {
                assert_eq!((fault, state.gpr[8]), (Exception::pf(DATA + 0x20, error), 1));
            }
            None => assert_eq!((fault, state.gpr[8]), (Exception::UD, 0)),
        }
    }
}

#[test]
fn calls_without_end_and_returns_without_calls_stay_on_the_guests_stack() {
    const DEEP: u32 = 100_000;
    let program = assemble(|a| {
        let (mut down, mut bottom, mut done) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(rsp, 0x60_0000u64)?;
        a.mov(ecx, DEEP)?;
        a.call(down)?;
        a.jmp(done)?;
        a.set_label(&mut down)?;
        a.inc(rax)?;
        a.dec(ecx)?;
        a.jz(bottom)?;
        a.call(down)?;
        a.set_label(&mut bottom)?;
        a.inc(rdx)?;
        a.ret()?;
        a.set_label(&mut done)?;
        // More returns than calls, to addresses that were written there.
        a.lea(rbx, ptr(done))?;
        a.add(rsi, 1)?;
        a.push(rbx)?;
        a.push(rbx)?;
        a.cmp(rsi, 50)?;
        a.mov(rax, qword_ptr(rsp))?;
        a.cmova(rax, r15)?;
        a.mov(qword_ptr(rsp), rax)?;
        a.ret()
    });
    let (fault, state) = same(Machine::long, &program, to_fault);
    assert_eq!(state.gpr[reg::RDX], u64::from(DEEP));
    assert_eq!((fault, state.gpr[reg::RSI]), (Exception::UD, 51), "address 0 holds no instruction");
}

#[test]
fn an_exception_with_a_wild_stack_goes_nowhere_else() {
    let mut handler = CodeAssembler::new(64).unwrap();
    handler.mov(rax, 7u64).unwrap();
    // The next exception is the last.
    handler.lidt(ptr(DATA + 0x8000)).unwrap();
    handler.ud2().unwrap();
    let handler = handler.assemble(HANDLER).unwrap();
    let wild = [0x7fff_ffff_fff8, 0x8000_0000_0000, 1 << 63, 4, RAM + 0x1000, u64::MAX];
    for (user, stack) in [false, true].into_iter().flat_map(|user| wild.map(|stack| (user, stack))) {
        let machine = || {
            let mut machine = with_levels(Machine::long());
            machine.write(HANDLER, &handler);
            if user {
                to_user(&mut machine);
            }
            machine
        };
        let program = assemble(|a| {
            a.mov(rsp, stack)?;
            a.mov(rax, 5u64)
        });
        let (halt, state) = same(machine, &program, |vcpu| vcpu.run(&NullBus).unwrap());
        // Behind RAM is an address, if one that keeps nothing.
        let handled = if user || stack == RAM + 0x1000 { 7 } else { 5 };
        assert_eq!((halt, state.gpr[reg::RAX]), (Halt::TripleFault, handled), "{stack:#x}");
    }
}
