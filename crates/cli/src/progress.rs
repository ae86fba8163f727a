//! How far a long step is, on standard error.

use std::io::{self, IsTerminal};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ruse_guest::Progress;

/// A bar on a terminal, a line for each step elsewhere.
#[derive(Default)]
pub struct Bar {
    bar: Option<ProgressBar>,
}

impl Bar {
    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn draw(&self, done: u64, total: u64, template: &str) {
        let Some(bar) = &self.bar else { return };
        if bar.length() != Some(total) {
            bar.set_length(total);
            // The templates are constant and right.
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
        }
        bar.set_position(done);
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
        self.draw(done, total, "{msg} [{bar:30}] {bytes}/{total_bytes}");
    }

    fn items(&mut self, done: u64, total: u64) {
        self.draw(done, total, "{msg} [{bar:30}] {percent}%");
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
