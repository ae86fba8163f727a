//! KVM's paravirtual interfaces under this engine ([`ruse_arch::paravirt`] has their layout, docs/paravirtual.md says
//! which are offered and why).
//!
//! What CPUID offers decides what a guest may use, so that one that comes from another engine keeps what it has there.

pub(crate) mod clock;
pub(crate) mod hypercall;
pub(crate) mod msr;
pub(crate) mod steal;

use std::sync::{
    Arc,
    atomic::{Ordering, fence},
};

use ruse_arch::{
    Paravirt, VcpuState,
    paravirt::{ENABLED, FEATURES_LEAF, SIGNATURE, SIGNATURE_LEAF, async_pf, feature},
};
use ruse_engine::{CpuidTable, Message};
use ruse_memory::{GuestMemoryMmap, GuestRam};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions, guest_memory};

use self::{clock::VmClock, steal::Steal};
use crate::cpu::Cpu;

/// Physical address to which messages for CPU 0 are written (SDM volume 3, 10.11.1).
const MESSAGES: u64 = 0xfee0_0000;

/// What this engine offers.
pub(crate) fn offered() -> u32 {
    let clock = feature::CLOCK_OLD | feature::CLOCK | feature::CLOCK_STABLE;
    let steal = if steal::is_known() { feature::STEAL_TIME } else { 0 };
    feature::NO_IO_DELAY | clock | steal
}

/// Features of a table, if it is one of KVM's.
pub(crate) fn features(table: &CpuidTable) -> Option<u32> {
    let [_, signature @ ..] = table.get(SIGNATURE_LEAF, 0);
    (signature == SIGNATURE).then(|| table.get(FEATURES_LEAF, 0)[0])
}

/// The paravirtual interfaces of one vCPU.
#[derive(Default)]
pub struct Unit {
    registers: Paravirt,
    clock: Arc<VmClock>,
    /// The clock in the guest's memory is not that of the registers.
    clock_is_stale: bool,
    /// What was added to the clock when it was written.
    clock_lead: u64,
    /// The machine was held since the vCPU ran.
    was_held: bool,
    /// Registers were loaded since the vCPU ran.
    was_loaded: bool,
    steal: Steal,
    /// Another vCPU has ended this one's HLT, or its next one.
    pub(crate) unhalted: bool,
}

impl Unit {
    /// The VM's other vCPUs have this clock, too.
    pub(crate) fn share(&mut self, clock: Arc<VmClock>) {
        self.clock = clock;
    }

    /// The registers.
    pub(crate) fn registers(&self) -> Paravirt {
        self.registers
    }
}

/// Takes over the registers of a state; its counter is in force already. Guest memory stays as it is until the vCPU runs.
pub(crate) fn load(cpu: &mut Cpu, state: &VcpuState) {
    cpu.paravirt.registers = state.paravirt;
    cpu.paravirt.clock_is_stale = true;
    cpu.paravirt.was_loaded = true;
    cpu.paravirt.unhalted = false;
    clock::take_over(cpu, state.tsc);
}

/// The vCPU is about to run, on a thread that may be another than before.
pub(crate) fn enter(cpu: &mut Cpu) {
    clock::enter(cpu);
    let loaded = std::mem::take(&mut cpu.paravirt.was_loaded);
    steal::enter(cpu, loaded);
    if loaded {
        end_async_faults(cpu);
    }
}

/// Page faults whose ends another engine would have told have ended: here none is outstanding.
fn end_async_faults(cpu: &Cpu) {
    const TOLD: u64 = ENABLED | async_pf::BY_INTERRUPT;
    let Paravirt { async_pf, async_pf_vector, .. } = cpu.paravirt.registers;
    if async_pf & TOLD != TOLD {
        return;
    }
    let token = GuestAddress((async_pf & !0x3f) + async_pf::TOKEN);
    if cpu.mmu.ram().memory().write_obj(async_pf::ALL, token).is_ok() {
        let data = async_pf_vector as u32 & 0xff;
        cpu.bus().deliver(Message { address: MESSAGES | u64::from(cpu.id) << 12, data });
    }
}

/// Changes an area of the guest's that has a version at this offset, which is odd as long as the area changes. Guests
/// may name any address: where there is no RAM, nothing is written.
fn update(
    ram: &GuestRam,
    area: u64,
    len: usize,
    version: u64,
    change: impl FnOnce(&GuestMemoryMmap) -> guest_memory::Result<()>,
) {
    let memory = ram.memory();
    if !memory.check_range(GuestAddress(area), len, Permissions::Write) {
        return;
    }
    let version = GuestAddress(area + version);
    let write = || {
        let odd = memory.read_obj::<u32>(version)?.wrapping_add(1) | 1;
        memory.write_obj(odd, version)?;
        fence(Ordering::SeqCst);
        change(memory)?;
        fence(Ordering::SeqCst);
        memory.write_obj(odd.wrapping_add(1), version)
    };
    // It is RAM, as was checked.
    let _: guest_memory::Result<()> = write();
}

#[cfg(test)]
mod tests;
