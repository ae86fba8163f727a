//! What this host offers to a machine, and which engine `auto` takes.

use std::fs;

use rustix::fs::MemfdFlags;
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use crate::config::Accel;
use crate::host::{HostCpu, KvmState, host_memory};

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
    pub kvm: KvmState,
    /// Whether memory for generated code can be made: anonymous files, mapped executable.
    pub executable_memory: Result<(), String>,
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

/// Chooses an engine.
pub fn choose(accel: Accel) -> Result<Choice, ChoiceError> {
    match accel {
        Accel::Kvm => Ok(Choice { engine: Accel::Kvm, reason: "asked for".into() }),
        Accel::Dbt => Ok(Choice { engine: Accel::Dbt, reason: "asked for".into() }),
        Accel::Auto => {
            let kvm = KvmState::detect().describe();
            let reason = format!("the speed of KVM is not measured yet ({kvm})");
            Ok(Choice { engine: Accel::Dbt, reason })
        }
    }
}

impl HostReport {
    /// Looks at this host.
    pub fn collect() -> Self {
        let cpu = HostCpu::detect();
        let missing_features = WANTED.into_iter().filter(|flag| !cpu.has(flag)).collect();
        let auto = choose(Accel::Auto)
            .unwrap_or_else(|error| Choice { engine: Accel::Dbt, reason: error.to_string() });
        Self {
            cpu,
            missing_features,
            memory: host_memory(),
            kvm: KvmState::detect(),
            executable_memory: probe_executable_memory().map_err(|error| error.to_string()),
            limits: Limits::detect(),
            perf_event_paranoid: read_number("/proc/sys/kernel/perf_event_paranoid"),
            auto,
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
        assert_eq!(report.auto.engine, Accel::Dbt);
        assert_eq!(report.executable_memory, Ok(()));
        let json = serde_json::to_value(&report).unwrap();
        assert!(json["auto"]["reason"].is_string() && json["kvm"]["state"].is_string());
    }

    #[test]
    fn what_is_asked_for_is_taken() {
        assert_eq!(choose(Accel::Kvm).unwrap().engine, Accel::Kvm);
        assert_eq!(choose(Accel::Dbt).unwrap().engine, Accel::Dbt);
    }
}
