//! `ruse run --detach`: the same command once more as a process of its own, which is left when its machine runs.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use rustix::process::setsid;
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::failure::{FAILED, Failure};

/// The option that the new process has in addition.
pub const OPTION: &str = "--detached";

/// Starts the process and waits until its machine runs, whose name is printed then. Until then its messages come here.
pub fn start() -> Result<u8, Failure> {
    let program = env::current_exe().context("cannot find this program's file")?;
    let mut child = Command::new(program)
        .args(env::args_os().skip(1))
        .arg(OPTION)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start a process for the machine")?;
    let mut name = String::new();
    if let Some(out) = child.stdout.take() {
        BufReader::new(out).read_line(&mut name).context("cannot read from the machine's process")?;
    }
    if name.is_empty() {
        let status = child.wait().context("cannot wait for the machine's process")?;
        return Ok(status.code().map_or(FAILED, |code| code as u8));
    }
    // A reader who has gone knows the name.
    let _ = write!(std::io::stdout(), "{name}");
    Ok(0)
}

/// In the new process: its machine `name` runs. The other process and its terminal are left; messages go to a log.
pub fn leave(name: &str) -> anyhow::Result<()> {
    let log = open_log(name)?;
    println!("{name}");
    // It is no leader of a process group: the process that started it is another.
    setsid().context("cannot leave the terminal")?;
    let null = File::open("/dev/null").context("cannot open /dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&log)?;
    dup2_stderr(&log)?;
    Ok(())
}

/// The log of the machine of this name, emptied.
fn open_log(name: &str) -> anyhow::Result<File> {
    let dir = log_dir()?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).with_context(|| {
        format!("cannot create {} for the log; set XDG_STATE_HOME to another place", dir.display())
    })?;
    let path = dir.join(format!("{name}.log"));
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot write the log {}", path.display()))
}

/// `$XDG_STATE_HOME/ruse`, or `~/.local/state/ruse`.
fn log_dir() -> anyhow::Result<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")));
    match state {
        Some(state) => Ok(state.join("ruse")),
        None => bail!("no directory for the log; set XDG_STATE_HOME or HOME to an absolute path"),
    }
}
