//! The kinds of programs.

mod code;
mod forks;
mod jit;
mod litmus;
mod locks;
mod maps;
mod patch;
mod signals;

use ruse_random::Random;

pub use code::prepare;
pub use forks::{EXECUTED, executed};

/// Programs that do the same with other random numbers.
pub struct Kind {
    /// For names.
    pub name: &'static str,
    /// Runs one and gives its digest. What is wrong anywhere is a panic.
    pub run: fn(&mut Random) -> u64,
}

/// All kinds. Each is a process of its own, with as many threads as it says.
pub const KINDS: [Kind; 8] = [
    Kind { name: "code", run: code::run },
    Kind { name: "signals", run: signals::run },
    Kind { name: "forks", run: forks::run },
    Kind { name: "maps", run: maps::run },
    Kind { name: "jit", run: jit::run },
    Kind { name: "patch", run: patch::run },
    Kind { name: "locks", run: locks::run },
    Kind { name: "litmus", run: litmus::run },
];
