//! The archive of what is run in the lab. Programs get the libraries that this host loads for them, at the same paths.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use ruse_guest::cpio::CpioWriter;

/// An archive being written.
pub struct Archive {
    out: CpioWriter<Vec<u8>>,
    /// What is in it: directories and libraries are asked for more than once.
    names: BTreeSet<String>,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Archive {
        Archive { out: CpioWriter::new(Vec::new()), names: BTreeSet::new() }
    }

    /// Adds a file with these permission bits, and the directories above it.
    pub fn file(&mut self, name: &str, permissions: u32, content: &[u8]) -> Result<()> {
        self.parents(name)?;
        self.names.insert(name.to_owned());
        Ok(self.out.file(name, permissions, content)?)
    }

    /// Adds a program under this name, with its libraries.
    pub fn program(&mut self, name: &str, path: &Path) -> Result<()> {
        self.file(name, 0o755, &read(path)?)?;
        libraries(path)?.iter().try_for_each(|library| self.as_here(library))
    }

    /// Adds a file of this host under its own path.
    pub fn as_here(&mut self, path: &Path) -> Result<()> {
        let name = path.to_str().context("a path that is not UTF-8")?.trim_start_matches('/').to_owned();
        if self.names.contains(&name) {
            return Ok(());
        }
        self.file(&name, 0o755, &read(path)?)
    }

    /// Ends the archive.
    pub fn finish(self) -> io::Result<Vec<u8>> {
        self.out.finish()
    }

    fn parents(&mut self, name: &str) -> Result<()> {
        for (at, _) in name.match_indices('/') {
            let directory = &name[..at];
            if self.names.insert(directory.to_owned()) {
                self.out.directory(directory)?;
            }
        }
        Ok(())
    }
}

/// Reads a file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}

/// The libraries that this host loads for a program, and what loads them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("running ldd")?;
    // Of a static program it says that there is nothing, and fails.
    let said = String::from_utf8_lossy(&output.stdout);
    let libraries = said.lines().map(library).collect::<Result<Vec<_>>>()?;
    Ok(libraries.into_iter().flatten().collect())
}

/// The path in a line of ldd: `NAME => PATH (ADDRESS)`, or `PATH (ADDRESS)` of the loader. The kernel's own has none.
fn library(line: &str) -> Result<Option<PathBuf>> {
    ensure!(!line.contains("not found"), "a library is missing: {}", line.trim());
    let path = line.rsplit("=> ").next().and_then(|rest| rest.split_whitespace().next());
    Ok(path.filter(|path| path.starts_with('/')).map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_ldd_are_read() {
        let path = |line| library(line).unwrap().map(|path| path.display().to_string());
        assert_eq!(path("\tlinux-vdso.so.1 (0x00007fe4aa796000)"), None);
        assert_eq!(
            path("\tlibm.so.6 => /lib/libm.so.6 (0x00007fe4aa100000)").as_deref(),
            Some("/lib/libm.so.6")
        );
        assert_eq!(path("\t/lib64/ld.so.2 (0x00007fe4aa798000)").as_deref(), Some("/lib64/ld.so.2"));
        assert_eq!(path("\tstatically linked"), None);
        assert!(library("\tlibx.so => not found").is_err());
    }

    #[test]
    fn directories_come_before_what_is_in_them_and_files_once() {
        let here = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"));
        let mut archive = Archive::new();
        archive.file("lab/tests/a", 0o644, b"one").unwrap();
        archive.file("lab/b", 0o644, b"two").unwrap();
        archive.as_here(here).unwrap();
        archive.as_here(here).unwrap();
        let bytes = archive.finish().unwrap();
        // Where the entry of this name is: the name follows the last field of the header, which is zero.
        let places = |name: &str| -> Vec<usize> {
            let name = format!("00000000{name}\0");
            let windows = bytes.windows(name.len()).enumerate();
            windows.filter(|(_, window)| *window == name.as_bytes()).map(|(at, _)| at).collect()
        };
        let only = |name: &str| {
            let places = places(name);
            assert_eq!(places.len(), 1, "{name}");
            places[0]
        };
        assert!(only("lab") < only("lab/tests") && only("lab/tests") < only("lab/tests/a"));
        assert!(only("lab/tests/a") < only("lab/b"));
        only(here.to_str().unwrap().trim_start_matches('/'));
    }
}
