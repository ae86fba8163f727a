//! A long run of the translator: a guest with several CPUs runs random programs, this host the same ones, and what they
//! find has to be the same.

mod answers;
mod checks;
mod guest;
mod progress;
mod stops;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use serde_json::json;

use answers::Answers;
use checks::Checks;
use guest::Guest;
use progress::Progress;
use stops::Stops;

/// Seconds without a line after which the guest counts as hung.
const SILENCE: u64 = 400;
/// Parts of what a kernel prints when something is wrong.
const TROUBLE: [&str; 6] = ["BUG:", "WARNING:", "Oops", "Kernel panic", "rcu: INFO", "Call Trace"];

/// What to run, and how long.
#[derive(Args)]
pub struct Options {
    /// How long the guest runs programs.
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// From which all programs are made; without it, one by the clock.
    #[arg(long)]
    seed: Option<u64>,
    /// The guest's CPUs; each has a program of its own at a time.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    vcpus: u32,
    /// Runs this program alone, again and again, as often as there is time for.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Stops and continues the machine's processes all the time, as job control and freezers do.
    #[arg(long)]
    stops: bool,
    /// The `ruse` to try; without it, the one of this tree is built.
    #[arg(long)]
    ruse: Option<PathBuf>,
    /// More arguments for `ruse run`, as one word each.
    #[arg(long = "ruse-arg", allow_hyphen_values = true)]
    ruse_args: Vec<String>,
    /// Writes what was done as JSON on standard output.
    #[arg(long)]
    json: bool,
}

/// What a run has done so far.
#[derive(Default)]
struct Done {
    /// Programs by kind.
    programs: BTreeMap<String, u64>,
    /// The guest has come to its end.
    whole: bool,
}

impl Done {
    fn add(&mut self, name: &str) {
        let kind = name.split('-').next().unwrap_or(name);
        *self.programs.entry(kind.to_owned()).or_default() += 1;
    }

    fn total(&self) -> u64 {
        self.programs.values().sum()
    }
}

/// Runs the guest and compares.
pub fn run(options: &Options) -> Result<()> {
    let seed = options.seed.unwrap_or_else(by_the_clock);
    let mut done = Done::default();
    let result = compare(options, seed, &mut done);
    let kinds: Vec<String> = done.programs.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    if options.json {
        let failure = result.as_ref().err().map(|error| format!("{error:#}"));
        let (minutes, vcpus, programs) = (options.minutes, options.vcpus, &done.programs);
        println!(
            "{}",
            json!({ "seed": seed, "minutes": minutes, "vcpus": vcpus, "programs": programs, "failure": failure })
        );
    } else {
        println!("seed {seed}: {} programs ({})", done.total(), kinds.join(", "));
    }
    let vcpus = options.vcpus;
    result.with_context(|| {
        format!("seed {seed} (one program again: cargo xtask stress --vcpus {vcpus} --only NAME)")
    })
}

fn by_the_clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |now| now.as_secs())
}

/// Listens to the guest and has each of its answers repeated here.
fn compare(options: &Options, seed: u64, done: &mut Done) -> Result<()> {
    let guest = Guest::prepare(options)?;
    if let Some(only) = &options.only {
        let found = Answers::start(&guest.program)?.find(only)?;
        ensure!(u64::from_str_radix(&found, 16).is_ok(), "{only} fails on this host as well: {found}");
    }
    let checks = Checks::start(&guest.program)?;
    let mut progress = Progress::new(Duration::from_secs_f64(options.minutes * 60.0));
    let mut run = guest.start(options, seed, SILENCE)?;
    let _stops = options.stops.then(|| Stops::begin(run.id()));
    while let Some((_, line)) = run.next_line()? {
        run.allow(SILENCE);
        let said = match Said::by(&line) {
            Said::Up => {
                progress.begin();
                Ok(())
            }
            Said::Done => {
                done.whole = true;
                Ok(())
            }
            Said::Other => Ok(()),
            Said::Found { name, digest } => checks.add(name, digest),
            Said::Failed { name, what } => Err(anyhow!("{name}: {what}")),
            Said::Trouble => Err(anyhow!("{line}")),
        };
        match said.and_then(|()| checks.compared()) {
            Ok(names) => names.iter().for_each(|name| done.add(name)),
            Err(failure) => {
                progress.end();
                eprintln!("{}", run.last_and_next_lines());
                return Err(failure);
            }
        }
        progress.show(done.total());
    }
    progress.end();
    let (status, _) = run.wait()?;
    ensure!(status.success() && done.whole, "the guest ended early, with {status}:\n{}", run.last_lines());
    checks.finish()?.iter().for_each(|name| done.add(name));
    ensure!(done.total() > 0, "no program came to its end:\n{}", run.last_lines());
    Ok(())
}

/// What a line of the guest says.
#[derive(Debug, PartialEq)]
enum Said<'a> {
    /// It begins.
    Up,
    /// A program has found this.
    Found { name: &'a str, digest: &'a str },
    /// A program has found something wrong, or did not come to its end.
    Failed { name: &'a str, what: String },
    /// All of it has come to its end.
    Done,
    /// The kernel complains.
    Trouble,
    /// Nothing that matters.
    Other,
}

impl Said<'_> {
    fn by(line: &str) -> Said<'_> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["STRESS-UP"] => Said::Up,
            ["STRESS", name, digest] => Said::Found { name, digest },
            ["STRESS-FAIL", name, ref what @ ..] => Said::Failed { name, what: what.join(" ") },
            ["STRESS-DONE", "whole"] => Said::Done,
            _ if TROUBLE.iter().any(|part| line.contains(part)) => Said::Trouble,
            _ => Said::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_guest_are_read() {
        assert_eq!(Said::by("STRESS jit-1 00ff"), Said::Found { name: "jit-1", digest: "00ff" });
        let what = "signal 11".to_owned();
        assert_eq!(Said::by("STRESS-FAIL jit-1 signal 11"), Said::Failed { name: "jit-1", what });
        assert_eq!(Said::by("STRESS-DONE whole"), Said::Done);
        assert_eq!(Said::by("STRESS-DONE a worker failed"), Said::Other);
        assert_eq!(Said::by("[  7.1] watchdog: BUG: soft lockup - CPU#1"), Said::Trouble);
        assert_eq!(Said::by("STRESS-BEGIN jit-1"), Said::Other);
    }

    #[test]
    fn programs_are_counted_by_kind() {
        let mut done = Done::default();
        ["jit-1", "jit-2", "maps-1"].into_iter().for_each(|name| done.add(name));
        assert_eq!((done.total(), done.programs["jit"]), (3, 2));
    }
}
