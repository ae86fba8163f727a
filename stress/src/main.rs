//! Random programs that find a digest, the same on each machine. As the first program of a guest, `run SEED WORKERS
//! SECONDS [NAME]` runs them on all CPUs, prints `STRESS NAME DIGEST` for each and powers off; on a host, `answer` runs
//! those whose names it reads. `cargo xtask stress` does both and compares.

mod digest;
mod fault;
mod memory;
mod name;
mod process;
mod programs;

use std::env;
use std::io::{self, BufRead};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memory::Shared;
use name::Name;

/// The number of the process that a kernel starts.
const INIT: u32 = 1;

fn main() -> ExitCode {
    let words: Vec<String> = env::args().collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        [_, "run", seed, workers, seconds, ref only @ ..] => run(seed, workers, seconds, only.first()),
        [_, "answer"] => answer(),
        [_, programs::EXECUTED, value] => programs::executed(value),
        _ => {
            eprintln!("usage: {} run SEED WORKERS SECONDS [NAME] | answer", words[0]);
            ExitCode::FAILURE
        }
    }
}

/// Runs random programs, or one again and again, until the time is over.
fn run(seed: &str, workers: &str, seconds: &str, only: Option<&&str>) -> ExitCode {
    let number = |word: &str| word.parse::<u64>().expect("a number");
    let (seed, workers) = (number(seed), number(workers));
    let end = Instant::now() + Duration::from_secs(number(seconds));
    let only: Option<Name> = only.map(|name| name.parse().expect("a program's name"));
    programs::prepare();
    println!("STRESS-UP");
    let next = Shared::new(AtomicU64::new(0));
    let work = || {
        while Instant::now() < end {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let name = only.unwrap_or_else(|| Name::nth(seed, n));
            println!("STRESS-BEGIN {name}");
            match process::find(name) {
                Ok(digest) => println!("STRESS {name} {digest:016x}"),
                Err(what) => println!("STRESS-FAIL {name} {what}"),
            }
        }
    };
    let children: Vec<_> = (0..workers).map(|_| process::fork(work)).collect();
    let whole = children.into_iter().map(process::wait).all(|end| end.is_ok());
    println!("STRESS-DONE {}", if whole { "whole" } else { "a worker failed" });
    if std::process::id() == INIT {
        process::power_off();
    }
    ExitCode::SUCCESS
}

/// Runs the programs that standard input names, a line each, and says what they find.
fn answer() -> ExitCode {
    programs::prepare();
    for line in io::stdin().lock().lines() {
        let name = line.expect("lines of text");
        match name.parse().map_err(str::to_owned).and_then(process::find) {
            Ok(digest) => println!("{digest:016x}"),
            Err(what) => println!("{what}"),
        }
    }
    ExitCode::SUCCESS
}
