//! What commands print: tables, JSON.

use std::io::Write;
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;

use crate::failure::Failure;

/// Prints a value as JSON.
pub fn print_json(value: &impl Serialize) -> Result<u8, Failure> {
    print(&format!("{}\n", serde_json::to_string_pretty(value).context("cannot write JSON")?))
}

/// Prints what was asked for.
pub fn print(text: &str) -> Result<u8, Failure> {
    // A reader who has gone has seen enough.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(0)
}

/// Columns that are as wide as what is in them.
pub fn table<const N: usize>(head: &[String; N], rows: &[[String; N]]) -> String {
    let all = || std::iter::once(head).chain(rows);
    let width = |column: usize| all().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<_> = (0..N).map(width).collect();
    let line = |row: &[String; N]| {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    all().map(line).collect()
}

/// A time in its two largest units.
pub fn age(time: Duration) -> String {
    let seconds = time.as_secs();
    match (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m {s}s"),
        (0, h, m, _) => format!("{h}h {m}m"),
        (d, h, _, _) => format!("{d}d {h}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_two_units() {
        let of = |s| age(Duration::from_secs(s));
        assert_eq!([of(0), of(61), of(7200), of(90_000)], ["0s", "1m 1s", "2h 0m", "1d 1h"]);
    }

    #[test]
    fn columns_are_aligned() {
        let row = |a: &str, b: &str| [a.to_owned(), b.to_owned()];
        assert_eq!(table(&row("A", "B"), &[row("long", "x")]), "A     B\nlong  x\n");
    }
}
