//! Disks: the files of a configuration as block devices of a machine.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use ruse_block::{Disk, DiskError, RawDisk};
use ruse_devices::pci::PciAddress;
use ruse_memory::GuestRam;
use ruse_virtio::VirtioPci;
use ruse_virtio::block::Block;

use super::{PlugError, Server, plug};
use crate::board::Board;
use crate::config::DiskConfig;
use crate::pci_slots;

/// Most queues of a disk for which nothing is said: more threads than that seldom make it faster.
const MOST_QUEUES: u16 = 4;

/// A disk of a machine.
pub(crate) struct AttachedDisk {
    config: DiskConfig,
    disk: Arc<dyn Disk>,
    function: Arc<Mutex<VirtioPci>>,
}

/// What a disk of a machine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// The file.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// It takes no writes.
    pub read_only: bool,
}

impl AttachedDisk {
    /// Opens the files.
    pub(crate) fn open_all(configs: &[DiskConfig]) -> Result<Vec<Arc<dyn Disk>>, DiskError> {
        let open = |config: &DiskConfig| {
            Ok(Arc::new(RawDisk::open(&config.path, config.read_only)?) as Arc<dyn Disk>)
        };
        configs.iter().map(open).collect()
    }

    /// Plugs disks in, each at the address of its number.
    pub(crate) fn plug_all(
        board: &Arc<Board>,
        ram: &GuestRam,
        gsi: impl Fn(PciAddress) -> u8,
        cpus: u32,
        disks: Vec<(DiskConfig, Arc<dyn Disk>)>,
    ) -> Result<(Vec<Self>, Vec<Server>), PlugError> {
        let (mut attached, mut all) = (Vec::new(), Vec::new());
        for (number, (config, disk)) in (0u8..).zip(disks) {
            let at = PciAddress::new(pci_slots::DISKS.start + number, 0);
            let queues = config.queues.unwrap_or(MOST_QUEUES.min(cpus as u16));
            let mut block = Block::new(disk.clone(), config.serial.as_deref().unwrap_or_default(), queues);
            if config.split_rings {
                block = block.with_split_rings();
            }
            let handlers = (0..queues).map(|_| Box::new(block.handler()) as _).collect();
            let name = format!("disk{number}");
            let (function, servers) = plug(board, ram, at, gsi(at), &name, Box::new(block), handlers)?;
            attached.push(Self { config, disk, function });
            all.extend(servers);
        }
        Ok((attached, all))
    }

    /// Looks how large the disk is now, and tells the guest if that has changed.
    pub(crate) fn refresh(&self, board: &Board) -> std::io::Result<DiskInfo> {
        let before = self.disk.size();
        let size = self.disk.refresh_size()?;
        if size != before {
            board.access_function(&*self.function, |function, access| function.config_changed(access));
        }
        Ok(DiskInfo { path: self.config.path.clone(), size, read_only: self.config.read_only })
    }
}
