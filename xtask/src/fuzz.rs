//! Long runs of the fuzz targets: builds them with coverage counters and gives each to libFuzzer for a while.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

/// The triple that is built for. Naming it keeps the counters out of build scripts and macros.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// Has LLVM count which edges run and trace what is compared, as libFuzzer expects. All of these are stable options.
const COVERAGE: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
];

/// What to fuzz, and for how long.
#[derive(Args)]
pub struct Options {
    /// Targets; without any, all of them in turn.
    targets: Vec<String>,
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    time: u64,
    /// Runs this one input, such as a run has kept, in place of new ones.
    #[arg(long)]
    input: Option<PathBuf>,
    /// Where inputs are kept: what reaches new code in TARGET/, what fails in found/.
    #[arg(long, default_value = "target/fuzz")]
    dir: PathBuf,
    /// Seconds that one input may take.
    #[arg(long, default_value_t = 20)]
    timeout: u64,
}

/// Runs the targets. The first failure ends it.
pub fn run(options: &Options) -> Result<()> {
    let program = build()?;
    let all = names(&program)?;
    let targets = if options.targets.is_empty() { &all } else { &options.targets };
    if let Some(unknown) = targets.iter().find(|target| !all.contains(target)) {
        bail!("there is no target '{unknown}'; there are: {}", all.join(", "));
    }
    if options.input.is_some() && options.targets.len() != 1 {
        bail!("--input needs the one target that it is for");
    }
    for target in targets {
        fuzz(&program, target, options)?;
    }
    Ok(())
}

fn build() -> Result<PathBuf> {
    let mut command = Command::new(env!("CARGO"));
    command.args(["build", "--package", "ruse-fuzz", "--bin", "fuzz", "--features", "libfuzzer"]);
    command.args(["--profile", "fuzz", "--target", TRIPLE]);
    command.env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\u{1f}"));
    if !command.status().context("cannot run cargo")?.success() {
        bail!("the fuzz targets do not build");
    }
    let target_dir = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    Ok(Path::new(&target_dir).join(TRIPLE).join("fuzz/fuzz"))
}

/// The program prints the names of its targets where it is given none.
fn names(program: &Path) -> Result<Vec<String>> {
    let output = Command::new(program).env_remove("RUSE_FUZZ_TARGET").output();
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

fn fuzz(program: &Path, target: &str, options: &Options) -> Result<()> {
    let (kept, found) = (options.dir.join(target), options.dir.join("found"));
    for dir in [&kept, &found] {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let mut command = Command::new(program);
    command.env("RUSE_FUZZ_TARGET", target).arg(format!("-timeout={}", options.timeout));
    match &options.input {
        Some(input) => command.arg(input),
        None => command
            .arg(format!("-max_total_time={}", options.time))
            .arg(format!("-artifact_prefix={}/{target}-", found.display()))
            .args(["-max_len=2048", "-len_control=10", "-use_value_profile=1", "-print_final_stats=1"])
            .arg(&kept),
    };
    eprintln!("== {target}");
    if !command.status().with_context(|| format!("cannot run {}", program.display()))?.success() {
        bail!("{target} failed; the input is in {}", found.display());
    }
    Ok(())
}
