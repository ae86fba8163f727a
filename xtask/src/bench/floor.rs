//! The least advantage over QEMU that every case has to have, recorded in a file: what falls below it has become slower.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::report::geometric_mean;
use super::run::qemu_version;
use super::{Measured, Peer};

/// What a floor is of the ratio that was measured when it was recorded. Machines differ, and others work beside: the
/// time of a single case scatters more than a mean.
const CASE_SHARE: f64 = 0.6;
const MEAN_SHARE: f64 = 0.75;
/// The name of the time from the start of the process to the guest's init.
const START: &str = "start";

/// The least ratios of QEMU's time to Ruse's.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Floors {
    /// The QEMU that they were recorded with.
    qemu: String,
    /// By case, the start included.
    cases: BTreeMap<String, f64>,
    /// Of the geometric mean, by group and of all cases.
    means: BTreeMap<String, f64>,
}

/// Something that is slower than it may be.
#[derive(Debug, PartialEq)]
pub struct Below {
    name: String,
    ratio: f64,
    floor: f64,
}

impl Floors {
    /// Reads recorded floors.
    pub fn read(path: &Path) -> Result<Floors> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} has no floors", path.display()))
    }

    /// Writes floors for what was measured.
    pub fn record(measured: &Measured, path: &Path) -> Result<()> {
        let share = |ratios: BTreeMap<String, f64>, share: f64| {
            ratios.into_iter().map(|(name, ratio)| (name, (ratio * share * 100.0).round() / 100.0)).collect()
        };
        let floors = Floors {
            qemu: qemu_version(),
            cases: share(cases(measured), CASE_SHARE),
            means: share(means(measured), MEAN_SHARE),
        };
        let text = serde_json::to_string_pretty(&floors)?;
        std::fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))
    }

    /// The QEMU that the floors were recorded with.
    pub fn qemu(&self) -> &str {
        &self.qemu
    }

    /// What is below its floor. What was not measured, or has no floor, is not.
    pub fn below(&self, measured: &Measured) -> Vec<Below> {
        let under = |floors: &BTreeMap<String, f64>, ratios: BTreeMap<String, f64>, prefix: &str| {
            let pairs =
                ratios.into_iter().filter_map(|(name, ratio)| Some((*floors.get(&name)?, name, ratio)));
            let low = pairs.filter(|&(floor, _, ratio)| ratio < floor);
            low.map(|(floor, name, ratio)| Below { name: format!("{prefix}{name}"), ratio, floor })
                .collect::<Vec<_>>()
        };
        let mut below = under(&self.cases, cases(measured), "");
        // The mean over some of a group's cases says nothing about the group.
        let ran = |case: &String| case == START || measured.cases.iter().any(|(_, name)| name == case);
        if self.cases.keys().all(ran) {
            below.extend(under(&self.means, means(measured), "mean of "));
        }
        below
    }

    /// Cases that were measured and have no floor.
    pub fn missing(&self, measured: &Measured) -> Vec<String> {
        cases(measured).into_keys().filter(|name| !self.cases.contains_key(name)).collect()
    }
}

impl Below {
    /// The case; for a mean, its words.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl std::fmt::Display for Below {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Below { name, ratio, floor } = self;
        let less = (1.0 - ratio / floor) * 100.0;
        write!(
            f,
            "{name}: QEMU takes {ratio:.2} times as long, the floor is {floor:.2} ({less:.0} % below it)"
        )
    }
}

/// The ratio of each case, and of the start. Of several rounds the fastest counts: load makes times longer, never
/// shorter.
fn cases(measured: &Measured) -> BTreeMap<String, f64> {
    let names = measured.cases.iter().map(|(_, name)| name);
    let cases = names.filter_map(|name| Some((name.clone(), case(measured, name)?)));
    let ups = |peer| fastest(measured.peers.get(&peer)?.boots.iter().map(|boot| boot.0));
    let start = ratio(ups(Peer::Qemu), ups(Peer::Ruse));
    cases.chain(start.map(|start| (START.to_owned(), start))).collect()
}

fn case(measured: &Measured, name: &str) -> Option<f64> {
    let best = |peer| fastest(measured.peers.get(&peer)?.cases.get(name)?.seconds.iter().copied());
    ratio(best(Peer::Qemu), best(Peer::Ruse))
}

fn ratio(slow: Option<f64>, fast: Option<f64>) -> Option<f64> {
    Some(slow? / fast?).filter(|ratio| ratio.is_finite())
}

fn fastest(seconds: impl Iterator<Item = f64>) -> Option<f64> {
    seconds.filter(|seconds| seconds.is_finite()).min_by(f64::total_cmp)
}

/// The geometric means of the groups' cases, and of all.
fn means(measured: &Measured) -> BTreeMap<String, f64> {
    let groups = measured.groups().into_iter().map(Some).chain([None]);
    let mean = |group: Option<&str>| {
        let chosen = measured.cases.iter().filter(|(of, _)| group.is_none_or(|group| group == of));
        let ratios: Vec<f64> = chosen.filter_map(|(_, name)| case(measured, name)).collect();
        Some((group.unwrap_or("all").to_owned(), geometric_mean(&ratios)?))
    };
    groups.filter_map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{CaseFigures, Figures};

    fn measured(qemu: &[f64], ruse: &[f64]) -> Measured {
        let figures = |seconds: &[f64]| Figures {
            boots: seconds.iter().map(|&seconds| (seconds, seconds)).collect(),
            cases: [("crc".to_owned(), CaseFigures { seconds: seconds.to_vec(), check: String::new() })]
                .into(),
            overhead_kib: None,
        };
        Measured {
            cases: vec![("int".to_owned(), "crc".to_owned())],
            peers: [(Peer::Qemu, figures(qemu)), (Peer::Ruse, figures(ruse))].into(),
        }
    }

    fn floors(of: f64) -> Floors {
        let all = |names: &[&str]| names.iter().map(|&name| (name.to_owned(), of)).collect();
        Floors { qemu: String::new(), cases: all(&["crc", START]), means: all(&["int", "all"]) }
    }

    #[test]
    fn what_is_slower_than_its_floor_is_named() {
        let slow = measured(&[9.0, 3.0], &[2.0, 4.0]);
        assert_eq!(floors(1.5).below(&slow), []);
        let below = floors(2.0).below(&slow);
        let names: Vec<&str> = below.iter().map(Below::name).collect();
        assert_eq!(names, ["crc", START, "mean of all", "mean of int"]);
        assert_eq!(
            below[0].to_string(),
            "crc: QEMU takes 1.50 times as long, the floor is 2.00 (25 % below it)"
        );
    }

    #[test]
    fn a_case_without_a_floor_is_missing() {
        let some = measured(&[3.0], &[1.0]);
        assert!(floors(1.0).missing(&some).is_empty());
        assert_eq!(Floors::default().missing(&some), ["crc", START]);
    }

    #[test]
    fn floors_are_recorded_below_what_was_measured() {
        let some = measured(&[4.0], &[1.0]);
        let path = std::env::temp_dir().join(format!("ruse-floor-{}.json", std::process::id()));
        Floors::record(&some, &path).unwrap();
        let read = Floors::read(&path);
        std::fs::remove_file(&path).unwrap();
        let read = read.unwrap();
        assert_eq!((read.cases["crc"], read.cases[START]), (2.4, 2.4));
        assert_eq!((read.means["int"], read.means["all"]), (3.0, 3.0));
        assert!(read.below(&some).is_empty());
    }
}
