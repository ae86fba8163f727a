//! What can go wrong with running machines.

use std::io;
use std::path::{Path, PathBuf};

use crate::protocol::ErrorKind;

/// Why a machine cannot be registered, found or asked.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// The name is another machine's.
    #[error("a machine '{name}' runs already (ruse ps lists all); give another --name")]
    Taken {
        /// The name.
        name: String,
    },
    /// There is no such machine.
    #[error("no machine '{name}' runs (ruse ps lists those that do)")]
    NoMachine {
        /// The name that was asked for.
        name: String,
    },
    /// It runs, but does not answer.
    #[error("machine '{name}' does not answer{}", pid.map(|pid| format!(" (process {pid})")).unwrap_or_default())]
    Silent {
        /// Its name.
        name: String,
        /// Its process, if that is known.
        pid: Option<u32>,
    },
    /// It answered with an error.
    #[error("machine '{name}': {message}")]
    Refused {
        /// Its name.
        name: String,
        /// What kind of error.
        kind: ErrorKind,
        /// What it said.
        message: String,
    },
    /// Its guest keeps a device.
    #[error(
        "machine '{name}': its system has not let go of {id} within {seconds} s; it still leaves when that does"
    )]
    Kept {
        /// The machine's name.
        name: String,
        /// The device.
        id: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The place for machines' folders is not the user's own.
    #[error("{} is not a directory that only you can use; remove it, or set XDG_RUNTIME_DIR", path.display())]
    NotOurs {
        /// The directory.
        path: PathBuf,
    },
    /// A file or socket could not be used.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl ManagerError {
    /// Makes a converter for errors of one operation on one path.
    pub(crate) fn io<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> Self + use<E> {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source: source.into() }
    }

    /// Whether the user can mend it by other input.
    pub fn is_bad_input(&self) -> bool {
        matches!(
            self,
            Self::Taken { .. } | Self::NoMachine { .. } | Self::Refused { kind: ErrorKind::Impossible, .. }
        )
    }
}
