//! Device models of the platform: interrupt chips, timers, serial ports, clock chip, PCI host bridge, power registers.
//!
//! Devices never know which engine runs the CPUs.

pub mod device;
pub mod fabric;
pub mod interrupts;
pub mod ioapic;
pub mod lapic;
pub mod pic;
pub mod pit;

pub use device::{Access, Device, Effects, Power};
