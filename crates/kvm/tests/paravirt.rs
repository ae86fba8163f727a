//! A guest that uses KVM's clock and stolen time sees the same under both engines, and when it moves between them.
//!
//! RUSE_MOVES=N makes N moves.

mod support;

use std::{
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use iced_x86::code_asm::*;
use ruse_arch::{
    Paravirt, VcpuState,
    paravirt::{ClockPage, ENABLED, FEATURES_LEAF, SIGNATURE, SIGNATURE_LEAF, clock_flag, feature},
};
use ruse_dbt::{DbtEngine, DbtOptions};
use ruse_engine::{Engine, Halt};
use ruse_kvm::KvmEngine;
use ruse_memory::GuestRam;
use support::*;
use vm_memory::{Bytes, GuestAddress};

/// Where the guest has its clock, and the area of stolen time.
const CLOCK: u64 = 0x2_0000;
const STEAL: u64 = 0x2_1000;
/// After so many rounds the guest ends.
const LIMIT: u64 = 0x2_2000;

/// Registers: the latest time, how often time went back, stolen time, rounds.
const TIME: usize = 12;
const ERRORS: usize = 11;
const STOLEN: usize = 10;
const ROUNDS: usize = 15;

/// Reads the clock into RAX (the kernel's arch/x86/kernel/pvclock.c).
fn read_clock(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut again, mut right, mut scale) = (a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut again)?;
    a.mov(ebx, dword_ptr(r14))?;
    a.test(ebx, 1)?;
    a.jne(again)?;
    a.lfence()?;
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)?;
    a.sub(rax, qword_ptr(r14 + 8))?;
    a.movsx(ecx, byte_ptr(r14 + 28))?;
    a.test(ecx, ecx)?;
    a.js(right)?;
    a.shl(rax, cl)?;
    a.jmp(scale)?;
    a.set_label(&mut right)?;
    a.neg(ecx)?;
    a.shr(rax, cl)?;
    a.set_label(&mut scale)?;
    a.mov(edx, dword_ptr(r14 + 24))?;
    a.mul(rdx)?;
    a.shrd(rax, rdx, 32u32)?;
    a.add(rax, qword_ptr(r14 + 16))?;
    a.lfence()?;
    a.cmp(ebx, dword_ptr(r14))?;
    a.jne(again)
}

/// Reads both over and over, and counts how often one of them goes back.
fn program(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.inc(r15)?;
    read_clock(a)?;
    a.mov(rcx, qword_ptr(r13))?;
    for (now, last) in [(rax, r12), (rcx, r10)] {
        let mut forward = a.create_label();
        a.cmp(now, last)?;
        a.jae(forward)?;
        a.inc(r11)?;
        a.set_label(&mut forward)?;
        a.mov(last, now)?;
    }
    a.cmp(r15, qword_ptr(r9))?;
    a.jb(top)?;
    end(a)
}

/// RAM with the guest, and a vCPU before it.
fn prepare() -> (GuestRam, VcpuState) {
    let ram = GuestRam::new(1 << 20).unwrap();
    let mut state = long_mode(&ram, 0);
    put(&ram, CODE, &assemble(64, CODE, |a| program(a).unwrap()));
    put(&ram, LIMIT, &u64::MAX.to_le_bytes());
    state.gpr = [0; 16];
    (state.gpr[14], state.gpr[13], state.gpr[9]) = (CLOCK, STEAL, LIMIT);
    state.paravirt =
        Paravirt { system_time: CLOCK | ENABLED, steal_time: STEAL | ENABLED, ..Paravirt::default() };
    (ram, state)
}

/// The host's KVM, if it has what the guest needs.
fn kvm_with_clock() -> Option<KvmEngine> {
    const NEEDED: u32 = feature::CLOCK | feature::STEAL_TIME;
    let engine = kvm()?;
    if engine.supported_cpuid().get(FEATURES_LEAF, 0)[0] & NEEDED == NEEDED {
        return Some(engine);
    }
    println!("skipped: this KVM has no clock for guests");
    None
}

#[test]
fn the_interfaces_that_kvm_offers_are_those_that_ruse_knows() {
    let Some(engine) = kvm() else { return };
    let table = engine.supported_cpuid();
    let features = table.get(FEATURES_LEAF, 0)[0];
    println!("FIGURE features {features:#x}");
    assert_eq!(features & !feature::KNOWN, 0);
    if features != 0 {
        assert_eq!(table.get(SIGNATURE_LEAF, 0)[1..], SIGNATURE);
    }
}

/// Lets the guest run for so long.
fn run_for(rig: &mut Rig, time: Duration) {
    let handle = rig.vcpu.handle();
    let kicker = thread::spawn(move || {
        thread::sleep(time);
        handle.kick();
    });
    assert_eq!(rig.vcpu.run(&Recorder::default()).unwrap(), Halt::Kicked);
    kicker.join().unwrap();
}

fn clock_page(ram: &GuestRam) -> ClockPage {
    let mut bytes = [0; 24];
    ram.memory().read_slice(&mut bytes, GuestAddress(CLOCK + ClockPage::BODY)).unwrap();
    ClockPage::from_bytes(&bytes)
}

/// The guest's time at a moment between two of the host's.
struct Reading {
    guest: u64,
    earliest: Instant,
    latest: Instant,
}

impl Reading {
    /// What the guest would read now. It has read that or less.
    fn take(rig: &mut Rig) -> Self {
        let earliest = Instant::now();
        let state = rig.vcpu.state().unwrap();
        let latest = Instant::now();
        let guest = clock_page(&rig.ram).at(state.tsc);
        assert!(state.gpr[TIME] <= guest && guest - state.gpr[TIME] < 10_000_000_000, "{guest} {state:?}");
        Self { guest, earliest, latest }
    }

    /// Whether so much of the guest's time has passed since `before` as of the host's, but for a hundredth: a host that has
    /// just started may still be finding out how fast its counter is, which KVM's clock goes by.
    fn follows(&self, before: &Self) -> bool {
        let passed = (self.guest - before.guest) as f64 / 1e9;
        let [least, most] = [self.earliest - before.latest, self.latest - before.earliest];
        println!("FIGURE {passed:.6} s of the guest in {least:?} to {most:?}");
        (least.as_secs_f64() * 0.99..=most.as_secs_f64() * 1.01).contains(&passed)
    }
}

/// The guest's time goes at the host's rate, also while it is held, which it is told of.
fn check_clock(engine: &dyn Engine) {
    let (ram, state) = prepare();
    let mut rig = Rig::over(engine, ram);
    rig.vcpu.set_state(&state).unwrap();
    run_for(&mut rig, Duration::from_millis(100));
    let first = Reading::take(&mut rig);
    run_for(&mut rig, Duration::from_millis(1000));
    let second = Reading::take(&mut rig);
    assert!(second.follows(&first));
    assert_eq!(clock_page(&rig.ram).flags & clock_flag::STOPPED, 0);
    thread::sleep(Duration::from_millis(500));
    rig.vcpu.held();
    run_for(&mut rig, Duration::from_millis(500));
    assert!(Reading::take(&mut rig).follows(&second));
    assert_ne!(clock_page(&rig.ram).flags & clock_flag::STOPPED, 0);
    let after = rig.vcpu.state().unwrap();
    assert_eq!((after.gpr[ERRORS], after.paravirt), (0, state.paravirt));
}

#[test]
fn the_translators_clock_goes_at_the_hosts_rate() {
    check_clock(&DbtEngine::new(DbtOptions::default()));
}

#[test]
fn kvms_clock_goes_at_the_hosts_rate() {
    if let Some(engine) = kvm_with_clock() {
        check_clock(&engine);
    }
}

/// The guest's time never goes back while it moves between a machine and one that began later.
fn check_moves(engines: [&dyn Engine; 2]) {
    let moves = std::env::var("RUSE_MOVES").ok().and_then(|n| n.parse().ok()).unwrap_or(25);
    let (ram, state) = prepare();
    let earliest = Instant::now();
    let mut rigs = engines.map(|engine| {
        let rig = Rig::over(engine, ram.clone());
        thread::sleep(Duration::from_millis(50));
        rig
    });
    let latest = Instant::now();
    let mut made = 0;
    let end = move_at_random(&mut rigs, state, |before, after| {
        made += usize::from(after.gpr[ROUNDS] != before.gpr[ROUNDS]);
        assert_eq!(after.gpr[ERRORS], 0, "after {made} moves: {} {}", after.gpr[TIME], after.gpr[STOLEN]);
        if made == moves {
            ram.memory().store(0u64, GuestAddress(LIMIT), Ordering::SeqCst).unwrap();
        }
    });
    let (time, passed) = (Duration::from_nanos(end.gpr[TIME]), latest.elapsed());
    println!("FIGURE {made} moves from {}, the clock at {time:?} of {passed:?}", engines[0].name());
    assert_eq!(end.gpr[ERRORS], 0);
    // The older machine's clock began after the first moment; the end is noticed a little later.
    assert!(time <= earliest.elapsed().mul_f64(1.001), "{time:?} of {:?}", earliest.elapsed());
    assert!(time + Duration::from_secs(1) >= passed, "{time:?} of {passed:?}");
}

#[test]
fn a_clock_goes_on_from_kvm_to_the_translator() {
    if let Some(kvm) = kvm_with_clock() {
        check_moves([&kvm, &DbtEngine::new(DbtOptions::default())]);
    }
}

#[test]
fn a_clock_goes_on_from_the_translator_to_kvm() {
    if let Some(kvm) = kvm_with_clock() {
        check_moves([&DbtEngine::new(DbtOptions::default()), &kvm]);
    }
}
