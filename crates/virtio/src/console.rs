//! The console device (virtio 1.2, 5.3), as two kinds of device: a [`Console`], whose size the driver finds in the
//! configuration, and named [`Ports`], which a control queue tells of.
//!
//! They are two because the message that tells of a port's size is read differently by older and newer Linux drivers; the
//! configuration is not.

mod control;
mod port;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use crate::device::{Device, Handler, Identity};
use crate::features;
use control::Control;
pub use port::End;
use port::Port;

/// Device type.
const KIND: u16 = 3;
/// A communication controller of no kind that PCI knows.
const PCI_CLASS: u32 = 0x07_80_00;
/// Entries of each queue.
const ENTRIES: u16 = 64;

/// Feature bits (5.3.3).
mod feature {
    pub const SIZE: u64 = 1 << 0;
    pub const MULTIPORT: u64 = 1 << 1;
}

/// Columns and rows of a console, which may change at any time. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct ConsoleSize(Arc<AtomicU32>);

impl ConsoleSize {
    /// Changes the size; says whether it was another.
    pub fn set(&self, columns: u16, rows: u16) -> bool {
        let size = u32::from(rows) << 16 | u32::from(columns);
        self.0.swap(size, Ordering::AcqRel) != size
    }
}

/// The registers' side of a console.
#[derive(Clone, Debug)]
pub struct Console {
    size: ConsoleSize,
}

impl Console {
    /// A console that leads to `end`, with the handlers of its queues.
    pub fn new(size: ConsoleSize, end: End) -> io::Result<(Self, Vec<Box<dyn Handler>>)> {
        let (receive, transmit) = Port::handlers(Port::new(end, None)?);
        Ok((Self { size }, vec![receive, transmit]))
    }
}

impl Device for Console {
    fn identity(&self) -> Identity {
        Identity { kind: KIND, pci_class: PCI_CLASS }
    }
    fn features(&self) -> u64 {
        features::COMMON | feature::SIZE
    }
    fn queues(&self) -> Vec<u16> {
        vec![ENTRIES; 2]
    }
    fn config(&self) -> Vec<u8> {
        config(self.size.0.load(Ordering::Acquire), 1)
    }
}

/// The registers' side of ports.
#[derive(Clone, Copy, Debug)]
pub struct Ports {
    count: u16,
}

impl Ports {
    /// Ports of these names (at least one), with the handlers of their queues.
    pub fn new(ports: Vec<(String, End)>) -> io::Result<(Self, Vec<Box<dyn Handler>>)> {
        let names = ports.iter().map(|(name, _)| name.clone()).collect();
        let control = Arc::new(Mutex::new(Control::new(names)?));
        let (mut handlers, mut all) = (Vec::new(), Vec::new());
        for (number, (_, end)) in (0..).zip(ports) {
            let port = Port::new(end, Some((number, control.clone())))?;
            all.push(port.clone());
            let (receive, transmit) = Port::handlers(port);
            handlers.extend([receive, transmit]);
        }
        // Those of the control queue follow the first port's (5.3.2).
        handlers.splice(2..2, Control::handlers(control, all)?);
        Ok((Self { count: (handlers.len() / 2 - 1) as u16 }, handlers))
    }
}

impl Device for Ports {
    fn identity(&self) -> Identity {
        Identity { kind: KIND, pci_class: PCI_CLASS }
    }
    fn features(&self) -> u64 {
        features::COMMON | feature::MULTIPORT
    }
    fn queues(&self) -> Vec<u16> {
        vec![ENTRIES; 2 * usize::from(self.count) + 2]
    }
    fn config(&self) -> Vec<u8> {
        config(0, self.count.into())
    }
}

/// The configuration (5.3.4), without an emergency write.
fn config(size: u32, ports: u32) -> Vec<u8> {
    [size.to_le_bytes(), ports.to_le_bytes(), [0; 4]].concat()
}
