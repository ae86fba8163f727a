//! Device models of the platform: interrupt chips, timers, serial ports, clock chip, PCI host bridge, power registers.
//!
//! Devices never know which engine runs the CPUs.

pub mod device;

pub use device::{Access, Device, Effects, Power};
