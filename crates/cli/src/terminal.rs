//! The terminal in raw mode, and back, whatever happens.

use std::io::{self, IsTerminal};
use std::sync::{Mutex, PoisonError};

use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// What the terminal was like, while it is not like that.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Keeps the terminal in raw mode; dropped, it puts it back.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Puts the terminal of standard input into raw mode. `None` where it is not one.
    pub fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(io::stdin())?;
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(before.clone());
        let guard = Self(());
        make_raw(before)?;
        Ok(Some(guard))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Columns and rows of the terminal, if there is one.
pub fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdin()).ok()?;
    Some((size.ws_col, size.ws_row))
}

fn make_raw(mut mode: Termios) -> io::Result<()> {
    mode.make_raw();
    // Messages of the program itself end their lines as ever; the guest's CR LF looks the same with it.
    mode.output_modes |= OutputModes::OPOST;
    Ok(tcsetattr(io::stdin(), OptionalActions::Now, &mode)?)
}

/// Puts the terminal back as it was. May be called at any time, and more than once.
pub fn restore() {
    if let Some(before) = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // A terminal that has gone away needs nothing.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

/// The process has been stopped and goes on: the shell has changed the terminal meanwhile.
pub fn enter_again() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    if saved.is_some()
        && let Ok(now) = tcgetattr(io::stdin())
    {
        let _ = make_raw(now);
    }
}

/// Makes a panic of any thread put the terminal back before it prints.
pub fn restore_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        print(panic);
    }));
}
