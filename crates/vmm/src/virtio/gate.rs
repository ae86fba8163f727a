//! Who serves devices passes here: nobody does while the machine is held or reset.

use std::sync::atomic::AtomicBool;
use std::sync::{Condvar, Mutex, PoisonError};

use crate::lifecycle::{Lifecycle, Phase};
use crate::platform::lock;

/// How many serve a device just now.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    inside: Mutex<usize>,
    left: Condvar,
}

/// Held while a device is served.
pub(crate) struct Pass<'a>(&'a Gate);

impl Gate {
    /// Waits until the machine runs; `None` if it has ended, or `gone` was set while it was held.
    pub(crate) fn enter(&self, lifecycle: &Lifecycle, gone: &AtomicBool) -> Option<Pass<'_>> {
        while lifecycle.wait_running(gone) {
            let mut inside = lock(&self.inside);
            // Whoever changes the phase waits for those inside after that, under this lock.
            if lifecycle.phase() == Phase::Running {
                *inside += 1;
                return Some(Pass(self));
            }
        }
        None
    }

    /// Waits until nobody serves a device. The machine does not run.
    pub(crate) fn wait_empty(&self) {
        let mut inside = lock(&self.inside);
        while *inside > 0 {
            inside = self.left.wait(inside).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        *lock(&self.0.inside) -= 1;
        self.0.left.notify_all();
    }
}
