//! Signals: the first that asks for an end ends the machine, the second the process.

use std::io;
use std::sync::{Arc, OnceLock};
use std::thread::Builder;

use ruse_vmm::Control;
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;

use crate::{failure, terminal};

/// The signal that ended the machine, if one did.
pub type Ended = Arc<OnceLock<&'static str>>;

/// Starts a thread that handles signals for the machine.
pub fn watch(control: Control) -> io::Result<Ended> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGCONT, SIGWINCH])?;
    resize(&control);
    let ended = Ended::default();
    let noted = ended.clone();
    Builder::new().name("ruse-signals".into()).spawn(move || {
        for signal in signals.forever() {
            let name = match signal {
                SIGCONT => {
                    terminal::enter_again();
                    continue;
                }
                SIGWINCH => {
                    resize(&control);
                    continue;
                }
                SIGINT => "SIGINT",
                SIGTERM => "SIGTERM",
                _ => "SIGHUP",
            };
            if noted.set(name).is_err() {
                terminal::restore();
                std::process::exit(failure::FAILED.into());
            }
            control.stop();
        }
    })?;
    Ok(ended)
}

/// The guest's console is as large as the terminal.
fn resize(control: &Control) {
    if let Some((columns, rows)) = terminal::size() {
        control.resize_console(columns, rows);
    }
}
