//! The ioctls of a vCPU that the `kvm-ioctls` crate lacks.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
};

use kvm_bindings::{kvm_device_attr, kvm_sregs2};
use kvm_ioctls::VcpuFd;

/// The numbers of include/uapi/linux/kvm.h: direction, size, 0xAE, number (asm-generic/ioctl.h).
const fn number(direction: u64, size: usize, number: u64) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xae << 8 | number
}
const WRITE: u64 = 1;
const READ: u64 = 2;

const GET_SREGS2: u64 = number(READ, size_of::<kvm_sregs2>(), 0xcc);
const SET_SREGS2: u64 = number(WRITE, size_of::<kvm_sregs2>(), 0xcd);
const SET_DEVICE_ATTR: u64 = number(WRITE, size_of::<kvm_device_attr>(), 0xe1);

fn call<T>(fd: RawFd, request: u64, argument: *mut T) -> io::Result<()> {
    // SAFETY: each caller passes the structure that the request reads or writes, of the size that its number names.
    let result = unsafe { libc::ioctl(fd, request, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
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
    call(vcpu.as_raw_fd(), SET_SREGS2, &mut sregs)
}

/// Sets an attribute of a vCPU that is 64 bits wide (KVM_SET_DEVICE_ATTR).
pub fn set_attribute(vcpu: &VcpuFd, group: u32, attr: u32, value: u64) -> io::Result<()> {
    let addr = std::ptr::from_ref(&value) as u64;
    let mut argument = kvm_device_attr { flags: 0, group, attr: attr.into(), addr };
    call(vcpu.as_raw_fd(), SET_DEVICE_ATTR, &mut argument)
}
