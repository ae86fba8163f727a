//! What is known about each page of a region: whether it was written, and whether somebody watches writes.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, Ordering, fence},
    },
};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use crate::PAGE_SIZE;

const DIRTY: u8 = 1;
const WATCHED: u8 = 2;

/// Hears of writes to watched pages.
pub trait WriteListener: Send + Sync {
    /// The page at `gpa` was written by a device or loader. Called after the bytes are in memory.
    fn page_written(&self, gpa: u64);
}

/// Flags of each page of one region; clones share them. A `vm-memory` bitmap: that crate reports each write through it.
#[derive(Clone, Default)]
pub struct PageTracker {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    pages: Box<[AtomicU8]>,
    listener: OnceLock<(u64, Arc<dyn WriteListener>)>,
}

impl fmt::Debug for PageTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTracker").field("pages", &self.inner.pages.len()).finish_non_exhaustive()
    }
}

impl PageTracker {
    pub(crate) fn set_listener(&self, base: u64, listener: Arc<dyn WriteListener>) {
        let _ = self.inner.listener.set((base, listener));
    }

    /// Watches the page at `offset` (in bytes): later writes through `vm-memory` reach the listener. Whoever derives
    /// something from the page's bytes reads them after this call.
    pub fn watch(&self, offset: usize) {
        self.flags(offset).fetch_or(WATCHED, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }
    /// Stops watching the page at `offset`.
    pub fn unwatch(&self, offset: usize) {
        self.flags(offset).fetch_and(!WATCHED, Ordering::SeqCst);
    }
    /// The page at `offset` is written by a vCPU. Who watches it is not told: engines see to that themselves.
    pub fn note_write(&self, offset: usize) {
        let flags = self.flags(offset);
        if flags.load(Ordering::SeqCst) & DIRTY == 0 {
            flags.fetch_or(DIRTY, Ordering::SeqCst);
        }
    }
    /// Whether the page at `offset` was written since the last call.
    pub fn take_dirty(&self, offset: usize) -> bool {
        let flags = self.flags(offset);
        flags.load(Ordering::SeqCst) & DIRTY != 0 && flags.fetch_and(!DIRTY, Ordering::SeqCst) & DIRTY != 0
    }

    fn flags(&self, offset: usize) -> &AtomicU8 {
        &self.inner.pages[offset / PAGE_SIZE as usize]
    }
}

impl<'a> WithBitmapSlice<'a> for PageTracker {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for PageTracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        fence(Ordering::SeqCst);
        let page = PAGE_SIZE as usize;
        for index in offset / page..=(offset + len - 1) / page {
            let Some(flags) = self.inner.pages.get(index) else { return };
            let old = flags.load(Ordering::SeqCst);
            if old & DIRTY == 0 {
                flags.fetch_or(DIRTY, Ordering::AcqRel);
            }
            if old & WATCHED != 0
                && let Some((base, listener)) = self.inner.listener.get()
            {
                listener.page_written(base + (index * page) as u64);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.flags(offset).load(Ordering::Acquire) & DIRTY != 0
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for PageTracker {
    fn with_len(len: usize) -> Self {
        // Most pages of a large region may never be touched, and then neither is their part of this.
        let pages = Box::new_zeroed_slice(len.div_ceil(PAGE_SIZE as usize));
        // SAFETY: zero is a value of every `AtomicU8`.
        let pages = unsafe { pages.assume_init() };
        Self { inner: Arc::new(Inner { pages, listener: OnceLock::new() }) }
    }
}
