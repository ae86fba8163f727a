//! The balloon.

use std::sync::Arc;
use std::time::Duration;

use ruse_devices::pci::PciAddress;
use ruse_memory::GuestRam;
use ruse_virtio::balloon::{Balloon, BalloonControl, Statistics};
use serde::{Deserialize, Serialize};

use super::{PlugError, Server, SharedTransport, plug};
use crate::board::Board;
use crate::pci_slots;

/// The balloon of a machine.
pub(crate) struct AttachedBalloon {
    control: BalloonControl,
    function: SharedTransport,
}

/// What is in a machine's balloon, and what the guest tells of its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonInfo {
    /// Bytes that it is to have.
    pub target: u64,
    /// Bytes that it has, as the guest says.
    pub actual: u64,
    /// What the guest has told last of its memory.
    #[serde(default)]
    pub statistics: Statistics,
}

impl AttachedBalloon {
    /// Plugs in a balloon that is to be of so many bytes.
    pub(crate) fn plug(
        board: &Arc<Board>,
        ram: &GuestRam,
        gsi: impl Fn(PciAddress) -> u8,
        bytes: u64,
    ) -> Result<(Self, Vec<Server>), PlugError> {
        let (device, handlers) = Balloon::new(bytes)?;
        let control = device.control();
        let at = PciAddress::new(pci_slots::BALLOON, 0);
        let (function, servers) = plug(board, ram, at, gsi(at), "balloon", Box::new(device), handlers)?;
        Ok((Self { control, function }, servers))
    }

    /// Asks the guest for a balloon of so many bytes.
    pub(crate) fn resize(&self, board: &Board, bytes: u64) {
        if self.control.set_target(bytes) {
            board.access_function(&*self.function, |function, access| function.config_changed(access));
        }
    }

    /// Asks the guest how it is, and waits for its answer no longer than `patience`.
    pub(crate) fn info(&self, patience: Duration) -> BalloonInfo {
        let statistics = self.control.statistics.ask(patience);
        BalloonInfo { target: self.control.target(), actual: self.control.actual(), statistics }
    }
}
