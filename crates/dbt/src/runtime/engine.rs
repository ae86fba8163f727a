//! The contract of an engine, implemented by translation.

use std::sync::{
    Arc, Condvar, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use ruse_engine::{
    Capabilities, Clock, CpuidTable, DoorbellTable, Doorbells, Engine, EngineError, Vcpu, VcpuHandle, Vm,
    WriteLog,
};
use ruse_memory::GuestRam;

use super::{
    profile::{Profile, ProfileOptions},
    vcpu::DbtVcpu,
};
use crate::{
    cpu::{Arena, CpuBox, request},
    cpuid,
    direct::DirectMode,
    mmu::{
        Mmu,
        watch::{CodeMap, MAX_VCPUS},
    },
    paravirt::clock::VmClock,
};

/// Choices of the engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DbtOptions {
    /// Only tier 0 (`Some(0)`), the translator wherever it can (`Some(1)`), or the translator but for code that is
    /// written again and again (`None`).
    pub tier: Option<u8>,
    /// Executes each instruction in both tiers and stops at the first difference.
    pub check: bool,
    /// Looks through all the code that it makes ([`crate::backend::x86_64::audit`]), and panics where that reaches more
    /// than it may: for tests.
    pub audit: bool,
    /// When user code is executed directly: never where only tier 0 executes, or both do.
    pub direct: DirectMode,
}

impl DbtOptions {
    /// Whether code that is written again and again may be left to tier 0.
    pub(super) fn interprets_patches(&self) -> bool {
        self.tier.is_none() && !self.check
    }
}

/// Runs guest CPUs by dynamic binary translation.
pub struct DbtEngine {
    options: DbtOptions,
    profile: ProfileOptions,
}

impl DbtEngine {
    /// An engine with these choices.
    pub fn new(options: DbtOptions) -> Self {
        Self { options, profile: ProfileOptions::default() }
    }

    /// An engine that writes for `perf` what it translates.
    pub fn with_profile(options: DbtOptions, profile: ProfileOptions) -> Self {
        Self { options, profile }
    }
}

impl Engine for DbtEngine {
    fn name(&self) -> &'static str {
        "dbt"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { max_vcpus: MAX_VCPUS, has_local_apics: false }
    }

    fn supported_cpuid(&self) -> CpuidTable {
        cpuid::supported()
    }

    fn create_vm(&self, ram: GuestRam, clock: Arc<Clock>) -> Result<Arc<dyn Vm>, EngineError> {
        if !std::is_x86_feature_detected!("xsave") {
            return Err(EngineError::Host {
                what: "the translator needs a CPU with XSAVE",
                source: std::io::ErrorKind::Unsupported.into(),
            });
        }
        let profile = Profile::start(&self.profile)
            .map_err(|source| EngineError::Host { what: "cannot write files for perf", source })?;
        let code = CodeMap::new(ram.clone());
        Ok(Arc::new(DbtVm {
            ram,
            clock,
            code,
            doorbells: Arc::default(),
            guest_clock: Arc::default(),
            options: self.options,
            profile,
        }))
    }
}

struct DbtVm {
    ram: GuestRam,
    clock: Arc<Clock>,
    code: Arc<CodeMap>,
    doorbells: Arc<DoorbellTable>,
    guest_clock: Arc<VmClock>,
    options: DbtOptions,
    profile: Option<Arc<Profile>>,
}

impl Vm for DbtVm {
    fn create_vcpu(&self, id: u32, cpuid: CpuidTable) -> Result<Box<dyn Vcpu>, EngineError> {
        if id >= MAX_VCPUS {
            return Err(EngineError::State(format!("vCPU {id}: at most {MAX_VCPUS} are possible")));
        }
        let mmu = Mmu::new(self.ram.clone(), self.code.clone(), id);
        let mut cpu = CpuBox::new(id, cpuid, self.clock.clone(), mmu);
        cpu.doorbells = self.doorbells.reader();
        cpu.paravirt.share(self.guest_clock.clone());
        let mut vcpu = DbtVcpu::new(cpu, self.options)
            .map_err(|source| EngineError::Host { what: "cannot make memory for generated code", source })?;
        if let Some(profile) = &self.profile {
            vcpu.blocks.tell(profile.clone());
        }
        Ok(Box::new(vcpu))
    }

    fn doorbells(&self) -> &dyn Doorbells {
        &*self.doorbells
    }

    fn write_log(&self) -> &dyn WriteLog {
        &*self.code
    }
}

/// Lets a vCPU's thread sleep until somebody has a request.
#[derive(Default)]
pub(super) struct Parker {
    sleeping: AtomicBool,
    lock: Mutex<()>,
    condition: Condvar,
}

impl Parker {
    /// Sleeps until `ready` says yes; whoever changes its answer calls [`Parker::wake`] afterwards.
    pub fn sleep_until(&self, ready: impl Fn() -> bool) {
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleeping.store(true, Ordering::SeqCst);
        while !ready() {
            guard = self.condition.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleeping.store(false, Ordering::SeqCst);
    }

    /// Wakes the thread if it sleeps.
    pub fn wake(&self) {
        if self.sleeping.load(Ordering::SeqCst) {
            let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.condition.notify_all();
        }
    }
}

/// How other threads reach a vCPU.
pub(super) struct Handle {
    pub arena: Arc<Arena>,
    pub parker: Parker,
}

impl Handle {
    pub fn new(arena: Arc<Arena>) -> Self {
        Self { arena, parker: Parker::default() }
    }

    fn request(&self, bits: u32) {
        self.arena.shared.raise(bits);
        self.parker.wake();
    }
}

impl VcpuHandle for Handle {
    fn kick(&self) {
        self.request(request::KICK);
    }
    fn notify_interrupt(&self) {
        self.request(request::INTERRUPT);
    }
    fn nmi(&self) {
        self.request(request::NMI);
    }
    fn init(&self) {
        self.request(request::INIT);
    }
    fn sipi(&self, vector: u8) {
        self.arena.shared.sipi_vector.store(vector, Ordering::SeqCst);
        self.request(request::SIPI);
    }
    fn withdraw(&self) {
        self.arena.shared.take(request::NMI | request::INIT | request::SIPI);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ruse_arch::{MpState, VcpuState, state::seg};
    use ruse_engine::Halt;

    use super::*;
    use crate::tier0::testing::NullBus;

    #[test]
    fn what_is_withdrawn_does_not_start_a_vcpu() {
        let engine = DbtEngine::new(DbtOptions::default());
        let clock = Arc::new(Clock::with_frequency(2_000_000_000));
        let ram = GuestRam::new(1 << 20).unwrap();
        // HLT.
        crate::mmu::access::store(ram.host_page(0x1_2000).unwrap(), &[0xf4]);
        let vm = engine.create_vm(ram, clock).unwrap();
        let mut vcpu = vm.create_vcpu(1, engine.supported_cpuid()).unwrap();
        let waiting = VcpuState { mp_state: MpState::WaitForSipi, ..VcpuState::default() };
        vcpu.set_state(&waiting).unwrap();
        let handle = vcpu.handle();
        let mut run = || {
            let stop = handle.clone();
            let kicker = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                stop.kick();
            });
            assert_eq!(vcpu.run(&NullBus).unwrap(), Halt::Kicked);
            kicker.join().unwrap();
            vcpu.state().unwrap()
        };
        handle.nmi();
        handle.sipi(0x12);
        handle.withdraw();
        let state = run();
        assert_eq!((state.mp_state, state.nmi_pending), (MpState::WaitForSipi, false));
        handle.sipi(0x12);
        let state = run();
        assert_eq!((state.mp_state, state.seg[seg::CS].selector, state.rip), (MpState::Halted, 0x1200, 1));
    }
}
