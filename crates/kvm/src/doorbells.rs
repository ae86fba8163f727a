//! Doorbells: writes that the kernel answers with an eventfd (KVM_IOEVENTFD).

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use kvm_bindings::{
    kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio,
};
use kvm_ioctls::VmFd;
use ruse_engine::{Doorbell, DoorbellTable, DoorbellValue, Doorbells, EngineError, IoAddress};

use crate::{ioctl, vm::Shared};

/// The doorbells of a VM.
#[derive(Default)]
pub struct Registered {
    /// For the accesses of instructions that tier 0 finishes.
    pub table: Arc<DoorbellTable>,
    /// What the kernel has; it wants an eventfd back to let go of it.
    events: Mutex<Vec<(Doorbell, OwnedFd)>>,
}

/// Widths by which the kernel is told of a doorbell; 0 stands for all, and lets it do without the instruction's bytes where
/// the CPU does not give them, which is why memory keeps it.
///
/// Where a range ends at an address that is told by 0, the kernel's search can miss that one (kvm_io_bus_cmp compares the end
/// of the one with the beginning of the other), and the write is an access of the bus. Among ports that is too likely.
fn widths(doorbell: &Doorbell) -> &'static [u32] {
    match (doorbell.only, doorbell.at) {
        (Some(DoorbellValue { width: 1, .. }), _) => &[1],
        (Some(DoorbellValue { width: 2, .. }), _) => &[2],
        (Some(DoorbellValue { width: 4, .. }), _) => &[4],
        (Some(_), _) => &[8],
        (None, IoAddress::Port(_)) => &[1, 2, 4],
        (None, IoAddress::Memory(_)) => &[0],
    }
}

/// Tells the kernel of a doorbell of this width, or takes it away.
fn set(vm: &VmFd, doorbell: &Doorbell, len: u32, event: &OwnedFd, flags: u32) -> io::Result<()> {
    let (addr, pio) = match doorbell.at {
        IoAddress::Port(port) => (port.into(), 1 << kvm_ioeventfd_flag_nr_pio),
        IoAddress::Memory(gpa) => (gpa, 0),
    };
    let mut argument =
        kvm_ioeventfd { addr, len, fd: event.as_raw_fd(), flags: flags | pio, ..Default::default() };
    if let Some(only) = doorbell.only {
        argument.datamatch = only.value;
        argument.flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
    }
    ioctl::ioeventfd(vm, &argument)
}

/// Takes a doorbell of these widths away.
fn clear(vm: &VmFd, doorbell: &Doorbell, widths: &[u32], event: &OwnedFd) {
    for &width in widths {
        if let Err(error) = set(vm, doorbell, width, event, 1 << kvm_ioeventfd_flag_nr_deassign) {
            tracing::warn!(%error, ?doorbell, "KVM does not let go of a doorbell");
        }
    }
}

impl Doorbells for Shared {
    fn add(&self, doorbell: Doorbell, event: OwnedFd) -> Result<(), EngineError> {
        let failed = |source| EngineError::Host { what: "cannot make a doorbell", source };
        let mut events = self.doorbells.events.lock().unwrap_or_else(PoisonError::into_inner);
        self.doorbells.table.add(doorbell, event.try_clone().map_err(failed)?)?;
        let widths = widths(&doorbell);
        for (n, &width) in widths.iter().enumerate() {
            if let Err(error) = set(&self.fd, &doorbell, width, &event, 0) {
                clear(&self.fd, &doorbell, &widths[..n], &event);
                self.doorbells.table.remove(&doorbell);
                return Err(failed(error));
            }
        }
        events.push((doorbell, event));
        Ok(())
    }

    fn remove(&self, doorbell: &Doorbell) {
        let mut events = self.doorbells.events.lock().unwrap_or_else(PoisonError::into_inner);
        self.doorbells.table.remove(doorbell);
        if let Some(at) = events.iter().position(|(known, _)| known == doorbell) {
            let (_, event) = events.swap_remove(at);
            clear(&self.fd, doorbell, widths(doorbell), &event);
        }
    }
}
