//! What a type of device has of its own.

use crate::chain::Chain;
use crate::core::Work;
use crate::dma::Dma;
use crate::ring::{Queue, RingError};

/// Most chains that are served before the driver is told and others have their turn.
const BATCH: usize = 16;

/// Who a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Device type (virtio 1.2, 5).
    pub kind: u16,
    /// Class code of a PCI function: 0xBBSSPP.
    pub pci_class: u32,
}

/// The registers' side of a device type.
pub trait Device: Send {
    /// Who it is.
    fn identity(&self) -> Identity;
    /// The features that it offers: those of its type, and usually [`features::COMMON`](crate::features::COMMON).
    fn features(&self) -> u64;
    /// The most entries of each queue.
    fn queues(&self) -> Vec<u16>;
    /// Its configuration space; reads beyond are zero. Writes to it are dropped.
    fn config(&self) -> Vec<u8>;
}

/// The other side: serves one queue.
pub trait Handler: Send {
    /// Serves chains that wait, but not for ever. An error is the driver's: the device needs a reset then.
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError>;
}

/// What came of serving a queue for a while.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// The driver wants an interrupt.
    pub interrupt: bool,
    /// More waits: nobody will be notified of it.
    pub more: bool,
}

/// Serves the chains of a queue one by one. `one` gives how many bytes it has written.
pub fn serve(
    queue: &mut Queue,
    dma: &Dma,
    mut one: impl FnMut(&Chain) -> Result<u32, RingError>,
) -> Result<Served, RingError> {
    queue.disable_notifications(dma)?;
    let mut more = true;
    for _ in 0..BATCH {
        match queue.pop(dma)? {
            Some(chain) => {
                let written = one(&chain)?;
                queue.push(dma, &chain, written)?;
            }
            None => {
                more = queue.enable_notifications(dma)?;
                if !more {
                    break;
                }
            }
        }
    }
    Ok(Served { interrupt: queue.needs_interrupt(dma)?, more })
}
