//! What becomes of mappings, for those who keep copies of them outside the TLB (direct execution): they come by later, and
//! must not use a copy before.

use std::collections::VecDeque;

/// Something that copies of mappings have to follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The page of a linear address was flushed, in all address spaces.
    Page(u64),
    /// Everything of a process-context identifier was flushed.
    Space(u16),
    /// Nothing must write directly to the page of this guest physical address.
    Writer(u64),
    /// Nothing must write directly to any page.
    Writers,
}

/// Changes kept at most; who is further behind has to look at everything.
const KEPT: usize = 512;

/// The last changes. Nothing is kept before somebody asks for the first time.
#[derive(Debug, Default)]
pub struct Changes {
    kept: VecDeque<Change>,
    /// Number of the next change.
    next: u64,
    wanted: bool,
}

impl Changes {
    pub(super) fn note(&mut self, change: Change) {
        if !self.wanted {
            return;
        }
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(change);
        self.next += 1;
    }

    /// The number of the next change: what [`Changes::since`] is asked for later.
    pub fn now(&mut self) -> u64 {
        self.wanted = true;
        self.next
    }

    /// The changes since [`Changes::now`] gave a number; `None` if they are not all known any more.
    pub fn since(&self, number: u64) -> Option<Vec<Change>> {
        let new = usize::try_from(self.next - number).ok().filter(|&new| new <= self.kept.len())?;
        Some(self.kept.range(self.kept.len() - new..).copied().collect())
    }
}
