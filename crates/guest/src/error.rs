//! What can go wrong on the way to the default guest, each with what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why there is no default guest. Displayed, each is one line that ends with the remedy.
#[derive(Debug, Error)]
pub enum GuestError {
    /// One of apt's programs is not on this machine.
    #[error(
        "the default guest is fetched through apt, and `{program}` is not on this machine; give a kernel instead: ruse run --kernel PATH [--initrd PATH]"
    )]
    NoApt {
        /// The program that was not found.
        program: PathBuf,
    },
    /// There is no directory to keep the guest in.
    #[error("no directory to keep the default guest in; set XDG_CACHE_HOME or HOME to an absolute path")]
    NoCacheDir,
    /// Apt knows none of the packages that would serve.
    #[error(
        "apt knows no package {packages}, even after a look at its sources; check that apt's sources name a Debian archive for amd64, or give a kernel: ruse run --kernel PATH [--initrd PATH]"
    )]
    UnknownPackage {
        /// The names that were tried.
        packages: String,
    },
    /// Not the name of a package or release.
    #[error("'{name}' cannot be the name of a package or a release")]
    BadName {
        /// What was given.
        name: String,
    },
    /// One of apt's programs failed.
    #[error("`{command}` failed ({status}): {message}; check the network and apt's sources, then run again")]
    Apt {
        /// The command as it was run.
        command: String,
        /// Its exit status.
        status: String,
        /// The last lines that it wrote on standard error.
        message: String,
    },
    /// Apt answered with something that is not understood.
    #[error("`{command}` answered with a line that is not understood: {line:?}; please report this")]
    BadReply {
        /// The command as it was run.
        command: String,
        /// The line.
        line: String,
    },
    /// A fetched file is not what apt's signed lists promise.
    #[error(
        "{file} does not match apt's lists: {what}; it was not used. Run `apt-get update` as root, then run again"
    )]
    Corrupt {
        /// Name of the file.
        file: String,
        /// What differs.
        what: String,
    },
    /// A package's archive cannot be read.
    #[error("{} is not a Debian package that can be read: {why}; remove it and run again", path.display())]
    BadPackage {
        /// The package's file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A package lacks a file that it should have.
    #[error("{} holds no {member}; give a kernel instead: ruse run --kernel PATH [--initrd PATH]", path.display())]
    MissingMember {
        /// The package's file.
        path: PathBuf,
        /// The file that is not in it.
        member: String,
    },
    /// A file or directory could not be used.
    #[error("cannot {what} {}: {source}; check its permissions and the free space, or set XDG_CACHE_HOME to another place", path.display())]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl GuestError {
    /// Whether fresh lists of packages may mend this.
    pub(crate) fn may_be_old_lists(&self) -> bool {
        use GuestError::*;
        matches!(self, UnknownPackage { .. } | Apt { .. } | BadReply { .. } | Corrupt { .. })
    }

    /// Makes a converter for errors of one operation on one path.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> GuestError {
        let path = path.to_owned();
        move |source| GuestError::Io { what, path, source }
    }
}
