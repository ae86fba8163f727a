//! The handlers of signals.

use std::hint::black_box;
use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use super::{CODE, CODE_BYTES, COMES_AND_GOES, Site, Then};
use crate::digest::Digest;
use crate::memory::{Mapping, NONE, PAGE, RW};

/// The trap flag of RFLAGS.
const TRAP: i64 = 0x100;
/// `si_code` of a single step.
const STEP: i32 = 2;
/// Registers by which the handlers judge.
const REGISTERS: [i32; 15] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];
/// Vector registers by which they judge.
const VECTORS: usize = 8;
/// Bits of a page fault's error code that depend on the access alone: a write, a fetch.
const ACCESS: i64 = 0x12;
/// Vector of a page fault.
const PAGE_FAULT: i64 = 14;

/// What the handlers know and note.
struct Story {
    sites: Vec<Site>,
    sum: Digest,
    /// Single steps to go.
    steps: u64,
}

/// The story of this process, while its code runs.
static STORY: AtomicPtr<Story> = AtomicPtr::new(null_mut());
/// Interruptions by the timer.
static TICKS: AtomicU64 = AtomicU64::new(0);

/// Runs code that faults at these sites, interrupted after each so many microseconds, and gives the digest of what the
/// handlers have seen.
pub fn with(sites: Vec<Site>, microseconds: i64, code: impl FnOnce()) -> u64 {
    let mut story = Story { sites, sum: Digest::default(), steps: 0 };
    STORY.store(&raw mut story, Ordering::Release);
    let stack = Mapping::new(32 * PAGE, RW);
    install(&stack);
    let timer = Timer::start(100_000 + microseconds * 1000);
    code();
    drop(timer);
    // SAFETY: no handler runs any more.
    unsafe { (*STORY.load(Ordering::Acquire)).sum.value() }
}

fn install(stack: &Mapping) {
    // SAFETY: plain system calls with valid arguments.
    unsafe {
        let alternate = libc::stack_t { ss_sp: stack.start().cast(), ss_flags: 0, ss_size: 32 * PAGE };
        assert_eq!(libc::sigaltstack(&raw const alternate, null_mut()), 0);
        let set = |signal: i32, handler: usize, flags: i32| {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | flags;
            assert_eq!(libc::sigaction(signal, &raw const action, null_mut()), 0);
        };
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP] {
            set(signal, fault as *const () as usize, 0);
        }
        set(libc::SIGUSR1, tick as *const () as usize, libc::SA_RESTART);
    }
}

/// A timer that sends SIGUSR1 again and again.
struct Timer(libc::timer_t);

impl Timer {
    fn start(nanoseconds: i64) -> Timer {
        // SAFETY: plain system calls with valid arguments.
        unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            (event.sigev_notify, event.sigev_signo) = (libc::SIGEV_SIGNAL, libc::SIGUSR1);
            let mut timer = null_mut();
            assert_eq!(libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer), 0);
            let every = libc::timespec { tv_sec: 0, tv_nsec: nanoseconds };
            let times = libc::itimerspec { it_interval: every, it_value: every };
            assert_eq!(libc::timer_settime(timer, 0, &raw const times, null_mut()), 0);
            Timer(timer)
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer is this value's.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// Uses registers of all kinds, which nobody notices.
extern "C" fn tick(_: i32, _: *const libc::siginfo_t, _: *mut libc::c_void) {
    let n = TICKS.fetch_add(1, Ordering::Relaxed);
    let values: [f64; 8] = std::array::from_fn(|i| black_box(n as f64 + i as f64).sqrt());
    black_box(values.map(|value| value as u64 as f32));
}

/// Notes a fault and decides how it goes on.
extern "C" fn fault(signal: i32, info: *const libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: what the kernel hands over is valid; the interrupted code touches neither that nor the story.
    let (story, info, machine) = unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        (&mut *STORY.load(Ordering::Acquire), &*info, &mut context.uc_mcontext)
    };
    let rip = machine.gregs[libc::REG_RIP as usize] as u64;
    if signal == libc::SIGTRAP && info.si_code == STEP {
        return step(story, rip, machine);
    }
    let Some(site) = story.sites.iter().find(|site| site.at == rip) else { stray(signal, rip) };
    let then = site.then;
    note(story, signal, info, machine);
    let (rip, flags) = (libc::REG_RIP as usize, libc::REG_EFL as usize);
    match then {
        Then::At(address) => machine.gregs[rip] = address as i64,
        Then::Steps(address, steps) => {
            machine.gregs[rip] = address as i64;
            story.steps = steps;
            machine.gregs[flags] |= if steps > 0 { TRAP } else { 0 };
            protect(NONE);
        }
        Then::Again => return protect(RW),
        Then::Return => {
            let rsp = &mut machine.gregs[libc::REG_RSP as usize];
            // SAFETY: the call has just put the address there.
            let back = unsafe { *(*rsp as *const i64) };
            *rsp += 8;
            machine.gregs[rip] = back;
        }
    }
    change(story, machine);
}

/// Adds to the digest what a handler is told.
fn note(story: &mut Story, signal: i32, info: &libc::siginfo_t, machine: &libc::mcontext_t) {
    let get = |r: i32| machine.gregs[r as usize];
    let error = match get(libc::REG_TRAPNO) {
        PAGE_FAULT => get(libc::REG_ERR) & ACCESS,
        _ => get(libc::REG_ERR),
    };
    // SAFETY: these signals have an address.
    let address = unsafe { info.si_addr() } as i64;
    let told =
        [i64::from(signal), info.si_code.into(), address, get(libc::REG_RIP), get(libc::REG_TRAPNO), error];
    for value in told.into_iter().chain(REGISTERS.map(get)) {
        story.sum.add(value as u64);
    }
    // SAFETY: the kernel has put the floating-point registers there.
    let vectors = unsafe { (*machine.fpregs)._xmm };
    for [a, b, c, d] in vectors[..VECTORS].iter().map(|xmm| xmm.element.map(u64::from)) {
        story.sum.add(a | b << 32);
        story.sum.add(c | d << 32);
    }
}

/// Changes two registers, so that what comes depends on what was seen.
fn change(story: &Story, machine: &mut libc::mcontext_t) {
    let value = story.sum.value();
    let register = REGISTERS[(value % (REGISTERS.len() as u64 - 1)) as usize];
    machine.gregs[register as usize] ^= value as i64;
    // SAFETY: as in `note`.
    unsafe { (*machine.fpregs)._xmm[value as usize >> 8 & 7].element[1] ^= value as u32 };
}

/// After a single step.
fn step(story: &mut Story, rip: u64, machine: &mut libc::mcontext_t) {
    let within = (CODE..CODE + CODE_BYTES as u64).contains(&rip);
    story.sum.add(if within { rip } else { 0 });
    story.steps = if within { story.steps.saturating_sub(1) } else { 0 };
    if story.steps == 0 {
        machine.gregs[libc::REG_EFL as usize] &= !TRAP;
    }
}

fn protect(protection: i32) {
    // SAFETY: the page belongs to the data, for which the code reckons with faults.
    unsafe { libc::mprotect(COMES_AND_GOES as *mut _, PAGE, protection) };
}

/// A fault where none should be ends the process.
fn stray(signal: i32, rip: u64) -> ! {
    eprintln!("signal {signal} at {rip:x}: {}", io::Error::last_os_error());
    // SAFETY: nothing of this process is needed any more.
    unsafe { libc::_exit(103) }
}
