//! The vCPUs' part of the dirty log.
//!
//! While the log is on, an entry of a TLB gets the right to write only with a write, and the page is noted before. When
//! the notes have been taken, every vCPU drops that right from all its entries before its next instruction. What an
//! instruction under way writes to a page whose note is taken has been written when [`WriteLog::rearm`] returns.

use std::{sync::atomic::Ordering, thread};

use ruse_engine::{EngineError, WriteLog};

use super::watch::CodeMap;
use crate::cpu::request;

impl CodeMap {
    /// Whether vCPUs note the pages that they write to.
    #[inline]
    pub fn is_logging(&self) -> bool {
        self.logging.load(Ordering::Relaxed)
    }

    /// Says whether vCPUs note the pages that they write to. Entries that have the right already keep it.
    pub fn log_writes(&self, on: bool) {
        self.logging.store(on, Ordering::SeqCst);
    }
}

impl WriteLog for CodeMap {
    fn set_logging(&self, on: bool) -> Result<(), EngineError> {
        self.log_writes(on);
        Ok(())
    }

    fn collect(&self) -> Result<(), EngineError> {
        Ok(())
    }

    fn rearm(&self) -> Result<(), EngineError> {
        let vcpus = self.peers_in(u64::MAX);
        vcpus.iter().for_each(|vcpu| vcpu.request(request::LOG));
        for vcpu in vcpus {
            while !vcpu.has_seen(request::LOG) {
                thread::yield_now();
            }
        }
        Ok(())
    }
}
