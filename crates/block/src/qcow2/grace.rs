//! Clusters that are freed while someone still reads or writes them.
//!
//! A transfer looks its place up and then goes on without the lock. Until it is done, the place must not become anything
//! else. Transfers pin the present age; what is freed waits until no transfer is left that began before it was freed,
//! which two ages, in turn, tell.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::entry::Run;

/// Runs that may wait: in an image as Ruse makes them, 256 MiB of storage.
const MOST: usize = 4096;

/// What was freed, by ages. It is changed under the image's lock only.
#[derive(Debug, Default)]
pub(super) struct Grace {
    pins: [Arc<AtomicUsize>; 2],
    freed: [Vec<Run>; 2],
    age: usize,
}

/// Held during a transfer.
#[derive(Debug)]
pub(super) struct Pin(Arc<AtomicUsize>);

impl Grace {
    pub(super) fn pin(&self) -> Pin {
        let pins = &self.pins[self.age];
        pins.fetch_add(1, Ordering::Relaxed);
        Pin(pins.clone())
    }

    pub(super) fn free(&mut self, run: Run) {
        self.freed[self.age].push(run);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.freed.iter().all(Vec::is_empty)
    }

    /// Whether so much waits that it should be freed now.
    pub(super) fn is_full(&self) -> bool {
        self.freed.iter().map(Vec::len).sum::<usize>() >= MOST
    }

    /// What nobody reads or writes any more.
    pub(super) fn take(&mut self) -> Vec<Run> {
        let mut gone = Vec::new();
        for _ in 0..2 {
            // Transfers of the other age are all that can have begun before what is in it was freed.
            let other = 1 - self.age;
            if self.pins[other].load(Ordering::Acquire) == 0 {
                gone.append(&mut self.freed[other]);
                self.age = other;
            }
        }
        gone
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: Run = Run { offset: 1, len: 1 };

    #[test]
    fn nothing_is_gone_that_someone_uses() {
        let mut grace = Grace::default();
        let early = grace.pin();
        grace.free(RUN);
        assert_eq!(grace.take(), []);
        // Whoever comes later cannot find it.
        let late = grace.pin();
        assert_eq!(grace.take(), []);
        drop(early);
        assert_eq!(grace.take(), [RUN]);
        grace.free(RUN);
        assert_eq!(grace.take(), []);
        drop(late);
        assert_eq!(grace.take(), [RUN]);
        assert!(grace.is_empty());
    }
}
