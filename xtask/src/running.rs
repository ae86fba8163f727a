//! A process of which every line counts, and when it came.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

/// The lines that are shown when a run fails.
const LAST_LINES: usize = 15;

/// A process whose lines come with the time at which they came.
pub struct Running {
    child: Child,
    start: Instant,
    deadline: Instant,
    lines: Receiver<(Instant, String)>,
    last: Vec<String>,
}

impl Running {
    /// Starts `command`, which has so many seconds and nothing to read.
    pub fn start(command: Command, timeout: u64) -> Result<Running> {
        Running::start_reading(Stdio::null(), command, timeout)
    }

    /// Starts `command`, which reads `input`.
    pub fn start_reading(input: Stdio, mut command: Command, timeout: u64) -> Result<Running> {
        // Cargo names directories of libraries to what it runs, in which programs would look for theirs first.
        command.stdin(input).stdout(Stdio::piped()).env_remove("LD_LIBRARY_PATH");
        let start = Instant::now();
        let program = command.get_program().to_owned();
        let mut child = command.spawn().with_context(|| format!("starting {}", program.display()))?;
        let mut output = BufReader::new(child.stdout.take().expect("standard output is a pipe"));
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            let mut line = Vec::new();
            while output.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send((Instant::now(), text)).is_err() {
                    return;
                }
                line.clear();
            }
        });
        Ok(Running { child, start, deadline: start + Duration::from_secs(timeout), lines, last: Vec::new() })
    }

    /// What it reads, if that is a pipe, and once.
    pub fn input(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// The next line, with the seconds since the start; nothing at the end of the output.
    pub fn next_line(&mut self) -> Result<Option<(f64, String)>> {
        match self.lines.recv_timeout(self.deadline.saturating_duration_since(Instant::now())) {
            Ok((time, line)) => {
                if self.last.len() == LAST_LINES {
                    self.last.remove(0);
                }
                self.last.push(line.clone());
                Ok(Some(((time - self.start).as_secs_f64(), line)))
            }
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => Err(anyhow!("it takes too long:\n{}", self.last_lines())),
        }
    }

    /// Gives it so many seconds from now on.
    pub fn allow(&mut self, timeout: u64) {
        self.deadline = Instant::now() + Duration::from_secs(timeout);
    }

    /// What it printed at last, and the lines that come within a second.
    pub fn last_and_next_lines(&mut self) -> String {
        self.allow(1);
        while let Ok(Some(_)) = self.next_line() {}
        self.last_lines()
    }

    /// Waits for the end: how it ended, and the seconds since the start.
    pub fn wait(&mut self) -> Result<(ExitStatus, f64)> {
        let status = self.child.wait().context("waiting for its end")?;
        Ok((status, self.start.elapsed().as_secs_f64()))
    }

    /// What it printed at last.
    pub fn last_lines(&self) -> String {
        self.last.join("\n")
    }

    /// The process's number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Of a process that has ended there is nothing to end or to wait for.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
