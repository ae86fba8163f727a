//! The state of a local APIC in architectural terms (SDM volume 3, chapter 10).

use serde::{Deserialize, Serialize};

/// A local APIC's state: the register page and what it does not show.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicState {
    /// The register page: entry n is the register at offset 16 × n.
    pub regs: Vec<u32>,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// IA32_TSC_DEADLINE.
    pub tsc_deadline: u64,
    /// When the timer is due, in nanoseconds since the machine's start.
    pub timer_expiry: Option<u64>,
    /// Errors since the last write to the ESR.
    pub esr_pending: u32,
    /// Levels of LINT0 and LINT1.
    pub lint: [bool; 2],
}
