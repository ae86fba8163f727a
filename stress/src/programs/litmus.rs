//! Litmus tests of the order of memory accesses (SDM volume 3, 8.2.3): outcomes that the architecture forbids never show.

use std::arch::asm;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::thread;

use ruse_random::Random;

/// Pairs of variables, one after the other; each is used once.
const PLACES: usize = 6000;
/// How far threads may be apart in places before the one ahead waits.
const APART: usize = 3;

/// Variables of one place, on cache lines of their own.
#[repr(C, align(64))]
#[derive(Default)]
struct Place {
    x: AtomicU64,
    apart: [u64; 7],
    y: AtomicU64,
    /// What the threads have read.
    read: [AtomicU64; 4],
}

/// A plain store that stays where it is.
fn store(to: &AtomicU64, value: u64) {
    // SAFETY: a store to a variable that is only used atomically.
    unsafe { asm!("mov [{0}], {1}", in(reg) to.as_ptr(), in(reg) value, options(nostack, preserves_flags)) };
}

/// A plain load that stays where it is.
fn load(from: &AtomicU64) -> u64 {
    let value;
    // SAFETY: as in `store`.
    unsafe {
        asm!("mov {1}, [{0}]", in(reg) from.as_ptr(), out(reg) value, options(nostack, preserves_flags))
    };
    value
}

/// A store by a locked instruction.
fn exchange(to: &AtomicU64, value: u64) {
    to.swap(value, Ordering::SeqCst);
}

/// What a thread does at a place.
type Step = fn(&Place);

/// A test: what each thread does, and the outcomes that must not be.
struct Test {
    name: &'static str,
    threads: &'static [Step],
    forbidden: &'static [[u64; 4]],
}

/// Notes what a thread has read.
fn note(place: &Place, n: usize, value: u64) {
    place.read[n].store(value, Ordering::Relaxed);
}

const READ_X_THEN_Y: Step = |p| {
    let (a, b) = (load(&p.x), load(&p.y));
    note(p, 0, a);
    note(p, 1, b);
};

const READ_Y_THEN_X: Step = |p| {
    let (a, b) = (load(&p.y), load(&p.x));
    note(p, 2, a);
    note(p, 3, b);
};

const TESTS: [Test; 6] = [
    Test {
        name: "message passing",
        threads: &[
            |p| {
                store(&p.x, 1);
                store(&p.y, 1);
            },
            READ_Y_THEN_X,
        ],
        forbidden: &[[0, 0, 1, 0]],
    },
    Test {
        name: "store buffering with fences",
        threads: &[
            |p| {
                store(&p.x, 1);
                fence(Ordering::SeqCst);
                note(p, 0, load(&p.y));
            },
            |p| {
                store(&p.y, 1);
                fence(Ordering::SeqCst);
                note(p, 1, load(&p.x));
            },
        ],
        forbidden: &[[0, 0, 0, 0]],
    },
    Test {
        name: "store buffering with exchanges",
        threads: &[
            |p| {
                exchange(&p.x, 1);
                note(p, 0, load(&p.y));
            },
            |p| {
                exchange(&p.y, 1);
                note(p, 1, load(&p.x));
            },
        ],
        forbidden: &[[0, 0, 0, 0]],
    },
    Test {
        name: "load buffering",
        threads: &[
            |p| {
                let value = load(&p.x);
                store(&p.y, 1);
                note(p, 0, value);
            },
            |p| {
                let value = load(&p.y);
                store(&p.x, 1);
                note(p, 1, value);
            },
        ],
        forbidden: &[[1, 1, 0, 0]],
    },
    Test {
        name: "independent reads of independent writes",
        threads: &[|p| store(&p.x, 1), |p| store(&p.y, 1), READ_X_THEN_Y, READ_Y_THEN_X],
        forbidden: &[[1, 0, 1, 0]],
    },
    Test {
        name: "coherence of reads",
        threads: &[
            |p| store(&p.x, 1),
            |p| {
                let (a, b) = (load(&p.x), load(&p.x));
                note(p, 0, a);
                note(p, 1, b);
            },
        ],
        forbidden: &[[1, 0, 0, 0]],
    },
];

/// Runs one of the tests at all places.
pub fn run(random: &mut Random) -> u64 {
    let n = random.below(TESTS.len() as u64);
    let test = &TESTS[n as usize];
    let places: Vec<Place> = (0..PLACES).map(|_| Place::default()).collect();
    let at: Vec<AtomicU64> = test.threads.iter().map(|_| AtomicU64::new(0)).collect();
    let shift = random.below(40);
    thread::scope(|threads| {
        for (n, step) in test.threads.iter().enumerate() {
            let (places, at) = (&places, &at);
            threads.spawn(move || walk(n, *step, places, at, shift * n as u64));
        }
    });
    for (n, place) in places.iter().enumerate() {
        let read = place.read.each_ref().map(|value| value.load(Ordering::Relaxed));
        assert!(!test.forbidden.contains(&read), "{}: {read:?} at place {n}", test.name);
    }
    n
}

/// Goes through the places beside the other threads, `delay` turns behind.
fn walk(this: usize, step: Step, places: &[Place], at: &[AtomicU64], delay: u64) {
    for (n, place) in places.iter().enumerate() {
        at[this].store(n as u64, Ordering::Relaxed);
        let behind = |other: &AtomicU64| other.load(Ordering::Relaxed) as usize + APART < n;
        let mut turns = 0;
        while at.iter().any(behind) {
            turns += 1;
            // There may be more threads than CPUs.
            if turns > 100 {
                thread::yield_now();
            }
        }
        (0..delay).for_each(|_| std::hint::spin_loop());
        step(place);
    }
    at[this].store(places.len() as u64, Ordering::Relaxed);
}
