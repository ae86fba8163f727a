//! A terminal for the program: raw while a guest has it, and put back afterwards.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

use crate::bare::{Bare, image};
use crate::machine::Machine;

/// A pseudo-terminal.
pub struct Terminal {
    user: File,
    program: File,
    /// What it was like when it was new.
    pub mode_before: String,
}

impl Terminal {
    /// Opens one.
    pub fn open() -> Self {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("there are pseudo-terminals");
        grantpt(&user).and_then(|()| unlockpt(&user)).unwrap();
        let name = ptsname(&user, Vec::new()).unwrap().into_string().unwrap();
        let program = OpenOptions::new().read(true).write(true).open(name).unwrap();
        let mut terminal = Self { user: user.into(), program, mode_before: String::new() };
        terminal.mode_before = terminal.mode();
        terminal
    }

    /// The end where somebody types and reads.
    pub fn user_end(&self) -> File {
        self.user.try_clone().unwrap()
    }

    /// The end for a program's standard input or output.
    pub fn program_end(&self) -> OwnedFd {
        self.program.try_clone().unwrap().into()
    }

    /// Gives it so many columns and rows.
    pub fn resize(&self, columns: u16, rows: u16) {
        let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.user, size).unwrap();
    }

    /// Its settings, to be compared.
    pub fn mode(&self) -> String {
        format!("{:?}", tcgetattr(&self.program).unwrap())
    }
}

/// Starts a guest that echoes what is typed, on a terminal.
fn start_echo(bare: &Bare) -> Machine {
    let kernel = bare.kernel();
    let mut machine = Machine::on_terminal(&bare.words(&kernel, &[]));
    machine.expect("ready");
    assert_ne!(machine.terminal().mode(), machine.terminal().mode_before, "the terminal is raw");
    machine
}

#[test]
fn keys_reach_the_guest_and_some_the_monitor() {
    let bare = Bare::flat(image!(guest_echo, guest_echo_end));
    let mut machine = start_echo(&bare);
    machine.type_in("\x03\x04\x1a\x1c\x7f[");
    machine.expect("\x03\x04\x1a\x1c\x7f[");
    machine.type_in("\x01\x01]");
    machine.expect("\x01]");
    machine.type_in("\x01h");
    machine.expect("Ctrl-A c       monitor prompt");
    machine.type_in("\x01x");
    machine.end().with_code(0);
}

#[test]
fn the_prompt_pauses_resumes_and_ends_the_machine() {
    let bare = Bare::flat(image!(guest_echo, guest_echo_end));
    let mut machine = start_echo(&bare);
    machine.type_in("\x01c");
    machine.expect("(ruse) ");
    machine.type_in("info\r");
    machine.expect("ruse: running, engine dbt, 16 MiB of RAM");
    machine.expect("vcpu0: running");
    machine.expect("(ruse) ");
    machine.type_in("pause\r");
    machine.expect("paused");
    machine.type_in("help\r");
    machine.expect("press its power button");
    machine.type_in("nonsense\r");
    machine.expect("no such command: nonsense");
    machine.type_in("info\r");
    machine.expect("ruse: paused");
    machine.expect("vcpu0: ");
    machine.expect("held");
    machine.expect("(ruse) ");
    // Back to the guest, which stands still.
    machine.type_in("\r");
    let more = "<typed in the pause, and more of it than a serial port holds>";
    machine.type_in(more);
    machine.expect_not("<", Duration::from_millis(300));
    machine.type_in("\x01c");
    machine.expect("(ruse) ");
    machine.type_in("resume\r");
    machine.expect(more);
    machine.type_in("\x01c");
    machine.expect("(ruse) ");
    machine.type_in("reset\r");
    machine.expect("ready");
    machine.type_in("\x01cquit\r");
    machine.end().with_code(0);
}

#[test]
fn signals_end_the_machine() {
    let bare = Bare::flat(image!(guest_echo, guest_echo_end));
    for name in ["INT", "TERM", "HUP"] {
        let machine = start_echo(&bare);
        machine.signal(name);
        let ended = machine.end().with_code(1);
        assert_eq!(ended.messages, format!("ruse: ended by SIG{name}\n"));
    }
}

#[test]
fn a_guest_that_ends_leaves_the_terminal_as_it_was() {
    for (image, code) in [
        (image!(guest_virtual_8086, guest_virtual_8086_end), 0),
        (image!(guest_real_mode, guest_real_mode_end), 33),
        (image!(guest_triple_fault, guest_triple_fault_end), 3),
    ] {
        let bare = Bare::flat(image);
        let kernel = bare.kernel();
        Machine::on_terminal(&bare.words(&kernel, &[])).end().with_code(code);
    }
}
