//! Persistent memory: files that are mapped into the guest's memory.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;

use ruse_block::DiskError;
use ruse_devices::pci::PciAddress;
use ruse_memory::GuestRam;
use ruse_virtio::pmem::Pmem;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::{PlugError, Server, plug};
use crate::board::Board;
use crate::config::PmemConfig;
use crate::pci_slots;

/// Linux takes such memory in sections of this size.
const UNIT: u64 = 2 << 20;

/// Why a file cannot be persistent memory.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// It cannot be had.
    #[error(transparent)]
    File(#[from] DiskError),
    /// Its size is not possible.
    #[error("'{}' has {size} bytes: expected a multiple of 2 MiB, and not nothing", .path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        size: u64,
    },
    /// It has holes that cannot be filled.
    #[error("'{}' cannot have all of its storage: {source}", .path.display())]
    Full {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}

/// A file that is locked, and of a size that fits.
pub(crate) struct OpenPmem {
    pub(crate) path: PathBuf,
    pub(crate) file: Arc<File>,
    pub(crate) size: u64,
    pub(crate) read_only: bool,
}

impl OpenPmem {
    /// Opens the files.
    pub(crate) fn open_all(configs: &[PmemConfig]) -> Result<Vec<Self>, PmemError> {
        configs.iter().map(Self::open).collect()
    }

    fn open(config: &PmemConfig) -> Result<Self, PmemError> {
        let (path, read_only) = (config.path.clone(), config.read_only);
        let mut file = ruse_block::open_locked(&path, read_only)?;
        let size =
            file.seek(SeekFrom::End(0)).map_err(|source| DiskError::Open { path: path.clone(), source })?;
        if size == 0 || !size.is_multiple_of(UNIT) {
            return Err(PmemError::Size { path, size });
        }
        Ok(Self { path, file: Arc::new(file), size, read_only })
    }

    /// Gives the file storage for all of its bytes: a write to a mapping for which there is none would end the process.
    pub(crate) fn reserve(&self) -> Result<(), PmemError> {
        if self.read_only {
            return Ok(());
        }
        match fallocate(&*self.file, FallocateFlags::empty(), 0, self.size) {
            // Not for this kind of file (a block device), or not with this file system.
            Ok(()) | Err(Errno::NODEV | Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(error) => Err(PmemError::Full { path: self.path.clone(), source: error.into() }),
        }
    }

    /// Plugs devices in for files that lie at these addresses.
    pub(crate) fn plug_all(
        board: &Arc<Board>,
        ram: &GuestRam,
        gsi: impl Fn(PciAddress) -> u8,
        pmems: Vec<(u64, Self)>,
    ) -> Result<Vec<Server>, PlugError> {
        let mut all = Vec::new();
        for (number, (start, pmem)) in (0u8..).zip(pmems) {
            let at = PciAddress::new(pci_slots::SMALL, pci_slots::PMEMS.start + number);
            let (device, handlers) = Pmem::new(start, pmem.size, pmem.file);
            let name = format!("pmem{number}");
            all.extend(plug(board, ram, at, gsi(at), &name, Box::new(device), handlers)?.1);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn open(file: &tempfile::NamedTempFile, options: &str) -> Result<OpenPmem, String> {
        let config = format!("{}{options}", file.path().display()).parse().unwrap();
        OpenPmem::open(&config).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_is_this_machines_alone_and_has_all_of_its_storage() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(2 * UNIT).unwrap();
        let pmem = open(&file, "").unwrap();
        pmem.reserve().unwrap();
        assert_eq!((pmem.size, pmem.read_only), (2 * UNIT, false));
        assert!(file.as_file().metadata().unwrap().blocks() * 512 >= 2 * UNIT);
        for options in ["", ",readonly"] {
            assert!(open(&file, options).err().unwrap().contains("in use by another machine"));
        }
        drop(pmem);
        let readers = (open(&file, ",readonly").unwrap(), open(&file, ",readonly").unwrap());
        assert!(readers.0.read_only && open(&file, "").is_err());
    }

    #[test]
    fn other_files_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for size in [0, 1, UNIT - 1, UNIT + 4096] {
            file.as_file().set_len(size).unwrap();
            let error = open(&file, "").err().unwrap();
            assert!(error.contains(&format!("{size} bytes: expected a multiple of 2 MiB")), "{error}");
        }
        let missing = PmemConfig { path: "/no/such/file".into(), read_only: true };
        assert!(OpenPmem::open(&missing).err().unwrap().to_string().contains("'/no/such/file'"));
    }
}
