//! A VM: memory slots, vCPUs, and messages to the kernel's local APICs.

use std::{os::fd::OwnedFd, sync::Arc};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_enable_cap, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};
use ruse_engine::{
    Clock, CpuidTable, Doorbells, EngineError, IoAddress, LocalApics, Message, MessageSource, Vcpu, Vm,
    WriteLog,
};
use ruse_memory::GuestRam;

use crate::{
    coalesced::{self, Coalesced},
    cpuid,
    doorbells::Registered,
    log::{Log, LogInterface},
    open,
    routes::{PINS, Routes, Source},
    state::Support,
    syscall_entry,
    vcpu::KvmVcpu,
};

/// Where the kernel keeps three pages for CPUs that cannot run real mode: below the firmware's place, out of all RAM.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What a VM's vCPUs share.
pub struct Shared {
    pub fd: VmFd,
    pub ram: GuestRam,
    pub clock: Arc<Clock>,
    pub support: Support,
    pub log: Log,
    pub routes: Routes,
    pub doorbells: Registered,
    pub coalesced: Coalesced,
    /// KVM leaves SYSCALL unfinished.
    pub finish_syscalls: bool,
}

/// A VM.
pub struct KvmVm {
    shared: Arc<Shared>,
}

/// An error of the host with what was tried.
pub fn host(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> EngineError {
    move |error| EngineError::Host { what, source: error.into() }
}

impl KvmVm {
    /// Makes a VM over `ram`, whose SYSCALLs KVM does not finish if `finish_syscalls`.
    pub fn new(
        kvm: &Kvm,
        ram: GuestRam,
        clock: Arc<Clock>,
        sregs2: bool,
        log: LogInterface,
        finish_syscalls: bool,
    ) -> Result<Self, EngineError> {
        let fd = kvm
            .create_vm()
            .map_err(|error| EngineError::Guest(open::explain_creation(error.into()).to_string()))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(host("cannot place KVM's TSS"))?;
        let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        split.args[0] = PINS.into();
        fd.enable_cap(&split).map_err(host("cannot make KVM's local APICs"))?;
        let finish_syscalls = finish_syscalls && syscall_entry::tell_of_lstar(&fd);
        let support = Support::new(kvm, sregs2).map_err(host("cannot ask KVM for its MSRs"))?;
        let log = Log::new(log.enable(&fd));
        let (routes, doorbells, coalesced) = Default::default();
        let shared = Shared { fd, ram, clock, support, log, routes, doorbells, coalesced, finish_syscalls };
        shared.set_slots(false)?;
        Ok(Self { shared: Arc::new(shared) })
    }
}

impl Vm for KvmVm {
    fn create_vcpu(&self, id: u32, cpuid: CpuidTable) -> Result<Box<dyn Vcpu>, EngineError> {
        let fd = self.shared.fd.create_vcpu(id.into()).map_err(host("cannot make a vCPU"))?;
        let table = cpuid::for_kvm(&cpuid)
            .map_err(|source| EngineError::Host { what: "cannot make a CPUID table", source })?;
        fd.set_cpuid2(&table).map_err(host("KVM does not take the CPUID table"))?;
        // Messages reach a new vCPU from the first write to its local APIC on (kvm_recalculate_apic_map).
        let lapic = fd.get_lapic().map_err(host("cannot read a local APIC"))?;
        fd.set_lapic(&lapic).map_err(host("cannot set a local APIC"))?;
        Ok(Box::new(KvmVcpu::new(id, fd, self.shared.clone())?))
    }

    fn local_apics(&self) -> Option<&dyn LocalApics> {
        Some(self)
    }

    fn doorbells(&self) -> &dyn Doorbells {
        &*self.shared
    }

    fn write_log(&self) -> &dyn WriteLog {
        &*self.shared
    }

    fn coalesce_writes(&self, at: IoAddress, len: u32) {
        coalesced::register(&self.shared.fd, at, len);
    }
}

impl Shared {
    /// Delivers a message; the kernel says how many vCPUs took it, which is nobody's concern here.
    pub fn deliver(&self, message: Message) {
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        if let Err(error) = self.fd.signal_msi(msi) {
            tracing::debug!(%error, ?message, "a message reaches nobody");
        }
    }

    /// Sets the memory slots: one for each region, by its number.
    pub fn set_slots(&self, logging: bool) -> Result<(), EngineError> {
        for (slot, region) in (0..).zip(self.ram.regions()) {
            let flags = match (region.read_only, logging) {
                (true, _) => KVM_MEM_READONLY,
                (false, true) => KVM_MEM_LOG_DIRTY_PAGES,
                (false, false) => 0,
            };
            let slot = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.gpa,
                memory_size: region.size,
                userspace_addr: region.host as u64,
            };
            // SAFETY: the region is mapped as long as `ram`.
            unsafe { self.fd.set_user_memory_region(slot) }
                .map_err(host("cannot give KVM the guest's RAM"))?;
        }
        Ok(())
    }
}

impl LocalApics for KvmVm {
    fn deliver(&self, message: Message) {
        self.shared.deliver(message);
    }

    fn set_pins(&self, pins: &[Option<Message>]) {
        if let Err(error) = self.shared.routes.set_pins(&self.shared.fd, pins) {
            tracing::warn!(%error, "KVM does not take the routes of interrupts");
        }
    }

    fn connect(&self, event: OwnedFd) -> Result<Box<dyn MessageSource>, EngineError> {
        Ok(Box::new(Source::new(self.shared.clone(), event)?))
    }
}
