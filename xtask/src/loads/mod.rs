//! Real loads: programs of Debian's packages, natively and in a guest under each peer. All have to write the same.

mod native;
mod tree;

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use ruse_guest::{DefaultGuest, GuestFiles, Silent, run_argument};

use crate::bench::{self, Accel, CaseFigures, Figures, Guest, Measured, Peer, present_peers};
use crate::running::Running;
use tree::{Load, Tree};

/// What to run, and how often.
#[derive(Args)]
pub struct Options {
    /// Loads, by the names of their directories in bench/loads; without any, all.
    names: Vec<String>,
    /// Rounds; each runs every peer once, and medians are taken over them.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The guest's CPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    cpus: u32,
    /// Whom to run.
    #[arg(long, value_delimiter = ',', default_values = ["native", "qemu", "ruse"])]
    peers: Vec<Peer>,
    /// The `ruse` to measure; without it, the one of this tree is built.
    #[arg(long)]
    ruse: Option<PathBuf>,
    /// More arguments for `ruse run`, as one word each.
    #[arg(long = "ruse-arg", allow_hyphen_values = true)]
    ruse_args: Vec<String>,
    /// Ends a run of a load's cases that takes longer than this many seconds.
    #[arg(long, default_value_t = 900)]
    timeout: u64,
    /// Writes all figures to this file as well.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Where packages cannot be fetched or chroot is not permitted, says so and leaves the loads out.
    #[arg(long)]
    optional: bool,
}

/// What a case gave.
#[derive(Debug, PartialEq)]
struct Outcome {
    name: String,
    seconds: f64,
    /// Its exit status and the checksum of what it wrote.
    check: String,
    /// What it wrote.
    text: String,
}

/// What all runs have in common.
struct Job<'a> {
    options: &'a Options,
    guest: GuestFiles,
    ruse: PathBuf,
    directory: PathBuf,
}

/// Runs the loads and prints a report.
pub fn run(options: &Options) -> Result<()> {
    let loads: Vec<_> = chosen(&options.names)?.iter().map(|name| Load::read(name)).collect::<Result<_>>()?;
    let peers = present_peers(&options.peers)?;
    let ruse = bench::ruse(options.ruse.as_deref())?;
    let directory =
        env::current_exe()?.ancestors().nth(2).context("this program has no directory")?.join("loads");
    let guest = match fetch(&loads, &directory) {
        Err(error) if options.optional => {
            println!("the loads are skipped: {error:#}");
            return Ok(());
        }
        fetched => fetched?,
    };
    let trees = loads.iter().map(|load| load.prepare(&directory, &guest)).collect::<Result<Vec<_>>>()?;
    let job = Job { options, guest, ruse, directory };
    let mut measured = Measured {
        cases: loads.iter().flat_map(Load::cases).collect(),
        peers: peers.iter().map(|&peer| (peer, Figures::default())).collect(),
    };
    for round in 1..=options.rounds {
        for (load, tree) in loads.iter().zip(&trees) {
            for (&peer, figures) in &mut measured.peers {
                eprintln!("round {round} of {}: {} {}", options.rounds, load.name, peer.name());
                let outcomes = job.run(load, tree, peer);
                let outcomes = outcomes.with_context(|| format!("{} {}", load.name, peer.name()))?;
                note(&mut figures.cases, &load.name, outcomes)?;
            }
        }
    }
    let reported = measured.report(options.rounds, options.cpus, options.json.as_deref());
    reported.with_context(|| format!("what the cases wrote is in {}", job.directory.display()))
}

/// Fetches the default guest and the loads' packages, on a host that can run them.
fn fetch(loads: &[Load], directory: &Path) -> Result<GuestFiles> {
    native::way()?;
    let guest = DefaultGuest::new()?.prepare(&mut Silent)?;
    loads.iter().try_for_each(|load| load.fetch(directory, &guest))?;
    Ok(guest)
}

impl Job<'_> {
    /// Runs the cases of a load under a peer, and keeps what they write in files.
    fn run(&self, load: &Load, tree: &Tree, peer: Peer) -> Result<Vec<Outcome>> {
        let mut running = Running::start(self.command(tree, peer)?, self.options.timeout)?;
        let mut lines = Vec::new();
        while let Some((_, line)) = running.next_line()? {
            lines.push(line);
        }
        let (status, _) = running.wait()?;
        ensure!(status.success(), "it ended with {status}:\n{}", running.last_lines());
        let outcomes = outcomes(lines.iter().map(String::as_str));
        let failed = outcomes.iter().find(|outcome| !outcome.check.starts_with("status 0 "));
        if let (Peer::Native, Some(Outcome { name, check, text, .. })) = (peer, failed) {
            bail!("{name} fails without any guest, {check}:\n{text}");
        }
        let kept = self.directory.join(&load.name).join(peer.name());
        fs::create_dir_all(&kept)?;
        for outcome in &outcomes {
            fs::write(kept.join(&outcome.name), &outcome.text)?;
        }
        let missing = load.cases.iter().find(|case| !outcomes.iter().any(|outcome| outcome.name == **case));
        match missing {
            Some(case) => bail!("{case} did not run to its end:\n{}", running.last_lines()),
            None => Ok(outcomes),
        }
    }

    fn command(&self, tree: &Tree, peer: Peer) -> Result<Command> {
        let script = format!("chroot /{} {} cases", tree::PLACE_IN_GUEST, native::SCRIPT.join(" "));
        let line = format!("console=ttyS0 panic=-1 quiet {}", run_argument(&script));
        let (kernel, initrd) = (&*self.guest.kernel, &*tree.initrd);
        let guest =
            Guest { kernel, initrd, line, mebibytes: 2048, cpus: self.options.cpus, accel: Accel::Dbt };
        Ok(match peer {
            Peer::Native => native::command(&tree.root, "cases")?,
            Peer::Qemu => guest.under_qemu("pc"),
            Peer::Ruse => guest.under_ruse(&self.ruse, &self.options.ruse_args),
        })
    }
}

/// Adds the outcomes of a run to a peer's figures. Each run has to give the same.
fn note(figures: &mut BTreeMap<String, CaseFigures>, load: &str, outcomes: Vec<Outcome>) -> Result<()> {
    for Outcome { name, seconds, check, text } in outcomes {
        let case = figures.entry(format!("{load}/{name}")).or_default();
        ensure!(case.check.is_empty() || case.check == check, "{name} wrote something else before:\n{text}");
        case.seconds.push(seconds);
        case.check = check;
    }
    Ok(())
}

/// Finds the outcomes of cases in what a run printed; bench/loads/run says how they look.
fn outcomes<'a>(lines: impl IntoIterator<Item = &'a str>) -> Vec<Outcome> {
    let (mut outcomes, mut current) = (Vec::new(), None);
    for line in lines {
        let words: Vec<_> = line.split_whitespace().collect();
        match (words[..].first(), &mut current) {
            (Some(&"LOAD"), _) => current = begun(&words),
            (Some(&"LOAD-END"), Some(_)) if words.len() > 1 => {
                let mut outcome: Outcome = current.take().expect("there is one");
                outcome.check = format!("{} {}", outcome.check, words[1]);
                outcomes.push(outcome);
            }
            (Some(_), Some(outcome)) => outcome.text += &format!("{}\n", written(line)),
            _ => {}
        }
    }
    outcomes
}

/// A line without its mark. Lines come without blanks at their ends.
fn written(line: &str) -> &str {
    line.strip_prefix("| ").unwrap_or(if line == "|" { "" } else { line })
}

/// Reads `LOAD NAME SECONDS STATUS`.
fn begun(words: &[&str]) -> Option<Outcome> {
    let &[_, name, seconds, status] = words else { return None };
    let (name, check) = (name.to_owned(), format!("status {status}"));
    Some(Outcome { name, seconds: seconds.parse().ok()?, check, text: String::new() })
}

/// The names of all loads.
fn names() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(tree::sources())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// The loads that are asked for.
fn chosen(wanted: &[String]) -> Result<Vec<String>> {
    let all = names()?;
    if let Some(unknown) = wanted.iter().find(|name| !all.contains(name)) {
        bail!("there is no load '{unknown}'; there are: {}", all.join(", "));
    }
    Ok(if wanted.is_empty() { all } else { wanted.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_found_in_what_a_run_prints() {
        let printed = "[ 0.1] kernel\nLOAD one 1.25 0\n| a  b\n|\n[ 1.0] noise\n\nLOAD-END 12ab  -\n\
                       LOAD two 0.5 139\n\nLOAD-END 34cd  -\nLOAD three 0.1 0\n| cut off";
        let outcome = |name: &str, seconds, check: &str, text: &str| Outcome {
            name: name.into(),
            seconds,
            check: check.into(),
            text: text.into(),
        };
        let expected = [
            outcome("one", 1.25, "status 0 12ab", "a  b\n\n[ 1.0] noise\n"),
            outcome("two", 0.5, "status 139 34cd", ""),
        ];
        assert_eq!(outcomes(printed.lines()), expected);
    }

    #[test]
    fn the_same_load_has_to_give_the_same_each_time() {
        let run = |check: &str| {
            vec![Outcome { name: "one".into(), seconds: 1.0, check: check.into(), text: "said".into() }]
        };
        let mut figures = BTreeMap::new();
        note(&mut figures, "load", run("status 0 a")).unwrap();
        note(&mut figures, "load", run("status 0 a")).unwrap();
        assert_eq!(figures["load/one"].seconds, [1.0, 1.0]);
        assert!(note(&mut figures, "load", run("status 0 b")).unwrap_err().to_string().contains("said"));
    }

    #[test]
    fn loads_are_chosen_by_name() {
        assert!(chosen(&[]).unwrap().len() > 5);
        assert_eq!(chosen(&["perl".into()]).unwrap(), ["perl"]);
        assert!(chosen(&["prel".into()]).unwrap_err().to_string().contains("perl"));
    }
}
