//! What a type of device has of its own.

use std::os::fd::BorrowedFd;

use crate::chain::Chain;
use crate::core::Work;
use crate::dma::Dma;
use crate::ring::{Queue, RingError};

/// Most chains that are served before the driver is told and others have their turn.
pub(crate) const BATCH: usize = 16;

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
    /// Its configuration space; reads beyond are zero.
    fn config(&self) -> Vec<u8>;
    /// The driver writes to the configuration space. Most types have nothing there that it could write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Which of the device's threads serves queue `index`: usually each queue has one of its own.
    fn thread(&self, index: u16) -> u16 {
        index
    }
}

/// The other side: serves one queue.
pub trait Handler: Send {
    /// Serves chains that wait, but not for ever. An error is the driver's: the device needs a reset then.
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError>;

    /// A file that becomes readable when there is work of which the driver gives no notice, as a packet from outside is.
    /// `None` while there is nothing to wait for, as when the driver has to give buffers first.
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The queue cannot be served for now: no driver has it running. The device has been reset `resets` times
    /// ([`Work::resets`]). Afterwards nobody outside touches its buffers ([`Served::outside`]), and what was not answered is
    /// forgotten.
    fn idle(&mut self, _resets: u64) {}

    /// Whether the device's configuration has changed since it was last asked, of which the driver is told then.
    fn take_config_change(&mut self) -> bool {
        false
    }

    /// The machine is held: afterwards nobody outside touches buffers of the queue, and what was not answered is in the queue
    /// again ([`Queue::put_back`]). It goes on with the next call of [`Handler::serve`], of this handler or of another one.
    fn recall(&mut self, _work: &mut Work, _dma: &Dma) -> Result<Served, RingError> {
        Ok(Served::default())
    }

    /// What has failed since it was last asked, if the machine is to be held because of it.
    fn take_fault(&mut self) -> Option<String> {
        None
    }
}

/// What came of serving a queue for a while.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// The driver wants an interrupt.
    pub interrupt: bool,
    /// More waits: nobody will be notified of it.
    pub more: bool,
    /// Somebody outside this process may touch buffers of the queue until [`Handler::idle`] or [`Handler::recall`]. A reset
    /// is not complete before that.
    pub outside: bool,
}

/// Serves the chains of a queue one by one. `one` gives how many bytes it has written.
pub fn serve(
    queue: &mut Queue,
    dma: &Dma,
    mut one: impl FnMut(&Chain) -> Result<u32, RingError>,
) -> Result<Served, RingError> {
    serve_while(queue, dma, &mut (), |()| true, |(), chain| one(chain)).map(|(served, _)| served)
}

/// The same as long as `state` is `ready` for a chain. Says also whether it was, but the driver has to give chains first;
/// it notifies when it has.
pub(crate) fn serve_while<S: ?Sized>(
    queue: &mut Queue,
    dma: &Dma,
    state: &mut S,
    mut ready: impl FnMut(&mut S) -> bool,
    mut one: impl FnMut(&mut S, &Chain) -> Result<u32, RingError>,
) -> Result<(Served, bool), RingError> {
    queue.disable_notifications(dma)?;
    let (mut more, mut starved) = (true, false);
    for _ in 0..BATCH {
        if !ready(state) {
            more = false;
            break;
        }
        match queue.pop(dma)? {
            Some(chain) => {
                let written = one(state, &chain)?;
                queue.push(dma, &chain, written)?;
            }
            None if queue.enable_notifications(dma)? => {}
            None => {
                (more, starved) = (false, true);
                break;
            }
        }
    }
    Ok((Served { interrupt: queue.needs_interrupt(dma)?, more, ..Served::default() }, starved))
}
