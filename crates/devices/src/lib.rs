//! Device models of the platform: interrupt chips, timers, serial ports, clock chip, PCI host bridge, power registers.
//!
//! Devices never know which engine runs the CPUs.

pub mod bus;
pub mod debug_exit;
pub mod device;
pub mod fabric;
#[cfg(test)]
mod harness;
pub mod i8042;
pub mod interrupts;
pub mod ioapic;
mod lanes;
pub mod lapic;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod pm;
pub mod post;
pub mod pvpanic;
pub mod reset;
pub mod rtc;
pub mod serial;
pub mod watchdog;

pub use device::{Access, Device, Effects, Power, Ring};
