//! A load's files: Debian's packages unpacked into a tree, with the cases' input, and the same as an initramfs.

use std::ffi::OsString;
use std::fs::{self, DirEntry, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use ruse_guest::GuestFiles;
use ruse_guest::cpio::CpioWriter;

use super::native;

/// The directory of all loads' sources.
pub fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/loads")
}

/// Where the guest has the tree.
pub const PLACE_IN_GUEST: &str = "tree";
/// The shell that runs cases.
const SHELL: &str = "dash";
/// Directories that are links to those of the same name in `usr` (Debian Policy, 9.1).
const LINKS: [&str; 4] = ["bin", "sbin", "lib", "lib64"];
/// Apt's files, in a load's directory, and the packages in that.
const DOWNLOADS: &str = "apt";
const ARCHIVES: &str = "archives";
/// What a tree was made of.
const STAMP: &str = "stamp";
/// What no program reads.
const LEFT_OUT: [&str; 5] =
    ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/lintian"];

/// A load's files, ready to run.
pub struct Tree {
    /// The directory to run it in natively.
    pub root: PathBuf,
    /// The initramfs with the same files.
    pub initrd: PathBuf,
}

/// A load as its sources describe it.
pub struct Load {
    /// Its name.
    pub name: String,
    /// The cases' names, in their order.
    pub cases: Vec<String>,
    packages: Vec<String>,
    /// Its own files, and what all loads share.
    files: Vec<(OsString, Vec<u8>)>,
}

impl Load {
    /// Reads the load's sources.
    pub fn read(name: &str) -> Result<Load> {
        let mut files = files_in(&sources().join(name))?;
        let text = files.iter().find(|(file, _)| file == "cases").context("there is no file `cases`")?;
        let (packages, cases) = parse(&String::from_utf8_lossy(&text.1));
        files.extend(files_in(&sources())?);
        Ok(Load { name: name.to_owned(), cases, packages, files })
    }

    /// Each case with the load's name as its group.
    pub fn cases(&self) -> impl Iterator<Item = (String, String)> {
        self.cases.iter().map(|case| (self.name.clone(), format!("{}/{case}", self.name)))
    }

    /// Fetches the load's packages into the directory, unless the tree is there already.
    pub fn fetch(&self, directory: &Path, guest: &GuestFiles) -> Result<()> {
        let place = directory.join(&self.name);
        if self.is_made(&place, guest) {
            return Ok(());
        }
        eprintln!("{}: fetching packages", self.name);
        if place.exists() {
            fs::remove_dir_all(&place).with_context(|| format!("removing {}", place.display()))?;
        }
        fetch(&self.packages, &place.join(DOWNLOADS))
    }

    /// Makes the tree and the initramfs of what was fetched, unless they are there already.
    pub fn prepare(&self, directory: &Path, guest: &GuestFiles) -> Result<Tree> {
        let place = directory.join(&self.name);
        let tree = Tree { root: place.join("root"), initrd: place.join("initrd.cpio") };
        if self.is_made(&place, guest) {
            return Ok(tree);
        }
        eprintln!("{}: preparing", self.name);
        for link in LINKS {
            fs::create_dir_all(tree.root.join("usr").join(link))?;
            symlink(Path::new("usr").join(link), tree.root.join(link))?;
        }
        for entry in fs::read_dir(place.join(DOWNLOADS).join(ARCHIVES))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                unpack(&path, &tree.root)?;
            }
        }
        self.add_files(&tree.root, guest)?;
        write_initrd(&tree, guest)?;
        fs::remove_dir_all(place.join(DOWNLOADS))?;
        fs::write(place.join(STAMP), self.stamp(guest))?;
        Ok(tree)
    }

    fn is_made(&self, place: &Path, guest: &GuestFiles) -> bool {
        fs::read_to_string(place.join(STAMP)).is_ok_and(|stamp| stamp == self.stamp(guest))
    }

    /// All that a tree depends on, besides the packages' versions.
    fn stamp(&self, guest: &GuestFiles) -> String {
        format!("{:?} {:?}", guest.packages, self.files)
    }

    fn add_files(&self, root: &Path, guest: &GuestFiles) -> Result<()> {
        for directory in LEFT_OUT.map(|path| root.join(path)).iter().filter(|path| path.exists()) {
            fs::remove_dir_all(directory)?;
        }
        let shell = root.join("usr/bin/sh");
        if fs::symlink_metadata(&shell).is_err() {
            symlink(SHELL, shell)?;
        }
        let load = root.join("load");
        fs::create_dir_all(&load)?;
        for directory in ["tmp", "dev"] {
            fs::create_dir_all(root.join(directory))?;
        }
        // Shells and Perl open it; devices can be made by root alone.
        fs::write(root.join("dev/null"), "")?;
        for (name, content) in &self.files {
            fs::write(load.join(name), content)?;
        }
        fs::copy(&guest.busybox, load.join("busybox"))?;
        for program in ["busybox", "run"] {
            fs::set_permissions(load.join(program), fs::Permissions::from_mode(0o755))?;
        }
        let compiler = ["-O2", "-static", "measure.c", "-o", "measure"];
        let status = Command::new("cc").args(compiler).current_dir(&load).status().context("running cc")?;
        ensure!(status.success(), "measure.c does not compile (it needs gcc and libc6-dev)");
        let status = native::command(root, "prepare")?.status().context("running `prepare`")?;
        ensure!(status.success(), "the input of {} cannot be made", self.name);
        Ok(())
    }
}

/// The packages and the names of the cases in a file `cases`.
fn parse(text: &str) -> (Vec<String>, Vec<String>) {
    let (mut packages, mut cases) = (vec![SHELL.to_owned()], Vec::new());
    for line in text.lines() {
        let mut words = line.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("packages") => packages.extend(words),
            None | Some("prepare") => {}
            Some(name) if name.starts_with('#') => {}
            Some(name) => cases.push(name.to_owned()),
        }
    }
    (packages, cases)
}

/// Names and contents of the files in a directory, by name.
fn files_in(directory: &Path) -> Result<Vec<(OsString, Vec<u8>)>> {
    let entries = fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            files.push((entry.file_name(), fs::read(entry.path())?));
        }
    }
    files.sort();
    Ok(files)
}

/// Fetches the packages and all that they depend on, as if nothing were installed.
fn fetch(packages: &[String], directory: &Path) -> Result<()> {
    let (archives, lists) = (directory.join(ARCHIVES), directory.join("lists"));
    fs::create_dir_all(archives.join("partial"))?;
    fs::create_dir_all(lists.join("partial"))?;
    let apt = |own_lists: bool, words: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(["-q", "-y", "-oDir::State::status=/dev/null", "-oDebug::NoLocking=1"]);
        command.arg(format!("-oDir::Cache={}/", directory.display()));
        if own_lists {
            command.arg(format!("-oDir::State::lists={}/", lists.display()));
        }
        succeed(command.args(words).env("LC_ALL", "C"))
    };
    let mut install = vec!["-oAPT::Install-Recommends=0", "--download-only", "install"];
    install.extend(packages.iter().map(String::as_str));
    if apt(false, &install).is_err() {
        // The machine's lists of packages are empty or out of date.
        apt(true, &["update"])?;
        apt(true, &install)?;
    }
    Ok(())
}

/// Unpacks a package's files. Where Debian has links to directories, packages may have the directories.
fn unpack(package: &Path, root: &Path) -> Result<()> {
    let mut archive = Command::new("dpkg-deb");
    archive.arg("--fsys-tarfile").arg(package).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut archive = archive.spawn().context("running dpkg-deb")?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--keep-directory-symlink", "--directory"]).arg(root);
    succeed(tar.stdin(archive.stdout.take().expect("its output is a pipe")))?;
    ensure!(archive.wait()?.success(), "dpkg-deb cannot read {}", package.display());
    Ok(())
}

/// Runs a command; what it complains of is the error.
fn succeed(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_owned();
    let output = command.output().with_context(|| format!("running {}", program.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} failed:\n{}", program.display(), said.trim_end());
    Ok(())
}

/// Writes the default guest's initramfs and, behind it, the tree.
fn write_initrd(tree: &Tree, guest: &GuestFiles) -> Result<()> {
    let mut file = BufWriter::new(File::create(&tree.initrd)?);
    io::copy(&mut File::open(&guest.initrd)?, &mut file)?;
    let mut archive = CpioWriter::new(file);
    add_directory(&mut archive, &tree.root, PLACE_IN_GUEST)?;
    archive.finish()?;
    Ok(())
}

fn add_directory(archive: &mut CpioWriter<impl Write>, path: &Path, name: &str) -> Result<()> {
    archive.directory(name)?;
    let mut entries = fs::read_dir(path)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(DirEntry::file_name);
    for entry in entries {
        let (path, kind) = (entry.path(), entry.file_type()?);
        let name = format!("{name}/{}", entry.file_name().to_str().context("a name that is not UTF-8")?);
        if kind.is_dir() {
            add_directory(archive, &path, &name)?;
        } else if kind.is_symlink() {
            archive.symlink(&name, fs::read_link(&path)?.to_str().context("a link that is not UTF-8")?)?;
        } else if kind.is_file() {
            archive.file(&name, entry.metadata()?.permissions().mode(), &fs::read(&path)?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_and_cases_are_read() {
        let text =
            "# words\npackages perl-base xz-utils\n\nprepare seq 9 > f\none perl -e 1\ntwo   cat; true\n";
        let (packages, cases) = parse(text);
        assert_eq!(packages, ["dash", "perl-base", "xz-utils"]);
        assert_eq!(cases, ["one", "two"]);
    }

    #[test]
    fn every_load_has_packages_and_cases() {
        for name in super::super::names().unwrap() {
            let load = Load::read(&name).unwrap();
            assert!(load.packages.len() > 1 && !load.cases.is_empty(), "{name}");
        }
    }
}
