//! What was measured, for people and as JSON: medians, ratios, geometric means.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Figures, Measured, Peer};

/// The middle value, or the mean of the two middle ones.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// The geometric mean, of some values.
pub fn geometric_mean(values: &[f64]) -> Option<f64> {
    let sum: f64 = values.iter().map(|value| value.ln()).sum();
    (!values.is_empty()).then(|| (sum / values.len() as f64).exp())
}

impl Measured {
    /// Prints everything, writes it to a file as well if there is one, and fails if results differ between peers.
    pub fn report(&self, rounds: u32, cpus: u32, json_file: Option<&Path>) -> Result<()> {
        print(self, rounds, cpus);
        if let Some(path) = json_file {
            let text = serde_json::to_string_pretty(&json(self, rounds, cpus))?;
            fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))?;
        }
        let wrong = wrong_checks(self);
        ensure!(wrong.is_empty(), "results differ between peers: {}", wrong.join(", "));
        Ok(())
    }

    fn seconds(&self, peer: Peer, case: &str) -> Option<f64> {
        median(self.peers.get(&peer)?.cases.get(case)?.seconds.iter().copied())
    }

    /// How many times as long `slow` takes for a case as `fast`.
    fn ratio(&self, slow: Peer, fast: Peer, case: &str) -> Option<f64> {
        let ratio = self.seconds(slow, case)? / self.seconds(fast, case)?;
        (ratio.is_finite() && ratio > 0.0).then_some(ratio)
    }

    /// The geometric mean of the ratio over a group, or over everything.
    fn mean_ratio(&self, slow: Peer, fast: Peer, only: Option<&str>) -> Option<f64> {
        let in_group = |(group, _): &&(String, String)| only.is_none_or(|only| only == group);
        let ratios: Vec<f64> =
            self.cases.iter().filter(in_group).filter_map(|(_, name)| self.ratio(slow, fast, name)).collect();
        geometric_mean(&ratios)
    }

    /// The groups of the cases.
    pub fn groups(&self) -> Vec<&str> {
        let mut groups: Vec<&str> = self.cases.iter().map(|(group, _)| group.as_str()).collect();
        groups.dedup();
        groups
    }
}

const PEERS: [Peer; 3] = [Peer::Native, Peer::Qemu, Peer::Ruse];

/// The pairs that are compared: the slower by expectation first, with the heading of its column.
const RATIOS: [(Peer, Peer, &str); 3] = [
    (Peer::Ruse, Peer::Native, "ruse/native"),
    (Peer::Qemu, Peer::Native, "qemu/native"),
    (Peer::Qemu, Peer::Ruse, "qemu/ruse"),
];

fn print(measured: &Measured, rounds: u32, cpus: u32) {
    println!("medians of {rounds} rounds, {cpus} CPU; a ratio is how many times as long the first takes");
    if !measured.cases.is_empty() {
        print_cases(measured);
    }
    print_boots(measured);
}

fn print_cases(measured: &Measured) {
    print!("\n{:<10}{:<18}", "group", "case");
    for peer in PEERS {
        print!("{:>12}", format!("{} s", peer.name()));
    }
    println!("{}", RATIOS.map(|(_, _, heading)| format!("{heading:>13}")).concat());
    for (group, name) in &measured.cases {
        print!("{group:<10}{name:<18}");
        for peer in PEERS {
            print!("{:>12}", cell(measured.seconds(peer, name), 4));
        }
        println!("{}", ratio_cells(|slow, fast| measured.ratio(slow, fast, name)));
    }
    println!("\ngeometric means");
    let groups = measured.groups().into_iter().map(Some).chain([None]);
    for group in groups {
        print!("{:<64}", group.unwrap_or("all"));
        println!("{}", ratio_cells(|slow, fast| measured.mean_ratio(slow, fast, group)));
    }
}

fn ratio_cells(ratio: impl Fn(Peer, Peer) -> Option<f64>) -> String {
    RATIOS.map(|(slow, fast, _)| format!("{:>13}", cell(ratio(slow, fast), 2))).concat()
}

fn print_boots(measured: &Measured) {
    for (peer, Figures { boots, overhead_kib, .. }) in &measured.peers {
        let (up, end) = (median(boots.iter().map(|boot| boot.0)), median(boots.iter().map(|boot| boot.1)));
        if up.is_some() {
            println!("\n{}: start to init {} s, to power-off {} s", peer.name(), cell(up, 3), cell(end, 3));
        }
        if let Some(kib) = overhead_kib {
            println!("{}: {:.1} MiB resident besides guest RAM", peer.name(), *kib as f64 / 1024.0);
        }
    }
}

pub fn cell(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
}

/// The cases whose result is not the same under all peers that ran them.
fn wrong_checks(measured: &Measured) -> Vec<String> {
    let mut first: BTreeMap<&str, (Peer, &str)> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (&peer, figures) in &measured.peers {
        for (name, case) in figures.cases.iter().filter(|(_, case)| case.check != "no-avx2") {
            let &mut (other, check) = first.entry(name).or_insert((peer, &case.check));
            if check != case.check {
                wrong.push(format!("{name} ({} {check}, {} {})", other.name(), peer.name(), case.check));
            }
        }
    }
    wrong
}

/// Everything as JSON.
fn json(measured: &Measured, rounds: u32, cpus: u32) -> Value {
    let peers: serde_json::Map<String, Value> =
        measured.peers.iter().map(|(peer, figures)| (peer.name().to_owned(), peer_json(figures))).collect();
    let groups = measured.groups().into_iter().map(Some).chain([None]);
    let means: serde_json::Map<String, Value> = groups
        .map(|group| {
            let ratios = RATIOS
                .map(|(slow, fast, name)| (name.to_owned(), json!(measured.mean_ratio(slow, fast, group))));
            (group.unwrap_or("all").to_owned(), Value::Object(ratios.into_iter().collect()))
        })
        .collect();
    let cases: Vec<Value> =
        measured.cases.iter().map(|(group, name)| json!({ "group": group, "name": name })).collect();
    json!({ "rounds": rounds, "cpus": cpus, "cases": cases, "peers": peers, "geometric_means": means })
}

fn peer_json(figures: &Figures) -> Value {
    let finite =
        |values: &[f64]| -> Vec<f64> { values.iter().copied().filter(|value| value.is_finite()).collect() };
    let cases: serde_json::Map<String, Value> = figures
        .cases
        .iter()
        .map(|(name, case)| {
            let middle = median(case.seconds.iter().copied());
            (name.clone(), json!({ "median": middle, "seconds": finite(&case.seconds), "check": case.check }))
        })
        .collect();
    json!({
        "start_to_init": figures.boots.iter().map(|boot| boot.0).collect::<Vec<_>>(),
        "start_to_power_off": figures.boots.iter().map(|boot| boot.1).collect::<Vec<_>>(),
        "resident_besides_ram_kib": figures.overhead_kib,
        "cases": cases,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::CaseFigures;

    fn measured(times: &[(Peer, f64, &str)]) -> Measured {
        let figures = |&(peer, seconds, check): &(Peer, f64, &str)| {
            let case = CaseFigures { seconds: vec![seconds], check: check.to_owned() };
            (peer, Figures { cases: [("sieve".to_owned(), case)].into(), ..Figures::default() })
        };
        Measured {
            cases: vec![("int".to_owned(), "sieve".to_owned())],
            peers: times.iter().map(figures).collect(),
        }
    }

    #[test]
    fn medians_and_means() {
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, f64::NAN]), Some(2.5));
        assert_eq!(median([]), None);
        assert!((geometric_mean(&[2.0, 8.0]).unwrap() - 4.0).abs() < 1e-12);
    }

    #[test]
    fn ratios_and_differing_results() {
        let all = measured(&[(Peer::Native, 1.0, "a"), (Peer::Qemu, 9.0, "a"), (Peer::Ruse, 3.0, "a")]);
        assert_eq!(all.ratio(Peer::Qemu, Peer::Ruse, "sieve"), Some(3.0));
        assert_eq!(all.mean_ratio(Peer::Ruse, Peer::Native, Some("int")).unwrap().round(), 3.0);
        assert_eq!(all.mean_ratio(Peer::Ruse, Peer::Native, Some("fp")), None);
        assert!(wrong_checks(&all).is_empty());
        let wrong = wrong_checks(&measured(&[(Peer::Native, 1.0, "a"), (Peer::Ruse, 3.0, "b")]));
        assert_eq!(wrong, ["sieve (native a, ruse b)"]);
    }
}
