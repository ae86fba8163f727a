//! The `ruse` program with a guest in it, seen from outside: its console, its messages, its end.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::terminal::Terminal;

/// The longest that any step of a guest may take. Hosts of continuous integration are slow, and shared.
pub const PATIENCE: Duration = Duration::from_secs(240);
/// How often the program is asked whether it has ended.
const POLL: Duration = Duration::from_millis(5);

/// A running guest. Dropped, it is ended.
pub struct Machine {
    child: Child,
    keyboard: Box<dyn Write>,
    output: Receiver<Vec<u8>>,
    messages: Option<JoinHandle<String>>,
    console: String,
    /// How much of the console [`Machine::expect`] has passed.
    seen: usize,
    terminal: Option<Terminal>,
    runtime: TempDir,
}

/// A guest that has ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code of the program.
    pub code: Option<i32>,
    /// All that the guest printed, with plain line ends.
    pub console: String,
    /// What the program said on standard error.
    pub messages: String,
}

impl Machine {
    /// Starts `ruse run` with these words, its console on pipes.
    pub fn start(words: &[&str]) -> Self {
        let runtime = tempfile::tempdir().unwrap();
        let mut child = spawn(&runtime, words, Stdio::piped(), Stdio::piped());
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self::watch(runtime, child, Box::new(stdin), stdout, None)
    }

    /// Starts `ruse run` with these words on a terminal of its own.
    pub fn on_terminal(words: &[&str]) -> Self {
        let (runtime, terminal) = (tempfile::tempdir().unwrap(), Terminal::open());
        let end = |fd: OwnedFd| Stdio::from(fd);
        let child = spawn(&runtime, words, end(terminal.program_end()), end(terminal.program_end()));
        let (keyboard, screen) = (terminal.user_end(), terminal.user_end());
        Self::watch(runtime, child, Box::new(keyboard), screen, Some(terminal))
    }

    /// Starts any command of the program on a terminal of its own.
    pub fn command(command: &mut Command) -> Self {
        let terminal = Terminal::open();
        let end = || Stdio::from(terminal.program_end());
        let child = command.stdin(end()).stdout(end()).stderr(Stdio::piped()).spawn();
        let (keyboard, screen) = (terminal.user_end(), terminal.user_end());
        let own = tempfile::tempdir().unwrap();
        Self::watch(own, child.expect("the program starts"), Box::new(keyboard), screen, Some(terminal))
    }

    /// Where the machine is found.
    pub fn runtime(&self) -> &TempDir {
        &self.runtime
    }

    fn watch(
        runtime: TempDir,
        mut child: Child,
        keyboard: Box<dyn Write>,
        mut screen: impl Read + Send + 'static,
        terminal: Option<Terminal>,
    ) -> Self {
        let (sender, output) = channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        let mut stderr = child.stderr.take().unwrap();
        let messages = thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = stderr.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        });
        let (messages, console) = (Some(messages), String::new());
        Self { child, keyboard, output, messages, console, seen: 0, terminal, runtime }
    }

    /// Types on the guest's console.
    pub fn type_in(&mut self, text: &str) {
        self.keyboard
            .write_all(text.as_bytes())
            .and_then(|()| self.keyboard.flush())
            .expect("the guest takes input");
    }

    /// Waits until the guest has printed `text` after what was expected before.
    #[track_caller]
    pub fn expect(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.has_printed(text) {
            if let Err(error) = self.read(deadline) {
                panic!("no {text:?} ({error:?}); the console:\n{}", self.console);
            }
        }
    }

    /// Types a command at the guest's shell; the line that it prints.
    #[track_caller]
    pub fn ask(&mut self, command: &str) -> String {
        // The echo of what is typed does not look like the answer.
        self.type_in(&format!("echo ans$((6))wer $({command})\n"));
        self.expect("ans6wer");
        let begin = self.seen;
        self.expect("\n");
        self.console[begin..].lines().next().unwrap_or_default().trim_start().to_owned()
    }

    /// Fails the test if the guest prints `text` within a time.
    #[track_caller]
    pub fn expect_not(&mut self, text: &str, time: Duration) {
        let deadline = Instant::now() + time;
        while self.read(deadline).is_ok() {}
        assert!(!self.has_printed(text), "{text:?} came; the console:\n{}", self.console);
    }

    fn has_printed(&mut self, text: &str) -> bool {
        let found = self.console[self.seen..].find(text);
        self.seen += found.map_or(0, |at| at + text.len());
        found.is_some()
    }

    /// The terminal, of a machine that has one.
    pub fn terminal(&self) -> &Terminal {
        self.terminal.as_ref().expect("it was started on a terminal")
    }

    /// The processor time that the program has used.
    pub fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("the program runs");
        // Behind the name in parentheses: times in user and in system mode are fields 14 and 15 (proc(5)).
        let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11..13].iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum();
        Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
    }

    /// Bytes of the guest's RAM that the program has mapped.
    pub fn guest_memory(&self) -> u64 {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("the program runs");
        let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).expect("Linux says so");
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    /// Sends the program a signal: `INT`, `TERM`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(status.expect("kill runs").success());
    }

    /// Waits for the end of the program. A terminal has to be as it was before.
    #[track_caller]
    pub fn end(mut self) -> Ended {
        let status = self.wait();
        if let Some(terminal) = self.terminal.take() {
            assert_eq!(terminal.mode(), terminal.mode_before, "the terminal is as it was");
        }
        // Nobody holds the other end of the pipe or the terminal any more.
        while self.read(Instant::now() + PATIENCE).is_ok() {}
        let messages = self.messages.take().unwrap().join().unwrap();
        Ended { code: status.code(), console: std::mem::take(&mut self.console), messages }
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // A program whose output nobody takes would not end.
            while self.read(Instant::now() + POLL).is_ok() {}
            if let Some(status) = self.child.try_wait().expect("the program can be waited for") {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end; the console:\n{}", self.console);
        }
    }

    fn read(&mut self, deadline: Instant) -> Result<(), RecvTimeoutError> {
        let bytes = self.output.recv_timeout(deadline.saturating_duration_since(Instant::now()))?;
        // Serial consoles end lines with CR LF; no guest here prints a CR for another reason.
        self.console += &String::from_utf8_lossy(&bytes).replace('\r', "");
        Ok(())
    }
}

/// The program, with a directory for running machines in which it finds those of one test only.
pub fn ruse(runtime: &TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ruse"));
    command.env("XDG_RUNTIME_DIR", runtime.path());
    command
}

/// The translator is the engine if the words name none.
fn spawn(runtime: &TempDir, words: &[&str], stdin: Stdio, stdout: Stdio) -> Child {
    let engine: &[&str] = if words.contains(&"--accel") { &[] } else { &["--accel", "dbt"] };
    ruse(runtime)
        .arg("run")
        .args(engine)
        .args(words)
        .stdin(stdin)
        .stdout(stdout)
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts")
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// Fails the test unless the program ended with this code.
    #[track_caller]
    pub fn with_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.console, self.messages);
        self
    }

    /// The lines between the line `-- NAME` and the next line that begins so.
    #[track_caller]
    pub fn section(&self, name: &str) -> Vec<&str> {
        let title = format!("-- {name}");
        let mut lines = self.console.lines().skip_while(|line| *line != title);
        assert!(lines.next().is_some(), "no {title:?}:\n{}", self.console);
        lines.take_while(|line| !line.starts_with("-- ")).collect()
    }
}

/// A path as a word of a command line.
pub fn word(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}
