//! A VM: memory slots, vCPUs, and messages to the kernel's local APICs.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};
use ruse_engine::{Clock, CpuidTable, EngineError, LocalApics, Message, Vcpu, Vm};
use ruse_memory::GuestRam;

use crate::{cpuid, open, state::Support, vcpu::KvmVcpu};

/// Routes that belong to the I/O APIC's pins: the kernel looks at them to see which ends of interrupts it reports.
const PINS: u64 = 24;
/// Where the kernel keeps three pages for CPUs that cannot run real mode: below the firmware's place, out of all RAM.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What a VM's vCPUs share.
pub struct Shared {
    pub fd: VmFd,
    pub ram: GuestRam,
    pub clock: Arc<Clock>,
    pub support: Support,
}

/// A VM.
pub struct KvmVm {
    shared: Arc<Shared>,
    /// What the pins send, as the kernel knows it.
    pins: Mutex<Vec<Option<Message>>>,
}

/// An error of the host with what was tried.
pub fn host(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> EngineError {
    move |error| EngineError::Host { what, source: error.into() }
}

impl KvmVm {
    /// Makes a VM over `ram`.
    pub fn new(kvm: &Kvm, ram: GuestRam, clock: Arc<Clock>, sregs2: bool) -> Result<Self, EngineError> {
        let fd = kvm
            .create_vm()
            .map_err(|error| EngineError::Guest(open::explain_creation(error.into()).to_string()))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(host("cannot place KVM's TSS"))?;
        let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        split.args[0] = PINS;
        fd.enable_cap(&split).map_err(host("cannot make KVM's local APICs"))?;
        for (slot, region) in (0..).zip(ram.regions()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.gpa,
                memory_size: region.size,
                userspace_addr: region.host as u64,
            };
            // SAFETY: the region is mapped as long as `ram`, of which the VM keeps a clone.
            unsafe { fd.set_user_memory_region(slot) }.map_err(host("cannot give KVM the guest's RAM"))?;
        }
        let support = Support::new(kvm, sregs2).map_err(host("cannot ask KVM for its MSRs"))?;
        let shared = Arc::new(Shared { fd, ram, clock, support });
        Ok(Self { shared, pins: Mutex::default() })
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

    fn set_routes(&self, pins: &[Option<Message>]) -> io::Result<()> {
        let routes: Vec<_> = (0..)
            .zip(pins)
            .filter_map(|(gsi, pin)| {
                let message = (*pin)?;
                let mut route =
                    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
                route.u.msi.address_lo = message.address as u32;
                route.u.msi.address_hi = (message.address >> 32) as u32;
                route.u.msi.data = message.data;
                Some(route)
            })
            .collect();
        let routes = KvmIrqRouting::from_entries(&routes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(self.fd.set_gsi_routing(&routes)?)
    }
}

impl LocalApics for KvmVm {
    fn deliver(&self, message: Message) {
        self.shared.deliver(message);
    }

    fn set_pins(&self, pins: &[Option<Message>]) {
        let mut known = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        if *known == pins {
            return;
        }
        if let Err(error) = self.shared.set_routes(pins) {
            tracing::warn!(%error, "KVM does not take the routes of interrupts");
        }
        *known = pins.to_vec();
    }
}
