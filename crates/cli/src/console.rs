//! Standard input and output as the guest's first serial port, with the monitor's keys and prompt in between.

use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use ruse_vmm::{Console, ConsoleInput, ConsoleOutput, Control};

use crate::escape::{EscapeKeys, Key};
use crate::monitor::{self, Answer, Edit, LineEditor, PROMPT};

/// Bytes of one read.
const CHUNK: usize = 1024;
/// What Ctrl-A h shows.
const KEYS: &str = "
Ctrl-A x       end the machine
Ctrl-A c       monitor prompt
Ctrl-A h       this list
Ctrl-A Ctrl-A  send Ctrl-A to the guest
";

/// What input, output and the program have in common.
#[derive(Default)]
pub struct Link {
    /// The machine, once it runs.
    control: OnceLock<Control>,
    /// The prompt is open: the guest's output waits.
    prompting: AtomicBool,
}

impl Link {
    /// The machine runs now.
    pub fn connect(&self, control: Control) {
        // It is called once.
        let _ = self.control.set(control);
    }
}

/// A console on standard input and output. With `keys` the input is a terminal in raw mode and some keys are for the
/// monitor; without, every byte is for the guest.
pub fn stdio(keys: bool, link: &Arc<Link>) -> Console {
    let keyboard = Keyboard {
        link: link.clone(),
        escape: keys.then(EscapeKeys::default),
        editor: LineEditor::default(),
    };
    Console { input: Some(Box::new(keyboard)), output: Some(Box::new(Screen { link: link.clone() })) }
}

/// Standard output.
struct Screen {
    link: Arc<Link>,
}

impl ConsoleOutput for Screen {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(rustix::stdio::stdout())
    }
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(rustix::stdio::stdout(), bytes)?)
    }
    fn is_held(&self) -> bool {
        self.link.prompting.load(Ordering::Relaxed)
    }
}

/// Standard input.
struct Keyboard {
    link: Arc<Link>,
    escape: Option<EscapeKeys>,
    editor: LineEditor,
}

impl ConsoleInput for Keyboard {
    fn fd(&self) -> BorrowedFd<'_> {
        rustix::stdio::stdin()
    }

    fn read(&mut self, to_guest: &mut Vec<u8>) -> io::Result<bool> {
        let mut bytes = [0; CHUNK];
        let count = rustix::io::read(rustix::stdio::stdin(), &mut bytes)?;
        for &byte in &bytes[..count] {
            self.byte(byte, to_guest);
        }
        Ok(count > 0)
    }

    fn has_keys(&self) -> bool {
        self.escape.is_some()
    }
}

impl Keyboard {
    fn byte(&mut self, byte: u8, to_guest: &mut Vec<u8>) {
        let Some(escape) = &mut self.escape else { return to_guest.push(byte) };
        let prompting = self.link.prompting.load(Ordering::Relaxed);
        match escape.key(byte) {
            Key::Guest(byte) if prompting => self.edit(byte),
            Key::Guest(byte) => to_guest.push(byte),
            Key::End => {
                self.leave();
                if let Some(control) = self.link.control.get() {
                    control.stop();
                }
            }
            Key::Monitor if prompting => self.leave(),
            Key::Monitor => {
                self.link.prompting.store(true, Ordering::Relaxed);
                print(&format!("\n{PROMPT}"));
            }
            Key::Help => print(&if prompting { format!("{KEYS}{PROMPT}") } else { KEYS.into() }),
            // There is nobody else to leave the machine to.
            Key::Leave | Key::Nothing => {}
        }
    }

    fn edit(&mut self, byte: u8) {
        match self.editor.key(byte) {
            Edit::Echo(text) => print(&text),
            Edit::Cancel => self.leave(),
            Edit::Done(line) => self.command(&line),
        }
    }

    fn command(&mut self, line: &str) {
        print("\n");
        let Some(control) = self.link.control.get() else { return self.leave() };
        // Some commands end the machine: its last output must not wait for the prompt.
        self.link.prompting.store(false, Ordering::Relaxed);
        if let Answer::Text(text) = monitor::command(line, control) {
            self.link.prompting.store(true, Ordering::Relaxed);
            print(&format!("{text}{PROMPT}"));
        }
    }

    fn leave(&mut self) {
        if self.link.prompting.swap(false, Ordering::Relaxed) {
            print("\n");
        }
    }
}

/// Prints the monitor's own words, if anyone is there to read them.
fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}
