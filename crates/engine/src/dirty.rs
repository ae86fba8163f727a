//! The dirty log: which pages of RAM were written since the last look, by vCPUs, devices or loaders.

use std::sync::Arc;

use ruse_memory::{DirtyPages, GuestRam};

use crate::{EngineError, Vm};

/// An engine's part of the log: it notes what vCPUs write in the RAM's [`ruse_memory::PageTracker`], where writes of devices
/// and loaders are noted anyway. For the use of [`DirtyLog`].
pub trait WriteLog: Send + Sync {
    /// Notes the writes of vCPUs from now on, or no longer. Of pages that a vCPU could write to before, writes are noted
    /// only after [`WriteLog::rearm`].
    fn set_logging(&self, on: bool) -> Result<(), EngineError>;
    /// Notes the writes that were made before the call and are known elsewhere up to now.
    fn collect(&self) -> Result<(), EngineError>;
    /// What was noted has been taken. When this returns, writes to those pages are noted anew, and the bytes of those that
    /// were not are in RAM.
    fn rearm(&self) -> Result<(), EngineError>;
}

/// A dirty log that goes on until it is dropped. A VM has at most one.
pub struct DirtyLog {
    vm: Arc<dyn Vm>,
    ram: GuestRam,
}

impl DirtyLog {
    /// Starts the log of a VM over `ram`. The vCPUs may run.
    pub fn start(vm: Arc<dyn Vm>, ram: GuestRam) -> Result<Self, EngineError> {
        vm.write_log().set_logging(true)?;
        let log = Self { vm, ram };
        log.take()?;
        Ok(log)
    }

    /// Takes the pages that were written since the last call (or the start), by region of RAM. The vCPUs may run; what the
    /// pages hold is to be read afterwards: a write that is not in this answer and not in those bytes is in the next
    /// answer.
    ///
    /// Waits until instructions under way are done, so the caller holds no lock that an access of the
    /// [`Bus`](crate::Bus) waits for, and is no such access.
    pub fn take(&self) -> Result<Vec<DirtyPages>, EngineError> {
        let engine = self.vm.write_log();
        engine.collect()?;
        let pages = self.ram.take_dirty();
        engine.rearm()?;
        Ok(pages)
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        // Without effect on what the guest does, if it fails.
        let _ = self.vm.write_log().set_logging(false);
    }
}
