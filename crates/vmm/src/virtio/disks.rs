//! Disks: the files of a configuration as block devices of a machine.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use ruse_block::{Disk, DiskError, OpenOptions};
use ruse_devices::pci::PciAddress;
use ruse_memory::GuestRam;
use ruse_vhost::{OpenDevice, Peer, VhostUserError};
use ruse_virtio::block::{Block, Limits, OnError, SECTOR};
use ruse_virtio::{Device, Handler};
use serde::{Deserialize, Serialize};

use super::slots::{Prepared, SlotAddress};
use super::{PlugError, Server, SharedTransport, plug, prepare};
use crate::board::Board;
use crate::config::DiskConfig;
use crate::pci_slots;

/// Most queues of a disk for which nothing is said: more threads than that seldom make it faster.
const MOST_QUEUES: u16 = 4;

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum OpenDiskError {
    /// A file.
    #[error(transparent)]
    File(#[from] DiskError),
    /// Another process that serves it.
    #[error(transparent)]
    VhostUser(#[from] VhostUserError),
}

/// A disk that is not plugged in yet.
pub(crate) enum OpenDisk {
    /// What is in a file.
    File(Arc<dyn Disk>),
    /// What another process serves.
    VhostUser { device: Box<OpenDevice>, writable: bool },
}

impl OpenDisk {
    /// Opens what is behind the disks of a machine with so many CPUs.
    pub(crate) fn open_all(
        configs: &[DiskConfig],
        cpus: u64,
    ) -> Result<Vec<(DiskConfig, Self)>, OpenDiskError> {
        let open = |config: &DiskConfig| Ok((config.clone(), Self::open(config, cpus)?));
        configs.iter().map(open).collect()
    }

    /// Opens what is behind a disk.
    pub(super) fn open(config: &DiskConfig, cpus: u64) -> Result<Self, OpenDiskError> {
        if config.vhost_user {
            let (device, writable) =
                ruse_vhost::block(&Peer::new(&config.path), config.queues, usual_queues(cpus))?;
            return Ok(Self::VhostUser { device: Box::new(device), writable });
        }
        let options =
            OpenOptions { format: config.format, read_only: config.read_only, ..OpenOptions::default() };
        let disk = ruse_block::open(&config.path, &options)?;
        match disk.size() {
            0..SECTOR => Err(DiskError::Empty(config.path.clone()).into()),
            _ => Ok(Self::File(disk as Arc<dyn Disk>)),
        }
    }

    /// The device, with what serves its queues, and what is in it.
    fn device(self, config: &DiskConfig, ram: &GuestRam, cpus: u64) -> io::Result<DiskDevice> {
        match self {
            Self::File(disk) => {
                let (device, handlers) = block(config, disk.clone(), usual_queues(cpus));
                Ok((device, handlers, Content::File(disk)))
            }
            Self::VhostUser { device, writable } => {
                let configuration = device.device.configuration();
                let sectors = configuration.first_chunk().map_or(0, |n| u64::from_le_bytes(*n));
                let device = if config.split_rings { device.with_split_rings() } else { *device };
                let (device, handlers) = device.plug(ram)?;
                Ok((device, handlers, Content::VhostUser { size: sectors * SECTOR, writable }))
            }
        }
    }
}

/// A device of a disk, what serves its queues, and what is in it.
type DiskDevice = (Box<dyn Device>, Vec<Box<dyn Handler>>, Content);

/// Queues of a disk for which nothing is said.
fn usual_queues(cpus: u64) -> u16 {
    u64::from(MOST_QUEUES).min(cpus) as u16
}

/// A disk of a machine.
pub(crate) struct AttachedDisk {
    id: String,
    config: DiskConfig,
    content: Content,
    function: SharedTransport,
}

/// What is in a disk.
enum Content {
    /// Something that can change its size.
    File(Arc<dyn Disk>),
    /// Something of this size that another process serves.
    VhostUser { size: u64, writable: bool },
}

/// What a disk of a machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Which disk of the machine: `diskN`, or `slotN` of one that was attached.
    #[serde(default)]
    pub id: String,
    /// The file.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// It takes no writes.
    pub read_only: bool,
}

impl AttachedDisk {
    /// Plugs disks in, each at the address of its number.
    pub(crate) fn plug_all(
        board: &Arc<Board>,
        ram: &GuestRam,
        gsi: impl Fn(PciAddress) -> u8,
        cpus: u64,
        disks: Vec<(DiskConfig, OpenDisk)>,
    ) -> Result<(Vec<Self>, Vec<Server>), PlugError> {
        let (mut attached, mut all) = (Vec::new(), Vec::new());
        for (number, (config, disk)) in (0u8..).zip(disks) {
            let at = PciAddress::new(pci_slots::DISKS.start + number, 0);
            let (device, handlers, content) = disk.device(&config, ram, cpus)?;
            let id = format!("disk{number}");
            let (function, servers) = plug(board, ram, at, gsi(at), &id, device, handlers)?;
            attached.push(Self { id, config, content, function });
            all.extend(servers);
        }
        Ok((attached, all))
    }

    /// A disk for a slot, which is not plugged in yet.
    pub(super) fn prepare(
        board: &Arc<Board>,
        ram: &GuestRam,
        slot: &SlotAddress,
        cpus: u64,
        (config, disk): (DiskConfig, OpenDisk),
    ) -> io::Result<(Self, Prepared)> {
        let (device, handlers, content) = disk.device(&config, ram, cpus)?;
        let id = slot.id();
        let (function, servers) = prepare(board, ram, slot.at, slot.gsi, &id, device, handlers)?;
        Ok((Self { id, config, content, function: function.clone() }, (function, servers)))
    }

    /// Looks how large the disk is now, and tells the guest if that has changed.
    pub(crate) fn refresh(&self, board: &Board) -> io::Result<DiskInfo> {
        let (size, read_only) = match &self.content {
            Content::File(disk) => {
                let before = disk.size();
                let size = disk.refresh_size()?;
                if size != before {
                    board
                        .access_function(&*self.function, |function, access| function.config_changed(access));
                }
                (size, self.config.read_only)
            }
            Content::VhostUser { size, writable } => (*size, !writable),
        };
        let (id, path) = (self.id.clone(), self.config.path.clone());
        Ok(DiskInfo { id, path, size, read_only })
    }
}

/// A block device over a disk, with what serves its queues.
fn block(
    config: &DiskConfig,
    disk: Arc<dyn Disk>,
    usual_queues: u16,
) -> (Box<dyn Device>, Vec<Box<dyn Handler>>) {
    let queues = config.queues.unwrap_or(usual_queues);
    let mut block = Block::new(disk, config.serial.as_deref().unwrap_or_default(), queues);
    if config.iops.is_some() || config.bps.is_some() {
        block = block.with_limits(Limits::new(config.iops, config.bps));
    }
    if config.pause_on_error {
        block = block.on_error(OnError::Hold);
    }
    if config.split_rings {
        block = block.with_split_rings();
    }
    let handlers = (0..queues).map(|_| Box::new(block.handler()) as _).collect();
    (Box::new(block), handlers)
}
