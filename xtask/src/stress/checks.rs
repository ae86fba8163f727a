//! Compares what the guest finds with what this host finds, several programs at a time: while the guest has the CPUs, a
//! program mostly waits until it is the turn of its other threads.

use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, available_parallelism};

use anyhow::{Context, Result, bail};

use super::answers::Answers;

/// Processes for each CPU of this host.
const PROCESSES: usize = 3;

/// What a program has found in the guest.
struct Found {
    name: String,
    digest: String,
}

/// Processes that run the programs here.
pub struct Checks {
    found: Sender<Found>,
    /// Names of programs that have found the same, or what is wrong with one.
    compared: Receiver<Result<String>>,
}

impl Checks {
    /// Starts them.
    pub fn start(program: &Path) -> Result<Checks> {
        let (found, to_compare) = mpsc::channel();
        let (result, compared) = mpsc::channel();
        let to_compare = Arc::new(Mutex::new(to_compare));
        let cpus = available_parallelism().context("counting the CPUs")?.get();
        for _ in 0..PROCESSES * cpus {
            let (here, to_compare, result) = (Answers::start(program)?, to_compare.clone(), result.clone());
            thread::spawn(move || compare(here, &to_compare, &result));
        }
        Ok(Checks { found, compared })
    }

    /// Has a program run that has found this in the guest.
    pub fn add(&self, name: &str, digest: &str) -> Result<()> {
        let found = Found { name: name.to_owned(), digest: digest.to_owned() };
        self.found.send(found).ok().context("all programs on this host have ended")
    }

    /// Names of programs that were compared since this was asked last.
    pub fn compared(&self) -> Result<Vec<String>> {
        self.compared.try_iter().collect()
    }

    /// Names of the others, when all are compared.
    pub fn finish(self) -> Result<Vec<String>> {
        drop(self.found);
        self.compared.iter().collect()
    }
}

/// Compares one after the other, as long as there may be more.
fn compare(mut here: Answers, found: &Mutex<Receiver<Found>>, result: &Sender<Result<String>>) {
    let next = || found.lock().unwrap_or_else(PoisonError::into_inner).recv();
    while let Ok(found) = next() {
        let compared = same(&mut here, &found).map(|()| found.name);
        if result.send(compared).is_err() {
            return;
        }
    }
}

/// Whether a program finds the same here.
fn same(here: &mut Answers, Found { name, digest }: &Found) -> Result<()> {
    let expected = here.find(name)?;
    if *digest == expected {
        return Ok(());
    }
    // A host that is a virtual machine itself does not always get single steps right under load: what it finds now and
    // then is no measure.
    if here.find_again(name, digest)? {
        eprintln!("{name}: this host found {expected} first, {digest} later");
        return Ok(());
    }
    bail!("{name}: the guest found {digest}, this host {expected}")
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// What comes of programs that find these digests in the guest, and 00ff here.
    fn check(found: &[(&str, &str)]) -> Result<Vec<String>> {
        check_with("#!/bin/sh\nwhile read name; do echo 00ff; done\n", found)
    }

    /// The same with a script in place of the programs here.
    fn check_with(script: &str, found: &[(&str, &str)]) -> Result<Vec<String>> {
        let directory = tempfile::tempdir()?;
        let program = directory.path().join("program");
        fs::write(&program, script)?;
        fs::set_permissions(&program, Permissions::from_mode(0o755))?;
        let checks = Checks::start(&program)?;
        found.iter().try_for_each(|(name, digest)| checks.add(name, digest))?;
        checks.finish()
    }

    #[test]
    fn programs_that_find_the_same_are_named() {
        let mut names = check(&[("jit-1", "00ff"), ("jit-2", "00ff"), ("maps-1", "00ff")]).unwrap();
        names.sort_unstable();
        assert_eq!(names, ["jit-1", "jit-2", "maps-1"]);
    }

    #[test]
    fn a_program_that_finds_something_else_is_a_failure() {
        let failure = check(&[("jit-1", "00ff"), ("jit-2", "0001")]).unwrap_err();
        assert_eq!(failure.to_string(), "jit-2: the guest found 0001, this host 00ff");
    }

    #[test]
    fn a_program_that_fails_here_once_runs_again() {
        let script = "#!/bin/sh\nread name; echo status 103\nwhile read name; do echo 00ff; done\n";
        assert_eq!(check_with(script, &[("jit-1", "00ff")]).unwrap(), ["jit-1"]);
        let always = "#!/bin/sh\nwhile read name; do echo status 103; done\n";
        let failure = check_with(always, &[("jit-1", "00ff")]).unwrap_err();
        assert_eq!(failure.to_string(), "jit-1: the guest found 00ff, this host status 103");
    }
}
