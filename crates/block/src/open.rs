//! From a path to an image with all that is behind it, and new images.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::file::{FileId, HostFile};
use crate::guard::GuardedDisk;
use crate::image::{Backing, Image};
use crate::qcow2::{Compression, Opening, Qcow2};
use crate::{DiskError, Format, RawDisk, vhd, vhdx, vmdk};

/// Files behind each other at most.
const MOST_DEPTH: usize = 64;
/// Clusters of a qcow2 image for which nothing is said.
const CLUSTER_SIZE: u64 = 64 << 10;

/// How an image is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// Its format; what its content says, if nothing is said.
    pub format: Option<Format>,
    /// It is not written to.
    pub read_only: bool,
    /// It is to be repaired, so that it may be damaged.
    pub for_repair: bool,
    /// What is behind it is left alone: it reads as zeros.
    pub alone: bool,
}

/// Opens an image with its backing files. Nobody else writes any of them meanwhile.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Arc<dyn Image>, DiskError> {
    Chain::default().open(path, options, false)
}

/// The files that were opened for an image.
#[derive(Default)]
struct Chain {
    files: Vec<FileId>,
}

impl Chain {
    /// Opens one of them. What was only guessed to be an image, because whoever names it names no format, may be a raw
    /// disk on which a guest has written a header: it must not name further files.
    fn open(
        &mut self,
        path: &Path,
        options: &OpenOptions,
        behind: bool,
    ) -> Result<Arc<dyn Image>, DiskError> {
        let failed = |source| DiskError::Open { path: path.to_owned(), source };
        // Before it is opened: a lock of this chain's own is not another machine's.
        let id = FileId::of(path).map_err(failed)?;
        if self.files.contains(&id) || self.files.len() >= MOST_DEPTH {
            return Err(DiskError::Cycle(path.to_owned()));
        }
        self.files.push(id);
        let file = HostFile::open(path, options.read_only)?;
        let format = options.format.map_or_else(|| Format::probe(&file).map_err(failed), Ok)?;
        match format {
            Format::Raw => {
                let disk = RawDisk::new(file)?;
                let guessed = options.format.is_none() && !options.read_only;
                Ok(if guessed { Arc::new(GuardedDisk(disk)) } else { Arc::new(disk) })
            }
            Format::Qcow2 => {
                let opening = Opening::new(file)?;
                let named = opening.backing()?.filter(|_| !options.alone);
                if behind && options.format.is_none() && named.is_some() {
                    let what = "its format is only guessed, and it names another file; ruse disk rebase -u -F names the format";
                    return Err(DiskError::Format { path: path.to_owned(), what: what.to_owned() });
                }
                let backing = named.map(|backing| self.open_backing(path, &backing)).transpose()?;
                Ok(Arc::new(opening.finish(backing, options.for_repair)?))
            }
            Format::Vmdk => vmdk::open(file),
            Format::Vhd | Format::Vhdx => {
                let opened = if format == Format::Vhd { vhd::open(file) } else { vhdx::open(file) };
                match opened.map_err(failed)? {
                    Ok(image) => Ok(image.into()),
                    Err(what) => Err(DiskError::Format { path: path.to_owned(), what }),
                }
            }
        }
    }

    fn open_backing(&mut self, path: &Path, backing: &Backing) -> Result<Arc<dyn Image>, DiskError> {
        let options = OpenOptions { format: backing.format, read_only: true, ..OpenOptions::default() };
        match self.open(&resolve(path, &backing.path), &options, true) {
            // That says all.
            Err(error @ DiskError::Cycle(_)) => Err(error),
            Err(source) => Err(DiskError::Backing { path: path.to_owned(), source: Box::new(source) }),
            opened => opened,
        }
    }
}

/// Where a file is that an image names.
pub fn resolve(image: &Path, named: &Path) -> PathBuf {
    // An absolute path replaces the directory.
    image.parent().map_or_else(|| named.to_owned(), |directory| directory.join(named))
}

/// A new image.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Its format.
    pub format: Format,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes that are allocated at once, for formats that let one choose.
    pub cluster_size: Option<u64>,
    /// How clusters are compressed, where they are.
    pub compression: Compression,
    /// What is behind it.
    pub backing: Option<Backing>,
    /// A file that is there already is replaced.
    pub replace: bool,
}

impl CreateOptions {
    /// An image of a format and a size.
    pub fn new(format: Format, size: u64) -> Self {
        Self {
            format,
            size,
            cluster_size: None,
            compression: Compression::Zlib,
            backing: None,
            replace: false,
        }
    }

    fn cluster_bits(&self) -> Result<u32, String> {
        let size = self.cluster_size.unwrap_or(CLUSTER_SIZE);
        match size.is_power_of_two() && (512..=2 << 20).contains(&size) {
            true => Ok(size.trailing_zeros()),
            false => Err("the cluster size must be a power of two, 512 bytes to 2 MiB".to_owned()),
        }
    }
}

/// Makes an image. What cannot be made leaves no file behind.
pub fn create(path: &Path, options: &CreateOptions) -> Result<Arc<dyn Image>, DiskError> {
    let refuse = |what: String| DiskError::Format { path: path.to_owned(), what };
    if options.backing.is_some() && options.format != Format::Qcow2 {
        return Err(refuse(format!("{} images have no backing files", options.format)));
    }
    let cluster_bits = options.cluster_bits().map_err(refuse)?;
    let file = HostFile::create(path, options.replace)?;
    let made = fill(file, path, options, cluster_bits);
    if made.is_err() {
        let _ = std::fs::remove_file(path);
    }
    made
}

fn fill(
    file: HostFile,
    path: &Path,
    options: &CreateOptions,
    cluster_bits: u32,
) -> Result<Arc<dyn Image>, DiskError> {
    let failed = |source| DiskError::Create { path: path.to_owned(), source };
    let mut chain = Chain { files: vec![FileId::of(path).map_err(failed)?] };
    let size = options.size;
    match options.format {
        Format::Raw => file.set_size(size),
        Format::Qcow2 => {
            Qcow2::create(&file, cluster_bits, options.compression, options.backing.as_ref())
                .map_err(failed)?;
            let backing =
                options.backing.as_ref().map(|backing| chain.open_backing(path, backing)).transpose()?;
            let image = Opening::new(file)?.finish(backing, false)?;
            image.resize(size).map_err(|error| failed(io::Error::other(error.to_string())))?;
            return Ok(Arc::new(image));
        }
        Format::Vhd => vhd::create(&file, size),
        Format::Vhdx => vhdx::create(&file, size),
        Format::Vmdk => vmdk::create(&file, size),
    }
    .map_err(failed)?;
    drop(file);
    open(path, &OpenOptions { format: Some(options.format), ..OpenOptions::default() })
}
