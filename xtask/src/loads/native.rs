//! Running a load's tree on this host: its root becomes that of the process.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

/// Ways to another root: as root, as a user who may be root in a namespace, through sudo.
const WAYS: [&[&str]; 3] =
    [&["chroot"], &["unshare", "--map-root-user", "chroot"], &["sudo", "-n", "chroot"]];

/// The script in a tree that `prepare`s its input and runs its `cases`, with nothing of this host's environment.
pub const SCRIPT: [&str; 4] = ["/load/busybox", "env", "-i", "/load/run"];

/// The first way that this host permits.
pub fn way() -> Result<&'static [&'static str]> {
    let permitted = |way: &&&[&str]| {
        let mut nothing = enter(way, Path::new("/"), &["true"]);
        nothing.stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    WAYS.iter().find(permitted).copied().context("chroot needs root, user namespaces or sudo here")
}

/// The command that does one of both in the tree.
pub fn command(root: &Path, what: &str) -> Result<Command> {
    Ok(enter(way()?, root, &[&SCRIPT[..], &[what]].concat()))
}

fn enter(way: &[&str], root: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(way[0]);
    command.args(&way[1..]).arg(root).args(words).stdin(Stdio::null());
    command
}
