//! An engine whose vCPUs run a function of the test, not guest code.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use ruse_arch::{MpState, VcpuState};
use ruse_devices::pci::PciWindows;
use ruse_devices::rtc::{Rtc, RtcConfig};
use ruse_engine::{
    Bus, Capabilities, Clock, Counters, CpuidTable, DoorbellTable, Doorbells, Engine, EngineError, Halt,
    Vcpu, VcpuHandle, Vm, WriteLog,
};
use ruse_memory::GuestRam;

use crate::board::Board;
use crate::config::MachineConfig;
use crate::lifecycle::Lifecycle;
use crate::platform::{Platform, lock};

/// What a fake vCPU does after a step.
pub(crate) enum Flow {
    /// The next step.
    Go,
    /// HLT: waits for a kick or an interrupt.
    Sleep,
    /// Leaves `run`.
    Leave(Halt),
}

/// One step of a program: the vCPU's id, how often it was started, the steps since, and the bus.
pub(crate) type Program = dyn Fn(u32, u32, u32, &dyn Bus) -> Flow + Send + Sync;

pub(crate) struct FakeEngine(pub(crate) Arc<Program>);

impl FakeEngine {
    pub(crate) fn new(program: impl Fn(u32, u32, u32, &dyn Bus) -> Flow + Send + Sync + 'static) -> Self {
        Self(Arc::new(program))
    }
}

impl Engine for FakeEngine {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities { max_vcpus: 4, has_local_apics: false }
    }
    fn supported_cpuid(&self) -> CpuidTable {
        CpuidTable::default()
    }
    fn create_vm(&self, _ram: GuestRam, _clock: Arc<Clock>) -> Result<Arc<dyn Vm>, EngineError> {
        Ok(Arc::new(FakeVm { program: self.0.clone(), doorbells: Arc::default() }))
    }
}

pub(crate) struct FakeVm {
    program: Arc<Program>,
    doorbells: Arc<DoorbellTable>,
}

/// Windows of PCI as a small machine has them.
pub(crate) fn windows() -> PciWindows {
    PciWindows { ports: 0x1000..=0xffff, memory: vec![0xc000_0000..=0xdfff_ffff] }
}

/// The board of a machine whose vCPUs sleep, and the engine's doorbells.
pub(crate) fn board(cpus: u32, windows: Option<PciWindows>) -> (Arc<Board>, Arc<DoorbellTable>) {
    let platform = Platform::new(Rtc::new(RtcConfig::default()), false, windows).unwrap();
    let lifecycle = Arc::new(Lifecycle::new(cpus).unwrap());
    let doorbells = Arc::<DoorbellTable>::default();
    let vm = FakeVm { program: Arc::new(|_, _, _, _| Flow::Sleep), doorbells: doorbells.clone() };
    let board = Board::new(cpus, Arc::new(Clock::start()), platform, lifecycle, Some(Arc::new(vm))).unwrap();
    (Arc::new(board), doorbells)
}

/// A file of a MiB for a disk.
pub(crate) fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file
}

impl Vm for FakeVm {
    fn create_vcpu(&self, id: u32, _cpuid: CpuidTable) -> Result<Box<dyn Vcpu>, EngineError> {
        let (program, handle) = (self.program.clone(), Arc::default());
        Ok(Box::new(FakeVcpu { id, program, handle, state: VcpuState::default(), starts: 0, steps: 0 }))
    }
    fn doorbells(&self) -> &dyn Doorbells {
        &*self.doorbells
    }
    fn write_log(&self) -> &dyn WriteLog {
        self
    }
}

/// The programs do not write to memory.
impl WriteLog for FakeVm {
    fn set_logging(&self, _on: bool) -> Result<(), EngineError> {
        Ok(())
    }
    fn collect(&self) -> Result<(), EngineError> {
        Ok(())
    }
    fn rearm(&self) -> Result<(), EngineError> {
        Ok(())
    }
}

struct FakeVcpu {
    id: u32,
    program: Arc<Program>,
    handle: Arc<FakeHandle>,
    state: VcpuState,
    starts: u32,
    steps: u32,
}

impl Vcpu for FakeVcpu {
    fn run(&mut self, bus: &dyn Bus) -> Result<Halt, EngineError> {
        loop {
            if self.handle.kicked.swap(false, Ordering::SeqCst) {
                return Ok(Halt::Kicked);
            }
            if self.state.mp_state == MpState::WaitForSipi {
                self.handle.sleep(|handle| handle.kicked.load(Ordering::SeqCst));
                continue;
            }
            self.steps += 1;
            match (self.program)(self.id, self.starts, self.steps - 1, bus) {
                Flow::Go => {}
                Flow::Leave(halt) => return Ok(halt),
                Flow::Sleep => self
                    .handle
                    .sleep(|handle| handle.kicked.load(Ordering::SeqCst) || bus.interrupt_pending(self.id)),
            }
        }
    }
    fn handle(&self) -> Arc<dyn VcpuHandle> {
        self.handle.clone()
    }
    fn state(&mut self) -> Result<VcpuState, EngineError> {
        Ok(self.state.clone())
    }
    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        self.state = state.clone();
        self.starts += 1;
        self.steps = 0;
        Ok(())
    }
    fn counters(&self) -> Counters {
        Counters::from_iter([("steps", self.steps.into())])
    }
}

/// Notes what it is told.
#[derive(Default)]
pub(crate) struct FakeHandle {
    pub(crate) kicked: AtomicBool,
    pub(crate) notified: AtomicU32,
    pub(crate) others: Mutex<Vec<String>>,
    lock: Mutex<()>,
    changed: Condvar,
}

impl FakeHandle {
    fn sleep(&self, until: impl Fn(&Self) -> bool) {
        let mut guard = lock(&self.lock);
        while !until(self) {
            // A lost wake-up shows as a test that takes very long.
            guard = self.changed.wait_timeout(guard, Duration::from_secs(20)).unwrap().0;
        }
    }
    fn wake(&self) {
        let _guard = lock(&self.lock);
        self.changed.notify_all();
    }
}

impl VcpuHandle for FakeHandle {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.wake();
    }
    fn notify_interrupt(&self) {
        self.notified.fetch_add(1, Ordering::SeqCst);
        self.wake();
    }
    fn nmi(&self) {
        lock(&self.others).push("nmi".into());
    }
    fn init(&self) {
        lock(&self.others).push("init".into());
    }
    fn sipi(&self, vector: u8) {
        lock(&self.others).push(format!("sipi {vector:#x}"));
    }
    fn withdraw(&self) {
        lock(&self.others).clear();
    }
}

/// The smallest kernel there is: a multiboot header of the kind that says itself where it goes, and HLT.
pub(crate) fn tiny_kernel() -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    const FLAGS: u32 = 1 << 16;
    const BASE: u32 = 0x10_0000;
    let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS);
    let header = [MAGIC, FLAGS, checksum, BASE, BASE, BASE + 64, BASE + 64, BASE + 32];
    let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.resize(64, 0xf4);
    bytes
}

/// A machine that boots [`tiny_kernel`] from a file that lives as long as the second value.
pub(crate) fn tiny_machine() -> (MachineConfig, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), tiny_kernel()).unwrap();
    (MachineConfig { memory: 16 << 20, ..MachineConfig::new(file.path()) }, file)
}
