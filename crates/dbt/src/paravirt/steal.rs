//! Stolen time: how long the vCPU's thread could have run but the host ran others.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::atomic::{Ordering, fence},
};

use ruse_arch::paravirt::{ENABLED, steal_time};
use vm_memory::{Bytes, GuestAddress};

use super::update;
use crate::cpu::Cpu;

/// The guest looks at it in its ticks; more than one update in as many milliseconds would be for nobody.
const INTERVAL_NS: u64 = 1_000_000;

/// Where the host says how long the calling thread has waited for a CPU: the second number, in nanoseconds
/// (Documentation/scheduler/sched-stats.rst).
const SOURCE: &str = "/proc/thread-self/schedstat";

/// What is known of the vCPU's thread.
#[derive(Default)]
pub(super) struct Steal {
    /// Open for the thread that runs the vCPU.
    pub(super) source: Option<File>,
    /// Nanoseconds that the guest knows of.
    pub(super) told: u64,
    /// Nothing is done before the machine's clock is here.
    pub(super) next: u64,
}

/// Whether the host tells how long threads wait.
pub(super) fn is_known() -> bool {
    File::open(SOURCE).is_ok_and(|file| waited(&file).is_some())
}

/// How long the thread of `source` has waited.
fn waited(source: &File) -> Option<u64> {
    let mut text = [0; 64];
    let len = source.read_at(&mut text, 0).ok()?;
    std::str::from_utf8(&text[..len]).ok()?.split(' ').nth(1)?.parse().ok()
}

/// The address of the guest's area, if it has one.
fn area(cpu: &Cpu) -> Option<u64> {
    let register = cpu.paravirt.registers.steal_time;
    (register & ENABLED != 0).then_some(register & !ENABLED)
}

/// Begins to count on this thread. What it waited before is nothing to the guest.
pub(super) fn enter(cpu: &mut Cpu, loaded: bool) {
    let Some(area) = area(cpu) else { return };
    cpu.paravirt.steal.source = File::open(SOURCE).ok();
    cpu.paravirt.steal.told = cpu.paravirt.steal.source.as_ref().and_then(waited).unwrap_or(0);
    cpu.paravirt.steal.next = 0;
    if loaded {
        // Another engine may have left a vCPU marked as preempted, for which others flush no TLB but ask for it here.
        // They see the mark gone before the flush.
        let preempted = GuestAddress(area.wrapping_add(steal_time::PREEMPTED));
        let _ = cpu.mmu.ram().memory().write_obj(0u8, preempted);
        fence(Ordering::SeqCst);
        cpu.mmu.flush_all();
        cpu.update_mode();
    }
}

/// Tells the guest what was stolen, if it wants to know and enough time has passed. Called with each interrupt: ticks
/// are where guests look.
#[inline]
pub(crate) fn tell(cpu: &mut Cpu) {
    if cpu.paravirt.registers.steal_time & ENABLED != 0 {
        tell_guest(cpu);
    }
}

fn tell_guest(cpu: &mut Cpu) {
    let now = cpu.clock.now_ns();
    if now < cpu.paravirt.steal.next {
        return;
    }
    cpu.paravirt.steal.next = now + INTERVAL_NS;
    let Some(waited) = cpu.paravirt.steal.source.as_ref().and_then(waited) else { return };
    let stolen = waited.saturating_sub(std::mem::replace(&mut cpu.paravirt.steal.told, waited));
    let Some(area) = area(cpu) else { return };
    if stolen == 0 {
        return;
    }
    update(cpu.mmu.ram(), area, steal_time::LEN, steal_time::VERSION, |memory| {
        let at = GuestAddress(area + steal_time::NANOSECONDS);
        memory.write_obj(memory.read_obj::<u64>(at)?.wrapping_add(stolen), at)
    });
}
