//! The guest's clock, which KVM writes into guest memory. A vCPU that comes from another engine has its clock there.

use kvm_bindings::kvm_clock_data;
use ruse_arch::{
    VcpuState,
    paravirt::{ClockPage, ENABLED},
};
use vm_memory::{Bytes, GuestAddress};

use crate::vm::Shared;

/// The VM's clock goes on where that of the state is, unless it is further already: it never goes back, and is the same
/// on all vCPUs.
pub fn take_over(vm: &Shared, state: &VcpuState) {
    let register = state.paravirt.system_time;
    // A state without a counter is one that this vCPU was in just now.
    if register & ENABLED == 0 || state.tsc == 0 {
        return;
    }
    let Some(body) = (register & !ENABLED).checked_add(ClockPage::BODY) else { return };
    let mut bytes = [0; 24];
    // A guest may name an address that is not RAM; it has no clock then.
    if vm.ram.memory().read_slice(&mut bytes, GuestAddress(body)).is_err() {
        return;
    }
    let clock = ClockPage::from_bytes(&bytes).at(state.tsc);
    let set = || {
        if vm.fd.get_clock()?.clock < clock {
            vm.fd.set_clock(&kvm_clock_data { clock, ..Default::default() })?;
        }
        Ok::<_, kvm_ioctls::Error>(())
    };
    if let Err(error) = set() {
        tracing::debug!(%error, "KVM does not set the guest's clock");
    }
}
