//! The guest: the stock kernel, and the program that runs programs as its init.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use ruse_guest::{DefaultGuest, Silent};

use super::Options;
use crate::lab::Archive;
use crate::running::Running;

/// What the guest is made of.
pub struct Guest {
    /// The program, which runs on this host as well.
    pub program: PathBuf,
    ruse: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Guest {
    /// Builds what is missing.
    pub fn prepare(options: &Options) -> Result<Guest> {
        let kernel = DefaultGuest::new()?.prepare(&mut Silent)?.kernel;
        let built = build()?;
        let program = built.join("ruse-stress");
        let ruse = options.ruse.clone().unwrap_or_else(|| built.join("ruse"));
        let mut archive = Archive::new();
        archive.program("init", &program)?;
        let initrd = built.join("stress.cpio");
        fs::write(&initrd, archive.finish()?).with_context(|| format!("writing {}", initrd.display()))?;
        Ok(Guest { program, ruse, kernel, initrd })
    }

    /// Starts it. Until the first line, and then from line to line, it has so many seconds.
    pub fn start(&self, options: &Options, seed: u64, silence: u64) -> Result<Running> {
        let (vcpus, seconds) = (options.vcpus, (options.minutes * 60.0).ceil());
        let only = options.only.as_deref().unwrap_or_default();
        // What follows the dashes are init's arguments.
        let line = format!("console=ttyS0 panic=-1 quiet -- run {seed} {vcpus} {seconds} {only}");
        let mut command = Command::new(&self.ruse);
        command.args(["run", "--accel", "dbt", "--memory", "1G", "--cpus", &vcpus.to_string()]);
        command.arg("--kernel").arg(&self.kernel).arg("--initrd").arg(&self.initrd);
        command.args(["--cmdline", line.trim_end()]).args(&options.ruse_args);
        Running::start(command, silence)
    }
}

/// Builds `ruse` and the program as this one was built, and gives their directory. With the tests' profile the selection
/// is that of the tests, so that it shares what they are built of.
fn build() -> Result<PathBuf> {
    eprintln!("building ruse and the programs");
    let selection: &[&str] = match cfg!(debug_assertions) {
        true => &["--workspace", "--tests"],
        false => &["--release", "--package", "ruse-cli", "--package", "ruse-stress"],
    };
    let status = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()))
        .args(["build", "--quiet", "--bin", "ruse", "--bin", "ruse-stress"])
        .args(selection)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .context("running cargo")?;
    ensure!(status.success(), "ruse and the programs do not build");
    let this = env::current_exe().context("finding this program")?;
    this.parent().map(Path::to_owned).context("finding this program's directory")
}
