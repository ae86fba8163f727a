//! Why the program ends without success: one line and an exit code.

use std::fmt::Display;
use std::io::{self, Write};

use ruse_image::ImageError;
use ruse_manager::ManagerError;
use ruse_vmm::MachineError;

/// Exit code of anything that has no code of its own.
pub const FAILED: u8 = 1;
/// Exit code of bad input.
pub const BAD_INPUT: u8 = 2;
/// Exit code of a triple fault.
pub const TRIPLE_FAULT: u8 = 3;
/// Exit code of a guest panic.
pub const GUEST_PANIC: u8 = 4;

/// A message and an exit code.
#[derive(Debug)]
pub struct Failure {
    /// Exit code.
    pub code: u8,
    message: String,
}

impl Failure {
    /// The user can mend it.
    pub fn input(message: impl Display) -> Self {
        Self { code: BAD_INPUT, message: message.to_string() }
    }

    /// Something failed.
    pub fn other(message: impl Display) -> Self {
        Self { code: FAILED, message: message.to_string() }
    }

    /// Prints the message as one line.
    pub fn print(&self) {
        complain(&self.message);
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::other(format!("{error:#}"))
    }
}

impl From<ManagerError> for Failure {
    fn from(error: ManagerError) -> Self {
        if error.is_bad_input() { Self::input(error) } else { Self::other(error) }
    }
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        if error.is_bad_input() { Self::input(error) } else { Self::other(error) }
    }
}

impl From<MachineError> for Failure {
    fn from(error: MachineError) -> Self {
        if error.is_bad_input() { Self::input(error) } else { Self::other(error) }
    }
}

/// Prints a line on standard error; if that cannot be, there is nobody to tell.
pub fn complain(message: &str) {
    let _ = writeln!(io::stderr(), "ruse: {}", one_line(message));
}

/// The first paragraph of a text as one line, without a leading "error: ".
pub fn one_line(text: &str) -> String {
    let text = text.trim().trim_start_matches("error: ");
    let paragraph: Vec<_> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    paragraph.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_become_one_line() {
        assert_eq!(
            one_line("error: a value is required\n\nFor more information, try '--help'."),
            "a value is required"
        );
        assert_eq!(one_line("missing:\n  <COMMAND>\n\nUsage: x"), "missing: <COMMAND>");
        assert_eq!(one_line(""), "");
    }
}
