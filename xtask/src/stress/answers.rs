//! The programs on this host.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};

/// How often a program runs again whose digest is not the guest's.
const AGAIN: u32 = 5;

/// A process that runs programs here.
pub struct Answers {
    child: Child,
    names: ChildStdin,
    digests: BufReader<ChildStdout>,
}

impl Answers {
    /// Starts it.
    pub fn start(program: &Path) -> Result<Answers> {
        let mut child = Command::new(program)
            .arg("answer")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let names = child.stdin.take().expect("standard input is a pipe");
        let digests = BufReader::new(child.stdout.take().expect("standard output is a pipe"));
        Ok(Answers { child, names, digests })
    }

    /// Runs a program and gives the digest that it finds, or how it has failed.
    pub fn find(&mut self, name: &str) -> Result<String> {
        writeln!(self.names, "{name}").context("naming a program")?;
        let mut line = String::new();
        self.digests.read_line(&mut line).context("reading what a program found")?;
        let found = line.trim_end();
        ensure!(!found.is_empty(), "the programs on this host ended at {name}");
        Ok(found.to_owned())
    }

    /// Whether a program that has found something else here finds `digest` when it runs some more times.
    pub fn find_again(&mut self, name: &str, digest: &str) -> Result<bool> {
        for _ in 0..AGAIN {
            if self.find(name)? == digest {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        // Of a process that has ended there is nothing to end or to wait for.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
