//! Random user code: what the differential tests generate, run by a process.

use std::sync::LazyLock;

use ruse_cases::case::{Case, Executor, Outcome, digest};
use ruse_cases::compare::Rules;
use ruse_cases::generate::Generator;
use ruse_cases::native::Native;
use ruse_cases::pools::Pools;
use ruse_cases::program::program;
use ruse_random::Random;

use crate::digest::Digest;

/// Programs of the generator in one of ours.
const PROGRAMS: u64 = 40;
/// Inputs with which each of them runs.
const VARIANTS: u64 = 3;

/// What the generator chooses from.
static POOLS: LazyLock<Pools> = LazyLock::new(|| Pools::new(&Generator::default().codes));

/// Does what is the same for all programs, so that not each has to.
pub fn prepare() {
    LazyLock::force(&POOLS);
}

/// Runs generated code in a child and sums up what counts of the outcomes.
pub fn run(random: &mut Random) -> u64 {
    let seeds: Vec<u64> = (0..PROGRAMS).map(|_| random.word()).collect();
    let variants = |seed| (0..VARIANTS).map(move |variant| (seed, variant));
    let cases: Vec<Case> =
        seeds.into_iter().flat_map(variants).map(|(seed, variant)| program(&POOLS, seed, variant)).collect();
    let mut sum = Digest::default();
    for (case, outcome) in cases.iter().zip(Native::default().run(&cases)) {
        add(&mut sum, &Rules::new(case, &outcome, true).strip(&outcome));
    }
    sum.value()
}

fn add(sum: &mut Digest, outcome: &Outcome) {
    let Outcome { state, vector, error, address, window, code } = outcome;
    let numbers =
        [state.rip, state.flags, *vector, *error, *address, *code, digest(window), digest(&state.fpu)];
    numbers.into_iter().chain(state.gpr).for_each(|value| sum.add(value));
}
