//! Opening /dev/kvm, and what each failure means to a user.

use std::{io, path::Path};

use kvm_ioctls::{Cap, Kvm};

/// The interface that this engine speaks; it has not changed since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// Capabilities without which the engine does not run, with their names in the kernel's documentation.
const NEEDED: [(Cap, &str); 12] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
];

/// Why there is no KVM. Each message names what can be done.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no device file, though the CPU could.
    #[error(
        "there is no /dev/kvm, but the CPU has {0}: load the module (modprobe kvm_intel or kvm_amd), or pass the \
             device into this container"
    )]
    NoDevice(&'static str),
    /// There is no device file, and the CPU shows no virtualization: off in the firmware, or nested and not passed on.
    #[error(
        "there is no /dev/kvm, and the CPU shows no virtualization: enable VT-x or AMD-V in the firmware, or \
             nested virtualization in the hypervisor that this machine runs under"
    )]
    NoHardware,
    /// The user may not open the device.
    #[error(
        "/dev/kvm may not be opened by this user: add the user to the group that owns it (usually kvm) and log in anew"
    )]
    Permission,
    /// The device is there, but the driver behind it is not.
    #[error(
        "/dev/kvm is there, but no driver is behind it: load kvm_intel or kvm_amd; the firmware may have \
             virtualization disabled"
    )]
    NoDriver,
    /// Another hypervisor holds the CPU's virtualization.
    #[error("another hypervisor has taken the CPU's virtualization (VirtualBox, VMware?): stop its machines")]
    Busy,
    /// The kernel is too old or too odd.
    #[error("/dev/kvm lacks {0}: Linux 5.4 or later has it")]
    Lacks(&'static str),
    /// Anything else.
    #[error("/dev/kvm cannot be used: {0}")]
    Other(io::Error),
}

/// Opens the device and looks whether it has all that is needed.
pub(crate) fn open() -> Result<Kvm, OpenError> {
    let kvm = Kvm::new().map_err(|error| explain(io::Error::from(error)))?;
    if kvm.get_api_version() != API_VERSION {
        return Err(OpenError::Lacks("the interface of version 12"));
    }
    match NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(OpenError::Lacks(name)),
        None => Ok(kvm),
    }
}

/// What the failure to open the device means.
fn explain(error: io::Error) -> OpenError {
    match error.raw_os_error() {
        Some(libc::ENOENT) => match hardware() {
            Some(name) => OpenError::NoDevice(name),
            None => OpenError::NoHardware,
        },
        Some(libc::EACCES | libc::EPERM) if Path::new("/dev/kvm").exists() => OpenError::Permission,
        Some(libc::ENXIO | libc::ENODEV) => OpenError::NoDriver,
        _ => OpenError::Other(error),
    }
}

/// What the failure to make a VM means: the first that does turns the CPU's virtualization on.
pub(crate) fn explain_creation(error: io::Error) -> OpenError {
    if error.raw_os_error() == Some(libc::EBUSY) { OpenError::Busy } else { OpenError::Other(error) }
}

/// The virtualization that the CPU shows (CPUID.1:ECX.VMX, CPUID.80000001h:ECX.SVM).
fn hardware() -> Option<&'static str> {
    use std::arch::x86_64::__cpuid;
    if __cpuid(1).ecx >> 5 & 1 != 0 {
        return Some("VT-x");
    }
    let extended = __cpuid(0x8000_0000).eax >= 0x8000_0001;
    (extended && __cpuid(0x8000_0001).ecx >> 2 & 1 != 0).then_some("AMD-V")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_lack_has_a_line_of_its_own() {
        let texts: Vec<_> = [libc::ENOENT, libc::ENXIO, libc::EMFILE]
            .map(|code| explain(io::Error::from_raw_os_error(code)).to_string())
            .into_iter()
            .chain([explain_creation(io::Error::from_raw_os_error(libc::EBUSY)).to_string()])
            .collect();
        for (i, text) in texts.iter().enumerate() {
            assert!(!text.contains('\n') && !texts[..i].contains(text), "{text}");
        }
    }
}
