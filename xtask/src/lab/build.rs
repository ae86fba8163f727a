//! The programs for the lab: those that `cargo nextest run --workspace` runs, so that nothing is built for it alone.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// The package whose tests run in the lab.
const ENGINE: &str = "crates/kvm/Cargo.toml";
/// A program of tests of another package, which need drivers of the kernel's.
const VHOST: (&str, &str) = ("crates/vhost/Cargo.toml", "kernel_vhost");

/// The programs that run in the lab.
#[derive(Debug, PartialEq)]
pub struct Programs {
    /// `ruse` itself.
    pub ruse: PathBuf,
    /// The tests of the engine and of what else needs the lab's kernel, by name.
    pub tests: Vec<(String, PathBuf)>,
}

/// A message of cargo on something that it has built (The Cargo Book, "External tools").
#[derive(Deserialize)]
struct Built {
    executable: PathBuf,
    manifest_path: PathBuf,
    target: Target,
    profile: Profile,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

impl Built {
    fn is_for_the_lab(&self) -> bool {
        let (package, name) = VHOST;
        self.manifest_path.ends_with(ENGINE)
            || self.manifest_path.ends_with(package) && self.target.name == name
    }
}

impl Programs {
    /// Builds them. The whole workspace is selected, as its test run does: features of dependencies follow from that.
    pub fn build() -> Result<Programs> {
        eprintln!("building the tests");
        let output = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()))
            .args(["test", "--no-run", "--workspace", "--quiet"])
            .args(["--message-format", "json-render-diagnostics"])
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
            .stderr(Stdio::inherit())
            .output()
            .context("running cargo")?;
        ensure!(output.status.success(), "the tests do not build");
        Programs::choose(&String::from_utf8_lossy(&output.stdout))
    }

    /// Finds them in what cargo says.
    fn choose(messages: &str) -> Result<Programs> {
        let built: Vec<Built> = messages.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let ruse = built.iter().find(|built| built.target.name == "ruse" && !built.profile.test);
        let mut tests: Vec<_> = built
            .iter()
            .filter(|built| built.profile.test && built.is_for_the_lab())
            .map(|built| (built.target.name.clone(), built.executable.clone()))
            .collect();
        tests.sort();
        ensure!(!tests.is_empty(), "cargo says nothing of the engine's tests");
        Ok(Programs { ruse: ruse.context("cargo says nothing of ruse")?.executable.clone(), tests })
    }
}

/// Builds a program that talks over AF_VSOCK, the one of the boot tests, to the path given.
pub fn sockets(to: &Path) -> Result<()> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/cli/tests/boot/guests/vsock.c");
    let built = Command::new("cc").args(["-O1", "-static", "-o"]).args([to, &source]).status();
    ensure!(built.context("running cc")?.success(), "{} does not build", source.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(name: &str, package: &str, test: bool, executable: &str) -> String {
        serde_json::json!({
            "reason": "compiler-artifact", "target": { "name": name }, "profile": { "test": test },
            "manifest_path": format!("/w/crates/{package}/Cargo.toml"), "executable": executable,
        })
        .to_string()
    }

    #[test]
    fn programs_are_found_in_what_cargo_says() {
        let said = [
            r#"{"reason":"compiler-artifact","target":{"name":"x"},"profile":{"test":false},"manifest_path":"/w","executable":null}"#.into(),
            message("vcpu", "kvm", true, "/t/vcpu-1"),
            message("ruse", "cli", true, "/t/ruse-1"),
            message("ruse", "cli", false, "/t/ruse"),
            message("ruse_dbt", "dbt", true, "/t/dbt-1"),
            message("ruse_vhost", "vhost", true, "/t/vhost-1"),
            message("kernel_vhost", "vhost", true, "/t/vhost-2"),
            message("ruse_kvm", "kvm", true, "/t/kvm-1"),
            r#"{"reason":"build-finished","success":true}"#.into(),
        ];
        let found = Programs::choose(&said.join("\n")).unwrap();
        let tests = [("kernel_vhost", "/t/vhost-2"), ("ruse_kvm", "/t/kvm-1"), ("vcpu", "/t/vcpu-1")];
        let tests = tests.map(|(name, path)| (name.to_owned(), path.into())).into();
        assert_eq!(found, Programs { ruse: "/t/ruse".into(), tests });
        assert!(Programs::choose(&said[1..3].join("\n")).is_err(), "no program");
        assert!(Programs::choose(&said[3]).is_err(), "no tests");
    }
}
