//! Shared folders: file system devices.

use std::sync::Arc;

use ruse_devices::pci::PciAddress;
use ruse_memory::GuestRam;
use ruse_vhost::{OpenDevice, Peer, VhostUserError};
use ruse_virtio::Device;
use ruse_virtio::fs::{FileSystem, Server as FolderServer, ShareError};

use super::{PlugError, Server, plug};
use crate::board::Board;
use crate::config::ShareConfig;
use crate::pci_slots;

/// Why a folder cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum OpenShareError {
    /// The folder.
    #[error(transparent)]
    Folder(#[from] ShareError),
    /// Another process that serves it.
    #[error(transparent)]
    VhostUser(#[from] VhostUserError),
}

/// A folder that is not plugged in yet.
pub(crate) enum OpenShare {
    /// This process serves it.
    Here(FileSystem),
    /// Another process does.
    VhostUser(Box<OpenDevice>),
}

/// Opens the folders.
pub(crate) fn open_all(configs: &[ShareConfig]) -> Result<Vec<OpenShare>, OpenShareError> {
    let open = |config: &ShareConfig| {
        Ok(match config.vhost_user {
            true => OpenShare::VhostUser(Box::new(ruse_vhost::fs(&Peer::new(&config.path), &config.tag)?)),
            false => {
                let server = FolderServer::new(&config.path, config.options())?;
                OpenShare::Here(FileSystem::new(&config.tag, server))
            }
        })
    };
    configs.iter().map(open).collect()
}

/// Plugs shared folders in, each at the address of its number.
pub(crate) fn plug_all(
    board: &Arc<Board>,
    ram: &GuestRam,
    gsi: impl Fn(PciAddress) -> u8,
    shares: Vec<OpenShare>,
) -> Result<Vec<Server>, PlugError> {
    let mut all = Vec::new();
    for (slot, share) in pci_slots::SHARES.zip(shares) {
        let at = PciAddress::new(slot, 0);
        let name = format!("share{}", slot - pci_slots::SHARES.start);
        let (device, handlers): (Box<dyn Device>, _) = match share {
            OpenShare::Here(share) => {
                let handlers = share.handlers();
                (Box::new(share), handlers)
            }
            OpenShare::VhostUser(device) => device.plug(ram)?,
        };
        let (_, servers) = plug(board, ram, at, gsi(at), &name, device, handlers)?;
        all.extend(servers);
    }
    Ok(all)
}
