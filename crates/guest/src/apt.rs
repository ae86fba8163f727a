//! Questions to the machine's own apt: which package, from where, with which checksum.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::system::Source;
use crate::{GuestError, cache};

/// The programs of apt, and the lists of packages that they use.
#[derive(Debug, Clone)]
pub struct AptCommands {
    /// `apt-get`, by name or path.
    pub get: PathBuf,
    /// `apt-cache`, by name or path.
    pub cache: PathBuf,
    options: Vec<OsString>,
}

impl Default for AptCommands {
    fn default() -> Self {
        AptCommands::new("apt-get", "apt-cache")
    }
}

/// Where a package's file is and what it must be like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackageFile {
    /// Where apt fetches it from.
    pub uri: String,
    /// The name that apt gives the file.
    pub file: String,
    /// Its size in bytes.
    pub size: u64,
    /// The name of its checksum's algorithm: `SHA256` or `SHA512`.
    pub algorithm: String,
    /// The checksum, in hexadecimal digits.
    pub digest: String,
}

impl AptCommands {
    /// These programs, with the machine's own lists of packages.
    pub fn new(get: impl Into<PathBuf>, cache: impl Into<PathBuf>) -> Self {
        AptCommands { get: get.into(), cache: cache.into(), options: Vec::new() }
    }

    /// The same programs with lists of packages of their own in `dir`, fetched now. This needs no
    /// root, and serves where the machine's lists are empty or out of date.
    pub(crate) fn with_private_lists(&self, dir: &Path) -> Result<AptCommands, GuestError> {
        let (lists, cache) = (dir.join("lists"), dir.join("cache"));
        for partial in [lists.join("partial"), cache.join("archives/partial")] {
            fs::create_dir_all(&partial).map_err(GuestError::io("create", &partial))?;
        }
        let private = self.clone().with_dir("Dir::State::lists", &lists).with_dir("Dir::Cache", &cache);
        let lean = [
            "-q",
            "-o",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
            "-o",
            "Acquire::Languages=none",
            "update",
        ];
        private.run(&private.get, &lean)?;
        Ok(private)
    }

    fn with_option(mut self, name: &str, value: impl AsRef<OsStr>) -> AptCommands {
        let mut setting = OsString::from(name);
        setting.push("=");
        setting.push(value);
        self.options.extend(["-o".into(), setting]);
        self
    }

    fn with_dir(self, name: &str, path: &Path) -> AptCommands {
        let mut value = path.as_os_str().to_owned();
        value.push("/");
        self.with_option(name, value)
    }

    /// The same programs for a system that has nothing installed yet, with these sources. Files of theirs go into
    /// `dir`. The lists of packages are the machine's.
    pub(crate) fn for_new_system(&self, dir: &Path, sources: &str) -> Result<AptCommands, GuestError> {
        let (list, status) = (dir.join("sources.list"), dir.join("status"));
        cache::write_whole(&list, sources.as_bytes())?;
        cache::write_whole(&status, b"")?;
        Ok(self
            .clone()
            .with_option("Dir::State::status", status)
            .with_option("Dir::Etc::sourcelist", list)
            .with_option("Dir::Etc::sourceparts", "-")
            .with_option("Dir::Cache::pkgcache", "")
            .with_option("Dir::Cache::srcpkgcache", "")
            .with_option("APT::Architecture", "amd64")
            .with_option("APT::Architectures", "amd64")
            .with_option("APT::Install-Recommends", "false")
            .with_option("APT::Sandbox::User", "")
            .with_option("Acquire::ForceHash", "SHA256")
            .with_option("Debug::NoLocking", "true"))
    }

    /// Where the machine's packages come from.
    pub(crate) fn debian_sources(&self) -> Result<Vec<Source>, GuestError> {
        const UNKNOWN: &str = "$(ORIGIN)";
        let format = format!("$(REPO_URI)|$(RELEASE)|{UNKNOWN}");
        let reply = self.run(&self.get, &["indextargets", "--format", &format, "Created-By: Packages"])?;
        let source = |line: &str| {
            let mut words = line.split('|').map(str::to_owned);
            let (uri, release) = (words.next()?, words.next()?);
            Some(Source { uri, release, origin: words.next().filter(|origin| origin != UNKNOWN) })
        };
        Ok(reply.lines().filter_map(source).collect())
    }

    /// These packages and all that they depend on, in the order in which apt would unpack them. Those of which a file
    /// is in a directory already are left out: it is asked in one that is `empty`.
    pub(crate) fn closure(&self, packages: &[String], empty: &Path) -> Result<Vec<PackageFile>, GuestError> {
        let asked = self.clone().with_dir("Dir::Cache::archives", empty);
        let arguments = install(&["--print-uris"], packages);
        let output = asked.run(&asked.get, &arguments)?;
        let lines = output.lines().filter(|line| line.starts_with('\''));
        let parse = |line: &str| {
            PackageFile::parse(line).ok_or_else(|| GuestError::BadReply {
                command: self.describe(&self.get, &arguments),
                line: line.to_owned(),
            })
        };
        lines.map(parse).collect()
    }

    /// Begins to download these packages and all that they depend on into `dir`; what apt says goes to `log`.
    pub(crate) fn download_all(
        &self,
        packages: &[String],
        dir: &Path,
        log: &Path,
    ) -> Result<Child, GuestError> {
        let into = self.clone().with_dir("Dir::Cache::archives", dir);
        into.spawn(&install(&["-q", "--download-only"], packages), dir, log)
    }

    /// The first of `packages` that apt knows; one that only stands for another whose name begins
    /// with `prefix` is followed.
    pub(crate) fn resolve(&self, packages: &[&str], prefix: &str) -> Result<String, GuestError> {
        for package in packages {
            match self.run(&self.cache, &["depends", package]) {
                Ok(output) => {
                    let other = dependencies(&output).find(|name| name.starts_with(prefix));
                    return Ok(other.unwrap_or(package).to_owned());
                }
                Err(GuestError::Apt { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(GuestError::UnknownPackage { packages: packages.join(" or ") })
    }

    /// The packages that `package` depends on.
    pub(crate) fn dependencies(&self, package: &str) -> Result<Vec<String>, GuestError> {
        let output = self.run(&self.cache, &["depends", package])?;
        Ok(dependencies(&output).map(str::to_owned).collect())
    }

    /// Where the file of `package` is. Apt says nothing of a file that is in the directory already,
    /// so it is asked in one that is `empty`.
    pub(crate) fn locate(&self, package: &str, empty: &Path) -> Result<PackageFile, GuestError> {
        let arguments = ["download", "--print-uris", package];
        let mut command = self.command(&self.get, &arguments);
        command.current_dir(empty);
        let output = self.finish(command, &self.get, &arguments)?;
        let line = output.lines().rfind(|line| line.starts_with('\'')).unwrap_or(output.trim());
        PackageFile::parse(line).ok_or_else(|| GuestError::BadReply {
            command: self.describe(&self.get, &arguments),
            line: line.to_owned(),
        })
    }

    /// Begins to download `package` into `dir`; what apt says goes to `log`.
    pub(crate) fn download(&self, package: &str, dir: &Path, log: &Path) -> Result<Child, GuestError> {
        self.spawn(&["-q", "download", package], dir, log)
    }

    fn spawn(&self, arguments: &[&str], dir: &Path, log: &Path) -> Result<Child, GuestError> {
        let log_file = File::create(log).map_err(GuestError::io("create", log))?;
        let mut command = self.command(&self.get, arguments);
        command.current_dir(dir).stdout(Stdio::null()).stderr(log_file);
        command.spawn().map_err(|error| self.not_started(&self.get, error))
    }

    /// The error of a download that ended badly.
    pub(crate) fn download_failed(&self, package: &str, status: impl ToString, log: &Path) -> GuestError {
        let said = fs::read(log).unwrap_or_default();
        self.failed(&self.get, &["download", package], status, &said)
    }

    fn command(&self, program: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options).args(arguments).env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    fn run(&self, program: &Path, arguments: &[&str]) -> Result<String, GuestError> {
        self.finish(self.command(program, arguments), program, arguments)
    }

    fn finish(&self, mut command: Command, program: &Path, arguments: &[&str]) -> Result<String, GuestError> {
        tracing::debug!(?command, "asking apt");
        let Output { status, stdout, stderr } =
            command.output().map_err(|error| self.not_started(program, error))?;
        if !status.success() {
            return Err(self.failed(program, arguments, status, &stderr));
        }
        Ok(String::from_utf8_lossy(&stdout).into_owned())
    }

    fn not_started(&self, program: &Path, error: io::Error) -> GuestError {
        match error.kind() {
            io::ErrorKind::NotFound => GuestError::NoApt { program: program.to_owned() },
            _ => GuestError::io("run", program)(error),
        }
    }

    fn failed(&self, program: &Path, arguments: &[&str], status: impl ToString, said: &[u8]) -> GuestError {
        GuestError::Apt {
            command: self.describe(program, arguments),
            status: status.to_string(),
            message: last_words(&String::from_utf8_lossy(said)),
        }
    }

    fn describe(&self, program: &Path, arguments: &[&str]) -> String {
        let name = program.file_name().unwrap_or(OsStr::new("apt"));
        format!("{} {}", name.to_string_lossy(), arguments.join(" "))
    }
}

/// The words of `apt-get install`.
fn install<'a>(options: &[&'a str], packages: &'a [String]) -> Vec<&'a str> {
    let packages = packages.iter().map(String::as_str);
    options.iter().copied().chain(["--yes", "install", "--"]).chain(packages).collect()
}

/// The errors in what apt wrote, or its last line, as one line.
fn last_words(said: &str) -> String {
    let errors: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("E: ")).collect();
    match errors[..] {
        [] => said.lines().last().unwrap_or("it said nothing").trim().to_owned(),
        _ => errors.join("; "),
    }
}

/// The dependencies in the output of `apt-cache depends`.
fn dependencies(output: &str) -> impl Iterator<Item = &str> {
    let lines = output.lines().map(|line| line.trim_start_matches([' ', '|']));
    lines.filter_map(|line| line.strip_prefix("Depends: ")).map(str::trim)
}

impl PackageFile {
    /// Reads a line of `apt-get download --print-uris`: `'URI' FILE SIZE ALGORITHM:DIGEST`.
    pub fn parse(line: &str) -> Option<PackageFile> {
        let (uri, rest) = line.strip_prefix('\'')?.split_once('\'')?;
        let mut words = rest.split_whitespace();
        let (file, size) = (words.next()?, words.next()?.parse().ok()?);
        let (algorithm, digest) = words.next()?.split_once(':')?;
        let digits = match algorithm {
            "SHA256" => 64,
            "SHA512" => 128,
            _ => return None,
        };
        let plain_name = !file.contains('/') && !file.starts_with('.');
        let hexadecimal = digest.len() == digits && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
        (plain_name && hexadecimal).then(|| PackageFile {
            uri: uri.to_owned(),
            file: file.to_owned(),
            size,
            algorithm: algorithm.to_owned(),
            digest: digest.to_ascii_lowercase(),
        })
    }

    /// The package's name, from the file's (`NAME_VERSION_ARCH.deb`).
    pub fn package(&self) -> &str {
        self.file.split('_').next().unwrap_or("")
    }

    /// Its name and version, as one reads them.
    pub fn described(&self) -> String {
        format!("{} {}", self.package(), self.version())
    }

    /// The package's version, from the file's name (`NAME_VERSION_ARCH.deb`).
    pub fn version(&self) -> String {
        self.file.split('_').nth(1).unwrap_or("unknown").replace("%3a", ":")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "3d3fdbe91d4660c873e14b092c213fe81c1da6362daa236eb25d0171eb108744";

    #[test]
    fn a_line_of_print_uris_is_read() {
        for uri in ["http://host/pool/b_1%3a1.deb", "file:/srv/mirror/b.deb", "copy:/srv/a b.deb"] {
            let line = format!("'{uri}' busybox-static_1%3a1.35.0-4_amd64.deb 928188 SHA256:{DIGEST}");
            let file = PackageFile::parse(&line).unwrap();
            assert_eq!((file.uri.as_str(), file.size, file.digest.as_str()), (uri, 928_188, DIGEST));
            assert_eq!(file.version(), "1:1.35.0-4");
        }
    }

    #[test]
    fn lines_that_cannot_be_trusted_are_refused() {
        let good = format!("'http://h/x' x_1_amd64.deb 12 SHA256:{DIGEST}");
        assert!(PackageFile::parse(&good).is_some());
        let bad = [
            String::new(),
            good.replace("x_1", "../x_1"),
            good.replace(" 12 ", " -1 "),
            good.replace("SHA256", "MD5Sum"),
            good.replace(DIGEST, "00"),
            good.replace('\'', ""),
        ];
        for line in bad {
            assert_eq!(PackageFile::parse(&line), None, "{line}");
        }
    }

    #[test]
    fn dependencies_are_read() {
        let output =
            "linux-image-cloud-amd64\n  Depends: init\n |Depends: linux-image-6.1-cloud\n  Recommends: x\n";
        assert_eq!(dependencies(output).collect::<Vec<_>>(), ["init", "linux-image-6.1-cloud"]);
        assert_eq!(dependencies("busybox-static\n  Conflicts: busybox\n").count(), 0);
    }

    #[test]
    fn the_errors_are_kept_of_what_apt_says() {
        assert_eq!(last_words("W: old\nE: one\nnoise\nE: two\n"), "one; two");
        assert_eq!(last_words("only this"), "only this");
    }
}
