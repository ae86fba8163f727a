//! What the host says about itself.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use serde::Serialize;

/// The number of KVM's only API since 2007.
const KVM_API_VERSION: i32 = 12;
/// `_IO(0xae, 0)`: KVM_GET_API_VERSION.
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;

/// Bytes of RAM of the host.
pub fn host_memory() -> u64 {
    let read = || {
        let text = fs::read_to_string("/proc/meminfo").ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    };
    // A host that does not say refuses later what it cannot do.
    read().unwrap_or(u64::MAX)
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

/// What /dev/kvm is like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum KvmState {
    /// There is none.
    Missing,
    /// It may not be opened.
    Denied,
    /// It cannot be used.
    Broken {
        /// Why.
        error: String,
    },
    /// It answers.
    Present {
        /// The version of its API; 12 is the one that everybody has.
        api_version: i32,
    },
}

impl KvmState {
    /// Asks the host.
    pub fn detect() -> Self {
        let file = match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Self::Missing,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Self::Denied,
            Err(error) => return Self::Broken { error: error.to_string() },
        };
        // SAFETY: the request takes no argument and touches no memory of this process.
        let version = unsafe { libc::ioctl(file.as_raw_fd(), KVM_GET_API_VERSION, 0) };
        if version < 0 {
            return Self::Broken { error: io::Error::last_os_error().to_string() };
        }
        Self::Present { api_version: version }
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        match self {
            Self::Missing => "/dev/kvm does not exist".into(),
            Self::Denied => "/dev/kvm exists, but this user may not open it (group kvm?)".into(),
            Self::Broken { error } => format!("/dev/kvm does not answer: {error}"),
            Self::Present { api_version: KVM_API_VERSION } => "/dev/kvm works".into(),
            Self::Present { api_version } => format!("/dev/kvm has an unknown API version {api_version}"),
        }
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
        assert!(!KvmState::detect().describe().is_empty());
    }
}
