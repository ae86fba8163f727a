//! The packages of a whole Debian system: found and fetched through apt, as if nothing were installed.
//!
//! Only Debian's own sources of the machine's apt are used, for the release that is asked for; where it has none,
//! Debian's own archive.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::apt::{AptCommands, PackageFile};
use crate::fetch::{fetch, fetch_all};
use crate::kernel::{self, Kernel, VMLINUZ, write_initrd};
use crate::{GuestError, Progress, cache};

/// Enough for any package's scripts to run.
const BASE: &[&str] = &["?essential", "usr-is-merged"];
/// Brings the kernel.
const KERNEL: &str = "linux-image-cloud-amd64";
/// What signs Debian's archives, where the machine has it.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Debian's own archives, for a machine whose apt has none.
const ARCHIVES: &[(&str, &str)] =
    &[("http://deb.debian.org/debian/", ""), ("http://deb.debian.org/debian-security/", "-security")];
/// What releases are called in addition, in sources that are for everyone.
const SUFFIXES: &[&str] = &["", "-updates", "-security"];
/// Releases that have no others beside them.
const ROLLING: &[&str] = &["sid", "unstable"];

/// What a system is to be of.
#[derive(Debug, Clone)]
pub struct SystemPlan {
    /// The release, by its code name.
    pub release: String,
    /// Packages beside the essential ones.
    pub packages: Vec<String>,
}

/// The packages of a system, fetched and verified.
#[derive(Debug, Clone)]
pub struct SystemPackages {
    /// The directory that they are in.
    pub dir: PathBuf,
    /// All of them, in an order in which they can be unpacked.
    pub all: Vec<PackageFile>,
    /// Names of files of those that have to be there before a package's scripts can run.
    pub base: Vec<String>,
    /// The kernel's, which are not among the others.
    pub kernel: Vec<PackageFile>,
    /// What the system's own apt is to fetch from.
    pub sources: String,
}

impl SystemPackages {
    /// Writes the kernel, `vmlinuz`, and an initramfs that hands over to a system on a disk, `initrd`, into `dir`. Gives
    /// what the kernel calls its release.
    pub fn write_kernel(&self, busybox: &Path, dir: &Path) -> Result<String, GuestError> {
        let unpacked = self.dir.join("kernel");
        cache::fresh_dir(&unpacked)?;
        let packages: Vec<_> = self.kernel.iter().map(|package| self.dir.join(&package.file)).collect();
        let kernel = Kernel::unpack(&packages, &unpacked)?;
        let vmlinuz = dir.join(VMLINUZ);
        fs::copy(unpacked.join(VMLINUZ), &vmlinuz).map_err(GuestError::io("write", &vmlinuz))?;
        write_initrd(busybox, &unpacked, &kernel.modules, &dir.join("initrd"))?;
        Ok(kernel.release)
    }

    /// The file of a package that is among them.
    pub fn file_of(&self, package: &str) -> Option<&PackageFile> {
        self.all.iter().find(|file| file.package() == package)
    }
}

impl SystemPlan {
    /// Says what cannot be a release or a package.
    pub fn check(&self) -> Result<(), GuestError> {
        let plain = |text: &str| {
            let good =
                |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"+-.".contains(&byte);
            // A sign at the end is an instruction to apt, but for names as g++.
            let instruction = text.ends_with('-') || (text.ends_with('+') && !text.ends_with("++"));
            text.len() > 1
                && text.bytes().all(good)
                && text.as_bytes()[0].is_ascii_alphanumeric()
                && !instruction
        };
        match [&self.release].into_iter().chain(&self.packages).find(|name| !plain(name)) {
            Some(name) => Err(GuestError::BadName { name: name.clone() }),
            None => Ok(()),
        }
    }

    /// Fetches the packages into `dir`. What an earlier attempt has left there is taken up.
    pub fn fetch(
        &self,
        apt: &AptCommands,
        dir: &Path,
        progress: &mut dyn Progress,
    ) -> Result<SystemPackages, GuestError> {
        self.check()?;
        fs::create_dir_all(dir).map_err(GuestError::io("create", dir))?;
        progress.step("asking apt for the packages");
        let sources = sources(&apt.debian_sources()?, &self.release);
        let apt = apt.for_new_system(dir, &sources)?;
        match self.fetch_by(&apt, dir, &sources, progress) {
            Err(error) if error.may_be_old_lists() => {
                tracing::debug!(%error, "the machine's lists of packages do not serve");
                progress.step(&format!("fetching lists of packages of {}", self.release));
                let private = apt.with_private_lists(dir)?;
                self.fetch_by(&private, dir, &sources, progress)
            }
            done => done,
        }
    }

    fn fetch_by(
        &self,
        apt: &AptCommands,
        dir: &Path,
        sources: &str,
        progress: &mut dyn Progress,
    ) -> Result<SystemPackages, GuestError> {
        let base: Vec<_> = BASE.iter().map(|name| name.to_string()).collect();
        let wanted = [&base[..], &self.packages].concat();
        let empty = dir.join("empty");
        cache::fresh_dir(&empty)?;
        let kernel = kernel::packages(apt, &[KERNEL], &empty)?;
        let all = apt.closure(&wanted, &empty)?;
        let base = apt.closure(&base, &empty)?.into_iter().map(|file| file.file).collect();
        progress.step(&format!("fetching {} packages", all.len() + kernel.len()));
        let packages = dir.join("packages");
        fs::create_dir_all(packages.join("partial")).map_err(GuestError::io("create", &packages))?;
        fetch_all(apt, &wanted, &all, &packages, progress)?;
        for file in &kernel {
            progress.step(&format!("fetching {}", file.package()));
            fetch(apt, file, &packages, progress)?;
        }
        Ok(SystemPackages { dir: packages, all, base, kernel, sources: sources.to_owned() })
    }
}

/// A place that a machine's apt fetches from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    /// The archive.
    pub(crate) uri: String,
    /// The release, with a suffix or without.
    pub(crate) release: String,
    /// Who says to have made it; nothing where that has never been fetched.
    pub(crate) origin: Option<String>,
}

impl Source {
    fn is_debians(&self) -> bool {
        match &self.origin {
            Some(origin) => origin == "Debian",
            None => {
                self.uri.trim_end_matches('/').ends_with("/debian") || self.uri.contains("/debian-security")
            }
        }
    }
}

/// A list of sources for `release`, from those that a machine has.
fn sources(machine: &[Source], release: &str) -> String {
    let suffix = |source: &Source| source.release.find('-').map_or("", |at| &source.release[at..]).to_owned();
    let mut places: BTreeSet<(String, String)> = machine
        .iter()
        .filter(|source| source.is_debians())
        .map(|source| (source.uri.clone(), suffix(source)))
        .filter(|(_, suffix)| SUFFIXES.contains(&suffix.as_str()))
        .collect();
    if places.is_empty() {
        places.extend(ARCHIVES.iter().map(|(uri, suffix)| (uri.to_string(), suffix.to_string())));
    }
    places.retain(|(_, suffix)| suffix.is_empty() || !ROLLING.contains(&release));
    let signed = if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
    places.iter().map(|(uri, suffix)| format!("deb {signed}{uri} {release}{suffix} main\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(uri: &str, release: &str, origin: Option<&str>) -> Source {
        Source { uri: uri.into(), release: release.into(), origin: origin.map(Into::into) }
    }

    fn plain(text: &str) -> String {
        text.replace(&format!("[signed-by={KEYRING}] "), "")
    }

    #[test]
    fn the_machines_own_archives_serve_for_any_release() {
        let machine = [
            source("http://m/debian/", "bookworm", Some("Debian")),
            source("http://m/debian/", "bookworm-updates", Some("Debian")),
            source("http://m/debian/", "bookworm-backports", Some("Debian")),
            source("http://m/debian-security/", "bookworm-security", None),
            source("http://other/apt/", "nodistro", Some("Else")),
        ];
        let expected = "deb http://m/debian-security/ trixie-security main\ndeb http://m/debian/ trixie main\n\
                        deb http://m/debian/ trixie-updates main\n";
        assert_eq!(plain(&sources(&machine, "trixie")), expected);
        assert_eq!(plain(&sources(&machine, "sid")), "deb http://m/debian/ sid main\n");
    }

    #[test]
    fn without_any_debians_archive_serves() {
        let ubuntu = [source("http://u/ubuntu/", "jammy", Some("Ubuntu"))];
        let text = plain(&sources(&ubuntu, "bookworm"));
        assert!(text.contains("deb http://deb.debian.org/debian/ bookworm main\n"), "{text}");
        assert!(text.contains(" bookworm-security main\n"), "{text}");
    }

    #[test]
    fn names_that_apt_would_take_for_something_else_are_refused() {
        let plan = |release: &str, package: &str| SystemPlan {
            release: release.into(),
            packages: vec![package.into()],
        };
        plan("bookworm", "g++").check().unwrap();
        for (release, package) in [
            ("book worm", "vim"),
            ("bookworm", "-o"),
            ("bookworm", "vim-"),
            ("", "vim"),
            ("bookworm", "?essential"),
        ] {
            let result = plan(release, package).check();
            assert!(matches!(result, Err(GuestError::BadName { .. })), "{release} {package}");
        }
    }
}
