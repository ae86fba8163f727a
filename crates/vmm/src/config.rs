//! What a machine is made of, as plain data: parsed by whoever has the words, validated here, saved as it is.

mod console;
mod disk;
mod kind;
mod mac;
mod memory;
mod net;
mod pmem;
mod seed;
mod share;
mod size;
mod topology;
mod vsock;
mod watchdog;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use console::{ConsoleConfig, ConsoleEnd};
pub use disk::DiskConfig;
pub use kind::MachineKind;
pub use mac::MacAddress;
pub use memory::MemorySize;
pub use net::{HostInterface, NetConfig, NetOption, NetworkConfig, Vhost};
pub use pmem::PmemConfig;
pub use seed::SeedConfig;
pub use share::ShareConfig;
pub use size::{SizeError, format_size, parse_size};
pub use topology::{Topology, TopologyError};
pub use vsock::VsockConfig;
pub use watchdog::WatchdogAction;

use crate::cpuid::CpuModel;

/// Least RAM of a machine in bytes.
pub const MIN_MEMORY: u64 = 16 << 20;
/// Most vCPUs of a machine.
pub const MAX_CPUS: u32 = 64;
/// Most disks of a machine.
pub const MAX_DISKS: usize = 12;
/// Most shared folders of a machine.
pub const MAX_SHARES: usize = 4;
/// Most files in a machine's memory.
pub const MAX_PMEMS: usize = 4;
/// Most network devices of a machine.
pub const MAX_NETS: usize = 2;
/// Most named ports of a machine.
pub const MAX_PORTS: usize = 16;
/// Most PCI slots of a machine.
pub const MAX_SLOTS: u8 = 8;
/// Most bytes of a machine's name.
const MAX_NAME_LEN: usize = 64;
/// RAM of a machine for which nothing is said.
pub const DEFAULT_MEMORY: u64 = 512 << 20;

/// Which engine runs the vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The one that suits this host best.
    #[default]
    Auto,
    /// Hardware assistance through /dev/kvm.
    Kvm,
    /// Dynamic binary translation.
    Dbt,
}

/// When the translator executes user code directly, in a process of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direct {
    /// Where that is faster.
    #[default]
    Auto,
    /// Wherever that is possible.
    Always,
    /// Never.
    Off,
}

impl std::str::FromStr for Direct {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "always" => Ok(Self::Always),
            "off" => Ok(Self::Off),
            _ => Err("expected auto, always or off".into()),
        }
    }
}

impl std::str::FromStr for Accel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "dbt" => Ok(Self::Dbt),
            _ => Err("expected auto, kvm or dbt".into()),
        }
    }
}

/// Where the first serial port leads. The others lead nowhere.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SerialMode {
    /// The standard input and output of the program.
    #[default]
    Stdio,
    /// Nowhere.
    Null,
    /// Output to this file, no input.
    File(PathBuf),
}

impl std::str::FromStr for SerialMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("file=")) {
            ("stdio", _) => Ok(Self::Stdio),
            ("null", _) => Ok(Self::Null),
            (_, Some(path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err("expected stdio, null or file=PATH".into()),
        }
    }
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Name for messages and threads.
    pub name: String,
    /// What it is like.
    pub kind: MachineKind,
    /// RAM in bytes.
    pub memory: u64,
    /// RAM in bytes that there can be later, if that is more.
    pub max_memory: Option<u64>,
    /// vCPUs.
    pub cpus: Topology,
    /// What CPUID tells.
    pub cpu: CpuModel,
    /// The kernel to boot.
    pub kernel: PathBuf,
    /// Its initial RAM disk, or modules as `PATH[ ARGUMENTS][,...]`.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub cmdline: String,
    /// Where COM1 leads.
    pub serial: SerialMode,
    /// Whether there is a debug-exit port.
    pub debug_exit: bool,
    /// Disks, in the order of their names in the guest.
    pub disks: Vec<DiskConfig>,
    /// What cloud-init sets up: one more disk, behind all others.
    pub seed: Option<SeedConfig>,
    /// Files in its memory, in the order of their names in the guest.
    pub pmems: Vec<PmemConfig>,
    /// Bytes of the balloon at first, if there is one.
    pub balloon: Option<u64>,
    /// What a watchdog does that is not answered in time, if there is one.
    pub watchdog: Option<WatchdogAction>,
    /// Virtio consoles and ports.
    pub consoles: Vec<ConsoleConfig>,
    /// Folders of the host's that the guest can mount.
    pub shares: Vec<ShareConfig>,
    /// The socket device.
    pub vsock: Option<VsockConfig>,
    /// Network devices, in the order of their names in the guest.
    pub nets: Vec<NetConfig>,
    /// Empty PCI slots.
    pub slots: u8,
    /// Which engine runs it.
    pub accel: Accel,
    /// Executor of the translator that is forced: 0 interprets, 1 translates.
    pub tier: Option<u8>,
    /// Run both executors of the translator in lock-step and compare.
    pub check: bool,
    /// When the translator executes user code directly.
    pub direct: Direct,
    /// Write names of translated code for `perf report`.
    pub perf_map: bool,
    /// Write translated code for `perf inject --jit` into a file in this directory.
    pub jitdump: Option<PathBuf>,
}

impl MachineConfig {
    /// A machine that boots `kernel`, with the default of everything else.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            name: "ruse".into(),
            kind: MachineKind::default(),
            memory: DEFAULT_MEMORY,
            max_memory: None,
            cpus: Topology::default(),
            cpu: CpuModel::default(),
            kernel: kernel.into(),
            initrd: None,
            cmdline: String::new(),
            serial: SerialMode::default(),
            debug_exit: false,
            disks: Vec::new(),
            seed: None,
            pmems: Vec::new(),
            balloon: None,
            watchdog: None,
            consoles: Vec::new(),
            shares: Vec::new(),
            vsock: None,
            nets: Vec::new(),
            slots: 0,
            accel: Accel::default(),
            tier: None,
            check: false,
            direct: Direct::default(),
            perf_map: false,
            jitdump: None,
        }
    }

    /// Whether a machine can be called so: names are also those of files.
    pub fn is_name(name: &str) -> bool {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        name.len() <= MAX_NAME_LEN
            && name.bytes().all(plain)
            && name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
    }

    /// What a machine of this name is called in networks: letters, digits and hyphens.
    pub fn host_name(name: &str) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        name.chars().map(plain).collect::<String>().trim_matches('-').to_owned()
    }

    /// Says what is impossible about the machine on a host with `host_memory` bytes of RAM.
    pub fn validate(&self, host_memory: u64) -> Result<(), ConfigError> {
        if !Self::is_name(&self.name) {
            return Err(ConfigError::Name);
        }
        self.validate_memory(host_memory)?;
        let cpus = self.cpus.count();
        if cpus == 0 {
            return Err(ConfigError::NoCpus);
        }
        if cpus > u64::from(MAX_CPUS) {
            return Err(ConfigError::TooManyCpus { asked: cpus, max: MAX_CPUS });
        }
        let Topology { sockets, cores, threads } = self.cpus;
        let odd_cores = sockets > 1 && !cores.is_power_of_two();
        let odd_threads = (sockets > 1 || cores > 1) && !threads.is_power_of_two();
        if odd_cores || odd_threads {
            return Err(ConfigError::OddTopology);
        }
        let disks = self.disks.len() + usize::from(self.seed.is_some());
        if disks > MAX_DISKS {
            return Err(ConfigError::TooManyDisks { asked: disks });
        }
        if self.nets.len() > MAX_NETS {
            return Err(ConfigError::TooManyNets { asked: self.nets.len() });
        }
        if self.pmems.len() > MAX_PMEMS {
            return Err(ConfigError::TooManyPmems { asked: self.pmems.len() });
        }
        self.validate_shares()?;
        if self.slots > MAX_SLOTS {
            return Err(ConfigError::TooManySlots { asked: self.slots });
        }
        if let Some(asked) = self.balloon.filter(|asked| *asked >= self.memory) {
            return Err(ConfigError::LargeBalloon { asked });
        }
        self.validate_kind()?;
        self.validate_consoles()?;
        self.validate_translator()
    }

    /// Refuses devices that are on PCI only.
    fn validate_kind(&self) -> Result<(), ConfigError> {
        let only_pci = [("--slots", self.slots > 0), ("--watchdog", self.watchdog.is_some())];
        match only_pci.into_iter().find(|(_, given)| *given) {
            Some((one, _)) if self.kind == MachineKind::Microvm => Err(ConfigError::Contradiction {
                one,
                other: "--machine microvm",
                why: "such a machine has no PCI bus",
            }),
            _ => Ok(()),
        }
    }

    fn validate_consoles(&self) -> Result<(), ConfigError> {
        let mut names: Vec<_> = self.consoles.iter().filter_map(|console| console.name.as_deref()).collect();
        let (ports, consoles) = (names.len(), self.consoles.len() - names.len());
        names.sort_unstable();
        names.dedup();
        if consoles > 1 || names.len() < ports || ports > MAX_PORTS {
            return Err(ConfigError::Consoles);
        }
        match self.has_stdio_console() && self.serial != SerialMode::Null {
            true => Err(ConfigError::Contradiction {
                one: "--console stdio",
                other: "--serial",
                why: "nothing else of the guest is on the terminal or in a file then",
            }),
            false => Ok(()),
        }
    }

    /// Whether the program's standard input and output are the virtio console's.
    pub fn has_stdio_console(&self) -> bool {
        self.consoles.iter().any(ConsoleConfig::is_stdio)
    }

    fn validate_memory(&self, host_memory: u64) -> Result<(), ConfigError> {
        let asked = self.memory;
        if asked < MIN_MEMORY {
            return Err(ConfigError::TooLittleMemory { asked });
        }
        if !asked.is_multiple_of(ruse_memory::PAGE_SIZE) {
            return Err(ConfigError::OddMemory { asked });
        }
        if asked > ruse_memory::MAX_RAM {
            return Err(ConfigError::TooMuchMemory { asked });
        }
        let most = self.max_memory.unwrap_or(asked);
        if most < asked || !(most - asked).is_multiple_of(ruse_memory::BLOCK_SIZE) {
            return Err(ConfigError::OddMaxMemory { asked: most });
        }
        if most > ruse_memory::MAX_RAM {
            return Err(ConfigError::TooMuchMemory { asked: most });
        }
        if most > host_memory {
            return Err(ConfigError::MoreThanHost { asked: most, host: host_memory });
        }
        Ok(())
    }

    /// Bytes of RAM that can be plugged in later, if there are any.
    pub(crate) fn pluggable_memory(&self) -> Option<u64> {
        self.max_memory.map(|most| most - self.memory).filter(|size| *size > 0)
    }

    fn validate_shares(&self) -> Result<(), ConfigError> {
        if self.shares.len() > MAX_SHARES {
            return Err(ConfigError::TooManyShares { asked: self.shares.len() });
        }
        let tags: Vec<_> = self.shares.iter().map(|share| &share.tag).collect();
        match (1..tags.len()).find(|&n| tags[..n].contains(&tags[n])) {
            Some(n) => Err(ConfigError::SameTag { tag: tags[n].clone() }),
            None => Ok(()),
        }
    }

    fn validate_translator(&self) -> Result<(), ConfigError> {
        if self.tier.is_some_and(|tier| tier > 1) {
            return Err(ConfigError::Tier);
        }
        if self.check && self.tier.is_some() {
            return Err(ConfigError::Contradiction {
                one: "--check",
                other: "--tier",
                why: "the check runs both tiers",
            });
        }
        if self.direct != Direct::default() && (self.check || self.tier == Some(0)) {
            return Err(ConfigError::Contradiction {
                one: "--direct",
                other: if self.check { "--check" } else { "--tier 0" },
                why: "nothing is executed directly there",
            });
        }
        match self.translator_option() {
            Some(option) if self.accel == Accel::Kvm => Err(ConfigError::Contradiction {
                one: option,
                other: "--accel kvm",
                why: "it is of the translator",
            }),
            _ => Ok(()),
        }
    }

    /// An option that only the translator has.
    pub(crate) fn translator_option(&self) -> Option<&'static str> {
        let options = [
            ("--tier", self.tier.is_some()),
            ("--check", self.check),
            ("--direct", self.direct != Direct::default()),
            ("--perf-map", self.perf_map),
            ("--jitdump", self.jitdump.is_some()),
        ];
        options.into_iter().find_map(|(name, given)| given.then_some(name))
    }
}

/// What is impossible about a [`MachineConfig`]. Each names the option of the `ruse` program that sets it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A name that is no name.
    #[error("--name: expected 1 to 64 letters, digits and characters of '._-', the first a letter or digit")]
    Name,
    /// Less RAM than any guest can do with.
    #[error("--memory: {} is too little, the least is {}", format_size(*.asked), format_size(MIN_MEMORY))]
    TooLittleMemory {
        /// Bytes asked for.
        asked: u64,
    },
    /// RAM that is not whole pages.
    #[error("--memory: {asked} bytes are not a whole number of 4 KiB pages")]
    OddMemory {
        /// Bytes asked for.
        asked: u64,
    },
    /// RAM that cannot grow so far in whole blocks.
    #[error("--memory: max={} is not a multiple of 2 MiB more than what there is at first", format_size(*.asked))]
    OddMaxMemory {
        /// Bytes asked for.
        asked: u64,
    },
    /// More RAM than guest physical addresses have room for.
    #[error("--memory: {} is too much, the most is {}", format_size(*.asked), format_size(ruse_memory::MAX_RAM))]
    TooMuchMemory {
        /// Bytes asked for.
        asked: u64,
    },
    /// More RAM than the host has.
    #[error("--memory: {} is too much, this host has {}", format_size(*.asked), format_size(*.host))]
    MoreThanHost {
        /// Bytes asked for.
        asked: u64,
        /// Bytes of RAM of the host.
        host: u64,
    },
    /// More RAM and files than guest physical addresses have room for.
    #[error("--memory and --pmem: all of it is too much, the most is {}", format_size(ruse_memory::MAX_RAM))]
    TooMuchInAll,
    /// No vCPU.
    #[error("--cpus: a machine has at least one CPU")]
    NoCpus,
    /// More vCPUs than possible.
    #[error("--cpus: {asked} CPUs are too many, the most is {max}")]
    TooManyCpus {
        /// vCPUs asked for.
        asked: u64,
        /// The most.
        max: u32,
    },
    /// A topology that APIC IDs without gaps cannot express.
    #[error("--cpus: cores of several sockets, and threads of several cores, must be a power of two")]
    OddTopology,
    /// More disks than possible.
    #[error("--disk: {asked} disks are too many, the most is {MAX_DISKS}")]
    TooManyDisks {
        /// Disks asked for.
        asked: usize,
    },
    /// More files in memory than possible.
    #[error("--pmem: {asked} files are too many, the most is {MAX_PMEMS}")]
    TooManyPmems {
        /// Files asked for.
        asked: usize,
    },
    /// More network devices than possible.
    #[error("--net: {asked} network devices are too many, the most is {MAX_NETS}")]
    TooManyNets {
        /// Network devices asked for.
        asked: usize,
    },
    /// A balloon that leaves the guest nothing.
    #[error("--balloon: {} is all of the guest's RAM", format_size(*.asked))]
    LargeBalloon {
        /// Bytes asked for.
        asked: u64,
    },
    /// Consoles or ports that there cannot be.
    #[error("--console: expected at most one without a name, and at most {MAX_PORTS} of different names")]
    Consoles,
    /// More shared folders than possible.
    #[error("--share: {asked} folders are too many, the most is {MAX_SHARES}")]
    TooManyShares {
        /// Folders asked for.
        asked: usize,
    },
    /// Two shared folders have the same name.
    #[error("--share: there are two folders with the tag '{tag}'")]
    SameTag {
        /// The name.
        tag: String,
    },
    /// More PCI slots than possible.
    #[error("--slots: {asked} are too many, the most is {MAX_SLOTS}")]
    TooManySlots {
        /// Slots asked for.
        asked: u8,
    },
    /// A tier that does not exist.
    #[error("--tier: expected 0 or 1")]
    Tier,
    /// Two options that do not go together.
    #[error("{one} and {other} contradict each other: {why}")]
    Contradiction {
        /// An option.
        one: &'static str,
        /// Another.
        other: &'static str,
        /// The reason.
        why: &'static str,
    },
}

#[cfg(test)]
mod tests;
