//! The engine that runs guest CPUs by dynamic binary translation: nothing but an ordinary Linux process is needed.
//!
//! Two executors share one vCPU block ([`cpu::Cpu`]) and one software MMU ([`mmu`]): [`tier0`] executes single
//! instructions, all of them; the translator makes host code of the frequent ones.

pub mod backend;
pub mod code_memory;
pub mod counters;
pub mod cpu;
pub mod cpuid;
pub mod direct;
pub mod frontend;
pub mod ir;
pub mod mmu;
pub mod paravirt;
pub mod runtime;
pub mod single;
pub mod tier0;

pub use direct::DirectMode;
pub use runtime::{
    engine::{DbtEngine, DbtOptions},
    profile::ProfileOptions,
};
