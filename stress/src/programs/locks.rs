//! Threads that share data under locks, and by atomic instructions of all sizes and at all places.

use std::arch::asm;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread;

use ruse_random::Random;

use crate::digest::Digest;
use crate::memory::{Mapping, PAGE, RW, RWX};

/// Threads.
const THREADS: u64 = 3;

/// Runs some of the ways of sharing one after the other.
pub fn run(random: &mut Random) -> u64 {
    let ways: [fn(&mut Random) -> u64; 6] = [mutex, queue, sequence, atomics, parts, pairs];
    let mut sum = Digest::default();
    for _ in 0..4 {
        let way = random.pick(&ways);
        sum.add(way(random));
    }
    sum.value()
}

/// Runs as many threads of a function.
fn all(work: impl Fn(u64) + Sync) {
    thread::scope(|threads| {
        let work = &work;
        (0..THREADS).for_each(|n| drop(threads.spawn(move || work(n))));
    });
}

/// A list of numbers under a mutex, which sleeps in the kernel when it has to wait.
fn mutex(random: &mut Random) -> u64 {
    let (values, times) = (Mutex::new([0u64; 16]), 500 + random.below(2000));
    all(|_| {
        for n in 0..times {
            let mut values = values.lock().expect("no thread fails");
            let first = values[0];
            for value in values.iter_mut() {
                assert_eq!(*value, first, "a list under a lock");
                *value += n;
            }
        }
    });
    values.into_inner().expect("no thread fails")[7]
}

/// A queue on which threads wait for each other.
fn queue(random: &mut Random) -> u64 {
    let most = 1 + random.below(4) as usize;
    let (list, changed) = (Mutex::new(VecDeque::new()), Condvar::new());
    let (times, sum) = (200 + random.below(300), AtomicU64::new(0));
    let push = |value| {
        let mut list = changed
            .wait_while(list.lock().expect("no thread fails"), |list: &mut VecDeque<u64>| list.len() >= most)
            .expect("no thread fails");
        list.push_back(value);
        changed.notify_all();
    };
    let pop = || {
        let mut list = changed
            .wait_while(list.lock().expect("no thread fails"), |list| list.is_empty())
            .expect("no thread fails");
        changed.notify_all();
        list.pop_front().expect("it is not empty")
    };
    all(|thread| match thread {
        0 => (0..(THREADS - 1) * times).for_each(push),
        _ => (0..times).for_each(|_| {
            sum.fetch_add(pop(), Ordering::Relaxed);
        }),
    });
    sum.into_inner()
}

/// A sequence lock: readers never see half of a change.
fn sequence(random: &mut Random) -> u64 {
    let (turn, times) = (AtomicU64::new(0), 2000 + random.below(4000));
    let values: [AtomicU64; 6] = Default::default();
    all(|thread| {
        if thread == 0 {
            for n in 1..=times {
                turn.fetch_add(1, Ordering::AcqRel);
                values.iter().for_each(|value| value.store(n, Ordering::Release));
                turn.fetch_add(1, Ordering::Release);
            }
            return;
        }
        loop {
            let before = turn.load(Ordering::Acquire);
            let seen = values.each_ref().map(|value| value.load(Ordering::Acquire));
            let after = turn.load(Ordering::Acquire);
            if before % 2 == 0 && before == after {
                assert_eq!(seen, [before / 2; 6], "under a sequence lock");
                if before == 2 * times {
                    return;
                }
            }
        }
    });
    turn.into_inner()
}

/// Counters of each size by each instruction, also over the ends of cache lines and pages.
fn atomics(random: &mut Random) -> u64 {
    let memory = Mapping::new(2 * PAGE, RW);
    let offset = match random.below(8) {
        0 | 1 => PAGE - 1 - random.below(7) as usize,
        2 => 64 - 1 - random.below(7) as usize,
        _ => random.below(500) as usize * 8,
    };
    // What crosses a cache line keeps all CPUs of the host waiting.
    let times = if offset % 64 > 56 { 100 } else { 2000 };
    let at = memory.start().wrapping_add(offset) as u64;
    all(|_| {
        for _ in 0..times {
            // SAFETY: locked instructions on memory that is only used by them meanwhile.
            unsafe {
                asm!("lock inc qword ptr [{0}]", "lock add qword ptr [{0}], 2", in(reg) at);
                asm!("lock xadd [{0}], {1}", in(reg) at, inout(reg) 3u64 => _);
                asm!(
                    "mov rax, [{0}]", "2:", "lea {1}, [rax + 5]", "lock cmpxchg [{0}], {1}", "jne 2b",
                    in(reg) at, out(reg) _, out("rax") _,
                );
                // Each bit is this thread's alone for a while: set and cleared an even number of times.
                asm!("lock btc qword ptr [{0}], 60", "lock xor dword ptr [{0} + 4], 0x4000000", in(reg) at);
                asm!("lock not byte ptr [{0} + 7]", "lock not byte ptr [{0} + 7]", in(reg) at);
            }
        }
    });
    // SAFETY: no thread uses it any more.
    let found = unsafe { (at as *const u64).read_unaligned() };
    let bits = 0xff << 56 | 1 << 60 | 0x4000000 << 32;
    assert_eq!(found & !bits, THREADS * times * 11, "a counter of all threads");
    found & !bits
}

/// How often a counter over the end of a line or page counts.
const COUNTS: u64 = 200;

/// A counter over the end of a cache line or of a page, beside locked counters and plain stores in single bytes of it.
fn parts(random: &mut Random) -> u64 {
    const RET: u8 = 0xc3;
    let end = if random.below(3) == 0 { 64 } else { PAGE };
    let offset = end - 1 - random.below(7) as usize;
    // What is written to a page with code on it goes another way.
    let code = random.below(2) == 0;
    let memory = Mapping::new(2 * PAGE, if code { RWX } else { RW });
    let function = memory.start().wrapping_add(PAGE - 64);
    // SAFETY: the byte lies in the mapping, of which only this thread knows yet.
    unsafe { function.write(RET) };
    let (function, at) = (function as u64, memory.start().wrapping_add(offset) as u64);
    let done = AtomicBool::new(false);
    let [first, last]: [AtomicU64; 2] = Default::default();
    // SAFETY: the function returns at once. Other bytes than a thread's own change only as parts of the counter.
    all(|thread| unsafe {
        match thread {
            0 => {
                for _ in 0..COUNTS {
                    if code {
                        asm!("call {}", in(reg) function, clobber_abi("C"));
                    }
                    asm!("lock add qword ptr [{}], 0x10000", in(reg) at);
                }
                done.store(true, Ordering::Release);
            }
            1 => {
                let rounds = rounds_until(&done, |_| asm!("lock inc byte ptr [{}]", in(reg) at));
                first.store(rounds & 0xff, Ordering::Relaxed);
            }
            _ => {
                let rounds = rounds_until(&done, |round| {
                    let found: u8;
                    asm!("mov {}, [{} + 1]", out(reg_byte) found, in(reg) at);
                    assert_eq!(found, round as u8, "a byte that one thread alone stores to");
                    asm!("mov [{} + 1], {}", in(reg) at, in(reg_byte) found.wrapping_add(1));
                    asm!("lock inc byte ptr [{} + 7]", in(reg) at);
                });
                last.store(rounds & 0xff, Ordering::Relaxed);
            }
        }
    });
    // SAFETY: no thread uses it any more.
    let found = unsafe { (at as *const u64).read_unaligned() };
    assert_eq!((found & 0xff, found >> 56), (first.into_inner(), last.into_inner()), "parts of a counter");
    assert_eq!(found << 8 >> 24, COUNTS, "a counter over the end of a line or page");
    offset as u64
}

/// Repeats something, with the number of the round, until others are done; gives how often.
fn rounds_until(done: &AtomicBool, mut work: impl FnMut(u64)) -> u64 {
    (0..).take_while(|_| !done.load(Ordering::Acquire)).inspect(|&round| work(round)).count() as u64
}

/// Two numbers that are changed at once.
#[repr(C, align(16))]
struct Pair([u64; 2]);

/// Pairs of counters by CMPXCHG16B.
fn pairs(random: &mut Random) -> u64 {
    let (mut pair, times) = (Pair([0, 0]), 500 + random.below(1500));
    let at = (&raw mut pair) as u64;
    all(|_| {
        for _ in 0..times {
            let (low, high): (u64, u64);
            // SAFETY: a locked instruction on memory that is only used by it meanwhile; the compiler keeps RBX to itself,
            // so that it is saved around its use.
            unsafe {
                asm!(
                    "push rbx",
                    "xor eax, eax", "xor edx, edx",
                    "2:", "lea rbx, [rax + 1]", "lea rcx, [rdx + 3]", "lock cmpxchg16b [rdi]", "jne 2b",
                    "pop rbx",
                    in("rdi") at, out("rax") low, out("rdx") high, out("rcx") _,
                );
            }
            assert_eq!(low.wrapping_mul(3), high, "two numbers that change at once");
        }
    });
    // SAFETY: no thread uses it any more.
    let [low, high] = unsafe { (at as *const Pair).read_volatile() }.0;
    assert_eq!([low, high], [THREADS * times, 3 * THREADS * times]);
    low
}
