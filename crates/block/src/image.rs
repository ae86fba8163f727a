//! What can be done with an image as a file, beside reading and writing the disk that is in it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use crate::file::HostFile;
use crate::{Disk, Format};

/// A disk in a file of some format.
pub trait Image: Disk {
    /// What the file says about itself.
    fn info(&self) -> io::Result<ImageInfo>;

    /// Changes the size of the disk; what is new is zero, what is cut off is lost.
    fn resize(&self, size: u64) -> Result<(), ResizeError>;

    /// Compares what the file says in several places. With `repair`, what is wrong is mended if possible.
    /// `None` for formats that say nothing twice.
    fn check(&self, repair: Repair) -> io::Result<Option<CheckReport>> {
        let _ = repair;
        Ok(None)
    }

    /// What is behind this image.
    fn backing(&self) -> Option<&Arc<dyn Image>> {
        None
    }

    /// Names another backing file, or none. The bytes are not looked at.
    fn set_backing(&self, backing: Option<&Backing>) -> io::Result<()> {
        let _ = backing;
        Err(io::Error::new(io::ErrorKind::Unsupported, "the format has no backing files"))
    }

    /// Forgets all that is in this image, so that its backing file shows.
    fn clear(&self) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "the format has no backing files"))
    }

    /// Writes one whole cluster compressed, if the format can and the bytes are worth it; says whether it did.
    fn write_compressed(&self, offset: u64, bytes: &[u8]) -> io::Result<bool> {
        let _ = (offset, bytes);
        Ok(false)
    }
}

/// The file that has what an image has not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Backing {
    /// As it is written in the image: relative to the directory of the image, if not absolute.
    pub path: PathBuf,
    /// Its format, if the image says so.
    pub format: Option<Format>,
}

/// What an image says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageInfo {
    /// Its format.
    pub format: Format,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// Bytes of the file.
    pub file_size: u64,
    /// Bytes of storage that the file takes.
    pub allocated: u64,
    /// Bytes that are allocated at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// The kind within the format.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// The file behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing: Option<Backing>,
    /// How clusters are compressed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<String>,
    /// It was not closed as it should.
    pub dirty: bool,
    /// It is known to be damaged.
    pub corrupt: bool,
    /// Snapshots within the image.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<Snapshot>,
}

impl ImageInfo {
    pub(crate) fn new(format: Format, virtual_size: u64, file: &HostFile) -> io::Result<Self> {
        let (file_size, allocated) = (file.size()?, file.allocated()?);
        Ok(Self { file_size, allocated, ..Self::empty(format, virtual_size) })
    }

    pub(crate) fn empty(format: Format, virtual_size: u64) -> Self {
        Self {
            format,
            virtual_size,
            file_size: 0,
            allocated: 0,
            cluster_size: None,
            variant: None,
            backing: None,
            compression: None,
            dirty: false,
            corrupt: false,
            snapshots: Vec::new(),
        }
    }
}

/// A snapshot within an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// What it is called by programs.
    pub id: String,
    /// What it is called by people.
    pub name: String,
    /// When it was made: seconds since 1970.
    pub seconds: u64,
    /// Bytes of the disk then.
    pub disk_size: u64,
    /// Bytes of the machine's state in it.
    pub state_size: u64,
}

/// What a check mends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    Nothing,
    /// Storage that nobody uses.
    Leaks,
    /// Wrong numbers as well.
    All,
}

/// What a check has found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// What endangers data, in words; the first few.
    pub errors: Vec<String>,
    /// How many there are.
    pub error_count: u64,
    /// Clusters that nobody uses and that are not free.
    pub leaks: u64,
    /// Clusters of the disk that are in the image.
    pub allocated_clusters: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Of the errors, those that were mended.
    pub repaired_errors: u64,
    /// Of the leaks, those that were mended.
    pub repaired_leaks: u64,
}

impl CheckReport {
    /// Errors that a report tells in words.
    const WORDS: usize = 20;

    pub(crate) fn error(&mut self, what: impl FnOnce() -> String) {
        self.error_count += 1;
        if self.errors.len() < Self::WORDS {
            self.errors.push(what());
        }
    }

    /// Whether the image is as it should be now.
    pub fn is_clean(&self) -> bool {
        self.error_count == self.repaired_errors && self.leaks == self.repaired_leaks
    }
}

/// Why an image cannot get another size.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// The host refuses.
    #[error(transparent)]
    Host(#[from] io::Error),
    /// The format cannot.
    #[error("{0}")]
    Format(&'static str),
}
