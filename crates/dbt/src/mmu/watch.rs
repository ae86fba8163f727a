//! Who has translated code from a page of RAM, and who may write to it directly: what keeps translations true when code
//! is written by its own vCPU, by another one, or by a device.
//!
//! A vCPU that is about to translate from a page registers first ([`CodeMap::watch`]); the other vCPUs that could write
//! to the page without being seen give that right up before the first byte is read. A vCPU that gains the right to
//! write registers first too, and looks for code afterwards, so that one of the two always sees the other.
//!
//! Only translated code is waited for. Whoever else writes (tier 0, the walk of the page tables, devices) looks for code
//! after the bytes are there. Between the two steps of either side is a full fence, so that either the writer sees that
//! the page is watched, and posts its note, or the translator reads the new bytes.

use std::sync::{
    Arc, Mutex, PoisonError, RwLock,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence},
};

use ruse_memory::{GuestRam, PAGE_SIZE, WriteListener};

use crate::cpu::{Arena, request};

/// Most vCPUs of a VM: one bit each in the masks of a page.
pub const MAX_VCPUS: u32 = 64;

/// What a vCPU is told about a page of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// The page (guest physical address) was written and translations of it are void.
    Written(u64),
    /// Direct writes to the page must end.
    Guard(u64),
}

#[derive(Default)]
struct PageMasks {
    /// vCPUs with translations from the page.
    code: AtomicU64,
    /// vCPUs that may write to the page directly.
    writers: AtomicU64,
}

/// One vCPU as the others see it.
pub struct Peer {
    arena: Arc<Arena>,
    notes: Mutex<Vec<Note>>,
    /// Translated code is being executed.
    running: AtomicU32,
    /// Guest instructions are being executed, by any tier.
    inside: AtomicBool,
    /// It stands still in the middle of an instruction, or before one.
    pub(super) still: AtomicBool,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl Peer {
    /// Marks the beginning and the end of translated code on this vCPU.
    pub fn set_running(&self, running: bool) {
        self.running.store(u32::from(running), Ordering::SeqCst);
    }
    /// The vCPU executes guest instructions until the value is dropped. It looks at its requests before each.
    pub fn enter(self: &Arc<Self>) -> Inside {
        self.inside.store(true, Ordering::SeqCst);
        Inside(self.clone())
    }
    /// Calls `wait`, in which the vCPU executes no instructions.
    pub fn outside<R>(&self, wait: impl FnOnce() -> R) -> R {
        self.inside.store(false, Ordering::SeqCst);
        let result = wait();
        self.inside.store(true, Ordering::SeqCst);
        result
    }
    /// Asks for something, without getting the vCPU out of a wait.
    pub(super) fn request(&self, bits: u32) {
        self.arena.shared.raise(bits);
    }
    /// Takes back what was asked for.
    pub(super) fn withdraw(&self, bits: u32) {
        self.arena.shared.take(bits);
    }
    /// What is asked of it.
    pub(super) fn requests(&self) -> u32 {
        self.arena.shared.requests.load(Ordering::SeqCst)
    }
    /// Whether it may execute guest instructions now.
    pub(super) fn is_inside(&self) -> bool {
        self.inside.load(Ordering::SeqCst)
    }
    /// Whether the vCPU has seen these requests, or will before its next instruction.
    pub(super) fn has_seen(&self, bits: u32) -> bool {
        !self.is_inside() || self.requests() & bits == 0
    }
    /// Raises requests and gets the vCPU out of a wait.
    pub fn wake_with(&self, bits: u32) {
        self.request(bits);
        (self.wake)();
    }
    /// Takes the notes that have arrived.
    pub fn take_notes(&self) -> Vec<Note> {
        std::mem::take(&mut self.notes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn post(&self, note: Note) {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).push(note);
        self.wake_with(request::MEMORY);
    }

    fn is_done(&self) -> bool {
        self.running.load(Ordering::SeqCst) == 0
            || self.notes.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

/// See [`Peer::enter`].
pub struct Inside(Arc<Peer>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.inside.store(false, Ordering::SeqCst);
    }
}

/// The pages of a VM's RAM with their masks, shared by its vCPUs.
pub struct CodeMap {
    ram: GuestRam,
    regions: Vec<(u64, Box<[PageMasks]>)>,
    /// vCPUs note the pages that they write to.
    pub(super) logging: AtomicBool,
    peers: RwLock<Vec<Option<Arc<Peer>>>>,
}

impl CodeMap {
    /// No code anywhere in `ram`. Hears of writes by devices from now on.
    pub fn new(ram: GuestRam) -> Arc<Self> {
        let regions = ram
            .regions()
            .iter()
            .map(|r| {
                // What a guest never executes or writes to costs no memory here either.
                let pages = Box::new_zeroed_slice((r.size / PAGE_SIZE) as usize);
                // SAFETY: a mask that is zero is one of no vCPUs.
                (r.gpa, unsafe { pages.assume_init() })
            })
            .collect();
        let logging = AtomicBool::new(false);
        let map = Arc::new(Self { ram: ram.clone(), regions, logging, peers: RwLock::default() });
        ram.set_write_listener(Arc::new(DeviceWrites(Arc::downgrade(&map))));
        map
    }

    /// Registers vCPU `id`; `wake` gets it out of a wait.
    pub fn join(&self, id: u32, arena: Arc<Arena>, wake: Box<dyn Fn() + Send + Sync>) -> Arc<Peer> {
        let peer = Arc::new(Peer {
            arena,
            notes: Mutex::default(),
            running: AtomicU32::new(0),
            inside: AtomicBool::new(false),
            still: AtomicBool::new(false),
            wake,
        });
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        if peers.len() <= id as usize {
            peers.resize(id as usize + 1, None);
        }
        peers[id as usize] = Some(peer.clone());
        peer
    }

    /// vCPU `id`, if there is one.
    pub fn peer(&self, id: u32) -> Option<Arc<Peer>> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner).get(id as usize)?.clone()
    }

    /// vCPU `id` gains the right to write directly to the page, unless there is code on it.
    pub fn allow_writes(&self, gpa: u64, id: u32) -> bool {
        let Some(page) = self.page(gpa) else { return false };
        let bit = 1 << id;
        if page.writers.load(Ordering::SeqCst) & bit == 0 {
            page.writers.fetch_or(bit, Ordering::SeqCst);
        }
        page.code.load(Ordering::SeqCst) == 0
    }

    /// Whether vCPU `id` may have entries that write directly to the page.
    pub fn is_writer(&self, gpa: u64, id: u32) -> bool {
        self.page(gpa).is_some_and(|page| page.writers.load(Ordering::SeqCst) & (1 << id) != 0)
    }

    /// Whether vCPU `id` may have entries that write directly to the page; forgets it.
    pub fn take_writer(&self, gpa: u64, id: u32) -> bool {
        let bit = 1 << id;
        self.page(gpa).is_some_and(|p| p.writers.fetch_and(!bit, Ordering::SeqCst) & bit != 0)
    }

    /// Whether any vCPU has translations from the page.
    pub fn has_code(&self, gpa: u64) -> bool {
        self.page(gpa).is_some_and(|p| p.code.load(Ordering::SeqCst) != 0)
    }

    /// vCPU `id` is about to translate from the page: when this returns, nobody else writes to it unseen. It reads the
    /// page's bytes afterwards. Must not be called while the caller counts as running.
    pub fn watch(&self, gpa: u64, id: u32) {
        let Some(page) = self.page(gpa) else { return };
        if page.code.fetch_or(1 << id, Ordering::SeqCst) & (1 << id) != 0 {
            return;
        }
        if let Some((tracker, offset)) = self.ram.tracker(gpa) {
            tracker.watch(offset);
        }
        fence(Ordering::SeqCst);
        let others = self.peers_in(page.writers.load(Ordering::SeqCst) & !(1 << id));
        let guard = || {
            for peer in &others {
                peer.post(Note::Guard(gpa & !(PAGE_SIZE - 1)));
                while !peer.is_done() {
                    std::hint::spin_loop();
                }
            }
        };
        match self.peer(id) {
            // One of them may wait for this vCPU to stand still.
            Some(this) if !others.is_empty() => this.stand_still(guard),
            _ => guard(),
        }
    }

    /// vCPU `id` has no translations from the page any more.
    pub fn unwatch(&self, gpa: u64, id: u32) {
        if let Some(page) = self.page(gpa) {
            page.code.fetch_and(!(1 << id), Ordering::SeqCst);
        }
    }

    /// The page was written by vCPU `id`, which looks after its own translations (`None`: nobody does, as with a device).
    /// A full fence lies between the write and this call.
    pub fn written(&self, gpa: u64, id: Option<u32>) {
        let Some(page) = self.page(gpa) else { return };
        let own = id.map_or(0, |id| 1u64 << id);
        let others = page.code.load(Ordering::SeqCst) & !own;
        for peer in self.peers_in(others) {
            peer.post(Note::Written(gpa & !(PAGE_SIZE - 1)));
        }
    }

    pub(super) fn peers_in(&self, mask: u64) -> Vec<Arc<Peer>> {
        if mask == 0 {
            return Vec::new();
        }
        let peers = self.peers.read().unwrap_or_else(PoisonError::into_inner);
        peers.iter().enumerate().filter(|(i, _)| mask >> i & 1 != 0).filter_map(|(_, p)| p.clone()).collect()
    }

    fn page(&self, gpa: u64) -> Option<&PageMasks> {
        self.regions
            .iter()
            .find_map(|(base, pages)| pages.get(usize::try_from(gpa.checked_sub(*base)? / PAGE_SIZE).ok()?))
    }
}

/// Passes writes of devices on to the vCPUs that have translations.
struct DeviceWrites(std::sync::Weak<CodeMap>);

impl WriteListener for DeviceWrites {
    fn page_written(&self, gpa: u64) {
        if let Some(map) = self.0.upgrade() {
            map.written(gpa, None);
        }
    }
}
