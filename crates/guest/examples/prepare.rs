//! Prepares the default guest in the user's cache directory, or in one that is given, and names its files.

use ruse_guest::{DefaultGuest, GuestError, Progress};

struct Print;

impl Progress for Print {
    fn step(&mut self, what: &str) {
        eprintln!("{what}");
    }
    fn bytes(&mut self, done: u64, total: u64) {
        eprintln!("  {done} of {total} bytes");
    }
}

fn main() -> Result<(), GuestError> {
    let guest = match std::env::args_os().nth(1) {
        Some(dir) => DefaultGuest::in_dir(dir),
        None => DefaultGuest::new()?,
    };
    match guest.prepare(&mut Print) {
        Ok(files) => println!("{}\n{}", files.kernel.display(), files.initrd.display()),
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    }
    Ok(())
}
