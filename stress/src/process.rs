//! Processes: each program runs in one of its own.

use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering};

use ruse_random::Random;

use crate::memory::Shared;
use crate::name::Name;

/// Seconds after which a program counts as one that does not end. On a busy host a guest's seconds are short.
const PATIENCE: u32 = 1200;
/// Exit status of a program that has found something wrong and said so.
const WRONG: i32 = 101;

/// A child that has not been waited for.
pub struct Child(libc::pid_t);

/// Runs a program; its digest, or how it failed.
pub fn find(name: Name) -> Result<u64, String> {
    let found = Shared::new(AtomicU64::new(0));
    let child = fork(|| {
        // SAFETY: a plain system call: its signal ends a program that does not end by itself.
        unsafe { libc::alarm(PATIENCE) };
        found.store((name.kind.run)(&mut Random::new(name.seed)), Ordering::Relaxed);
    });
    wait(child).map(|()| found.load(Ordering::Relaxed))
}

/// Runs a function in a child.
pub fn fork(work: impl FnOnce()) -> Child {
    // SAFETY: this process has one thread wherever it forks (or the others only compute), so that no lock is held that
    // the child needs.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", io::Error::last_os_error()),
        0 => {
            let done = panic::catch_unwind(AssertUnwindSafe(work));
            // SAFETY: nothing of this process is needed any more.
            unsafe { libc::_exit(if done.is_ok() { 0 } else { WRONG }) }
        }
        id => Child(id),
    }
}

/// Waits for a child; how it failed, if it did.
pub fn wait(Child(id): Child) -> Result<(), String> {
    let mut status = 0;
    // SAFETY: `status` is this function's.
    while unsafe { libc::waitpid(id, &raw mut status, 0) } != id {
        assert_eq!(io::Error::last_os_error().kind(), io::ErrorKind::Interrupted, "waitpid");
    }
    match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
        (true, 0) => Ok(()),
        (true, code) => Err(format!("exit status {code}")),
        _ => Err(format!("signal {}", libc::WTERMSIG(status))),
    }
}

/// Turns the machine off.
pub fn power_off() {
    // SAFETY: plain system calls; init has the right.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
}
