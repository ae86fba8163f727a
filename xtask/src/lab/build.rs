//! Programs for the lab. They are linked statically, for there is nothing in the lab but busybox.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// Naming the target keeps the flags out of build scripts and macros.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The programs that run in the lab.
pub struct Programs {
    /// `ruse` itself.
    pub ruse: PathBuf,
    /// The tests of the engine, by name.
    pub tests: Vec<(String, PathBuf)>,
}

/// A message of cargo (The Cargo Book, "External tools").
#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    target: Option<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

impl Programs {
    /// Builds them. The same packages are selected each time, so that what they share is built once.
    pub fn build() -> Result<Programs> {
        eprintln!("building ruse and the tests of its KVM engine");
        let names = integration_tests()?;
        let mut arguments = vec!["build", "--bin", "ruse"];
        names.iter().for_each(|name| arguments.extend(["--test", name]));
        let mut programs = cargo(&arguments)?;
        let ruse =
            programs.iter().position(|(name, _)| name == "ruse").context("cargo says nothing of ruse")?;
        let (_, ruse) = programs.remove(ruse);
        programs.extend(cargo(&["test", "--no-run", "--lib"])?);
        Ok(Programs { ruse, tests: programs })
    }
}

/// Names of the engine's test programs.
fn integration_tests() -> Result<Vec<String>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/kvm/tests");
    let files = fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))?;
    let paths = files.filter_map(|entry| Some(entry.ok()?.path()));
    let mut names: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    Ok(names)
}

/// Runs cargo; the names and paths of the programs that it has built.
fn cargo(arguments: &[&str]) -> Result<Vec<(String, PathBuf)>> {
    let directory = super::image::directory()?.join("cargo");
    let output = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()))
        .args(arguments)
        .args(["--package", "ruse-cli", "--package", "ruse-kvm"])
        .args(["--quiet", "--target", TARGET, "--message-format", "json-render-diagnostics"])
        .env("CARGO_TARGET_DIR", directory)
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
        .stderr(Stdio::inherit())
        .output()
        .context("running cargo")?;
    ensure!(output.status.success(), "cargo {} failed", arguments.join(" "));
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(program).collect())
}

/// The program that a message of cargo is about, if it is about one.
fn program(line: &str) -> Option<(String, PathBuf)> {
    let message: Message = serde_json::from_str(line).ok()?;
    Some((message.target?.name, message.executable?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_what_cargo_says() {
        let said = r#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"vcpu"},"executable":"/t/vcpu-1"}"#;
        assert_eq!(program(said), Some(("vcpu".to_owned(), "/t/vcpu-1".into())));
        assert_eq!(
            program(r#"{"reason":"compiler-artifact","target":{"name":"x"},"executable":null}"#),
            None
        );
        assert_eq!(program(r#"{"reason":"build-finished","success":true}"#), None);
    }
}
