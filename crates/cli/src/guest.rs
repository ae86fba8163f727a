//! The default guest, with a progress bar while it is fetched.

use std::io::{self, IsTerminal};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ruse_guest::{DefaultGuest, GuestError, GuestFiles, Progress};

/// The default guest's files if they are there; nothing is fetched.
pub fn prepared() -> Option<GuestFiles> {
    DefaultGuest::new().ok()?.prepared()
}

/// The default guest's files, fetched where they are not there yet.
pub fn prepare() -> Result<GuestFiles, GuestError> {
    let guest = DefaultGuest::new()?;
    match guest.prepared() {
        Some(files) => Ok(files),
        None => guest.prepare(&mut Bar::default()),
    }
}

/// A bar on a terminal, a line for each step elsewhere.
#[derive(Default)]
struct Bar {
    bar: Option<ProgressBar>,
}

impl Bar {
    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Bar {
    fn step(&mut self, what: &str) {
        self.clear();
        if !io::stderr().is_terminal() {
            eprintln!("ruse: {what}");
            return;
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(ProgressStyle::default_spinner());
        bar.set_message(what.to_owned());
        bar.tick();
        self.bar = Some(bar);
    }

    fn bytes(&mut self, done: u64, total: u64) {
        let Some(bar) = &self.bar else { return };
        if bar.length() != Some(total) {
            bar.set_length(total);
            // The template is constant and right.
            if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes}") {
                bar.set_style(style.progress_chars("=> "));
            }
        }
        bar.set_position(done);
    }

    fn finish(&mut self) {
        self.clear();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.clear();
    }
}
