//! The dirty log of both engines: guests write to pages while the log is taken, and a copy of RAM that is made from its
//! answers comes out the same.

mod support;

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use iced_x86::code_asm::*;
use ruse_arch::{VcpuState, state::reg};
use ruse_dbt::{DbtEngine, DbtOptions};
use ruse_engine::{DirtyLog, Engine, Vcpu};
use ruse_kvm::{KvmEngine, LogInterface};
use ruse_memory::{DirtyPages, GuestRam, PAGE_SIZE};
use support::*;
use vm_memory::{Bytes, GuestAddress};

/// The pages that programs write to.
const DATA: u64 = 0x10_0000;
const PAGES: u64 = 700;
/// The programs end when they have made so many rounds as it says here.
const LIMIT: u64 = 0x2_0000;
/// A page that only a device writes to.
const DEVICE: u64 = 0x2_1000;
/// What CPUs mark in page tables, and the limit, lie below.
const LOW: u64 = DATA;
/// Registers of the programs: random number, rounds made.
const RANDOM: usize = reg::RBX;
const ROUNDS: usize = 8;

/// Takes of the log while the guest runs, and rounds that it makes at least.
const TAKES: u64 = 40;
const LEAST: u64 = 1_000;

fn next_random(mut random: u64) -> u64 {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    random
}

/// The page that a random number stands for.
fn page_of(random: u64) -> u64 {
    DATA + (random >> 8 & 0xffff_ffff) % PAGES * PAGE_SIZE
}

/// Each round writes to a random page, in the ways that there are: directly, by a locked instruction that emulators may not
/// have, and by a string instruction.
fn program(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    for (left, by) in [(true, 13u32), (false, 7), (true, 17)] {
        a.mov(rax, rbx)?;
        if left {
            a.shl(rax, by)?;
        } else {
            a.shr(rax, by)?;
        }
        a.xor(rbx, rax)?;
    }
    a.mov(rax, rbx)?;
    a.shr(rax, 8)?;
    a.mov(eax, eax)?;
    a.xor(edx, edx)?;
    a.mov(esi, PAGES as u32)?;
    a.div(rsi)?;
    a.shl(rdx, 12)?;
    a.lea(rdi, ptr(rdx + DATA as i32))?;
    a.mov(rax, rbx)?;
    a.and(eax, 0xff8)?;
    a.add(rax, rdi)?;
    a.mov(qword_ptr(rax), rbx)?;
    a.mov(rax, qword_ptr(rdi))?;
    a.mov(rdx, qword_ptr(rdi + 8))?;
    a.mov(rcx, r8)?;
    a.lock().cmpxchg16b(xmmword_ptr(rdi))?;
    a.mov(rax, r8)?;
    a.add(rdi, 0x20)?;
    a.mov(ecx, 4)?;
    a.rep().stosq()?;
    a.inc(r8)?;
    a.cmp(r8, qword_ptr(LIMIT))?;
    a.jb(top)?;
    end(a)
}

/// A copy of RAM that is brought up to date by the log.
struct Copy {
    ram: GuestRam,
    bytes: Vec<u8>,
    /// All pages that the log has named.
    named: BTreeSet<u64>,
}

impl Copy {
    fn of(ram: &GuestRam) -> Self {
        Self { ram: ram.clone(), bytes: contents(ram), named: BTreeSet::new() }
    }

    fn update(&mut self, taken: &[DirtyPages]) {
        for page in taken.iter().flat_map(DirtyPages::pages) {
            let bytes = &mut self.bytes[page as usize..][..PAGE_SIZE as usize];
            self.ram.memory().read_slice(bytes, GuestAddress(page)).unwrap();
            self.named.insert(page);
        }
    }

    /// Pages that differ from RAM.
    fn differences(&self) -> Vec<usize> {
        let now = contents(&self.ram);
        let pages = now.chunks(PAGE_SIZE as usize).zip(self.bytes.chunks(PAGE_SIZE as usize));
        pages
            .enumerate()
            .filter(|(_, (now, copy))| now != copy)
            .map(|(n, _)| n * PAGE_SIZE as usize)
            .collect()
    }
}

fn contents(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; ram.size() as usize];
    ram.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

fn set_limit(ram: &GuestRam, rounds: u64) {
    ram.memory().store(rounds, GuestAddress(LIMIT), Ordering::SeqCst).unwrap();
}

/// Runs the program on a thread; the rounds that it has made.
fn spawn(mut vcpu: Box<dyn Vcpu>, state: &VcpuState) -> thread::JoinHandle<(Box<dyn Vcpu>, u64)> {
    vcpu.set_state(state).unwrap();
    thread::spawn(move || {
        Recorder::default().run(&mut *vcpu);
        let rounds = vcpu.state().unwrap().gpr[ROUNDS];
        (vcpu, rounds)
    })
}

/// Two vCPUs and a device write while the log is taken over and over; twice, with a log of its own each time.
fn check(engine: &dyn Engine) {
    let Rig { ram, vm, vcpu } = Rig::over(engine, GuestRam::new(4 << 20).unwrap());
    let mut vcpus = vec![vcpu, vm.create_vcpu(1, engine.supported_cpuid()).unwrap()];
    put(&ram, CODE, &assemble(64, CODE, |a| program(a).unwrap()));
    for session in 1..3 {
        let state = long_mode(&ram, 0);
        set_limit(&ram, u64::MAX);
        let log = DirtyLog::start(vm.clone(), ram.clone()).unwrap();
        let mut copy = Copy::of(&ram);
        let seeds = [session << 32 | 0x7f4a_7c15, session << 32 | 0x4f6c_dd1d];
        let threads: Vec<_> = (vcpus.drain(..).zip(seeds))
            .map(|(vcpu, seed)| {
                let mut state = state.clone();
                (state.gpr[RANDOM], state.gpr[ROUNDS]) = (seed, 0);
                spawn(vcpu, &state)
            })
            .collect();
        for take in 0..TAKES {
            put(&ram, DEVICE + take % 8, &[take as u8]);
            copy.update(&log.take().unwrap());
        }
        set_limit(&ram, LEAST);
        let mut expected = BTreeSet::new();
        for (thread, seed) in threads.into_iter().zip(seeds) {
            let (vcpu, rounds) = thread.join().unwrap();
            vcpus.push(vcpu);
            (0..rounds).fold(seed, |random, _| {
                let random = next_random(random);
                expected.insert(page_of(random));
                random
            });
        }
        copy.update(&log.take().unwrap());
        assert!(log.take().unwrap().iter().all(|region| region.count() == 0), "nobody writes any more");
        assert_eq!(copy.differences(), [0; 0], "pages that the log has missed");
        let (low, data): (BTreeSet<u64>, _) = copy.named.iter().partition(|&&page| page < LOW);
        assert!(low.contains(&DEVICE), "{low:x?}");
        // KVM names a page also when it lets a vCPU write to it at a read (make_spte).
        assert!(engine.name() == "kvm" || !low.contains(&CODE), "{low:x?}");
        assert_eq!(data, expected, "pages that were written");
    }
}

/// More pages than a ring of KVM holds are written between two takes, and some are not. `may_overflow`: the guest may not be
/// left in time when the ring is full, and then all pages count as written.
fn check_many(engine: &dyn Engine, may_overflow: bool) {
    const MANY: u64 = 6_000;
    const OTHERS: u64 = 100;
    let mut rig = Rig::over(engine, GuestRam::new(DATA + (MANY + OTHERS) * PAGE_SIZE).unwrap());
    let state = long_mode(&rig.ram, 0);
    let code = assemble(64, CODE, |a| {
        let mut top = a.create_label();
        a.mov(ebx, DATA as u32).unwrap();
        a.mov(ecx, MANY as u32).unwrap();
        a.set_label(&mut top).unwrap();
        a.mov(dword_ptr(rbx), ecx).unwrap();
        a.add(ebx, PAGE_SIZE as i32).unwrap();
        a.dec(ecx).unwrap();
        a.jne(top).unwrap();
        end(a).unwrap();
    });
    rig.put(CODE, &code);
    rig.vcpu.set_state(&state).unwrap();
    let log = DirtyLog::start(rig.vm.clone(), rig.ram.clone()).unwrap();
    Recorder::default().run(&mut *rig.vcpu);
    let taken = log.take().unwrap();
    let data: Vec<_> = taken.iter().flat_map(DirtyPages::pages).filter(|&page| page >= LOW).collect();
    let exits = rig.vcpu.counters().get("exits.log");
    println!("FIGURE {}: {} pages of {MANY}, {exits} exits", engine.name(), data.len());
    let overflow = may_overflow && data.len() as u64 == MANY + OTHERS;
    assert!(overflow || data.len() as u64 == MANY, "{} pages, {exits} exits", data.len());
}

fn both(engine: &dyn Engine) {
    check(engine);
    check_many(engine, false);
}

/// Whether KVM is a program: those make some millions of instructions a second.
fn is_emulator(kvm: &KvmEngine) -> bool {
    ruse_kvm::probe::measure(kvm).unwrap().instructions < 20_000_000
}

#[test]
fn a_copy_by_the_log_of_the_translator_is_true() {
    both(&DbtEngine::new(DbtOptions::default()));
}

#[test]
fn a_copy_by_the_log_of_tier_0_is_true() {
    both(&DbtEngine::new(DbtOptions { tier: Some(0), ..DbtOptions::default() }));
}

#[test]
fn a_copy_by_the_best_log_of_kvm_is_true() {
    if let Some(kvm) = kvm() {
        check(&kvm);
        check_many(&kvm, is_emulator(&kvm));
    }
}

#[test]
fn a_copy_by_bitmaps_of_kvm_is_true() {
    for interface in [LogInterface::ClearedBitmap, LogInterface::Bitmap] {
        if let Some(kvm) = kvm() {
            both(&kvm.with_log(interface));
        }
    }
}

#[test]
fn a_vcpu_that_sleeps_or_does_not_run_does_not_hold_up_the_log() {
    for engine in engines() {
        let mut rig = Rig::new(&*engine);
        let count = Arc::new(AtomicU64::new(0));
        let code = assemble(16, CODE, |a| {
            a.cli().unwrap();
            a.mov(word_ptr(0x4000), 1).unwrap();
            a.hlt().unwrap();
        });
        rig.put(CODE, &code);
        rig.vcpu.set_state(&real_mode()).unwrap();
        let log = DirtyLog::start(rig.vm.clone(), rig.ram.clone()).unwrap();
        log.take().unwrap();
        let handle = rig.vcpu.handle();
        let sleeper = thread::spawn({
            let count = count.clone();
            move || {
                rig.vcpu.run(&Recorder::default()).unwrap();
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        let written = |taken: Vec<DirtyPages>| taken.iter().flat_map(DirtyPages::pages).any(|p| p == 0x4000);
        while !written(log.take().unwrap()) {
            thread::yield_now();
        }
        assert_eq!(count.load(Ordering::SeqCst), 0, "the vCPU sleeps");
        handle.kick();
        sleeper.join().unwrap();
    }
}
