//! Virtio devices whose rings somebody else serves: a vhost-user process behind a Unix socket, or the host's kernel
//! (/dev/vhost-net, /dev/vhost-vsock).
//!
//! The guest's rings are not given away. A relay for each queue takes chains from the guest's ring and makes them
//! available in a ring of its own, in memory that it shares with the backend; the backend reads and writes the buffers
//! where they are, in the guest's RAM. So Ruse sees each chain that comes back before the guest does, and can say that its
//! buffers were written, which the translator and the dirty log have to know; it keeps what a backend that has ended did
//! not answer, for the next one; and a backend needs neither packed rings nor event indices for a guest that has them.

mod backend;
mod device;
mod kernel;
mod relay;
mod shadow;
#[cfg(test)]
mod tests;
mod user;

pub use backend::{Backend, BackendError, Region, RingSetup};
pub use device::{Kind, OpenDevice, Parts, VhostDevice};
pub use kernel::{KernelError, has_vhost_net, net as kernel_net, vsock as kernel_vsock};
pub use user::{Peer, VhostUserError, block, fs, net};
