//! The guest's clock: a page that says how its time-stamp counter counts nanoseconds, and the wall clock's time at zero.
//!
//! The clock is the machine's. One that came from another engine may be ahead of that; by how much, all vCPUs of the VM
//! share.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use ruse_arch::paravirt::{ClockPage, ENABLED, clock_flag};
use ruse_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::update;
use crate::cpu::Cpu;

/// What the vCPUs of a VM share.
#[derive(Default)]
pub(crate) struct VmClock {
    /// Nanoseconds by which the guest's clock is ahead of the machine's.
    lead: AtomicU64,
    /// What was last written to the wall clock's register.
    pub(super) wall_clock: AtomicU64,
}

/// The clock that guest memory has at this address.
fn read(ram: &GuestRam, area: u64) -> Option<ClockPage> {
    let mut bytes = [0; 24];
    let body = GuestAddress(area.checked_add(ClockPage::BODY)?);
    ram.memory().read_slice(&mut bytes, body).ok()?;
    Some(ClockPage::from_bytes(&bytes))
}

/// The address of the vCPU's clock, if the guest has one.
fn area(cpu: &Cpu) -> Option<u64> {
    let register = cpu.paravirt.registers.system_time;
    (register & ENABLED != 0).then_some(register & !ENABLED)
}

/// The clock goes on where it was when the vCPU's counter was `tsc`. Zero says nothing.
pub(super) fn take_over(cpu: &Cpu, tsc: u64) {
    if tsc == 0 {
        return;
    }
    if let Some(page) = area(cpu).and_then(|area| read(cpu.mmu.ram(), area)) {
        // A clock that is behind goes forward, so that it is the same on all vCPUs.
        let lead = page.at(tsc).saturating_sub(cpu.clock.now_ns());
        cpu.paravirt.clock.lead.fetch_max(lead, Ordering::SeqCst);
    }
}

/// Brings the clock up to date before the vCPU runs.
pub(super) fn enter(cpu: &mut Cpu) {
    let lead = cpu.paravirt.clock.lead.load(Ordering::SeqCst);
    if cpu.paravirt.clock_is_stale || cpu.paravirt.clock_lead != lead || cpu.paravirt.was_held {
        write(cpu);
    }
}

/// Writes the clock, if the guest has one: after changes of its address and of the counter.
pub(crate) fn write(cpu: &mut Cpu) {
    let lead = cpu.paravirt.clock.lead.load(Ordering::SeqCst);
    (cpu.paravirt.clock_is_stale, cpu.paravirt.clock_lead) = (false, lead);
    let held = std::mem::take(&mut cpu.paravirt.was_held);
    let Some(area) = area(cpu) else { return };
    let ram = cpu.mmu.ram();
    // What the guest has not seen yet stays.
    let unseen = read(ram, area).is_some_and(|old| old.flags & clock_flag::STOPPED != 0);
    let stopped = if held || unseen { clock_flag::STOPPED } else { 0 };
    // From the machine's zero on, so that it is exactly the same on all vCPUs.
    let page = ClockPage {
        tsc: cpu.tsc_lead(),
        nanoseconds: lead,
        flags: clock_flag::STABLE | stopped,
        ..ClockPage::with_frequency(cpu.clock.tsc_hz())
    };
    update(ram, area, ClockPage::LEN, 0, |memory| {
        memory.write_slice(&page.to_bytes(), GuestAddress(area + ClockPage::BODY))
    });
}

/// The machine was held: the guest's watchdogs are told when the vCPU runs on.
pub(crate) fn held(cpu: &mut Cpu) {
    cpu.paravirt.was_held = area(cpu).is_some();
}

/// Writes the wall clock's time at the zero of the guest's clock: version, seconds and nanoseconds, 32 bits each.
pub(super) fn write_wall_clock(cpu: &Cpu, area: u64) {
    let now = cpu.clock.now_ns().wrapping_add(cpu.paravirt.clock.lead.load(Ordering::SeqCst));
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let zero = wall.saturating_sub(now.into());
    let (seconds, nanoseconds) = ((zero / 1_000_000_000) as u32, (zero % 1_000_000_000) as u32);
    update(cpu.mmu.ram(), area, 12, 0, |memory| {
        memory.write_obj(seconds, GuestAddress(area + 4))?;
        memory.write_obj(nanoseconds, GuestAddress(area + 8))
    });
}
