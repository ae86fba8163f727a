//! The contract between a machine and the engine that runs its CPUs.
//!
//! An engine calls the machine, not the other way round: [`Vcpu::run`] takes the [`Bus`] and returns only when the
//! vCPU has to stop. Port and memory-mapped accesses, interrupt acknowledgement and local APIC registers are calls on
//! the bus; under the translator plain function calls, under KVM made by its exit loop.

pub mod apics;
pub mod bus;
pub mod clock;
pub mod counters;
pub mod cpuid;
pub mod dirty;
pub mod doorbell;
pub mod halt_poll;

use std::sync::Arc;

pub use apics::{LocalApics, Message, MessageSource};
pub use bus::{Bus, MsrFault};
pub use clock::{Clock, TscMeasurement, host_tsc};
pub use counters::Counters;
pub use cpuid::{CpuidEntry, CpuidTable};
pub use dirty::{DirtyLog, WriteLog};
pub use doorbell::{Doorbell, DoorbellReader, DoorbellTable, DoorbellValue, Doorbells, IoAddress};
pub use halt_poll::HaltPoll;
use ruse_arch::VcpuState;
use ruse_memory::GuestRam;

/// Why an engine could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The host lacks something that the engine needs.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
    /// The state given is one that no CPU of this engine can be in.
    #[error("the vCPU cannot take this state: {0}")]
    State(String),
    /// The guest cannot be run on.
    #[error("{0}")]
    Guest(String),
    /// The executors of the engine disagree (check mode).
    #[error("the executors disagree: {0}")]
    Mismatch(String),
}

/// What an engine can do on this host.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Capabilities {
    /// The most vCPUs of one VM.
    pub max_vcpus: u32,
    /// The engine has the local APICs itself and takes message-signalled interrupts.
    pub has_local_apics: bool,
}

/// Makes VMs.
pub trait Engine: Send + Sync {
    /// The name that `--accel` takes.
    fn name(&self) -> &'static str;
    /// What the engine can do on this host.
    fn capabilities(&self) -> Capabilities;
    /// All CPUID features that the engine can give a guest.
    fn supported_cpuid(&self) -> CpuidTable;
    /// Creates a VM over `ram`; guest time follows `clock`.
    fn create_vm(&self, ram: GuestRam, clock: Arc<Clock>) -> Result<Arc<dyn Vm>, EngineError>;
}

/// One virtual machine's CPUs and memory slots.
pub trait Vm: Send + Sync {
    /// Creates vCPU `id` (its index and APIC id), in the state after power-up.
    fn create_vcpu(&self, id: u32, cpuid: CpuidTable) -> Result<Box<dyn Vcpu>, EngineError>;
    /// The local APICs, if the engine has them ([`Capabilities::has_local_apics`]).
    fn local_apics(&self) -> Option<&dyn LocalApics> {
        None
    }
    /// Writes that signal an eventfd instead of a call of the bus.
    fn doorbells(&self) -> &dyn Doorbells;
    /// The engine's part of the dirty log, for [`DirtyLog`].
    fn write_log(&self) -> &dyn WriteLog;
    /// Writes to `len` bytes from `at` on may wait: they reach the bus in their order, before the next access that any vCPU
    /// makes there, but the vCPU named may be another. An engine for which they cost nothing more than others does nothing.
    fn coalesce_writes(&self, at: IoAddress, len: u32) {
        let _ = (at, len);
    }
}

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halt {
    /// [`VcpuHandle::kick`] was called.
    Kicked,
    /// The guest made a triple fault (SDM volume 3, 6.15, interrupt 8).
    TripleFault,
}

/// A virtual CPU, owned by the thread that runs it.
pub trait Vcpu: Send {
    /// Runs guest code until the vCPU has to stop. HLT and the wait for a start-up IPI block inside.
    fn run(&mut self, bus: &dyn Bus) -> Result<Halt, EngineError>;
    /// A handle by which other threads reach the vCPU.
    fn handle(&self) -> Arc<dyn VcpuHandle>;
    /// The whole architectural state.
    fn state(&mut self) -> Result<VcpuState, EngineError>;
    /// Replaces the whole architectural state.
    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError>;
    /// The machine was held for a while: the guest's watchdogs are told, where it has asked for that.
    fn held(&mut self) {}
    /// Counters of the engine, for diagnosis.
    fn counters(&self) -> Counters {
        Counters::default()
    }
}

/// Reaches a vCPU from any thread. No call blocks.
pub trait VcpuHandle: Send + Sync {
    /// Makes [`Vcpu::run`] return [`Halt::Kicked`] soon; once for each call that finds none pending.
    fn kick(&self);
    /// The answer of [`Bus::interrupt_pending`] may have become `true`: wakes a halted vCPU.
    fn notify_interrupt(&self);
    /// Delivers a non-maskable interrupt.
    fn nmi(&self);
    /// Delivers INIT: the vCPU resets its registers and waits for a start-up IPI (vCPU 0 restarts at the reset vector).
    fn init(&self);
    /// Delivers a start-up IPI: a vCPU that waits for one starts at `vector` << 12 in real mode.
    fn sipi(&self, vector: u8);
    /// Takes back what [`Self::nmi`], [`Self::init`] and [`Self::sipi`] have asked for and the vCPU has not seen yet:
    /// the machine is being reset, and the vCPU does not run.
    fn withdraw(&self) {}
}
