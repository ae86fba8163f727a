//! `ruse console`: the terminal as a viewer of a machine's serial console.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;

use anyhow::Context;
use ruse_manager::{Registry, attach};

use crate::escape::{EscapeKeys, Key};
use crate::failure::Failure;
use crate::manage::MachineName;
use crate::terminal::{self, RawMode};

/// Bytes of one read.
const CHUNK: usize = 4096;
/// What Ctrl-A h shows.
const KEYS: &str = "
Ctrl-A d       leave the console; the machine runs on
Ctrl-A h       this list
Ctrl-A Ctrl-A  send Ctrl-A to the guest
";

/// Shows the console until the user leaves it or the machine ends.
pub fn console(machine: &MachineName) -> Result<u8, Failure> {
    let stream = attach(&Registry::open()?, &machine.name)?;
    let typed = stream.try_clone().context("cannot use the console's socket")?;
    restore_on_signals().context("cannot handle signals")?;
    let raw = RawMode::enter().context("cannot set up the terminal")?;
    let keys = raw.is_some().then(EscapeKeys::default);
    // It may wait for a key as long as it likes; the process does not wait for it.
    thread::spawn(move || type_in(typed, keys));
    show(stream);
    drop(raw);
    Ok(0)
}

/// Everything that the guest prints.
fn show(mut stream: UnixStream) {
    let mut bytes = [0; CHUNK];
    let mut out = io::stdout();
    while let Ok(count @ 1..) = stream.read(&mut bytes) {
        if out.write_all(&bytes[..count]).and_then(|()| out.flush()).is_err() {
            return;
        }
    }
}

/// Everything that the user types; `keys` are of a terminal. At the end of the input the output still comes.
fn type_in(mut stream: UnixStream, mut keys: Option<EscapeKeys>) {
    let mut bytes = [0; CHUNK];
    while let Ok(count @ 1..) = rustix::io::read(rustix::stdio::stdin(), &mut bytes) {
        let mut to_guest = Vec::new();
        for &byte in &bytes[..count] {
            match keys.as_mut().map_or(Key::Guest(byte), |keys| keys.key(byte)) {
                Key::Guest(byte) => to_guest.push(byte),
                Key::Leave => {
                    // The other thread ends with it.
                    let _ = stream.shutdown(Shutdown::Both);
                    return;
                }
                Key::Help => print(KEYS),
                Key::End | Key::Monitor | Key::Nothing => {}
            }
        }
        if stream.write_all(&to_guest).is_err() {
            return;
        }
    }
    // What was typed before must arrive, so this end is not closed for both directions.
    let _ = stream.shutdown(Shutdown::Write);
}

fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
    let _ = io::stdout().flush();
}

/// Signals end the program; the terminal is put back first.
fn restore_on_signals() -> io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    thread::spawn(move || {
        if signals.forever().next().is_some() {
            terminal::restore();
            std::process::exit(crate::failure::FAILED.into());
        }
    });
    Ok(())
}
