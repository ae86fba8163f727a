//! What a CPU may ask of the interrupt chips without their lock.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// One CPU's view of the interrupt chips, kept up to date by every call that changes them.
#[derive(Debug)]
pub struct CpuLine {
    pending: AtomicBool,
    page: AtomicU64,
}

/// No page: an address that no page has.
const NO_PAGE: u64 = u64::MAX;

impl Default for CpuLine {
    fn default() -> Self {
        Self { pending: AtomicBool::new(false), page: AtomicU64::new(NO_PAGE) }
    }
}

impl CpuLine {
    /// Whether an interrupt waits that the task priority lets through.
    ///
    /// A CPU that halts announces that first and asks then; the signal that it must not miss is made after this
    /// changes. Sequentially consistent for that.
    pub fn pending(&self) -> bool {
        self.pending.load(Ordering::SeqCst)
    }

    /// Where the CPU sees its xAPIC page; `None` when the APIC is off or in x2APIC mode.
    pub fn apic_page(&self) -> Option<u64> {
        let page = self.page.load(Ordering::Relaxed);
        (page != NO_PAGE).then_some(page)
    }

    /// Sets whether an interrupt waits; returns whether it now does and did not.
    pub(super) fn set_pending(&self, pending: bool) -> bool {
        // Only the lock's holder writes: the load saves a locked store where nothing changes.
        if self.pending.load(Ordering::Relaxed) == pending {
            return false;
        }
        self.pending.store(pending, Ordering::SeqCst);
        pending
    }

    pub(super) fn set_page(&self, page: Option<u64>) {
        self.page.store(page.unwrap_or(NO_PAGE), Ordering::Relaxed);
    }
}
