//! The socket device.

use std::sync::Arc;

use ruse_devices::pci::PciAddress;
use ruse_memory::GuestRam;
use ruse_vhost::OpenDevice;
use ruse_virtio::vsock::Vsock;
use ruse_virtio::{Device, Handler};

use super::{PlugError, Server, plug};
use crate::board::Board;
use crate::config::VsockConfig;
use crate::machine::MachineError;
use crate::pci_slots;

/// A socket device, before there is a machine.
pub(crate) enum Sockets {
    /// It listens already.
    Here { device: Vsock, handlers: Vec<Box<dyn Handler>> },
    /// The host's kernel has the guest's address.
    Kernel(Box<OpenDevice>),
}

impl Sockets {
    /// Makes the socket for the host's programs, or has the kernel do without.
    pub(crate) fn open(config: &VsockConfig) -> Result<Self, MachineError> {
        if config.vhost {
            return Ok(Self::Kernel(Box::new(ruse_vhost::kernel_vsock(config.cid)?)));
        }
        let path = config.path.as_deref().ok_or(MachineError::NoVsockPath)?;
        let (device, handlers) = Vsock::listen(config.cid, path)?;
        Ok(Self::Here { device, handlers })
    }

    /// Plugs the device in.
    pub(crate) fn plug(
        self,
        board: &Arc<Board>,
        ram: &GuestRam,
        gsi: impl Fn(PciAddress) -> u8,
    ) -> Result<Vec<Server>, PlugError> {
        let at = PciAddress::new(pci_slots::VSOCK, 0);
        let (device, handlers): (Box<dyn Device>, _) = match self {
            Self::Here { device, handlers } => (Box::new(device), handlers),
            Self::Kernel(device) => device.plug(ram)?,
        };
        let (_, servers) = plug(board, ram, at, gsi(at), "vsock", device, handlers)?;
        Ok(servers)
    }
}
