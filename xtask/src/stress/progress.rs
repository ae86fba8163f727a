//! How far a run has come, on a terminal.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

/// Signs of the bar.
const WIDTH: usize = 40;
/// How often it is drawn.
const PERIOD: Duration = Duration::from_millis(200);

/// A bar on standard error, if that is a terminal.
pub struct Progress {
    whole: Duration,
    start: Instant,
    drawn: Option<Instant>,
    visible: bool,
}

impl Progress {
    /// A bar for so long.
    pub fn new(whole: Duration) -> Progress {
        Progress { whole, start: Instant::now(), drawn: None, visible: stderr().is_terminal() }
    }

    /// The time begins now.
    pub fn begin(&mut self) {
        self.start = Instant::now();
    }

    /// Shows the time, and how many programs have ended.
    pub fn show(&mut self, programs: u64) {
        if self.visible && self.drawn.is_none_or(|drawn| drawn.elapsed() >= PERIOD) {
            self.drawn = Some(Instant::now());
            eprint!("\r{}", bar(self.start.elapsed(), self.whole, programs));
            stderr().flush().ok();
        }
    }

    /// Removes it.
    pub fn end(&mut self) {
        if self.drawn.take().is_some() {
            eprint!("\r\x1b[K");
        }
    }
}

fn bar(time: Duration, whole: Duration, programs: u64) -> String {
    let share = (time.as_secs_f64() / whole.as_secs_f64().max(1.0)).min(1.0);
    let full = (share * WIDTH as f64) as usize;
    let clock = |time: Duration| format!("{}:{:02}", time.as_secs() / 60, time.as_secs() % 60);
    let signs = "#".repeat(full) + &".".repeat(WIDTH - full);
    format!("[{signs}] {} of {}, {programs} programs", clock(time.min(whole)), clock(whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_fills_up_and_no_further() {
        let minute = Duration::from_secs(60);
        let half = bar(minute / 2, minute, 7);
        assert!(half.contains("####....") && half.ends_with("] 0:30 of 1:00, 7 programs"), "{half}");
        let whole = bar(minute * 2, minute, 9);
        assert!(!whole.contains('.') && whole.ends_with("1:00 of 1:00, 9 programs"), "{whole}");
    }
}
