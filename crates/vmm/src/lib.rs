//! Assembles a machine from a configuration and runs it: one thread for each vCPU and one for input and output.
//!
//! [`Machine::load`] checks a [`MachineConfig`], makes RAM and puts the guest there; [`Machine::start`] makes vCPUs with
//! an engine ([`engine_for`]) and starts the threads; [`RunningMachine::wait`] gives the [`Outcome`]. Meanwhile
//! [`Control`] reaches the machine from any thread.

mod address_plan;
mod alarm;
mod bells;
mod board;
mod bus;
pub mod config;
pub mod console;
mod console_pump;
mod cpuid;
pub mod doctor;
mod dump;
mod engines;
#[cfg(test)]
mod fake;
pub mod host;
mod io_thread;
mod lifecycle;
mod machine;
mod mmio_slots;
mod panic_watch;
mod pci_slots;
mod platform;
pub mod report;
mod seed;
mod threads;
mod virtio;
mod wires;

pub use config::{
    Accel, ConfigError, ConsoleConfig, Direct, DiskConfig, MachineConfig, MachineKind, MemorySize, NetConfig,
    NetOption, NetworkConfig, PmemConfig, SeedConfig, SerialMode, ShareConfig, Topology, VsockConfig,
    WatchdogAction,
};
pub use console::{Console, ConsoleInput, ConsoleOutput};
pub use cpuid::CpuModel;
pub use dump::CpuDump;
pub use engines::engine_for;
pub use lifecycle::Phase;
pub use machine::{Control, Machine, MachineError, RunningMachine};
pub use report::{MachineInfo, Outcome, VcpuReport};
pub use seed::SeedError;
pub use virtio::{
    AttachError, BalloonInfo, ConsoleError, DetachError, DeviceConfig, DiskInfo, MemoryInfo, NetError,
    NetInfo, PmemError, ResizeMemoryError,
};
