//! What was measured, for people.

use super::{Figures, Measured};
use crate::bench::{cell, median};

/// Kinds of exits, as the guest names them, with what they are.
const EXITS: [(&str, &str); 4] = [
    ("port-out", "port write, µs"),
    ("port-in", "port read, µs"),
    ("memory-read", "memory-mapped read, µs"),
    ("cpuid", "CPUID, which KVM answers itself, µs"),
];

/// Prints a line for each figure, a column for each monitor.
pub fn print(measured: &Measured) {
    println!("{} rounds: medians; of exits, the fastest run", measured.rounds);
    print!("{:44}", "");
    println!("{}", measured.peers.keys().map(|peer| format!("{:>14}", peer.name())).collect::<String>());
    let row = |heading: &str, digits: usize, value: &dyn Fn(&Figures) -> Option<f64>| {
        let cells = measured.peers.values().map(|figures| format!("{:>14}", cell(value(figures), digits)));
        println!("{heading:44}{}", cells.collect::<String>());
    };
    let scaled = |values: &[f64], by: f64| median(values.iter().copied()).map(|value| value * by);
    row("start to the first guest instruction, ms", 2, &|figures| scaled(&figures.first_instruction, 1e3));
    row("system calls until the first entry", 0, &|figures| figures.system_calls.map(|count| count as f64));
    for (kind, heading) in EXITS {
        row(heading, 2, &|figures| fastest(figures.exits.get(kind)?).map(|ns| ns / 1e3));
    }
    row("start to a stock kernel's init, s", 3, &|figures| scaled(&figures.up, 1.0));
    row("resident then besides guest RAM, MiB", 2, &|figures| {
        median(figures.resident_kib.iter().map(|&kib| kib as f64 / 1024.0))
    });
}

/// What else the machine does only makes a round longer.
fn fastest(values: &[f64]) -> Option<f64> {
    values.iter().copied().min_by(f64::total_cmp)
}
