//! The default guest, with a progress bar while it is fetched.

use ruse_guest::{DefaultGuest, GuestError, GuestFiles};

use crate::progress::Bar;

/// The default guest's files if they are there; nothing is fetched.
pub fn prepared() -> Option<GuestFiles> {
    DefaultGuest::new().ok()?.prepared()
}

/// The default guest's files, fetched where they are not there yet.
pub fn prepare() -> Result<GuestFiles, GuestError> {
    let guest = DefaultGuest::new()?;
    match guest.prepared() {
        Some(files) => Ok(files),
        None => guest.prepare(&mut Bar::default()),
    }
}
