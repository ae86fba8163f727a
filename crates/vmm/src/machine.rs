//! Assembles a machine from its configuration, and what can be done with it while it runs.

use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ruse_arch::VcpuState;
use ruse_devices::bus::MapError;
use ruse_devices::lapic::TIMER_HZ;
use ruse_devices::pci::{PciAddress, PciWindows, SlotTaken};
use ruse_devices::post::POST_PORT;
use ruse_devices::rtc::{Rtc, RtcConfig};
use ruse_devices::watchdog::Watchdog;
use ruse_engine::{Clock, Counters, Engine, EngineError, IoAddress, TscMeasurement, Vcpu, Vm};
use ruse_loader::{AcpiConfig, EntryChoice, Image, LoadError, LoadRequest, Module};
use ruse_memory::{GuestRam, LOW_RAM_END, MemoryError};
use ruse_vhost::KernelError;
use ruse_virtio::listener::ListenError;

use crate::address_plan::AddressPlan;
use crate::board::Board;
use crate::config::{ConfigError, DiskConfig, MachineConfig, MachineKind};
use crate::console::Console;
use crate::console_pump;
use crate::cpuid::CpuidPlan;
use crate::doctor::ChoiceError;
use crate::host::{host_memory, raise_file_limit};
use crate::io_thread::IoThread;
use crate::lifecycle::{Lifecycle, Phase};
use crate::mmio_slots;
use crate::pci_slots;
use crate::platform::Platform;
use crate::report::{MachineInfo, Outcome};
use crate::seed::{self, SeedError};
use crate::threads::{VcpuThread, start_state};
use crate::virtio::{
    self, AttachError, AttachedBalloon, AttachedConsole, AttachedDisk, AttachedMem, AttachedNet, BalloonInfo,
    ConsoleError, Consoles, DetachError, DeviceConfig, DiskInfo, MemoryInfo, NetError, NetInfo, OpenDisk,
    OpenDiskError, OpenNet, OpenPmem, OpenShare, OpenShareError, PlugError, PmemError, ResizeMemoryError,
    Server, SlotKeeper, Slots, Sockets,
};

/// log2 of how much slower a guest's time goes while both tiers execute it: they take that much longer.
const CHECK_SLOWDOWN: u32 = 6;

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
    Disk(#[from] OpenDiskError),
    /// The disk for cloud-init cannot be had.
    #[error(transparent)]
    Seed(#[from] SeedError),
    /// A file cannot be in memory.
    #[error("--pmem: {0}")]
    Pmem(#[from] PmemError),
    /// A virtio console cannot be had.
    #[error("--console: {0}")]
    Console(#[from] ConsoleError),
    /// A folder cannot be shared.
    #[error("--share: {0}")]
    Share(#[from] OpenShareError),
    /// The socket device cannot be had.
    #[error("--vsock: {0}")]
    Vsock(#[from] ListenError),
    /// The host's kernel does not serve the socket device.
    #[error("--vsock: vhost: {0}")]
    VsockVhost(#[from] KernelError),
    /// Nothing says where the socket device is reached.
    #[error("--vsock: expected CID,path=PATH, as the machine has no folder of its own")]
    NoVsockPath,
    /// A network cannot be had.
    #[error(transparent)]
    Net(#[from] NetError),
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
            Self::Config(_) | Self::Choice(_) | Self::Disk(_) | Self::Net(_) => true,
            Self::Pmem(_) | Self::Console(_) | Self::Share(_) => true,
            Self::Vsock(_) | Self::VsockVhost(_) | Self::NoVsockPath => true,
            Self::Seed(error) => !matches!(error, SeedError::Make(_)),
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
            PlugError::Host(source) => Self::Host { what: "cannot make a device", source },
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
    fn open(config: &MachineConfig, plan: &AddressPlan, ram: GuestRam) -> Result<Self, LoadError> {
        let modules = match &config.initrd {
            Some(path) => Module::open_list(&path.to_string_lossy())?,
            None => Vec::new(),
        };
        Ok(Self {
            kernel: Image::open(&config.kernel)?,
            modules,
            cmdline: config.cmdline.clone(),
            acpi: acpi_config(config, plan),
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

fn acpi_config(config: &MachineConfig, plan: &AddressPlan) -> AcpiConfig {
    let mut acpi = AcpiConfig::new(config.cpus.count() as u32);
    match config.kind {
        MachineKind::Pc => acpi.mmio64 = Some(plan.pci.clone()),
        MachineKind::Microvm => (acpi.pci, acpi.virtio) = (false, mmio_slots::places(config)),
    }
    acpi
}

/// Where PCI functions can answer, if there are any: the windows that ACPI tells of, and ports above those of the platform.
fn pci_windows(acpi: &AcpiConfig) -> Option<PciWindows> {
    let all = acpi.mmio32.iter().chain(&acpi.mmio64);
    let memory = all.map(|window| window.start..=window.end - 1).collect();
    acpi.pci.then_some(PciWindows { ports: PCI_PORTS, memory })
}

/// A machine with its guest in RAM, but without CPUs.
pub struct Machine {
    config: MachineConfig,
    ram: GuestRam,
    boot: Boot,
    disks: Vec<(DiskConfig, OpenDisk)>,
    /// RAM that can be plugged in: where, and how much.
    pluggable: Option<(u64, u64)>,
    /// Files in memory, with their addresses.
    pmems: Vec<(u64, OpenPmem)>,
    consoles: Consoles,
    shares: Vec<OpenShare>,
    sockets: Option<Sockets>,
    nets: Vec<OpenNet>,
    entry: VcpuState,
    /// Goes on while the guest is loaded.
    tsc: TscMeasurement,
}

impl Machine {
    /// Checks a configuration, makes the RAM and loads the guest.
    pub fn load(config: MachineConfig) -> Result<Self, MachineError> {
        config.validate(host_memory())?;
        raise_file_limit();
        let tsc = TscMeasurement::begin();
        // Before RAM, so that a wrong path costs nothing.
        Image::open(&config.kernel)?;
        let mut disks = OpenDisk::open_all(&config.disks, config.cpus.count())?;
        if let Some(files) = &config.seed {
            let disk = DiskConfig { read_only: true, ..DiskConfig::new(seed::LABEL.into()) };
            disks.push((disk, OpenDisk::File(Arc::new(seed::make(files, &config.name)?))));
        }
        let pmems = OpenPmem::open_all(&config.pmems)?;
        let consoles = Consoles::open(&config.consoles)?;
        let shares = virtio::open_shares(&config.shares)?;
        let sockets = config.vsock.as_ref().map(Sockets::open).transpose()?;
        let nets = OpenNet::open_all(&config.name, &config.nets)?;
        let plan = AddressPlan::new(&config, &pmems)?;
        let ram = GuestRam::with_layout(&plan.layout)?;
        let boot = Boot::open(&config, &plan, ram.clone())?;
        let entry = boot.load()?;
        let AddressPlan { pluggable, pmems: places, .. } = plan;
        let pmems = places.into_iter().zip(pmems).collect();
        Ok(Self { config, ram, boot, disks, pluggable, pmems, consoles, shares, sockets, nets, entry, tsc })
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
        let (attached, servers) = self.plug(&board)?;
        let vcpus = self.create_vcpus(engine, &*vm, cpus, &clock)?;
        board.connect(vcpus.iter().map(|vcpu| vcpu.handle()).collect());
        self.spawn(engine.name(), board, vcpus, console, attached, servers)
    }

    /// Plugs the devices in.
    fn plug(&mut self, board: &Arc<Board>) -> Result<(Attached, Vec<Server>), MachineError> {
        let (intx, config) = (self.boot.acpi.intx, &self.config);
        let gsi = |at| match config.kind {
            MachineKind::Pc => pci_slots::gsi(intx, at),
            MachineKind::Microvm => mmio_slots::gsi(at),
        };
        let mut servers = virtio::plug_entropy(board, &self.ram, gsi)?;
        let cpus = config.cpus.count();
        let (nets, more) = OpenNet::plug_all(board, &self.ram, gsi, std::mem::take(&mut self.nets))?;
        servers.extend(more);
        let disks = std::mem::take(&mut self.disks);
        let (disks, more) = AttachedDisk::plug_all(board, &self.ram, gsi, cpus, disks)?;
        servers.extend(more);
        let mut balloon = None;
        if let Some(bytes) = config.balloon {
            let (attached, more) = AttachedBalloon::plug(board, &self.ram, gsi, bytes)?;
            balloon = Some(attached);
            servers.extend(more);
        }
        let mut memory = None;
        if let Some(place) = self.pluggable {
            let (attached, more) = AttachedMem::plug(board, &self.ram, gsi, place, config.memory)?;
            memory = Some(attached);
            servers.extend(more);
        }
        self.pmems.iter().try_for_each(|(_, pmem)| pmem.reserve())?;
        servers.extend(OpenPmem::plug_all(board, &self.ram, gsi, std::mem::take(&mut self.pmems))?);
        let (console, more) = self.consoles.plug(board, &self.ram, gsi)?;
        servers.extend(more);
        servers.extend(virtio::plug_shares(board, &self.ram, gsi, std::mem::take(&mut self.shares))?);
        if let Some(sockets) = self.sockets.take() {
            servers.extend(sockets.plug(board, &self.ram, gsi)?);
        }
        if config.kind == MachineKind::Pc {
            pci_slots::plug_pvpanic(board)?;
        }
        if let Some(action) = config.watchdog {
            let at = PciAddress::new(pci_slots::SMALL, pci_slots::WATCHDOG);
            board.plug_watchdog(at, Watchdog::new(action.power()))?;
        }
        let ports = pci_slots::plug_root_ports(board, intx, config.slots)?;
        let slots = Slots::new(board, &self.ram, &config.name, cpus, ports)
            .map_err(MachineError::host("cannot make an eventfd"))?;
        board.assign_pci();
        Ok((Attached { disks, nets, console, balloon, memory, slots }, servers))
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
        attached: Attached,
        servers: Vec<Server>,
    ) -> Result<RunningMachine, MachineError> {
        let Self { config, ram, boot, entry, mut consoles, .. } = self;
        let (config, attached) = (Arc::new(config), Arc::new(attached));
        let thread = |source| MachineError::Host { what: "cannot start a thread", source };
        // What leads to the virtio console does not lead to the serial port.
        let (serial, pump) = match consoles.stdio.take() {
            Some(stream) => (Console::default(), Some(console_pump::spawn(console, stream).map_err(thread)?)),
            None => (console, None),
        };
        let (old, old_ram) = (attached.clone(), ram.clone());
        let keeper = (!attached.slots.is_empty()).then(|| SlotKeeper(attached.slots.clone()));
        let control = Control { board: board.clone(), config, engine, attached };
        let mut running = RunningMachine { control, threads: Vec::new(), _consoles: consoles };
        // The files and the protocol are the same as at first, and so is the state.
        let reload = Box::new(move || {
            if let Some(memory) = &old.memory {
                memory.unplug_all(&old_ram);
            }
            boot.load().map(drop)
        });
        let io = IoThread::new(board.clone(), ram.clone(), serial, reload)
            .map_err(MachineError::host("cannot set up the I/O thread"))?;
        let vcpus: Result<Vec<_>, _> = (0..)
            .zip(vcpus)
            .map(|(id, vcpu)| {
                let start = start_state(id, &entry, board.has_external_apics());
                VcpuThread { id, vcpu, board: board.clone(), ram: ram.clone(), start }.spawn()
            })
            .chain(servers.into_iter().map(Server::spawn))
            .chain([io.spawn()])
            .chain(keeper.map(SlotKeeper::spawn))
            .collect();
        running.threads = vcpus.map_err(thread)?;
        // It ends after those that serve the console.
        running.threads.extend(pump);
        Ok(running)
    }
}

/// A machine whose threads run. Dropping it ends them.
pub struct RunningMachine {
    control: Control,
    threads: Vec<JoinHandle<()>>,
    /// Whose sockets are removed at the end.
    _consoles: Consoles,
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

/// Devices that are reached from outside.
struct Attached {
    disks: Vec<AttachedDisk>,
    nets: Vec<AttachedNet>,
    slots: Arc<Slots>,
    console: Option<AttachedConsole>,
    balloon: Option<AttachedBalloon>,
    memory: Option<AttachedMem>,
}

/// Reaches a running machine from any thread. No call waits for the guest.
#[derive(Clone)]
pub struct Control {
    board: Arc<Board>,
    config: Arc<MachineConfig>,
    engine: &'static str,
    attached: Arc<Attached>,
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
        if self.phase() == Phase::Paused {
            self.board.go_on();
        }
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
        let disks: io::Result<Vec<_>> =
            self.attached.disks.iter().map(|disk| disk.refresh(&self.board)).collect();
        Ok([disks?, self.attached.slots.refresh_disks()?].concat())
    }
    /// What its network devices are.
    pub fn nets(&self) -> Vec<NetInfo> {
        let mut nets = Vec::new();
        self.for_each_net(|net| nets.push(net.info()));
        nets
    }
    fn for_each_net(&self, mut call: impl FnMut(&AttachedNet)) {
        self.attached.nets.iter().for_each(&mut call);
        self.attached.slots.for_each_net(call);
    }
    /// Plugs or pulls the cable of a network device, or of all of them; `false` if there is none with a cable.
    pub fn set_link(&self, device: Option<&str>, up: bool) -> bool {
        let mut found = false;
        self.for_each_net(|net| {
            if device.is_none_or(|id| id == net.id()) {
                found |= net.set_link(&self.board, up);
            }
        });
        found
    }
    /// Puts a device into a slot of the machine's, where its system finds it; gives its name.
    pub fn attach(&self, device: DeviceConfig) -> Result<String, AttachError> {
        self.attached.slots.attach(device)
    }
    /// Has a device that was attached taken out, when the guest's system has let go of it, or by force. This does not wait
    /// for it.
    pub fn detach(&self, id: &str, force: bool) -> Result<(), DetachError> {
        self.attached.slots.detach(id, force)
    }
    /// Asks the guest for a balloon of so many bytes, but not for all of its RAM; `false` if the machine has none.
    pub fn resize_balloon(&self, bytes: u64) -> bool {
        let balloon = self.attached.balloon.as_ref();
        let most = self.config.memory - ruse_memory::PAGE_SIZE;
        balloon.map(|balloon| balloon.resize(&self.board, bytes.min(most))).is_some()
    }
    /// What is in the balloon, if there is one. The guest is asked for its statistics and has so long to tell new ones.
    pub fn balloon(&self, patience: Duration) -> Option<BalloonInfo> {
        self.attached.balloon.as_ref().map(|balloon| balloon.info(patience))
    }
    /// Asks the guest to have so many bytes of RAM.
    ///
    /// # Errors
    /// It cannot have so many.
    pub fn resize_memory(&self, bytes: u64) -> Result<(), ResizeMemoryError> {
        let memory = self.attached.memory.as_ref().ok_or(ResizeMemoryError::Fixed)?;
        memory.resize(&self.board, bytes)
    }
    /// How much RAM there is, of a machine that can have more or less.
    pub fn memory(&self) -> Option<MemoryInfo> {
        self.attached.memory.as_ref().map(AttachedMem::info)
    }
    /// The window of the virtio console, if there is one, has this size now.
    pub fn resize_console(&self, columns: u16, rows: u16) {
        if let Some(console) = &self.attached.console {
            console.resize(&self.board, columns, rows);
        }
    }
    /// What the machine is doing, in detail. Waits a fraction of a second for vCPUs that do not answer.
    pub fn info(&self) -> MachineInfo {
        let vcpus = self.board.lifecycle.reports(|| self.board.kick_all());
        let mut counters = Counters::default();
        vcpus.iter().for_each(|vcpu| counters.add(&vcpu.counters));
        MachineInfo {
            name: self.config.name.clone(),
            phase: self.phase(),
            engine: self.engine.into(),
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
