//! One vCPU executes while all others stand still: for locked accesses that the host cannot make in one.
//!
//! A locked access is atomic for every access of other processors to any of its bytes, locked or not, also where it
//! leaves a cache line or a page (SDM volume 3, 9.1.2). But pages that are neighbours in the guest are not on the host,
//! and a host may fault on what leaves a line. Tier 0 makes such an access as a read and a write, alone. Devices go on.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    thread,
};

use super::watch::{CodeMap, Peer};
use crate::cpu::request;

/// Whose turn it is, in the whole process: vCPUs of another engine that tier 0 finishes instructions for have no code map
/// in common.
static TURN: Mutex<()> = Mutex::new(());

/// The other vCPUs stand still until this is dropped.
pub struct Alone {
    others: Vec<Arc<Peer>>,
    _turn: MutexGuard<'static, ()>,
}

impl CodeMap {
    /// Waits until no vCPU but `id`, which calls this in the middle of an instruction, executes any.
    pub fn alone(&self, id: u32) -> Alone {
        let take_turn = || TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = match self.peer(id) {
            Some(this) => this.stand_still(take_turn),
            None => take_turn(),
        };
        let others = self.peers_in(!(1 << id));
        others.iter().for_each(|peer| peer.request(request::STAND_STILL));
        for peer in &others {
            while !peer.stands_still() {
                thread::yield_now();
            }
        }
        Alone { others, _turn: turn }
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        self.others.iter().for_each(|peer| peer.withdraw(request::STAND_STILL));
    }
}

impl Peer {
    /// Calls `wait`, in which this vCPU executes nothing, and returns when no other one is alone.
    pub fn stand_still<R>(&self, wait: impl FnOnce() -> R) -> R {
        self.still.store(true, Ordering::SeqCst);
        let result = wait();
        loop {
            while self.requests() & request::STAND_STILL != 0 {
                thread::yield_now();
            }
            self.still.store(false, Ordering::SeqCst);
            // Who has asked before that may have seen it stand still.
            if self.requests() & request::STAND_STILL == 0 {
                return result;
            }
            self.still.store(true, Ordering::SeqCst);
        }
    }

    /// Whether the vCPU executes nothing as long as it is asked to stand still.
    fn stands_still(&self) -> bool {
        !self.is_inside() || self.still.load(Ordering::SeqCst)
    }
}
