//! What serves a device does with its registers, whatever transport they belong to.

use ruse_devices::{Access, Effects};

use crate::core::{Core, Work};
use crate::device::Served;
use crate::ring::RingError;

/// A device behind some transport.
pub trait Transport: Send {
    /// What all transports have registers for.
    fn core(&self) -> &Core;
    /// The same, to be changed: what that makes known is passed on by [`Transport::settle`].
    fn core_mut(&mut self) -> &mut Core;
    /// Passes on what the core has to say, by interrupts and doorbells.
    fn settle(&mut self, effects: &mut Effects);

    /// Lends a queue to its handler ([`Core::begin`]).
    fn begin(&mut self, queue: u16) -> Option<Work> {
        self.core_mut().begin(queue)
    }

    /// Takes a queue back ([`Core::finish`]).
    fn finish(&mut self, access: &mut Access, work: Work, result: Result<Served, RingError>) -> bool {
        let more = self.core_mut().finish(work, result);
        self.settle(access.effects);
        more
    }

    /// Nobody outside touches buffers of a queue any more ([`Core::recalled`]).
    fn recalled(&mut self, access: &mut Access, queue: u16) {
        self.core_mut().recalled(queue);
        self.settle(access.effects);
    }

    /// The device's configuration has changed.
    fn config_changed(&mut self, access: &mut Access) {
        self.core_mut().config_changed();
        self.settle(access.effects);
    }

    /// How often the device has been reset.
    fn resets(&self) -> u64 {
        self.core().resets()
    }

    /// Whether a queue is lent, or its buffers are.
    fn is_busy(&self) -> bool {
        self.core().is_busy()
    }
}
