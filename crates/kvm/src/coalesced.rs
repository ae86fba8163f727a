//! Coalesced writes: the kernel keeps them in a ring, which the VM's vCPUs share (KVM_CAP_COALESCED_MMIO).

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use kvm_bindings::{
    KVM_CAP_COALESCED_MMIO, KVM_CAP_COALESCED_PIO, KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio,
    kvm_coalesced_mmio_ring,
};
use kvm_ioctls::{IoEventAddress, VmFd};
use ruse_engine::{Bus, IoAddress};

use crate::mapping::Mapping;

/// Bytes of the ring with its head.
const BYTES: usize = 4096;
const HEAD: usize = size_of::<kvm_coalesced_mmio_ring>();
/// How many writes it holds.
const ENTRIES: u32 = ((BYTES - HEAD) / size_of::<kvm_coalesced_mmio>()) as u32;

/// The ring of a VM.
#[derive(Default)]
pub struct Coalesced {
    ring: OnceLock<Mapping>,
    /// Held by the vCPU that empties the ring.
    emptying: Mutex<()>,
}

impl Coalesced {
    /// Finds the ring, where the host has one. Any vCPU leads to it.
    pub fn find(&self, vm: &VmFd, vcpu: BorrowedFd) -> io::Result<()> {
        if self.ring.get().is_none() && has(vm, KVM_CAP_COALESCED_MMIO) {
            let ring = Mapping::new(vcpu, KVM_COALESCED_MMIO_PAGE_OFFSET, BYTES)?;
            let _ = self.ring.set(ring);
        }
        Ok(())
    }

    /// Makes the writes that wait. Where another vCPU is about to make them, waits for it.
    #[inline]
    pub fn empty(&self, vcpu: u32, bus: &dyn Bus) {
        if let Some(ring) = self.ring.get()
            && first(ring).load(Ordering::Acquire) != last(ring).load(Ordering::Acquire)
        {
            self.make_writes(ring, vcpu, bus);
        }
    }

    #[cold]
    fn make_writes(&self, ring: &Mapping, vcpu: u32, bus: &dyn Bus) {
        let _emptying = self.emptying.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let index = first(ring).load(Ordering::Acquire);
            if index == last(ring).load(Ordering::Acquire) {
                return;
            }
            // SAFETY: an entry of the mapping, which the kernel has written before it moved the end, and leaves alone until
            // the beginning moves.
            let write = unsafe { ring.at::<kvm_coalesced_mmio>(HEAD, index as usize).read() };
            // SAFETY: both variants are an integer.
            let is_port = unsafe { write.__bindgen_anon_1.pio } != 0;
            let data = &write.data[..(write.len as usize).min(write.data.len())];
            if is_port {
                bus.pio_write(vcpu, write.phys_addr as u16, data);
            } else {
                bus.mmio_write(vcpu, write.phys_addr, data);
            }
            // Only now: to others, an empty ring says that its writes have been made.
            first(ring).store((index + 1) % ENTRIES, Ordering::Release);
        }
    }
}

/// Index of the oldest write.
fn first(ring: &Mapping) -> &AtomicU32 {
    // SAFETY: lies in the mapping, which the borrow keeps; the kernel reads it too, hence the atomic.
    unsafe { AtomicU32::from_ptr(ring.at(std::mem::offset_of!(kvm_coalesced_mmio_ring, first), 0)) }
}

/// Index behind the newest write.
fn last(ring: &Mapping) -> &AtomicU32 {
    // SAFETY: as in `first`; the kernel writes it.
    unsafe { AtomicU32::from_ptr(ring.at(std::mem::offset_of!(kvm_coalesced_mmio_ring, last), 0)) }
}

fn has(vm: &VmFd, capability: u32) -> bool {
    vm.check_extension_raw(capability.into()) > 0
}

/// Lets writes to a range wait, where the host can.
pub fn register(vm: &VmFd, at: IoAddress, len: u32) {
    let (capability, at) = match at {
        IoAddress::Port(port) => (KVM_CAP_COALESCED_PIO, IoEventAddress::Pio(port.into())),
        IoAddress::Memory(gpa) => (KVM_CAP_COALESCED_MMIO, IoEventAddress::Mmio(gpa)),
    };
    if has(vm, capability)
        && let Err(error) = vm.register_coalesced_mmio(at, len)
    {
        tracing::debug!(%error, ?at, "KVM does not let writes wait");
    }
}
