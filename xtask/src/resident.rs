//! Resident memory of a process that is not its guest's RAM.

use std::fs;

use anyhow::{Context, Result};

/// Resident memory of process `id` in KiB, without the mappings whose path contains `ram`.
pub fn besides(ram: &str, id: u32) -> Result<u64> {
    let path = format!("/proc/{id}/smaps");
    let smaps = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    Ok(sum(&smaps, ram))
}

/// The sum of `Rss:` over the mappings whose path does not contain `ram`, in KiB.
fn sum(smaps: &str, ram: &str) -> u64 {
    let (mut total, mut counts) = (0, true);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Rss:") if counts => {
                total += words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0)
            }
            Some(word) if !word.ends_with(':') => counts = !line.contains(ram),
            _ => {}
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_left_out_of_the_resident_memory() {
        let smaps = "7f00-7f10 rw-s 0 00:01 5 /memfd:guest-ram (deleted)\nRss:  900 kB\nPss: 900 kB\n\
                     7f20-7f30 rw-p 0 00:00 0 [heap]\nRss:  12 kB\n7f40-7f50 r-xp 0 00:00 0\nRss:  30 kB\n";
        assert_eq!(sum(smaps, "memfd:guest-ram"), 42);
    }
}
