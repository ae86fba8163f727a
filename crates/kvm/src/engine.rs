//! The engine: what the host's KVM can do, and VMs.

use std::sync::Arc;

use kvm_ioctls::Kvm;
use ruse_engine::{Capabilities, Clock, CpuidTable, Engine, EngineError, Vm};
use ruse_memory::GuestRam;

use crate::{
    cpuid,
    log::LogInterface,
    open::{self, OpenError},
    syscall_entry,
    vm::KvmVm,
};

/// Runs guest CPUs through /dev/kvm.
pub struct KvmEngine {
    kvm: Arc<Kvm>,
    supported: CpuidTable,
    log: LogInterface,
}

impl KvmEngine {
    /// Opens /dev/kvm.
    ///
    /// # Errors
    /// Says what is missing, and what the user can do.
    pub fn open() -> Result<Self, OpenError> {
        let kvm = open::open()?;
        let supported = cpuid::supported(&kvm).map_err(OpenError::Other)?;
        Ok(Self { kvm: Arc::new(kvm), supported, log: LogInterface::default() })
    }

    /// The same engine, with at best this interface for the dirty log, as on an older kernel.
    pub fn with_log(self, log: LogInterface) -> Self {
        Self { log, ..self }
    }

    /// Whether this host's KVM leaves SYSCALL unfinished, which the engine does for it, at the price of an exit for each
    /// and for each page fault.
    pub fn finishes_syscalls(&self) -> bool {
        syscall_entry::is_unfinished(&self.kvm)
    }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn capabilities(&self) -> Capabilities {
        // Identifiers of xAPICs are eight bits wide, 255 is everybody.
        let max = self.kvm.get_max_vcpus().min(self.kvm.get_max_vcpu_id()).min(255);
        Capabilities { max_vcpus: max as u32, has_local_apics: true }
    }

    fn supported_cpuid(&self) -> CpuidTable {
        self.supported.clone()
    }

    fn create_vm(&self, ram: GuestRam, clock: Arc<Clock>) -> Result<Arc<dyn Vm>, EngineError> {
        let with_sregs2 = self.kvm.check_extension_raw(u64::from(kvm_bindings::KVM_CAP_SREGS2)) > 0;
        let finish_syscalls = self.finishes_syscalls();
        Ok(Arc::new(KvmVm::new(&self.kvm, ram, clock, with_sregs2, self.log, finish_syscalls)?))
    }
}
