//! What the host says about itself.

mod runtime;

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

pub use runtime::runtime_dir;
use serde::Serialize;

/// Bytes of RAM of the host.
pub fn host_memory() -> u64 {
    let host = rustix::system::sysinfo();
    host.totalram.saturating_mul(host.mem_unit.into())
}

/// The host's processor, after /proc/cpuinfo.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HostCpu {
    /// Vendor as CPUID tells it.
    pub vendor: String,
    /// Name.
    pub model: String,
    /// CPUs that this process may use.
    pub count: usize,
    /// Features, as Linux names them.
    #[serde(skip)]
    pub flags: Vec<String>,
}

impl HostCpu {
    /// Asks the host.
    pub fn detect() -> Self {
        let count = std::thread::available_parallelism().map_or(1, |n| n.get());
        Self { count, ..Self::parse(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()) }
    }

    /// Reads the first processor of /proc/cpuinfo's text.
    fn parse(text: &str) -> Self {
        let field = |name: &str| {
            let mut lines = text.lines().filter_map(|line| line.split_once(':'));
            lines
                .find(|(key, _)| key.trim() == name)
                .map(|(_, value)| value.trim().to_owned())
                .unwrap_or_default()
        };
        Self {
            vendor: field("vendor_id"),
            model: field("model name"),
            count: 1,
            flags: field("flags").split_whitespace().map(str::to_owned).collect(),
        }
    }

    /// Whether Linux names this feature.
    pub fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|f| f == flag)
    }
}

/// Lets this process have as many files open as it can: a guest's connections and shared folders need one each.
pub(crate) fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::debug!(%error, "the limit of open files stays");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpuinfo_is_read() {
        let text = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: A: B\nflags\t\t: fpu avx2\n\n\
                    processor\t: 1\nflags\t\t: other\n";
        let cpu = HostCpu::parse(text);
        assert_eq!((&*cpu.vendor, &*cpu.model), ("GenuineIntel", "A: B"));
        assert!(cpu.has("avx2") && !cpu.has("avx") && !cpu.has("other"));
        assert_eq!(HostCpu::parse("").vendor, "");
    }

    #[test]
    fn this_host_answers() {
        assert!(host_memory() > 1 << 20);
        assert!(HostCpu::detect().count > 0);
    }
}
