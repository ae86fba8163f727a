//! What a machine tells about itself.

use std::borrow::Cow;

use ruse_arch::{MpState, VcpuState};
use ruse_engine::Counters;
use serde::{Deserialize, Serialize};

use crate::dump::CpuDump;
use crate::lifecycle::Phase;

/// How a machine ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The guest switched it off.
    PowerOff,
    /// The guest wrote to the debug-exit port; the code is what the process is to exit with.
    DebugExit(u8),
    /// A vCPU made a triple fault.
    TripleFault {
        /// The vCPU.
        vcpu: u32,
        /// Its state at the fault.
        dump: Box<CpuDump>,
    },
    /// The guest's kernel panicked and asked for a reset.
    GuestPanic {
        /// The line that it printed.
        message: String,
        /// The vCPU that asked for the reset.
        vcpu: u32,
        /// Its state then.
        dump: Option<Box<CpuDump>>,
    },
    /// The user ended it.
    Stopped,
    /// The monitor failed.
    Failed {
        /// What happened.
        what: String,
        /// The vCPU that it happened to.
        vcpu: Option<u32>,
    },
}

/// What a vCPU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activity {
    /// Executes instructions.
    Running,
    /// Waits in HLT for an interrupt.
    Halted,
    /// Waits for a start-up IPI.
    WaitsForStartUp,
    /// Stopped by a triple fault.
    Shutdown,
    /// Not known: it has not answered yet.
    Unknown,
}

/// A vCPU as of a moment ago.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuReport {
    /// Its number.
    pub id: u32,
    /// The monitor holds it.
    pub held: bool,
    /// What it does when it is not held.
    pub activity: Activity,
    /// Its instruction pointer.
    pub rip: Option<u64>,
    /// Counters of the engine.
    pub counters: Counters,
}

impl VcpuReport {
    pub(crate) fn new(id: u32, held: bool, state: Option<&VcpuState>, counters: &Counters) -> Self {
        let activity = match state.map(|s| s.mp_state) {
            Some(MpState::Running) => Activity::Running,
            Some(MpState::Halted) => Activity::Halted,
            Some(MpState::WaitForSipi) => Activity::WaitsForStartUp,
            Some(MpState::Shutdown) => Activity::Shutdown,
            None => Activity::Unknown,
        };
        Self { id, held, activity, rip: state.map(|s| s.rip), counters: counters.clone() }
    }
}

/// A machine as of a moment ago.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineInfo {
    /// Its name.
    pub name: String,
    /// What it is doing.
    pub phase: Phase,
    /// The engine that runs it.
    pub engine: Cow<'static, str>,
    /// RAM in bytes.
    pub memory: u64,
    /// Nanoseconds since its start.
    pub uptime_ns: u64,
    /// Its vCPUs.
    pub vcpus: Vec<VcpuReport>,
    /// The counters of all of them.
    pub counters: Counters,
}
