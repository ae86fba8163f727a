//! The `ruse` program with a guest in it, seen from outside: its console, its messages, its end.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// The longest that any step of a guest may take. Hosts of continuous integration are slow, and shared.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A running guest. Dropped, it is ended.
pub struct Machine {
    child: Child,
    keyboard: Option<ChildStdin>,
    output: Receiver<Vec<u8>>,
    messages: Option<JoinHandle<String>>,
    console: String,
    /// How much of the console [`Machine::expect`] has passed.
    seen: usize,
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
    /// Starts `ruse run` with these words.
    pub fn start(words: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ruse"))
            .arg("run")
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let (sender, output) = channel();
        let mut stdout = child.stdout.take().unwrap();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = stdout.read(&mut bytes) {
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
        let keyboard = child.stdin.take();
        Self { child, keyboard, output, messages: Some(messages), console: String::new(), seen: 0 }
    }

    /// Types on the guest's console.
    pub fn type_in(&mut self, text: &str) {
        let keyboard = self.keyboard.as_mut().expect("the keyboard is there");
        keyboard.write_all(text.as_bytes()).and_then(|()| keyboard.flush()).expect("the guest takes input");
    }

    /// Waits until the guest has printed `text` after what was expected before.
    pub fn expect(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.console[self.seen..].find(text) {
                self.seen += at + text.len();
                return;
            }
            if let Err(error) = self.read(deadline) {
                panic!("no {text:?} ({error:?}); the console:\n{}", self.console);
            }
        }
    }

    /// The process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Asks the program to end as a terminal would.
    pub fn interrupt(&self) {
        let status = Command::new("kill").args(["-INT", &self.id().to_string()]).status();
        assert!(status.expect("kill runs").success());
    }

    /// Waits for the end of the program.
    pub fn end(mut self) -> Ended {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.read(deadline) {
                Ok(()) => {}
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("it does not end; the console:\n{}", self.console),
            }
        }
        let code = self.child.wait().expect("the program can be waited for").code();
        let messages = self.messages.take().unwrap().join().unwrap();
        Ended { code, console: std::mem::take(&mut self.console), messages }
    }

    fn read(&mut self, deadline: Instant) -> Result<(), RecvTimeoutError> {
        let bytes = self.output.recv_timeout(deadline.saturating_duration_since(Instant::now()))?;
        // Serial consoles end lines with CR LF; no guest here prints a CR for another reason.
        self.console += &String::from_utf8_lossy(&bytes).replace('\r', "");
        Ok(())
    }
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
