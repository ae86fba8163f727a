//! Guest instructions under each executor against the host's CPU: registers, flags, memory and fault must agree.
//!
//! `RUSE_DIFF_CASES` says how many random cases run of each kind, `RUSE_DIFF_ROUNDS` how often single instructions are
//! tried, `RUSE_DIFF_SEED` where the generator begins.

#[path = "differential/guest.rs"]
mod guest;
#[path = "differential/tier0.rs"]
mod tier0;
#[path = "differential/translator.rs"]
mod translator;

use std::collections::BTreeMap;

use ruse_cases::case::{Case, Executor, Outcome};
use ruse_cases::generate::Generator;
use ruse_cases::pools::Pools;
use ruse_cases::program::program;
use ruse_cases::{compare, native};
use tier0::Tier0;
use translator::Translator;

/// Inputs with which each program runs.
const VARIANTS: u64 = 3;
/// Cases that are handed to an executor at a time.
const BATCH: usize = 128;
/// Differences that are printed.
const PRINTED: u64 = 48;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Runs cases under an executor and on the host, and reports the differences.
fn run(what: &str, executor: &mut dyn Executor, cases: impl Iterator<Item = Case>) {
    run_both(what, &mut native::Native::default(), executor, cases);
}

/// Runs cases under both executors and reports the differences by mnemonic.
fn run_both(
    what: &str,
    right: &mut dyn Executor,
    executor: &mut dyn Executor,
    mut cases: impl Iterator<Item = Case>,
) {
    let (mut total, mut differences) = (0u64, BTreeMap::<String, u64>::new());
    loop {
        let batch: Vec<Case> = cases.by_ref().take(BATCH).collect();
        if batch.is_empty() {
            break;
        }
        total += batch.len() as u64;
        let expected = right.run(&batch);
        let found = executor.run(&batch);
        for ((case, expected), found) in batch.iter().zip(&expected).zip(&found) {
            let text = compare::difference(case, expected, found, executor.forgets_dead_flags());
            text.inspect(|text| report(case, expected, found, text, &mut differences));
        }
    }
    let bad: u64 = differences.values().sum();
    for (name, count) in &differences {
        eprintln!("{what}: {count:6} {name}");
    }
    eprintln!("{what}: {total} cases under {}, {bad} differences", executor.name());
    assert_eq!(bad, 0, "{what}: {} and {} disagree", executor.name(), right.name());
}

fn report(case: &Case, expected: &Outcome, found: &Outcome, text: &str, seen: &mut BTreeMap<String, u64>) {
    let name = case.instruction_at(expected, found);
    let total: u64 = seen.values().sum();
    let of_this = seen.entry(name.clone()).or_default();
    *of_this += 1;
    if *of_this <= 2 && total < PRINTED {
        eprintln!("--- seed {:#x}, {name}\n{}{text}", case.seed, case.listing());
    }
}

/// Random sequences, `count` of them unless the settings say otherwise.
fn sequences(seed: u64, count: u64) -> impl Iterator<Item = Case> {
    let generator = Generator::default();
    let count = setting("RUSE_DIFF_CASES", count);
    let seed = setting("RUSE_DIFF_SEED", seed);
    (0..count).map(move |n| generator.random(seed.wrapping_add(n), 1..=8))
}

/// Every instruction by itself, a few times.
fn single_cases(generator: &Generator) -> impl Iterator<Item = Case> {
    let rounds = setting("RUSE_DIFF_ROUNDS", 6);
    (0..rounds).flat_map(move |round| (0..generator.codes.len()).map(move |n| generator.single(n, round)))
}

/// Each case twice, so that what an executor has made of it the first time is used the second time.
fn twice(cases: impl Iterator<Item = Case>) -> impl Iterator<Item = Case> {
    cases.flat_map(|case| [case, case])
}

/// Random programs, each with several inputs; `count` cases unless the settings say otherwise.
fn programs(seed: u64, count: u64) -> impl Iterator<Item = Case> {
    let count = setting("RUSE_DIFF_CASES", count);
    let pools = Pools::new(&Generator::default().codes);
    let seed = setting("RUSE_DIFF_SEED", seed);
    (0..count).map(move |n| program(&pools, seed.wrapping_add(n / VARIANTS), n % VARIANTS))
}

#[test]
fn tier0_single_instructions() {
    run("single", &mut Tier0::new(), single_cases(&Generator::default()));
}

#[test]
fn tier0_sequences() {
    run("sequences", &mut Tier0::new(), sequences(1 << 40, 40_000));
}

#[test]
fn translator_single_instructions() {
    run("single", &mut Translator::new(), twice(single_cases(&Generator::default())));
}

#[test]
fn translator_sequences() {
    run("sequences", &mut Translator::new(), twice(sequences(2 << 40, 20_000)));
}

#[test]
fn tier0_programs() {
    run("programs", &mut Tier0::new(), programs(3 << 40, 15_000));
}

#[test]
fn translator_programs() {
    let mut translator = Translator::new();
    run("programs", &mut translator, programs(4 << 40, 45_000));
    let (entries, interpreted) = translator.work();
    // A loop that stays in its block is one run, but counts in each round what it leaves to tier 0.
    assert!(entries * 4 > interpreted, "{entries} runs of blocks, {interpreted} instructions in tier 0");
}

/// Code at an address at which the host has none is right if it does what it does in tier 0.
#[test]
fn code_that_is_copied_for_another_address_does_the_same() {
    let mut copying = Translator::copying();
    run_both("copies", &mut Tier0::higher(), &mut copying, programs(5 << 40, 15_000));
    let (made, copied) = (copying.counter("blocks.made"), copying.counter("blocks.copied"));
    // Programs that write into themselves begin with other code at the second address.
    assert!(copied * 5 > made, "{copied} copies of {made} blocks");
}

/// Whether user code can be executed directly here; says so if not.
fn can_run_directly() -> bool {
    ruse_sandbox::Sandbox::probe().inspect_err(|error| eprintln!("SKIPPED: {error}")).is_ok()
}

#[test]
fn code_that_runs_directly_does_the_same() {
    if !can_run_directly() {
        return;
    }
    let mut direct = Translator::directly();
    run("direct", &mut direct, sequences(6 << 40, 5_000).chain(programs(7 << 40, 2_000)));
    let (runs, mapped) = (direct.counter("direct.runs"), direct.counter("direct.faults.mapped"));
    eprintln!("direct: entered {runs} times, {mapped} faults");
    assert!(runs >= 7_000, "not everything ran directly");
}
