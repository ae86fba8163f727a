//! virtio 1.2: rings, transports and devices.
//!
//! A device has two sides. What the guest's CPUs see is a [`Device`] in a [`Core`] behind a transport ([`VirtioPci`],
//! [`VirtioMmio`]): registers, without threads and host calls. What serves a queue is a [`Handler`] in a thread of the
//! machine: it borrows the queue from the transport ([`Core::begin`]) and gives it back ([`Core::finish`]); only in between
//! does it touch guest memory. A reset that the guest asks for meanwhile is complete when the queue has come back, which
//! the guest sees in the status register.

pub mod balloon;
pub mod block;
mod chain;
pub mod console;
mod core;
mod device;
mod dma;
pub mod entropy;
pub mod features;
pub mod fs;
pub mod listener;
pub mod mem;
mod mmio;
pub mod net;
mod pci;
pub mod pmem;
pub mod ring;
#[cfg(test)]
mod testing;
mod transport;
pub mod vsock;

pub use self::core::{Core, CoreState, Notice, Work};
pub use chain::{Buffer, Chain};
pub use device::{Device, Handler, Identity, Served, serve};
pub use dma::{Dma, GuestSlice};
pub use mmio::{VirtioMmio, VirtioMmioState};
pub use pci::{VirtioPci, VirtioPciState};
pub use transport::Transport;
