//! Memory that is plugged in while the machine runs.

use std::sync::Arc;

use ruse_devices::pci::PciAddress;
use ruse_memory::{BLOCK_SIZE, GuestRam};
use ruse_virtio::mem::{Mem, MemControl};
use serde::{Deserialize, Serialize};

use super::{PlugError, Server, SharedTransport, plug};
use crate::board::Board;
use crate::config::format_size;
use crate::pci_slots;

/// The pluggable memory of a machine.
pub(crate) struct AttachedMem {
    control: MemControl,
    function: SharedTransport,
    /// Bytes of RAM that are there from the beginning, and that there can be.
    least: u64,
    most: u64,
}

/// How much RAM a machine has that can have more or less.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryInfo {
    /// Bytes that it has.
    pub size: u64,
    /// Bytes that it is to have, when its system has done its part.
    pub requested: u64,
    /// Bytes that it can have at most.
    pub max: u64,
}

/// Why a machine cannot have so much RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResizeMemoryError {
    /// It has what it has.
    #[error("its RAM stays as it is: it was started without --memory SIZE,max=SIZE")]
    Fixed,
    /// Too little or too much.
    #[error("{} is not from {} to {}", format_size(*.asked), format_size(*.least), format_size(*.most))]
    Range {
        /// Bytes asked for.
        asked: u64,
        /// What it has at least.
        least: u64,
        /// What it can have at most.
        most: u64,
    },
    /// A part of a block.
    #[error("{asked} bytes are not a multiple of 2 MiB more than {}", format_size(*.least))]
    Odd {
        /// Bytes asked for.
        asked: u64,
        /// What it has at least.
        least: u64,
    },
}

impl AttachedMem {
    /// Plugs in the device for the pluggable region of RAM, beside `least` bytes that are there.
    pub(crate) fn plug(
        board: &Arc<Board>,
        ram: &GuestRam,
        gsi: impl Fn(PciAddress) -> u8,
        (start, size): (u64, u64),
        least: u64,
    ) -> Result<(Self, Vec<Server>), PlugError> {
        let (device, handlers) = Mem::new(start, size);
        let control = device.control();
        let at = PciAddress::new(pci_slots::SMALL, pci_slots::MEM);
        let (function, servers) = plug(board, ram, at, gsi(at), "mem", Box::new(device), handlers)?;
        Ok((Self { control, function, least, most: least + size }, servers))
    }

    /// Asks the guest to have so many bytes of RAM.
    pub(crate) fn resize(&self, board: &Board, asked: u64) -> Result<(), ResizeMemoryError> {
        let Self { least, most, .. } = *self;
        let more = asked.checked_sub(least).filter(|_| asked <= most);
        let more = more.ok_or(ResizeMemoryError::Range { asked, least, most })?;
        if !more.is_multiple_of(BLOCK_SIZE) {
            return Err(ResizeMemoryError::Odd { asked, least });
        }
        if self.control.request(more) {
            board.access_function(&*self.function, |function, access| function.config_changed(access));
        }
        Ok(())
    }

    pub(crate) fn info(&self) -> MemoryInfo {
        let [size, requested] =
            [self.control.plugged(), self.control.requested()].map(|bytes| self.least + bytes);
        MemoryInfo { size, requested, max: self.most }
    }

    /// The machine is reset: what its old system had plugged in is gone.
    pub(crate) fn unplug_all(&self, ram: &GuestRam) {
        if let Err(error) = self.control.unplug_all(ram) {
            tracing::warn!(%error, "memory is not given back");
        }
    }
}
