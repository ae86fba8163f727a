//! Guest instructions under each executor against the host's CPU: registers, flags, memory and fault must agree.
//!
//! `RUSE_DIFF_CASES` says how many random cases run, `RUSE_DIFF_SEED` where the generator begins.

#[path = "differential/case.rs"]
mod case;
#[path = "differential/compare.rs"]
mod compare;
#[path = "differential/generate.rs"]
mod generate;
#[path = "differential/native.rs"]
mod native;
#[path = "differential/operands.rs"]
mod operands;
#[path = "differential/random.rs"]
mod random;
#[path = "differential/tier0.rs"]
mod tier0;

use std::collections::BTreeMap;

use case::{Case, Executor, Outcome};
use generate::Generator;

/// Cases of one kind that run by default.
const DEFAULT_CASES: u64 = 100_000;
/// Cases that are handed to an executor at a time.
const BATCH: usize = 128;
/// Differences that are printed.
const PRINTED: usize = 12;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Runs cases under both executors and reports the differences by mnemonic.
fn run(what: &str, executor: &mut dyn Executor, mut cases: impl Iterator<Item = Case>) {
    let mut host = native::Native::new();
    let (mut total, mut differences) = (0u64, BTreeMap::<String, u64>::new());
    loop {
        let batch: Vec<Case> = cases.by_ref().take(BATCH).collect();
        if batch.is_empty() {
            break;
        }
        total += batch.len() as u64;
        let expected = host.run(&batch);
        let found = executor.run(&batch);
        for ((case, expected), found) in batch.iter().zip(&expected).zip(&found) {
            report(case, expected, found, &mut differences);
        }
    }
    let bad: u64 = differences.values().sum();
    for (name, count) in &differences {
        eprintln!("{what}: {count:6} {name}");
    }
    eprintln!("{what}: {total} cases under {}, {bad} differences", executor.name());
    assert_eq!(bad, 0, "{what}: {} and the host disagree", executor.name());
}

fn report(case: &Case, expected: &Outcome, found: &Outcome, differences: &mut BTreeMap<String, u64>) {
    let Some(text) = compare::difference(case, expected, found) else { return };
    let name = case.instruction_at(expected, found);
    let seen: u64 = differences.values().sum();
    let of_this = differences.entry(name.clone()).or_default();
    *of_this += 1;
    if *of_this <= 2 && seen < PRINTED as u64 * 4 {
        eprintln!("--- seed {:#x}, {name}\n{}{text}", case.seed, case.listing());
    }
}

fn random_cases(seed: u64, count: u64, length: std::ops::RangeInclusive<u64>) -> impl Iterator<Item = Case> {
    let generator = Generator::new();
    let seed = setting("RUSE_DIFF_SEED", seed);
    (0..count).map(move |n| generator.random(seed.wrapping_add(n), length.clone()))
}

/// Every instruction by itself, a few times.
#[test]
fn tier0_single_instructions() {
    let generator = Generator::new();
    let rounds = setting("RUSE_DIFF_ROUNDS", 12);
    let cases = (0..rounds).flat_map(|round| {
        let generator = &generator;
        (0..generator.codes.len()).map(move |n| generator.single(n, round))
    });
    run("single", &mut tier0::Tier0::new(), cases);
}

/// Random sequences.
#[test]
fn tier0_sequences() {
    let count = setting("RUSE_DIFF_CASES", DEFAULT_CASES);
    run("sequences", &mut tier0::Tier0::new(), random_cases(1 << 40, count, 1..=8));
}
