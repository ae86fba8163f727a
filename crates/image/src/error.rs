//! What can go wrong with images.

use std::io;
use std::path::{Path, PathBuf};

use ruse_block::DiskError;
use ruse_guest::GuestError;
use ruse_vmm::MachineError;

/// Why there is no image. Displayed, each is one line.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// There is no directory to keep images in.
    #[error("no directory to keep images in; set XDG_DATA_HOME or HOME to an absolute path")]
    NoDataDir,
    /// Not a name for an image.
    #[error(
        "'{name}' cannot be the name of an image: letters, digits and characters of '._-', the first a letter or digit"
    )]
    BadName {
        /// What was given.
        name: String,
    },
    /// There is an image of that name.
    #[error(
        "there is an image '{name}' already; remove it (ruse image remove {name}) or give another --name"
    )]
    Exists {
        /// The name.
        name: String,
    },
    /// There is no such image.
    #[error("there is no image '{name}' (ruse image list shows all; ruse image build makes one)")]
    NoImage {
        /// The name that was asked for.
        name: String,
    },
    /// A machine of that name has run another image.
    #[error(
        "machine '{name}' has run another image; give another --name, or --fresh to throw away what it has on its disk"
    )]
    OtherImage {
        /// The machine's name.
        name: String,
    },
    /// A machine's disk is to go, but the machine runs.
    #[error("machine '{name}' runs: ruse stop {name}")]
    Runs {
        /// The machine's name.
        name: String,
    },
    /// A machine of that name has not run an image.
    #[error("no machine '{name}' has run an image")]
    NoImageIn {
        /// The machine's name.
        name: String,
    },
    /// Its description cannot be read.
    #[error("image '{name}' is damaged: {why}; remove it (ruse image remove {name}) and build it again")]
    Damaged {
        /// Its name.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// Somebody builds this image.
    #[error("image '{name}' is being built by another process")]
    Busy {
        /// Its name.
        name: String,
    },
    /// The disk is too small for the packages, or too large for this.
    #[error("--size: a disk has from 1 GiB to 64 TiB, in whole MiB")]
    Size,
    /// Packages cannot be had.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// A machine's disk cannot be made.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Machines have it under their disks.
    #[error("image '{name}' is under the disks of {}; --force removes those too", machines.join(", "))]
    InUse {
        /// Its name.
        name: String,
        /// The machines.
        machines: Vec<String>,
    },
    /// The machine that builds cannot run.
    #[error("the machine that builds the image: {0}")]
    Machine(#[from] MachineError),
    /// It ran, and failed.
    #[error("building the image failed at '{step}': {last}; all that was printed is in {}", log.display())]
    Build {
        /// The step that it came to.
        step: String,
        /// The last that it printed.
        last: String,
        /// Everything that it printed.
        log: PathBuf,
    },
    /// A key for SSH cannot be made.
    #[error("cannot make a key for SSH: ssh-keygen {what}")]
    Key {
        /// What happened.
        what: String,
    },
    /// A file or directory could not be used.
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

impl ImageError {
    /// Makes a converter for errors of one operation on one path.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }

    /// Whether the user can mend it by other input.
    pub fn is_bad_input(&self) -> bool {
        match self {
            Self::BadName { .. } | Self::Exists { .. } | Self::NoImage { .. } | Self::Size => true,
            Self::OtherImage { .. } | Self::NoImageIn { .. } | Self::InUse { .. } | Self::Runs { .. } => true,
            Self::Guest(error) => matches!(error, GuestError::BadName { .. }),
            _ => false,
        }
    }
}
