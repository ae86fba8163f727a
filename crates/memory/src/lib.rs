//! Guest physical memory: where RAM lies, the host memory behind it, and who must hear of writes to it.
//!
//! RAM is one memfd mapped shared, so that other processes and other mappings see the same bytes. Regions that devices bring
//! may be mappings of other files. Accesses of devices
//! and loaders go through the `vm-memory` crate ([`GuestRam::memory`]), which reports each write to the
//! [`PageTracker`]; accesses of vCPUs go through raw host addresses ([`GuestRam::host_page`]).

mod dirty;
mod file;
mod layout;
mod pluggable;
mod tracker;
pub mod vectored;

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::Arc,
};

pub use dirty::DirtyPages;
pub use layout::Layout;
use layout::Part;
use pluggable::Blocks;
pub use pluggable::{BLOCK_SIZE, Plugged};
pub use tracker::{PageTracker, WriteListener};
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestRegionMmap};

/// `vm-memory`'s collection of regions with Ruse's tracker.
pub type GuestMemoryMmap = vm_memory::GuestMemoryMmap<PageTracker>;

/// Size of the smallest page in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// RAM below 4 GiB ends here at the latest; PCI windows and chips lie above.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// RAM that does not fit below [`LOW_RAM_END`] goes on here.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// Most RAM of a VM in bytes: what fits under the presented physical address width with room for PCI windows.
pub const MAX_RAM: u64 = 1 << 40;

/// Why RAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size that is zero, not in whole pages or above [`MAX_RAM`].
    #[error("{0} bytes is not a possible size of RAM: whole 4 KiB pages up to 1 TiB")]
    Size(u64),
    /// A region that is not in whole pages, or meets another one.
    #[error("no memory can be at {0:#x}: there is other memory, or it is not a page")]
    Place(u64),
    /// The host refused.
    #[error("cannot reserve {size} bytes for the guest's RAM: {source}")]
    Host {
        /// Bytes asked for.
        size: u64,
        /// The host's answer.
        source: std::io::Error,
    },
}

/// What a region is for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    /// RAM that is there from the beginning, as the memory map says.
    Ram,
    /// What firmware lies in.
    Firmware,
    /// RAM that is plugged in, block by block, and of which a device tells.
    Pluggable,
    /// A file, of which a device tells.
    Persistent,
}

/// A run of RAM in guest physical space with the host memory behind it.
#[derive(Clone, Copy, Debug)]
pub struct RamRegion {
    /// First guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Where the region is mapped in this process.
    pub host: *mut u8,
    /// What it is for the guest.
    pub kind: RegionKind,
    /// Guest CPUs cannot change it: their writes are the machine's, as those to addresses without RAM.
    pub read_only: bool,
}

// SAFETY: a `RamRegion` is only a description; the memory behind it is shared by nature (guest CPUs race on it) and
// stays mapped as long as the `GuestRam` that it came from.
unsafe impl Send for RamRegion {}
// SAFETY: see above.
unsafe impl Sync for RamRegion {}

/// The RAM of one VM. Clones share it.
#[derive(Clone)]
pub struct GuestRam {
    inner: Arc<Inner>,
}

struct Inner {
    memory: GuestMemoryMmap,
    regions: Vec<RamRegion>,
    trackers: Vec<PageTracker>,
    file: Arc<File>,
    /// Where each region begins in `file`, unless it is a mapping of another one.
    offsets: Vec<Option<u64>>,
    pluggable: Option<Blocks>,
    size: u64,
}

impl GuestRam {
    /// Reserves `size` bytes of zeroed RAM: up to 3 GiB from address 0, the rest from 4 GiB.
    pub fn new(size: u64) -> Result<Self, MemoryError> {
        Self::with_layout(&Layout::of_ram(size)?)
    }

    /// Reserves zeroed memory.
    pub fn with_layout(layout: &Layout) -> Result<Self, MemoryError> {
        let size = layout.total();
        let host = |source| MemoryError::Host { size, source };
        let fd = rustix::fs::memfd_create("guest-ram", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(|e| host(e.into()))?;
        let file = Arc::new(File::from(fd));
        file.set_len(size).map_err(host)?;
        let (mut mapped, mut trackers, mut offsets, mut end) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for part in layout.parts() {
            let tracker = PageTracker::with_len(part.size as usize);
            let backing = match &part.file {
                Some(other) => FileOffset::from_arc(other.clone(), 0),
                None => FileOffset::from_arc(file.clone(), end),
            };
            mapped.push(map(part, backing, &tracker)?);
            trackers.push(tracker);
            offsets.push(part.file.is_none().then_some(end));
            end += if part.file.is_none() { part.size } else { 0 };
        }
        let memory = GuestMemoryMmap::from_regions(mapped).map_err(|e| host(std::io::Error::other(e)))?;
        let regions: Vec<_> = (memory.iter().zip(layout.parts()))
            .map(|(r, part)| RamRegion {
                gpa: part.gpa,
                size: part.size,
                host: r.as_ptr(),
                kind: part.kind,
                read_only: part.read_only,
            })
            .collect();
        regions.iter().for_each(advise_huge);
        let pluggable = regions.iter().find(|region| region.kind == RegionKind::Pluggable);
        let pluggable = pluggable.map(|region| Blocks::new(region.gpa, region.size));
        let size = layout.ram();
        Ok(Self { inner: Arc::new(Inner { memory, regions, trackers, file, offsets, pluggable, size }) })
    }

    /// Bytes of RAM that is there from the beginning.
    pub fn size(&self) -> u64 {
        self.inner.size
    }
    /// The regions, lowest address first.
    pub fn regions(&self) -> &[RamRegion] {
        &self.inner.regions
    }
    /// Access for devices and loaders; writes through it are tracked.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.inner.memory
    }
    /// The memfd behind RAM, in which the regions that are no files' lie one behind the other.
    pub fn raw_fd(&self) -> i32 {
        self.inner.file.as_raw_fd()
    }
    /// As [`Self::raw_fd`].
    pub fn file(&self) -> BorrowedFd<'_> {
        self.inner.file.as_fd()
    }
    /// Where the page that holds `gpa` lies in [`Self::file`]; `None` where there is no RAM, or memory of another file.
    pub fn file_offset(&self, gpa: u64) -> Option<u64> {
        let index = self.region(gpa)?;
        let start = self.inner.offsets[index]?;
        Some(start + ((gpa - self.inner.regions[index].gpa) & !(PAGE_SIZE - 1)))
    }
    /// Host address of the page of RAM that holds `gpa`, or `None` where there is no RAM. The page stays mapped as
    /// long as `self`; whoever writes through the address reports it to [`Self::tracker`].
    pub fn host_page(&self, gpa: u64) -> Option<*mut u8> {
        let region = &self.inner.regions[self.region(gpa)?];
        let offset = (gpa - region.gpa) & !(PAGE_SIZE - 1);
        Some(region.host.wrapping_add(offset as usize))
    }
    /// The tracker of the region that holds `gpa`, and the offset of `gpa` in it.
    pub fn tracker(&self, gpa: u64) -> Option<(&PageTracker, usize)> {
        let index = self.region(gpa)?;
        Some((&self.inner.trackers[index], (gpa - self.inner.regions[index].gpa) as usize))
    }
    /// Sets who hears of writes by devices to watched pages, for all regions. Only the first call counts.
    pub fn set_write_listener(&self, listener: Arc<dyn WriteListener>) {
        for (region, tracker) in self.inner.regions.iter().zip(&self.inner.trackers) {
            tracker.set_listener(region.gpa, listener.clone());
        }
    }

    fn region(&self, gpa: u64) -> Option<usize> {
        self.inner.regions.iter().position(|r| gpa.wrapping_sub(r.gpa) < r.size)
    }
}

/// Maps a part of guest memory. Nobody writes through a mapping of a file that is only read; it is private all the same.
fn map(
    part: &Part,
    backing: FileOffset,
    tracker: &PageTracker,
) -> Result<GuestRegionMmap<PageTracker>, MemoryError> {
    let private = part.read_only && part.file.is_some();
    let sharing = if private { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
    let region = MmapRegionBuilder::new_with_bitmap(part.size as usize, tracker.clone())
        .with_file_offset(backing)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(sharing | libc::MAP_NORESERVE)
        .build()
        .map_err(|error| MemoryError::Host { size: part.size, source: std::io::Error::other(error) })?;
    GuestRegionMmap::new(region, GuestAddress(part.gpa)).ok_or(MemoryError::Place(part.gpa))
}

/// Asks for huge pages behind the region; hosts may ignore it.
fn advise_huge(region: &RamRegion) {
    // SAFETY: the range is one mapping of this process; the advice does not change its contents.
    unsafe { libc::madvise(region.host.cast(), region.size as usize, libc::MADV_HUGEPAGE) };
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn large_ram_leaves_the_hole_free() {
        let ram = GuestRam::new(LOW_RAM_END + 0x1000_0000).unwrap();
        assert!(ram.host_page(LOW_RAM_END - 1).is_some());
        assert!(ram.host_page(LOW_RAM_END).is_none());
        assert!(ram.host_page(HIGH_RAM_START).is_some());
        assert!(ram.host_page(HIGH_RAM_START + 0x1000_0000).is_none());
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for size in [0, 5, 4097, MAX_RAM + PAGE_SIZE] {
            assert!(matches!(GuestRam::new(size), Err(MemoryError::Size(_))));
        }
    }

    #[test]
    fn writes_to_watched_pages_are_heard() {
        struct Log(Mutex<Vec<u64>>);
        impl WriteListener for Log {
            fn page_written(&self, gpa: u64) {
                self.0.lock().unwrap().push(gpa);
            }
        }
        let ram = GuestRam::new(0x10_0000).unwrap();
        let log = Arc::new(Log(Mutex::default()));
        ram.set_write_listener(log.clone());
        ram.memory().write_obj(1u8, GuestAddress(0x3000)).unwrap();
        let (tracker, offset) = ram.tracker(0x3000).unwrap();
        tracker.watch(offset);
        ram.memory().write_slice(&[0; 4], GuestAddress(0x2ffe)).unwrap();
        assert_eq!(*log.0.lock().unwrap(), [0x3000]);
        assert!(ram.tracker(0x2000).unwrap().0.take_dirty(0x2000));
        assert!(!ram.tracker(0x2000).unwrap().0.take_dirty(0x2000));
    }
}
