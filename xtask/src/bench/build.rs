//! What the benchmark runs: the program, its initramfs, the kernel.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use ruse_guest::{DefaultGuest, Progress};

/// Files for a run of the benchmark.
pub struct Materials {
    /// The program, to run natively.
    pub program: PathBuf,
    /// The initramfs with the program in it.
    pub initrd: PathBuf,
    /// The kernel.
    pub kernel: PathBuf,
}

impl Materials {
    /// Builds the program and its initramfs, and finds the kernel.
    pub fn prepare(kernel: Option<&Path>) -> Result<Materials> {
        let (kernel, busybox) = match kernel {
            Some(kernel) => (kernel.to_owned(), None),
            None => {
                let files = DefaultGuest::new()?.prepare(&mut Steps)?;
                (files.kernel, Some(files.busybox))
            }
        };
        ensure!(kernel.is_file(), "no kernel {}", kernel.display());
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let out = executables()?.join("../bench");
        let mut build = Command::new(root.join("bench/guest/build"));
        build.arg(&out);
        if let Some(busybox) = busybox {
            build.env("BUSYBOX", busybox);
        }
        let output = build.output().context("running bench/guest/build")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("bench/guest/build failed (it needs gcc, libc6-dev, busybox-static and cpio):\n{said}");
        }
        Ok(Materials { program: out.join("bench"), initrd: out.join("bench.cpio.gz"), kernel })
    }

    /// Group and name of each case that the program has.
    pub fn list_cases(&self) -> Result<Vec<(String, String)>> {
        let output =
            Command::new(&self.program).arg("-l").output().context("running the benchmark's program")?;
        let pair = |line: &str| line.split_once(' ').map(|(group, name)| (group.to_owned(), name.to_owned()));
        Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(pair).collect())
    }
}

/// The `ruse` to measure: the one that is given, else this tree's, which is built in release mode.
pub fn ruse(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(given) = given {
        return Ok(given.to_owned());
    }
    eprintln!("building ruse");
    let cargo = env::var_os("CARGO").unwrap_or("cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--release", "--package", "ruse-cli", "--bin", "ruse"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .context("running cargo")?;
    ensure!(status.success(), "ruse does not build");
    Ok(executables()?.join("../release/ruse"))
}

/// The directory of this program: that of a profile, beside `release`.
fn executables() -> Result<PathBuf> {
    let this = env::current_exe().context("finding this program")?;
    Ok(this.parent().context("finding this program's directory")?.to_owned())
}

/// Tells the steps on standard error.
struct Steps;

impl Progress for Steps {
    fn step(&mut self, what: &str) {
        eprintln!("{what}");
    }
    fn bytes(&mut self, _done: u64, _total: u64) {}
}
