//! Assembles a machine from its configuration, and what can be done with it while it runs.

use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use ruse_arch::VcpuState;
use ruse_block::{Disk, DiskError};
use ruse_devices::bus::MapError;
use ruse_devices::lapic::TIMER_HZ;
use ruse_devices::pci::{PciWindows, SlotTaken};
use ruse_devices::post::POST_PORT;
use ruse_devices::rtc::{Rtc, RtcConfig};
use ruse_engine::{Clock, Counters, Engine, EngineError, IoAddress, TscMeasurement, Vcpu, Vm};
use ruse_loader::{AcpiConfig, EntryChoice, Image, LoadError, LoadRequest, Module};
use ruse_memory::{GuestRam, HIGH_RAM_START, LOW_RAM_END, MemoryError};

use crate::board::Board;
use crate::config::{ConfigError, MachineConfig};
use crate::console::Console;
use crate::cpuid::CpuidPlan;
use crate::doctor::ChoiceError;
use crate::host::host_memory;
use crate::io_thread::IoThread;
use crate::lifecycle::{Lifecycle, Phase};
use crate::pci_slots;
use crate::platform::Platform;
use crate::report::{MachineInfo, Outcome};
use crate::threads::{VcpuThread, start_state};
use crate::virtio::{self, AttachedDisk, DiskInfo, PlugError, Server};

/// log2 of how much slower a guest's time goes while both tiers execute it: they take that much longer.
const CHECK_SLOWDOWN: u32 = 6;

/// Bytes of the window for PCI memory above RAM, which is also what it begins at a multiple of.
const PCI_WINDOW: u64 = 64 << 30;
/// Ports for PCI functions.
const PCI_PORTS: RangeInclusive<u64> = 0x1000..=0xffff;

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The configuration is impossible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The engine cannot be had.
    #[error(transparent)]
    Choice(#[from] ChoiceError),
    /// The guest cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The guest's RAM cannot be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Two devices are at one address; a bug.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A disk cannot be had.
    #[error("--disk: {0}")]
    Disk(#[from] DiskError),
    /// Two PCI functions are at one address; a bug.
    #[error(transparent)]
    Slot(#[from] SlotTaken),
    /// The host refused something.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
}

impl MachineError {
    /// Whether the user can mend it by other input; else the host or Ruse is at fault.
    pub fn is_bad_input(&self) -> bool {
        match self {
            Self::Config(_) | Self::Choice(_) | Self::Disk(_) => true,
            Self::Load(error) => !matches!(error, LoadError::Memory(_)),
            Self::Memory(_) | Self::Engine(_) | Self::Map(_) | Self::Slot(_) | Self::Host { .. } => false,
        }
    }

    fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

impl From<PlugError> for MachineError {
    fn from(error: PlugError) -> Self {
        match error {
            PlugError::Slot(slot) => Self::Slot(slot),
            PlugError::Host(source) => Self::Host { what: "cannot make an eventfd", source },
        }
    }
}

/// A guest's files and where they are loaded; serves the start and every reset.
struct Boot {
    kernel: Image,
    modules: Vec<Module>,
    cmdline: String,
    acpi: AcpiConfig,
    ram: GuestRam,
}

impl Boot {
    fn open(config: &MachineConfig, ram: GuestRam) -> Result<Self, LoadError> {
        let modules = match &config.initrd {
            Some(path) => Module::open_list(&path.to_string_lossy())?,
            None => Vec::new(),
        };
        Ok(Self {
            kernel: Image::open(&config.kernel)?,
            modules,
            cmdline: config.cmdline.clone(),
            acpi: acpi_config(config),
            ram,
        })
    }

    fn load(&self) -> Result<VcpuState, LoadError> {
        let request = LoadRequest {
            kernel: &self.kernel,
            modules: &self.modules,
            cmdline: &self.cmdline,
            acpi: Some(&self.acpi),
            entry: EntryChoice::Auto,
        };
        Ok(ruse_loader::load(&request, &self.ram)?.entry)
    }
}

fn acpi_config(config: &MachineConfig) -> AcpiConfig {
    let mut acpi = AcpiConfig::new(config.cpus.count() as u32);
    let end = HIGH_RAM_START + config.memory.saturating_sub(LOW_RAM_END);
    let start = end.next_multiple_of(PCI_WINDOW);
    acpi.mmio64 = Some(start..start + PCI_WINDOW);
    acpi
}

/// Where PCI functions can answer: the windows that ACPI tells of, and ports above those of the platform.
fn pci_windows(acpi: &AcpiConfig) -> PciWindows {
    let all = acpi.mmio32.iter().chain(&acpi.mmio64);
    PciWindows { ports: PCI_PORTS, memory: all.map(|window| window.start..=window.end - 1).collect() }
}

/// A machine with its guest in RAM, but without CPUs.
pub struct Machine {
    config: MachineConfig,
    ram: GuestRam,
    boot: Boot,
    disks: Vec<Arc<dyn Disk>>,
    entry: VcpuState,
    /// Goes on while the guest is loaded.
    tsc: TscMeasurement,
}

impl Machine {
    /// Checks a configuration, makes the RAM and loads the guest.
    pub fn load(config: MachineConfig) -> Result<Self, MachineError> {
        config.validate(host_memory())?;
        let tsc = TscMeasurement::begin();
        // Before RAM, so that a wrong path costs nothing.
        Image::open(&config.kernel)?;
        let disks = AttachedDisk::open_all(&config.disks)?;
        let ram = GuestRam::new(config.memory)?;
        let boot = Boot::open(&config, ram.clone())?;
        let entry = boot.load()?;
        Ok(Self { config, ram, boot, disks, entry, tsc })
    }

    /// Makes the vCPUs with `engine` and starts everything.
    pub fn start(mut self, engine: &dyn Engine, console: Console) -> Result<RunningMachine, MachineError> {
        let (asked, max) = (self.config.cpus.count(), engine.capabilities().max_vcpus);
        if asked > u64::from(max) {
            return Err(ConfigError::TooManyCpus { asked, max }.into());
        }
        let cpus = asked as u32;
        let slow = if self.config.check { CHECK_SLOWDOWN } else { 0 };
        let clock = Arc::new(Clock::start_after(&self.tsc, slow));
        let lifecycle = Arc::new(Lifecycle::new(cpus).map_err(MachineError::host("cannot make an eventfd"))?);
        let windows = pci_windows(&self.boot.acpi);
        let platform = Platform::new(Rtc::new(self.rtc_config()), self.config.debug_exit, windows)?;
        let vm = engine.create_vm(self.ram.clone(), clock.clone())?;
        // A system writes there to wait, not to be heard.
        vm.coalesce_writes(IoAddress::Port(POST_PORT), 1);
        let board = Board::new(cpus, clock.clone(), platform, lifecycle, Some(vm.clone()))
            .map_err(MachineError::host("cannot make a timer"))?;
        let board = Arc::new(board);
        let (disks, servers) = self.plug(&board)?;
        let vcpus = self.create_vcpus(engine, &*vm, cpus, &clock)?;
        board.connect(vcpus.iter().map(|vcpu| vcpu.handle()).collect());
        self.spawn(engine.name(), board, vcpus, console, disks, servers)
    }

    /// Plugs the PCI devices in.
    fn plug(&mut self, board: &Arc<Board>) -> Result<(Vec<AttachedDisk>, Vec<Server>), MachineError> {
        let (intx, config) = (self.boot.acpi.intx, &self.config);
        let gsi = |at| pci_slots::gsi(intx, at);
        let mut servers = virtio::plug_entropy(board, &self.ram, gsi)?;
        let disks = config.disks.iter().cloned().zip(self.disks.drain(..)).collect();
        let (disks, more) = AttachedDisk::plug_all(board, &self.ram, gsi, config.cpus.count() as u32, disks)?;
        servers.extend(more);
        pci_slots::plug_root_ports(board, intx, config.slots)?;
        board.assign_pci();
        Ok((disks, servers))
    }

    fn rtc_config(&self) -> RtcConfig {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let low = self.config.memory.min(LOW_RAM_END);
        RtcConfig {
            unix_seconds: unix.as_secs() as i64,
            low_memory: low,
            high_memory: self.config.memory - low,
        }
    }

    fn create_vcpus(
        &self,
        engine: &dyn Engine,
        vm: &dyn Vm,
        cpus: u32,
        clock: &Clock,
    ) -> Result<Vec<Box<dyn Vcpu>>, MachineError> {
        let config = &self.config;
        let features = config.cpu.features(engine.supported_cpuid());
        let plan = CpuidPlan::new(features, config.cpus, clock.tsc_hz(), TIMER_HZ);
        (0..cpus).map(|id| Ok(vm.create_vcpu(id, plan.table(id))?)).collect()
    }

    /// Starts the threads. If one cannot be started, those that run are ended.
    fn spawn(
        self,
        engine: &'static str,
        board: Arc<Board>,
        vcpus: Vec<Box<dyn Vcpu>>,
        console: Console,
        disks: Vec<AttachedDisk>,
        servers: Vec<Server>,
    ) -> Result<RunningMachine, MachineError> {
        let Self { config, ram, boot, entry, .. } = self;
        let control = Control { board: board.clone(), config: Arc::new(config), engine, disks: disks.into() };
        let mut running = RunningMachine { control, threads: Vec::new() };
        // The files and the protocol are the same as at first, and so is the state.
        let reload = Box::new(move || boot.load().map(drop));
        let io = IoThread::new(board.clone(), ram.clone(), console, reload)
            .map_err(MachineError::host("cannot set up the I/O thread"))?;
        let thread = MachineError::host("cannot start a thread");
        let vcpus: Result<Vec<_>, _> = (0..)
            .zip(vcpus)
            .map(|(id, vcpu)| {
                let start = start_state(id, &entry, board.has_external_apics());
                VcpuThread { id, vcpu, board: board.clone(), ram: ram.clone(), start }.spawn()
            })
            .chain(servers.into_iter().map(Server::spawn))
            .chain([io.spawn()])
            .collect();
        running.threads = vcpus.map_err(thread)?;
        Ok(running)
    }
}

/// A machine whose threads run. Dropping it ends them.
pub struct RunningMachine {
    control: Control,
    threads: Vec<JoinHandle<()>>,
}

impl RunningMachine {
    /// A handle for other threads.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Waits for the end, and until all output is written and all threads have left.
    pub fn wait(mut self) -> Outcome {
        let outcome = self.control.board.lifecycle.wait_outcome();
        for thread in self.threads.drain(..) {
            // A thread that panics reports that itself.
            let _ = thread.join();
        }
        outcome
    }
}

impl Drop for RunningMachine {
    fn drop(&mut self) {
        self.control.stop();
    }
}

/// Reaches a running machine from any thread. No call waits for the guest.
#[derive(Clone)]
pub struct Control {
    board: Arc<Board>,
    config: Arc<MachineConfig>,
    engine: &'static str,
    disks: Arc<[AttachedDisk]>,
}

impl Control {
    /// What the machine was made from.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }
    /// What the machine is doing.
    pub fn phase(&self) -> Phase {
        self.board.lifecycle.phase()
    }
    /// Holds the vCPUs; `false` if the machine has ended.
    pub fn pause(&self) -> bool {
        let goes_on = self.board.lifecycle.pause();
        self.board.kick_all();
        goes_on
    }
    /// Lets the vCPUs run on; `false` if the machine has ended.
    pub fn resume(&self) -> bool {
        self.board.lifecycle.resume()
    }
    /// Resets the machine.
    pub fn reset(&self) {
        self.board.lifecycle.reset(None);
        self.board.kick_all();
    }
    /// Asks the guest's system to shut down, as its power button does.
    pub fn press_power_button(&self) {
        self.board.press_power_button();
    }
    /// Ends the machine at once.
    pub fn stop(&self) {
        self.board.lifecycle.end(Outcome::Stopped);
        self.board.kick_all();
    }
    /// When vCPU 0 first entered the guest.
    pub fn first_entry(&self) -> Option<Instant> {
        self.board.lifecycle.first_entry()
    }
    /// Looks how large the disks are now, tells the guest where that has changed, and gives what they are.
    pub fn refresh_disks(&self) -> io::Result<Vec<DiskInfo>> {
        self.disks.iter().map(|disk| disk.refresh(&self.board)).collect()
    }
    /// What the machine is doing, in detail. Waits a fraction of a second for vCPUs that do not answer.
    pub fn info(&self) -> MachineInfo {
        let vcpus = self.board.lifecycle.reports(|| self.board.kick_all());
        let mut counters = Counters::default();
        vcpus.iter().for_each(|vcpu| counters.add(&vcpu.counters));
        MachineInfo {
            name: self.config.name.clone(),
            phase: self.phase(),
            engine: self.engine,
            memory: self.config.memory,
            uptime_ns: self.board.clock.now_ns(),
            vcpus,
            counters,
        }
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
