//! The vCPUs' part of the dirty log, by the best interface that the host has.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak,
        atomic::{AtomicU32, Ordering},
    },
};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use ruse_engine::{EngineError, WriteLog};
use ruse_memory::{DirtyPages, GuestRam, PAGE_SIZE};

use crate::{handle::Handle, ioctl, mapping::Mapping, vm::Shared};

/// Entries of a ring: its bytes are a power of two, and some 600 are the kernel's reserve.
const ENTRIES: usize = 4096;
const RING_BYTES: usize = ENTRIES * size_of::<kvm_dirty_gfn>();
/// How often the kernel is asked to take back what was seen until it is clear that it does not.
const RESETS: usize = 100;
/// States of an entry: free, then written by the kernel, then seen here, then free again.
const DIRTY: u32 = 1;
const SEEN: u32 = 2;

/// How KVM says which pages vCPUs have written, the best first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogInterface {
    /// A list by each vCPU (KVM_CAP_DIRTY_LOG_RING).
    #[default]
    Ring,
    /// A bitmap, of which pages are watched anew when told (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
    ClearedBitmap,
    /// A bitmap, of which each look watches all pages anew.
    Bitmap,
}

impl LogInterface {
    /// The best that the host has, from `self` on. To be called before there are vCPUs: a VM with rings has them from
    /// the beginning. While nothing is logged they cost 64 KiB of the kernel's memory for each vCPU and the test of a
    /// bit before each entry, so they are there always; a look then costs what was written, not what RAM there is.
    pub fn enable(self, vm: &VmFd) -> Self {
        let has = |cap: u32| vm.check_extension_raw(cap.into());
        let enable = |cap, argument| {
            let mut cap = kvm_enable_cap { cap, ..Default::default() };
            cap.args[0] = argument;
            vm.enable_cap(&cap).is_ok()
        };
        // On x86 the two names mean the same.
        let rings = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
        let ring = rings.into_iter().find(|&cap| has(cap) as i64 >= RING_BYTES as i64);
        if self == Self::Ring && ring.is_some_and(|cap| enable(cap, RING_BYTES as u64)) {
            return Self::Ring;
        }
        let manual = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
        let can_clear = has(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).max(0) as u64 & manual != 0;
        if self <= Self::ClearedBitmap && can_clear && enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, manual) {
            return Self::ClearedBitmap;
        }
        Self::Bitmap
    }
}

/// The log of a VM.
pub struct Log {
    interface: LogInterface,
    rings: Mutex<Rings>,
    /// Bitmaps by slot whose pages are to be watched anew.
    seen: Mutex<Vec<(u32, Vec<u64>)>>,
    /// Held for reading while tier 0 finishes an instruction.
    finishing: RwLock<()>,
}

/// The rings of a VM.
#[derive(Default)]
struct Rings {
    list: Vec<Ring>,
    /// Entries that were seen and that the kernel has not got back.
    seen: u32,
    /// Entries were lost, and with them the kernel's place in the ring is.
    overflowed: bool,
}

/// The ring of one vCPU.
struct Ring {
    vcpu: Weak<Handle>,
    /// Mapped when it is first looked into.
    entries: Option<Mapping>,
    next: usize,
}

impl Log {
    /// A log by an interface that is enabled.
    pub fn new(interface: LogInterface) -> Self {
        Self { interface, rings: Mutex::default(), seen: Mutex::default(), finishing: RwLock::default() }
    }

    /// There is a new vCPU.
    pub fn add_vcpu(&self, vcpu: &Arc<Handle>) {
        if self.interface == LogInterface::Ring {
            self.rings().list.push(Ring { vcpu: Arc::downgrade(vcpu), entries: None, next: 0 });
        }
    }

    /// Tier 0, which notes what it writes before it does, finishes an instruction until the value is dropped.
    pub fn finishing(&self) -> RwLockReadGuard<'_, ()> {
        self.finishing.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn rings(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    /// Maps it, if it is not yet.
    fn map(&mut self) -> io::Result<()> {
        if let (None, Some(vcpu)) = (&self.entries, self.vcpu.upgrade()) {
            self.entries = Some(Mapping::new(vcpu.file(), KVM_DIRTY_LOG_PAGE_OFFSET, RING_BYTES)?);
        }
        Ok(())
    }

    /// The next page: its slot and its number there.
    fn take(&mut self) -> Option<(u32, u64)> {
        let entry = self.entries.as_ref()?.at::<kvm_dirty_gfn>(0, self.next % ENTRIES);
        // SAFETY: an entry of the mapping; its flags say whose it is, and both sides access them as atomics.
        let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
        if flags.load(Ordering::Acquire) != DIRTY {
            return None;
        }
        // SAFETY: the kernel leaves an entry alone that is dirty.
        let page = unsafe { ((*entry).slot, (*entry).offset) };
        flags.store(SEEN, Ordering::Release);
        self.next += 1;
        Some(page)
    }
}

impl Rings {
    /// Notes what is in the rings.
    fn note(&mut self, ram: &GuestRam) -> io::Result<()> {
        let mut full = false;
        for ring in &mut self.list {
            ring.map()?;
            let before = self.seen;
            while let Some((slot, page)) = ring.take() {
                self.seen += 1;
                // The upper half is the address space, of which there is one without system management mode.
                if let Some(region) = ram.regions().get(slot as usize & 0xffff)
                    && let Some((tracker, offset)) = ram.tracker(region.gpa + page * PAGE_SIZE)
                {
                    tracker.note_write(offset);
                }
            }
            // The kernel keeps a reserve, so that this is more than there can be.
            full |= self.seen - before >= ENTRIES as u32;
        }
        if full {
            self.has_overflowed();
        }
        Ok(())
    }

    /// Watches the pages that were seen anew.
    fn reset(&mut self, vm: &VmFd) -> io::Result<()> {
        // A signal may cut it short.
        for _ in 0..RESETS {
            if self.seen == 0 {
                return Ok(());
            }
            self.seen = self.seen.saturating_sub(ioctl::reset_dirty_rings(vm)?);
        }
        self.seen = 0;
        self.has_overflowed();
        Ok(())
    }

    /// A KVM that emulates may go on for long without a look at what it has to do, and write over entries.
    fn has_overflowed(&mut self) {
        if !std::mem::replace(&mut self.overflowed, true) {
            tracing::warn!("KVM's list of written pages has overflowed: from now on all count as written");
        }
    }
}

impl Shared {
    /// A vCPU's ring is full.
    pub fn make_room(&self) -> io::Result<()> {
        let mut rings = self.log.rings();
        rings.note(&self.ram)?;
        rings.reset(&self.fd)
    }

    fn note_rings(&self) -> io::Result<()> {
        // What a vCPU has written may be in the CPU's own list until it leaves the guest.
        let vcpus: Vec<_> = self.log.rings().list.iter().filter_map(|ring| ring.vcpu.upgrade()).collect();
        vcpus.iter().for_each(|vcpu| vcpu.wait_outside());
        let mut rings = self.log.rings();
        rings.note(&self.ram)?;
        if rings.overflowed {
            self.ram.note_all_writes();
        }
        Ok(())
    }

    /// Notes what is in the bitmaps.
    fn note_bitmaps(&self) -> io::Result<()> {
        let mut seen = self.log.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for (slot, region) in (0..).zip(self.ram.regions()).filter(|(_, region)| !region.read_only) {
            let bitmap = self.fd.get_dirty_log(slot, region.size as usize)?;
            let pages = DirtyPages { gpa: region.gpa, bitmap };
            self.ram.note_writes(&pages);
            if self.log.interface == LogInterface::ClearedBitmap && pages.count() > 0 {
                seen.push((slot, pages.bitmap));
            }
        }
        Ok(())
    }

    fn watch_anew(&self) -> io::Result<()> {
        if self.log.interface == LogInterface::Ring {
            return self.log.rings().reset(&self.fd);
        }
        let mut seen = self.log.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for (slot, mut bitmap) in seen.drain(..) {
            let pages = self.ram.regions()[slot as usize].size / PAGE_SIZE;
            ioctl::clear_dirty_log(&self.fd, slot, pages as u32, &mut bitmap)?;
        }
        Ok(())
    }
}

impl WriteLog for Shared {
    fn set_logging(&self, on: bool) -> Result<(), EngineError> {
        self.set_slots(on)
    }

    fn collect(&self) -> Result<(), EngineError> {
        let failed = |source| EngineError::Host { what: "KVM does not say which pages were written", source };
        match self.log.interface {
            LogInterface::Ring => self.note_rings(),
            LogInterface::ClearedBitmap | LogInterface::Bitmap => self.note_bitmaps(),
        }
        .map_err(failed)
    }

    fn rearm(&self) -> Result<(), EngineError> {
        self.watch_anew()
            .map_err(|source| EngineError::Host { what: "KVM does not watch pages anew", source })?;
        drop(self.log.finishing.write().unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }
}
