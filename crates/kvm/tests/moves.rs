//! A computation that moves between a `kvm` and a `dbt` vCPU at random moments comes out as if it had stayed.
//!
//! RUSE_MOVES=N makes N moves. Where there is no KVM, the moves are between two vCPUs of the translator.

mod support;

use std::sync::atomic::Ordering;

use iced_x86::code_asm::*;
use ruse_arch::{
    VcpuState,
    state::{FpuState, reg},
};
use ruse_dbt::{DbtEngine, DbtOptions};
use ruse_engine::Engine;
use ruse_memory::GuestRam;
use support::*;
use vm_memory::{Bytes, GuestAddress};

/// Where the computation has its data: words that it changes, and copies of them.
const DATA: u64 = 0x2_0000;
const DATA_LEN: usize = 0x4000;
const COPY: u32 = 0x1000;
const FILLED: u32 = 0x2000;
const SCRATCH: i32 = 0x800;
/// A factor in double precision, and after so many rounds the computation ends.
const HALF: i32 = 0x900;
const LIMIT: i32 = 0x908;
/// The register that counts rounds.
const ROUNDS: usize = 15;

/// One round of integers: carries go from instruction to instruction.
fn integers(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, r8)?;
    a.mul(r9)?;
    a.add(r8, rax)?;
    a.adc(r9, rdx)?;
    a.rol(r8, 13)?;
    a.sbb(r10, r9)?;
    a.bswap(r10)?;
    a.xor(r9, r8)?;
    a.shld(r10, r8, 7u32)?;
    a.lea(r11, ptr(r11 + r10 * 4 + 0x1234))?;
    a.btc(r11, r8)?;
    a.xor(edx, edx)?;
    a.mov(rax, r8)?;
    a.mov(rcx, r9)?;
    a.or(rcx, 1)?;
    a.div(rcx)?;
    a.xor(r11, rdx)?;
    a.add(r10, rax)?;
    a.pushfq()?;
    a.pop(rax)?;
    a.and(eax, 0x8d5)?;
    a.add(r11, rax)
}

/// String instructions over the data.
fn strings(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.lea(rsi, ptr(r14))?;
    a.lea(rdi, ptr(r14 + COPY))?;
    a.mov(ecx, 0x200u32)?;
    a.rep().movsb()?;
    a.lea(rdi, ptr(r14 + FILLED))?;
    a.mov(rax, r8)?;
    a.mov(ecx, 100u32)?;
    a.rep().stosq()?;
    a.lea(rsi, ptr(r14))?;
    a.lea(rdi, ptr(r14 + COPY))?;
    a.mov(ecx, 0x200u32)?;
    a.repe().cmpsb()?;
    a.adc(r11, rcx)?;
    a.mov(rcx, r15)?;
    a.and(ecx, 63)?;
    a.xor(qword_ptr(r14 + rcx * 8), r11)
}

fn vectors(a: &mut CodeAssembler, avx2: bool) -> Result<(), IcedError> {
    a.movq(xmm0, r8)?;
    a.paddq(xmm1, xmm0)?;
    a.pxor(xmm2, xmm1)?;
    a.pshufd(xmm3, xmm2, 0x1b)?;
    a.paddd(xmm4, xmm3)?;
    a.cvtsi2sd(xmm5, ecx)?;
    a.mulsd(xmm6, qword_ptr(r14 + HALF))?;
    a.addsd(xmm6, xmm5)?;
    a.sqrtsd(xmm7, xmm6)?;
    a.movdqu(xmmword_ptr(r14 + SCRATCH), xmm4)?;
    a.movq(rax, xmm7)?;
    a.add(r8, rax)?;
    if avx2 {
        a.vpaddq(ymm9, ymm9, ymmword_ptr(r14))?;
        a.vpxor(ymm10, ymm9, ymm11)?;
        a.vpermq(ymm11, ymm10, 0x39)?;
        a.vmovdqu(ymmword_ptr(r14 + SCRATCH + 0x20), ymm11)?;
    }
    Ok(())
}

/// A value stays on the x87 stack from round to round.
fn x87(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.fild(dword_ptr(r14 + SCRATCH))?;
    a.faddp(st1, st0)?;
    a.fmul(qword_ptr(r14 + HALF))?;
    a.fld(st0)?;
    a.fabs()?;
    a.fsqrt()?;
    a.fstp(tbyte_ptr(r14 + SCRATCH + 0x40))?;
    a.mov(rax, qword_ptr(r14 + SCRATCH + 0x40))?;
    a.xor(r9, rax)
}

/// The computation, which ends when its rounds have reached the limit.
fn program(a: &mut CodeAssembler, avx2: bool) -> Result<(), IcedError> {
    let (mut top, mut part) = (a.create_label(), a.create_label());
    a.fldz()?;
    a.set_label(&mut top)?;
    a.call(part)?;
    strings(a)?;
    vectors(a, avx2)?;
    x87(a)?;
    a.inc(r15)?;
    a.cmp(r15, qword_ptr(r14 + LIMIT))?;
    a.jb(top)?;
    end(a)?;
    a.set_label(&mut part)?;
    integers(a)?;
    a.ret()
}

fn has_avx2() -> bool {
    std::is_x86_feature_detected!("avx2")
}

/// RAM with the computation, and a vCPU before it.
fn prepare(cpl: u16) -> (GuestRam, VcpuState) {
    let ram = GuestRam::new(1 << 20).unwrap();
    let mut state = long_mode(&ram, cpl);
    state.xcr0 = if has_avx2() { 7 } else { 3 };
    put(&ram, CODE, &assemble(64, CODE, |a| program(a, has_avx2()).unwrap()));
    let data: Vec<u8> = (0..0x400u32).map(|n| (n * 197 % 251) as u8).collect();
    put(&ram, DATA, &data);
    put(&ram, DATA + HALF as u64, &0.5f64.to_le_bytes());
    for (n, r) in state.gpr.iter_mut().enumerate().filter(|(n, _)| *n != reg::RSP) {
        *r = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(n as u64 + 1);
    }
    (state.gpr[14], state.gpr[ROUNDS]) = (DATA, 0);
    (ram, state)
}

fn set_limit(ram: &GuestRam, rounds: u64) {
    ram.memory().store(rounds, GuestAddress(DATA + LIMIT as u64), Ordering::SeqCst).unwrap();
}

/// What a computation leaves behind.
#[derive(Debug, PartialEq)]
struct Outcome {
    gpr: [u64; 16],
    rip: u64,
    fpu: FpuState,
    data: Vec<u8>,
}

impl Outcome {
    fn of(state: VcpuState, ram: &GuestRam) -> Self {
        let mut data = vec![0; DATA_LEN];
        ram.memory().read_slice(&mut data, GuestAddress(DATA)).unwrap();
        // Where the last x87 instruction was is told differently.
        let fpu = FpuState { fop: 0, fip: 0, fdp: 0, ..state.fpu };
        Self { gpr: state.gpr, rip: state.rip, fpu, data }
    }
}

fn uninterrupted(engine: &dyn Engine, cpl: u16, rounds: u64) -> Outcome {
    let (ram, state) = prepare(cpl);
    set_limit(&ram, rounds);
    let mut rig = Rig::over(engine, ram);
    rig.vcpu.set_state(&state).unwrap();
    Recorder::default().run(&mut *rig.vcpu);
    Outcome::of(rig.vcpu.state().unwrap(), &rig.ram)
}

/// Moves the computation between vCPUs of two engines; what it leaves behind, its rounds, and moves in which it got on.
fn moved(engines: [&dyn Engine; 2], cpl: u16, moves: usize) -> (Outcome, u64, usize) {
    let (ram, state) = prepare(cpl);
    set_limit(&ram, u64::MAX);
    let mut rigs = engines.map(|engine| Rig::over(engine, ram.clone()));
    let (mut made, mut limit) = (0, u64::MAX);
    let state = move_at_random(&mut rigs, state, |before, after| {
        made += usize::from((after.rip, after.gpr) != (before.rip, before.gpr));
        if made >= moves && limit == u64::MAX {
            limit = after.gpr[ROUNDS] + 2;
            set_limit(&ram, limit);
        }
    });
    set_limit(&ram, limit);
    (Outcome::of(state, &ram), limit, made)
}

fn check(cpl: u16, moves: usize) {
    let moves = std::env::var("RUSE_MOVES").ok().and_then(|n| n.parse().ok()).unwrap_or(moves);
    let dbt = DbtEngine::new(DbtOptions::default());
    let kvm = kvm();
    let first: &dyn Engine = kvm.as_ref().map_or(&dbt, |kvm| kvm);
    let (found, rounds, made) = moved([first, &dbt], cpl, moves);
    println!("FIGURE {made} moves between {} and dbt over {rounds} rounds", first.name());
    assert_eq!(found, uninterrupted(&dbt, cpl, rounds), "after {made} moves, {rounds} rounds");
    assert_eq!(found, uninterrupted(first, cpl, rounds), "of {}, {rounds} rounds", first.name());
}

#[test]
fn a_user_program_that_moves_comes_out_right() {
    check(3, 25);
}

#[test]
fn a_kernel_that_moves_comes_out_right() {
    check(0, 25);
}
