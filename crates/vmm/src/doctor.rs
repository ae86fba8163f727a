//! What this host offers to a machine, and which engine `auto` takes.

use std::fs;

use rustix::fs::MemfdFlags;
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use ruse_kvm::KvmEngine;
use ruse_kvm::probe::{Speed, measure};
use ruse_sandbox::Sandbox;

use crate::config::{Accel, MachineConfig};
use crate::host::{HostCpu, host_memory};

/// Features that a guest gets at the x86-64-v3 level, as Linux names them, and what the translator itself uses.
const WANTED: [&str; 20] = [
    "sse4_2",
    "popcnt",
    "cx16",
    "avx",
    "avx2",
    "bmi1",
    "bmi2",
    "fma",
    "f16c",
    "movbe",
    "abm",
    "aes",
    "pclmulqdq",
    "sha_ni",
    "xsave",
    "xsaveopt",
    "rdtscp",
    "rdrand",
    "constant_tsc",
    "nonstop_tsc",
];

/// A report on this host.
#[derive(Clone, Debug, Serialize)]
pub struct HostReport {
    /// The processor.
    pub cpu: HostCpu,
    /// Features that a guest would have if the processor had them.
    pub missing_features: Vec<&'static str>,
    /// Bytes of RAM.
    pub memory: u64,
    /// /dev/kvm.
    pub kvm: KvmReport,
    /// Whether memory for generated code can be made: anonymous files, mapped executable.
    pub executable_memory: Result<(), String>,
    /// Whether user code can be executed directly, in a process of its own.
    pub direct_execution: Result<(), String>,
    /// Limits of this process.
    pub limits: Limits,
    /// Linux's kernel.perf_event_paranoid, if it has the interface.
    pub perf_event_paranoid: Option<i64>,
    /// The engine that `auto` takes.
    pub auto: Choice,
}

/// Limits of this process; `None` is unlimited.
#[derive(Clone, Debug, Serialize)]
pub struct Limits {
    /// Bytes of address space (RLIMIT_AS).
    pub address_space: Option<u64>,
    /// Bytes of locked memory (RLIMIT_MEMLOCK).
    pub locked_memory: Option<u64>,
    /// Open files (RLIMIT_NOFILE).
    pub open_files: Option<u64>,
    /// Mappings (vm.max_map_count).
    pub mappings: Option<u64>,
}

/// An engine and why it was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// The engine; never [`Accel::Auto`].
    pub engine: Accel,
    /// Why, in one line.
    pub reason: String,
}

/// An engine that was asked for by name and cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ChoiceError {
    /// KVM cannot be used here.
    #[error("--accel kvm: {0}")]
    Kvm(#[from] ruse_kvm::OpenError),
}

/// Chooses the engine of a machine. `auto` takes KVM where it is hardware, for which it runs a guest of a few
/// instructions; a KVM that is software itself is slower than the translator by far.
pub fn choose(config: &MachineConfig) -> Choice {
    let asked = |engine| Choice { engine, reason: "asked for".into() };
    match (config.accel, config.translator_option()) {
        (Accel::Kvm, _) => asked(Accel::Kvm),
        (Accel::Dbt, _) => asked(Accel::Dbt),
        (Accel::Auto, Some(option)) => {
            Choice { engine: Accel::Dbt, reason: format!("{option} is of the translator") }
        }
        (Accel::Auto, None) => KvmReport::collect().choice(),
    }
}

/// What /dev/kvm is like.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum KvmReport {
    /// It cannot be used.
    Unusable {
        /// Why, and what can be done.
        reason: String,
    },
    /// It runs guests.
    Usable {
        /// How fast.
        speed: Speed,
        /// It leaves SYSCALL to Ruse to finish.
        finishes_syscalls: bool,
    },
}

impl KvmReport {
    /// Tries it. Takes a millisecond or two on hardware, more on slow ones.
    pub fn collect() -> Self {
        let tried = KvmEngine::open().map_err(|error| error.to_string()).and_then(|engine| {
            let speed = measure(&engine).map_err(|error| format!("KVM fails a trial: {error}"))?;
            Ok(Self::Usable { speed, finishes_syscalls: engine.finishes_syscalls() })
        });
        tried.unwrap_or_else(|reason| Self::Unusable { reason })
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        match self {
            Self::Unusable { reason } => reason.clone(),
            Self::Usable { speed, finishes_syscalls } => {
                let kind = if speed.is_hardware() { "hardware" } else { "software, which is slow" };
                let syscalls = if *finishes_syscalls { "; Ruse finishes its SYSCALLs" } else { "" };
                let millions = |n: u64| n as f64 / 1e6;
                let (instructions, exits) = (millions(speed.instructions), millions(speed.exits));
                format!(
                    "/dev/kvm is {kind}: {instructions:.1} million kernel-mode instructions and {exits:.2} million exits a second{syscalls}"
                )
            }
        }
    }

    /// The engine for a host with this.
    fn choice(&self) -> Choice {
        let engine = match self {
            Self::Usable { speed, .. } if speed.is_hardware() => Accel::Kvm,
            _ => Accel::Dbt,
        };
        Choice { engine, reason: self.describe() }
    }
}

impl HostReport {
    /// Looks at this host.
    pub fn collect() -> Self {
        let cpu = HostCpu::detect();
        let missing_features = WANTED.into_iter().filter(|flag| !cpu.has(flag)).collect();
        let kvm = KvmReport::collect();
        Self {
            cpu,
            missing_features,
            memory: host_memory(),
            auto: kvm.choice(),
            kvm,
            executable_memory: probe_executable_memory().map_err(|error| error.to_string()),
            direct_execution: Sandbox::probe().map_err(|error| error.to_string()),
            limits: Limits::detect(),
            perf_event_paranoid: read_number("/proc/sys/kernel/perf_event_paranoid"),
        }
    }
}

impl Limits {
    fn detect() -> Self {
        let limit = |resource| getrlimit(resource).current;
        Self {
            address_space: limit(Resource::As),
            locked_memory: limit(Resource::Memlock),
            open_files: limit(Resource::Nofile),
            mappings: read_number("/proc/sys/vm/max_map_count").and_then(|n| n.try_into().ok()),
        }
    }
}

fn read_number(path: &str) -> Option<i64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Makes a page of anonymous file and maps it executable, as the translator does for its code.
fn probe_executable_memory() -> Result<(), rustix::io::Errno> {
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    const LEN: usize = 4096;
    let file = rustix::fs::memfd_create("probe", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, LEN as u64)?;
    // SAFETY: a new mapping at an address of the kernel's choice, and the end of just that mapping.
    unsafe {
        let page =
            mmap(std::ptr::null_mut(), LEN, ProtFlags::READ | ProtFlags::EXEC, MapFlags::SHARED, &file, 0)?;
        munmap(page, LEN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_can_be_reported_on() {
        let report = HostReport::collect();
        assert_ne!(report.auto.engine, Accel::Auto);
        assert_eq!(report.executable_memory, Ok(()));
        let json = serde_json::to_value(&report).unwrap();
        assert!(json["auto"]["reason"].is_string() && json["kvm"]["state"].is_string());
    }

    #[test]
    fn auto_takes_kvm_only_where_it_is_hardware() {
        let kvm = |instructions| KvmReport::Usable {
            speed: Speed { exits: 100_000, instructions },
            finishes_syscalls: false,
        };
        assert_eq!(kvm(2_000_000_000).choice().engine, Accel::Kvm);
        let slow = kvm(1_500_000).choice();
        assert_eq!(slow.engine, Accel::Dbt);
        assert!(slow.reason.contains("software"), "{}", slow.reason);
        let none = KvmReport::Unusable { reason: "no".into() }.choice();
        assert_eq!(none, Choice { engine: Accel::Dbt, reason: "no".into() });
    }

    #[test]
    fn what_is_asked_for_is_taken() {
        let with = |accel, check| choose(&MachineConfig { accel, check, ..MachineConfig::new("k") }).engine;
        assert_eq!(with(Accel::Kvm, false), Accel::Kvm);
        assert_eq!(with(Accel::Dbt, false), Accel::Dbt);
        assert_eq!(with(Accel::Auto, true), Accel::Dbt);
    }
}
