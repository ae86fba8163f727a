//! `ruse ssh`, `exec` and `cp`: the host's own SSH programs, with the user's key for guests and the host key that the
//! machine's image has. They reach the guest by its socket device, so that they need no network.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, bail};
use clap::Args;
use ruse_image::{Machines, SshKey};
use ruse_manager::{Client, Registry};

use crate::failure::Failure;

/// The guest's port for SSH.
const PORT: u32 = 22;
/// Bytes of one read.
const CHUNK: usize = 64 << 10;

/// Options of `ruse ssh`.
#[derive(Debug, Args)]
pub struct SshOptions {
    /// The machine's name.
    pub name: String,
    /// A command for the guest's shell; without one, a shell.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// Options of `ruse exec`.
#[derive(Debug, Args)]
pub struct ExecOptions {
    /// The machine's name.
    pub name: String,
    /// A program and its arguments, which no shell changes.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    pub command: Vec<String>,
}

/// Options of `ruse cp`.
#[derive(Debug, Args)]
pub struct CpOptions {
    /// Directories with all that is in them.
    #[arg(short, long)]
    pub recursive: bool,
    /// Files of this host (PATH) or of a machine (NAME:PATH), and where to copy them; one side is a machine's.
    #[arg(required = true, num_args = 2..)]
    pub paths: Vec<String>,
}

/// Options of the hidden command that SSH runs to reach a machine.
#[derive(Debug, Args)]
pub struct ProxyOptions {
    /// The socket of the machine's socket device.
    pub socket: PathBuf,
}

/// A shell or a command in the guest. The exit code is SSH's, which is the command's.
pub fn ssh(options: &SshOptions) -> Result<u8, Failure> {
    let mut command = prepare("ssh", &options.name)?;
    command.arg(&options.name).args(&options.command);
    Err(replace(command).into())
}

/// A program in the guest.
pub fn exec(options: &ExecOptions) -> Result<u8, Failure> {
    let mut command = prepare("ssh", &options.name)?;
    let words: Vec<_> = options.command.iter().map(|word| quote(word)).collect();
    command.arg("-T").arg(&options.name).arg(words.join(" "));
    Err(replace(command).into())
}

/// Copies files.
pub fn cp(options: &CpOptions) -> Result<u8, Failure> {
    let machines: Vec<_> = options.paths.iter().filter_map(|path| machine_of(path)).collect();
    let Some(name) = machines.first() else {
        return Err(Failure::input("none of the paths is a machine's: NAME:PATH"));
    };
    if machines.iter().any(|other| other != name) || machines.len() == options.paths.len() {
        return Err(Failure::input("files are copied between this host and one machine"));
    }
    let mut command = prepare("scp", name)?;
    if options.recursive {
        command.arg("-r");
    }
    command.arg("-q").arg("--").args(&options.paths);
    Err(replace(command).into())
}

/// The machine of a path as scp understands it: what is before the first colon, if no slash is.
fn machine_of(path: &str) -> Option<&str> {
    path.split_once(':').map(|(name, _)| name).filter(|name| !name.is_empty() && !name.contains('/'))
}

/// A word that a shell takes as it is.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// One of SSH's programs, with what it needs to reach a machine.
fn prepare(program: &str, name: &str) -> Result<Command, Failure> {
    let info = Client::connect(&Registry::open()?, name)?.info()?;
    let machines = Machines::open()?;
    let record = machines.find(name)?;
    let socket = info.config.vsock.and_then(|vsock| vsock.path);
    let socket =
        socket.with_context(|| format!("machine '{name}' has no socket device: run it with --vsock 3"))?;
    let known = machines.write_known_hosts(name, &record)?;
    let own = std::env::current_exe().context("cannot find this program's file")?;
    let proxy = format!("ProxyCommand={} vsock-proxy {}", word(&own)?, word(&socket)?);
    let mut command = Command::new(program);
    command.args(["-F", "none", "-i"]).arg(SshKey::open()?.private);
    for option in [
        "IdentitiesOnly=yes",
        "StrictHostKeyChecking=yes",
        "LogLevel=ERROR",
        "HostKeyAlgorithms=ssh-ed25519",
        &format!("UserKnownHostsFile={}", word(&known)?),
        &format!("User={}", record.user),
        &format!("HostKeyAlias={name}"),
        &proxy,
    ] {
        command.args(["-o", option]);
    }
    Ok(command)
}

/// A path in one of SSH's options, where percent signs, quotes and a shell's signs mean something else.
fn word(path: &Path) -> anyhow::Result<String> {
    match path.to_str().filter(|text| !text.contains(['"', '\\', '\n', '$', '`'])) {
        Some(text) => Ok(format!("\"{}\"", text.replace('%', "%%"))),
        None => bail!("SSH cannot use the path {}", path.display()),
    }
}

/// Becomes another program; returns only if that cannot be.
fn replace(mut command: Command) -> anyhow::Error {
    let error = command.exec();
    let program = command.get_program().to_string_lossy().into_owned();
    match error.kind() {
        io::ErrorKind::NotFound => {
            anyhow::anyhow!("`{program}` is not on this machine (Debian: openssh-client)")
        }
        _ => anyhow::Error::from(error).context(format!("cannot run {program}")),
    }
}

/// Connects standard input and output with a port of the guest, by the convention of `docs/devices.md`.
pub fn proxy(options: &ProxyOptions) -> Result<u8, Failure> {
    let stream = UnixStream::connect(&options.socket)
        .with_context(|| format!("cannot reach {}", options.socket.display()))?;
    let mut answers = BufReader::new(stream.try_clone().context("cannot use the socket")?);
    writeln!(&stream, "CONNECT {PORT}").context("cannot use the socket")?;
    let mut answer = String::new();
    answers.read_line(&mut answer).context("cannot use the socket")?;
    if !answer.starts_with("OK ") {
        return Err(Failure::other("nobody answers in the guest: its SSH server may not run yet"));
    }
    let typed = stream.try_clone().context("cannot use the socket")?;
    thread::spawn(move || {
        pump(rustix::stdio::stdin(), |bytes| (&typed).write_all(bytes));
        let _ = typed.shutdown(Shutdown::Write);
    });
    let mut out = io::stdout();
    let mut bytes = vec![0; CHUNK];
    while let Ok(count @ 1..) = answers.read(&mut bytes) {
        if out.write_all(&bytes[..count]).and_then(|()| out.flush()).is_err() {
            break;
        }
    }
    Ok(0)
}

/// Passes on all that can be read.
fn pump(from: impl std::os::fd::AsFd, mut to: impl FnMut(&[u8]) -> io::Result<()>) {
    let mut bytes = vec![0; CHUNK];
    while let Ok(count @ 1..) = rustix::io::read(&from, &mut bytes) {
        if to(&bytes[..count]).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_machines_are_told_from_others() {
        assert_eq!(machine_of("web:/etc/x"), Some("web"));
        assert_eq!(machine_of("web:"), Some("web"));
        for own in ["file", "./a:b", "/a:b", ":x"] {
            assert_eq!(machine_of(own), None, "{own}");
        }
    }

    #[test]
    fn words_reach_a_program_as_they_are() {
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(word(Path::new("/a %b")).unwrap(), "\"/a %%b\"");
        assert!(word(Path::new("/a\"b")).is_err());
    }
}
