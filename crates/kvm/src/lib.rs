//! The engine that runs guest CPUs with hardware assistance: the contract of `ruse-engine` over /dev/kvm.
//!
//! The local APICs are the kernel's (a split irqchip); the I/O APIC, the 8259s, the timers and everything else are the
//! machine's. What the kernel's emulator gives up on, tier 0 of the translator finishes.
//!
//! Ioctls are those of the kernel's Documentation/virt/kvm/api.rst.

mod clock;
mod coalesced;
mod cpuid;
mod doorbells;
mod engine;
mod finish;
mod handle;
mod ioctl;
mod log;
mod mapping;
mod open;
pub mod probe;
mod routes;
mod state;
mod syscall_entry;
mod trial;
mod vcpu;
mod vm;

pub use engine::KvmEngine;
pub use log::LogInterface;
pub use open::OpenError;
