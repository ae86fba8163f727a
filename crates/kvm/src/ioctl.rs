//! The ioctls that the `kvm-ioctls` crate lacks, or has only for other types.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
};

use kvm_bindings::{
    kvm_clear_dirty_log, kvm_device_attr, kvm_ioeventfd, kvm_irqfd, kvm_mp_state, kvm_sregs2, kvm_vcpu_events,
};
use kvm_ioctls::{VcpuFd, VmFd};

/// The numbers of include/uapi/linux/kvm.h: direction, size, 0xAE, number (asm-generic/ioctl.h).
const fn number(direction: u64, size: usize, number: u64) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xae << 8 | number
}
const WRITE: u64 = 1;
const READ: u64 = 2;

const IRQFD: u64 = number(WRITE, size_of::<kvm_irqfd>(), 0x76);
const IOEVENTFD: u64 = number(WRITE, size_of::<kvm_ioeventfd>(), 0x79);
const GET_MP_STATE: u64 = number(READ, size_of::<kvm_mp_state>(), 0x98);
const GET_VCPU_EVENTS: u64 = number(READ, size_of::<kvm_vcpu_events>(), 0x9f);
const SET_VCPU_EVENTS: u64 = number(WRITE, size_of::<kvm_vcpu_events>(), 0xa0);
const CLEAR_DIRTY_LOG: u64 = number(READ | WRITE, size_of::<kvm_clear_dirty_log>(), 0xc0);
const RESET_DIRTY_RINGS: u64 = number(0, 0, 0xc7);
const GET_SREGS2: u64 = number(READ, size_of::<kvm_sregs2>(), 0xcc);
const SET_SREGS2: u64 = number(WRITE, size_of::<kvm_sregs2>(), 0xcd);
const SET_DEVICE_ATTR: u64 = number(WRITE, size_of::<kvm_device_attr>(), 0xe1);

fn call<T>(fd: RawFd, request: u64, argument: *mut T) -> io::Result<u32> {
    // SAFETY: each caller passes the structure that the request reads or writes, of the size that its number names.
    let result = unsafe { libc::ioctl(fd, request, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as u32) }
}

/// Special registers with the PDPTEs (KVM_GET_SREGS2).
pub fn sregs2(vcpu: &VcpuFd) -> io::Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    call(vcpu.as_raw_fd(), GET_SREGS2, &mut sregs)?;
    Ok(sregs)
}

/// Sets special registers with the PDPTEs (KVM_SET_SREGS2).
pub fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> io::Result<()> {
    let mut sregs = *sregs;
    call(vcpu.as_raw_fd(), SET_SREGS2, &mut sregs)?;
    Ok(())
}

/// Sets an attribute of a vCPU that is 64 bits wide (KVM_SET_DEVICE_ATTR).
pub fn set_attribute(vcpu: &VcpuFd, group: u32, attr: u32, value: u64) -> io::Result<()> {
    let addr = std::ptr::from_ref(&value) as u64;
    let mut argument = kvm_device_attr { flags: 0, group, attr: attr.into(), addr };
    call(vcpu.as_raw_fd(), SET_DEVICE_ATTR, &mut argument)?;
    Ok(())
}

/// Lets an eventfd raise an interrupt, or no longer (KVM_IRQFD).
pub fn irqfd(vm: &VmFd, argument: &kvm_irqfd) -> io::Result<()> {
    let mut argument = *argument;
    call(vm.as_raw_fd(), IRQFD, &mut argument)?;
    Ok(())
}

/// Lets a write signal an eventfd, or no longer (KVM_IOEVENTFD).
pub fn ioeventfd(vm: &VmFd, argument: &kvm_ioeventfd) -> io::Result<()> {
    let mut argument = *argument;
    call(vm.as_raw_fd(), IOEVENTFD, &mut argument)?;
    Ok(())
}

/// Watches the pages of a bitmap anew, which has all pages of a slot (KVM_CLEAR_DIRTY_LOG).
pub fn clear_dirty_log(vm: &VmFd, slot: u32, num_pages: u32, bitmap: &mut [u64]) -> io::Result<()> {
    assert!(bitmap.len() * 64 >= num_pages as usize, "the kernel reads a bit for each page");
    let mut argument = kvm_clear_dirty_log { slot, num_pages, ..Default::default() };
    argument.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
    call(vm.as_raw_fd(), CLEAR_DIRTY_LOG, &mut argument)?;
    Ok(())
}

/// Watches the pages anew that were seen in the rings of the vCPUs (KVM_RESET_DIRTY_RINGS); how many there were.
pub fn reset_dirty_rings(vm: &VmFd) -> io::Result<u32> {
    call(vm.as_raw_fd(), RESET_DIRTY_RINGS, std::ptr::null_mut::<()>())
}

/// What a vCPU is doing; takes over INIT and start-up IPIs on their way (KVM_GET_MP_STATE).
pub fn mp_state(vcpu: BorrowedFd) -> io::Result<kvm_mp_state> {
    let mut state = kvm_mp_state::default();
    call(vcpu.as_raw_fd(), GET_MP_STATE, &mut state)?;
    Ok(state)
}

/// Events of a vCPU that are on their way (KVM_GET_VCPU_EVENTS).
pub fn events(vcpu: BorrowedFd) -> io::Result<kvm_vcpu_events> {
    let mut events = kvm_vcpu_events::default();
    call(vcpu.as_raw_fd(), GET_VCPU_EVENTS, &mut events)?;
    Ok(events)
}

/// Sets events of a vCPU (KVM_SET_VCPU_EVENTS).
pub fn set_events(vcpu: BorrowedFd, events: &kvm_vcpu_events) -> io::Result<()> {
    let mut events = *events;
    call(vcpu.as_raw_fd(), SET_VCPU_EVENTS, &mut events)?;
    Ok(())
}
