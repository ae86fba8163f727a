//! The monitor prompt: a line editor and a few commands.

use std::fmt::Write;
use std::time::Duration;

use ruse_vmm::config::{format_size, parse_size};
use ruse_vmm::{BalloonInfo, Control, DiskInfo, MachineInfo, MemoryInfo, Phase, ResizeMemoryError};

/// The prompt.
pub const PROMPT: &str = "(ruse) ";
/// Longest line.
const LINE_LIMIT: usize = 256;
/// The commands.
const HELP: &str = "\
info      what the machine is doing
stats     what its engine has counted
disks     its disks; the guest is told where their size has changed
balloon   how much memory the guest has given back, and what it says of the rest
balloon SIZE  ask the guest to give back so much
memory    how much RAM it has
memory SIZE  let it have so much
pause     hold it
resume    let it run on
reset     reset it
shutdown  press its power button
quit      end it
help      this list
An empty line or Ctrl-A c goes back to the guest.
";

/// How long a guest has to tell of its memory.
pub const BALLOON_PATIENCE: Duration = Duration::from_millis(200);
/// What there is to say without `--balloon`.
const NO_BALLOON: &str = "it has none (--balloon SIZE)\n";

/// A line that is being typed.
#[derive(Debug, Default)]
pub struct LineEditor {
    line: String,
}

/// What a key does to the line.
#[derive(Debug, PartialEq, Eq)]
pub enum Edit {
    /// Echo this.
    Echo(String),
    /// The line is done.
    Done(String),
    /// The user has had enough.
    Cancel,
}

impl LineEditor {
    /// The next byte of the keyboard.
    pub fn key(&mut self, byte: u8) -> Edit {
        match byte {
            b'\r' | b'\n' => Edit::Done(std::mem::take(&mut self.line)),
            0x03 | 0x04 => {
                self.line.clear();
                Edit::Cancel
            }
            0x08 | 0x7f if self.line.pop().is_some() => Edit::Echo("\x08 \x08".into()),
            0x20..=0x7e if self.line.len() < LINE_LIMIT => {
                self.line.push(char::from(byte));
                Edit::Echo(char::from(byte).into())
            }
            _ => Edit::Echo(String::new()),
        }
    }
}

/// What a command leads to.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Print this and prompt again.
    Text(String),
    /// Back to the guest.
    Leave,
}

/// Carries out a command.
pub fn command(line: &str, control: &Control) -> Answer {
    let text = match line.trim() {
        "" => return Answer::Leave,
        "info" | "i" => describe(&control.info()),
        "stats" => counters(&control.info()),
        "disks" => disks(control),
        "balloon" => control.balloon(BALLOON_PATIENCE).map_or(NO_BALLOON.into(), |info| balloon(&info)),
        line if line.starts_with("balloon ") => resize_balloon(line["balloon ".len()..].trim(), control),
        "memory" => control.memory().map_or(format!("{}\n", ResizeMemoryError::Fixed), memory),
        line if line.starts_with("memory ") => resize_memory(line["memory ".len()..].trim(), control),
        "pause" | "stop" => {
            control.pause();
            "paused\n".into()
        }
        "resume" | "cont" | "c" => {
            control.resume();
            return Answer::Leave;
        }
        "reset" => {
            control.reset();
            return Answer::Leave;
        }
        "shutdown" => {
            control.press_power_button();
            return Answer::Leave;
        }
        "quit" | "q" | "exit" => {
            control.stop();
            return Answer::Leave;
        }
        "help" | "h" | "?" => HELP.into(),
        other => format!("no such command: {other} (try help)\n"),
    };
    Answer::Text(text)
}

/// What a machine is doing, for people.
pub fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Running => "running",
        Phase::Paused => "paused",
        Phase::Resetting => "being reset",
        Phase::Ended => "ended",
    }
}

/// A machine's state for people.
pub fn describe(info: &MachineInfo) -> String {
    let mut text = String::new();
    let phase = phase(info.phase);
    let seconds = info.uptime_ns / 1_000_000_000;
    let memory = format_size(info.memory);
    let _ = writeln!(text, "{}: {phase}, engine {}, {memory} of RAM, up {seconds} s", info.name, info.engine);
    for vcpu in &info.vcpus {
        let activity = format!("{:?}", vcpu.activity).to_lowercase();
        let held = if vcpu.held { ", held" } else { "" };
        let rip = vcpu.rip.map(|rip| format!(", rip {rip:#x}")).unwrap_or_default();
        let _ = writeln!(text, "vcpu{}: {activity}{held}{rip}", vcpu.id);
    }
    text
}

/// A disk for people.
pub fn disk(disk: &DiskInfo) -> String {
    let access = if disk.read_only { ", read-only" } else { "" };
    format!("{}: {}{access}\n", disk.path.display(), format_size(disk.size))
}

/// A machine's disks for people.
fn disks(control: &Control) -> String {
    match control.refresh_disks() {
        Ok(disks) if disks.is_empty() => "it has none\n".into(),
        Ok(disks) => disks.iter().map(disk).collect(),
        Err(error) => format!("cannot look at a disk: {error}\n"),
    }
}

/// The sizes of a machine's balloon for people.
pub fn balloon_sizes(info: &BalloonInfo) -> String {
    format!("{} of {} asked for\n", format_size(info.actual), format_size(info.target))
}

/// The RAM of a machine for people that can have more or less.
pub fn memory(info: MemoryInfo) -> String {
    let [size, requested, max] = [info.size, info.requested, info.max].map(format_size);
    format!("{size} of {requested} asked for, {max} at most\n")
}

fn resize_memory(size: &str, control: &Control) -> String {
    match parse_size(size).map(|bytes| control.resize_memory(bytes)) {
        Ok(Ok(())) => String::new(),
        Ok(Err(error)) => format!("memory: {error}\n"),
        Err(error) => format!("memory: {error}\n"),
    }
}

/// A machine's balloon for people.
pub fn balloon(info: &BalloonInfo) -> String {
    let mut text = balloon_sizes(info);
    for (name, &value) in &info.statistics {
        let value = if name.ends_with("memory") { format_size(value) } else { value.to_string() };
        let _ = writeln!(text, "  {name}: {value}");
    }
    text
}

fn resize_balloon(size: &str, control: &Control) -> String {
    match parse_size(size) {
        Ok(bytes) if control.resize_balloon(bytes) => String::new(),
        Ok(_) => NO_BALLOON.into(),
        Err(error) => format!("balloon: {error}\n"),
    }
}

/// What a machine's engine has counted, for people.
pub fn counters(info: &MachineInfo) -> String {
    info.counters.iter().map(|(name, count)| format!("  {name}: {count}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_edited() {
        let mut editor = LineEditor::default();
        for byte in b"infx" {
            assert_eq!(editor.key(*byte), Edit::Echo(char::from(*byte).into()));
        }
        assert_eq!(editor.key(0x7f), Edit::Echo("\x08 \x08".into()));
        editor.key(b'o');
        assert_eq!(editor.key(0x1b), Edit::Echo(String::new()));
        assert_eq!(editor.key(b'\r'), Edit::Done("info".into()));
        assert_eq!(editor.key(0x7f), Edit::Echo(String::new()), "nothing is left");
        editor.key(b'z');
        assert_eq!(editor.key(3), Edit::Cancel);
        assert_eq!(editor.key(b'\n'), Edit::Done(String::new()));
    }
}
