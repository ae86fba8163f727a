//! Message-signalled interrupts, and the local APICs of engines that have them.

use std::os::fd::OwnedFd;

use crate::EngineError;

/// A message-signalled interrupt: a write of `data` to `address` (SDM volume 3, 10.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Message {
    /// Address of the write.
    pub address: u64,
    /// Data of the write.
    pub data: u32,
}

/// The local APICs of a VM, where the engine has them. No call waits for a vCPU.
///
/// Where the engine has none, they are the machine's, and so is everything that sends them messages.
pub trait LocalApics: Send + Sync {
    /// Delivers a message.
    fn deliver(&self, message: Message);
    /// Says what the pins of the I/O APIC send, by pin; `None` for those that send nothing. The end of an interrupt of
    /// theirs that is level-triggered comes back as [`Bus::end_of_interrupt`](crate::Bus::end_of_interrupt).
    fn set_pins(&self, pins: &[Option<Message>]);
    /// Makes `event`, an eventfd, a source of messages, masked at first. Nobody else reads the eventfd while it is not
    /// masked.
    fn connect(&self, event: OwnedFd) -> Result<Box<dyn MessageSource>, EngineError>;
}

/// An eventfd whose signals deliver a message. When this is dropped, they do so no longer.
pub trait MessageSource: Send + Sync {
    /// Sets what a signal delivers; `None` masks it. Signals wait in the eventfd while it is masked, and together deliver
    /// one message when it no longer is (PCI 3.0, 6.8.2.10).
    fn set(&self, message: Option<Message>) -> Result<(), EngineError>;
}
