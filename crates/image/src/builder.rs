//! The machine that builds an image: the default guest with a script, and what it says meanwhile.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::available_parallelism;

use ruse_block::Format;
use ruse_guest::{EXIT_MARK, GuestFiles, Progress, run_argument};
use ruse_vmm::doctor::choose;
use ruse_vmm::{
    Console, ConsoleOutput, DiskConfig, Machine, MachineConfig, MachineError, Outcome, Topology, engine_for,
};

use crate::{ImageError, parts};

/// What the scripts print before a step's name.
const STEP: &str = "RUSE-STEP ";
/// What they print before the new system's SSH host key.
const HOST_KEY: &str = "RUSE-HOST-KEY ";
/// How dpkg's lines begin when it is about to do something with a package, which it does twice with each.
const WORK: &[&str] = &["Unpacking ", "Setting up "];
/// Most vCPUs that are of use.
const MOST_CPUS: u32 = 4;
/// Most bytes of a line.
const LINE_LIMIT: usize = 4096;

/// What is to be built.
pub(crate) struct Job<'a> {
    /// The kernel and initramfs that build.
    pub(crate) guest: &'a GuestFiles,
    /// The new disk, as large as it is to be, and empty.
    pub(crate) disk: &'a Path,
    /// The archive of [`parts`].
    pub(crate) parts: &'a Path,
    /// Where to write all that the machine prints.
    pub(crate) log: PathBuf,
    /// Bytes of RAM.
    pub(crate) memory: u64,
    /// Packages that are installed.
    pub(crate) packages: usize,
}

impl Job<'_> {
    /// Builds, and gives the new system's SSH host key.
    pub(crate) fn run(&self, progress: &mut dyn Progress) -> Result<String, ImageError> {
        let log = File::create(&self.log).map_err(ImageError::io("create", &self.log))?;
        let config = self.config();
        let choice = choose(&config);
        let engine = engine_for(&config, &choice).map_err(MachineError::from)?;
        let (sender, lines) = channel();
        let output = Transcript { log, line: Vec::new(), lines: sender };
        let console = Console { input: None, output: Some(Box::new(output)) };
        let running = Machine::load(config)?.start(&*engine, console)?;
        let packages = 2 * self.packages as u64;
        let mut story = Story { step: "start".into(), packages, ..Story::default() };
        story.follow(&lines, progress);
        let outcome = running.wait();
        match (story.succeeded, outcome, story.host_key) {
            (true, Outcome::PowerOff, Some(key)) => Ok(key),
            _ => Err(ImageError::Build { step: story.step, last: story.last, log: self.log.clone() }),
        }
    }

    fn config(&self) -> MachineConfig {
        let cpus = available_parallelism().map_or(1, |count| count.get() as u32).min(MOST_CPUS);
        let disk = |path: &Path, read_only| DiskConfig {
            read_only,
            format: Some(Format::Raw),
            ..DiskConfig::new(path.to_owned())
        };
        MachineConfig {
            name: "image-builder".into(),
            memory: self.memory,
            cpus: Topology::flat(cpus),
            initrd: Some(self.guest.initrd.clone()),
            // The builder's user owns all that runs in it.
            cmdline: format!("console=ttyS0 panic=-1 quiet mitigations=off {}", run_argument(parts::UNPACK)),
            disks: vec![disk(self.disk, false), disk(self.parts, true)],
            ..MachineConfig::new(&self.guest.kernel)
        }
    }
}

/// What has been told so far.
#[derive(Default)]
struct Story {
    step: String,
    last: String,
    host_key: Option<String>,
    exited: bool,
    succeeded: bool,
    packages: u64,
    done: u64,
}

impl Story {
    /// Listens to the end.
    fn follow(&mut self, lines: &Receiver<String>, progress: &mut dyn Progress) {
        for line in lines {
            if let Some(step) = line.strip_prefix(STEP) {
                self.step = step.to_owned();
                progress.step(step);
            } else if let Some(key) = line.strip_prefix(HOST_KEY) {
                self.host_key = Some(key.to_owned());
            } else if let Some(status) = line.strip_prefix(EXIT_MARK) {
                self.succeeded = status.trim() == "0";
                self.exited = true;
            } else if !line.is_empty() && !self.exited {
                if WORK.iter().any(|work| line.starts_with(work)) {
                    self.done += 1;
                    progress.items(self.done.min(self.packages), self.packages);
                }
                self.last = line;
            }
        }
    }
}

/// A console that keeps all that is printed, and passes it on line by line.
struct Transcript {
    log: File,
    line: Vec<u8>,
    lines: Sender<String>,
}

impl ConsoleOutput for Transcript {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.log.write_all(bytes)?;
        for &byte in bytes {
            match byte {
                b'\n' => {
                    let line = String::from_utf8_lossy(&self.line).trim().to_owned();
                    self.line.clear();
                    // Whoever listens does so until the machine has ended.
                    let _ = self.lines.send(line);
                }
                _ if self.line.len() < LINE_LIMIT => self.line.push(byte),
                _ => {}
            }
        }
        Ok(bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Notes(Vec<String>);

    impl Progress for Notes {
        fn step(&mut self, what: &str) {
            self.0.push(what.into());
        }
        fn bytes(&mut self, _done: u64, _total: u64) {}
        fn items(&mut self, done: u64, total: u64) {
            self.0.push(format!("{done}/{total}"));
        }
    }

    fn tell(text: &str) -> (Story, Vec<String>) {
        let (lines, receiver) = channel();
        let log = tempfile::tempfile().unwrap();
        Transcript { log, line: Vec::new(), lines }.write(text.as_bytes()).unwrap();
        let (mut story, mut notes) = (Story { packages: 2, ..Story::default() }, Notes::default());
        story.follow(&receiver, &mut notes);
        (story, notes.0)
    }

    #[test]
    fn the_story_of_a_build_is_followed() {
        let text = "boot\r\nRUSE-STEP one\r\nUnpacking a\r\nSetting up a\r\nSetting up a\r\n\
                    RUSE-HOST-KEY ssh-ed25519 AAAA\r\nRUSE-EXIT 0\r\n";
        let (story, notes) = tell(text);
        assert!(story.succeeded);
        assert_eq!(story.host_key.as_deref(), Some("ssh-ed25519 AAAA"));
        assert_eq!(notes, ["one", "1/2", "2/2", "2/2"]);
    }

    #[test]
    fn a_failure_says_where_and_what_came_last() {
        let (story, _) =
            tell("RUSE-STEP one\r\ntar: no space\r\n\r\nRUSE-EXIT 1\r\n[ 1.0] reboot: Power down\r\n");
        assert!(!story.succeeded);
        assert_eq!((&*story.step, &*story.last), ("one", "tar: no space"));
    }
}
