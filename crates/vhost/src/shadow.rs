//! A split ring (virtio 1.2, 2.7), the driver's side, in memory that a backend shares. What is read from it may be anything.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use ruse_virtio::Buffer;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileMemoryError};

use crate::backend::{BackendError, Region, RingSetup};

/// Where in the guest's physical addresses backends see the rings: far above all RAM.
const GPA: u64 = 1 << 50;

/// The descriptors are at the beginning of a ring's memory.
const DESCRIPTORS: usize = 0;
/// Bytes of a descriptor, and of an entry of the used ring.
const DESCRIPTOR_LEN: usize = 16;
const USED_LEN: usize = 8;
/// Offsets in the available and the used ring.
const INDEX: usize = 2;
const ELEMENTS: usize = 4;

/// Flags of a descriptor.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Flag of the used ring: no notifications.
const NO_NOTIFY: u16 = 1;

/// What is where in the memory of a ring with so many entries, which are also the most buffers of a chain.
#[derive(Clone, Copy)]
struct Places {
    entries: u16,
}

impl Places {
    /// Bytes of the descriptors, and of a table: there is one for each descriptor.
    fn table_len(self) -> usize {
        DESCRIPTOR_LEN * usize::from(self.entries)
    }
    fn available(self) -> usize {
        self.table_len()
    }
    /// The available ring is followed by a word that nobody uses here.
    fn used(self) -> usize {
        (self.available() + ELEMENTS + 2 * usize::from(self.entries) + 2).next_multiple_of(8)
    }
    fn tables(self) -> usize {
        (self.used() + ELEMENTS + USED_LEN * usize::from(self.entries) + 2).next_multiple_of(0x1000)
    }
    fn len(self) -> usize {
        self.tables() + self.table_len() * usize::from(self.entries)
    }
}

/// Memory with the rings of a device.
pub(crate) struct Area {
    mapped: MmapRegion,
    file: Arc<File>,
    places: Places,
}

impl Area {
    /// Memory for so many rings of so many entries.
    pub(crate) fn new(queues: usize, entries: u16) -> io::Result<Self> {
        let file = Arc::new(File::from(memfd_create("rings", MemfdFlags::CLOEXEC)?));
        let places = Places { entries };
        let size = queues * places.len();
        file.set_len(size as u64)?;
        let mapped = MmapRegion::from_file(FileOffset::from_arc(file.clone(), 0), size);
        Ok(Self { mapped: mapped.map_err(io::Error::other)?, file, places })
    }

    /// What a backend has to know of it.
    pub(crate) fn region(&self) -> Region<'_> {
        let size = self.mapped.size() as u64;
        Region { gpa: GPA, size, host: self.mapped.as_ptr() as u64, file: self.file.as_fd(), offset: 0 }
    }
}

/// A ring.
pub(crate) struct Shadow {
    area: Arc<Area>,
    places: Places,
    index: u16,
    /// Where it begins in the area.
    base: usize,
    /// Chains may be in tables of their own.
    indirect: bool,
    /// Descriptors that are not in use.
    free: Vec<u16>,
    /// The descriptors of the chain that begins at each; none where no chain is under way.
    chains: Vec<Vec<u16>>,
    next_available: u16,
    next_used: u16,
}

/// All accesses are within the area.
fn inside<T>(result: Result<T, VolatileMemoryError>) -> io::Result<T> {
    result.map_err(io::Error::other)
}

impl Shadow {
    /// The ring of this number.
    pub(crate) fn new(area: Arc<Area>, index: u16) -> Self {
        let places = area.places;
        Self {
            base: usize::from(index) * places.len(),
            area,
            places,
            index,
            indirect: false,
            free: (0..places.entries).rev().collect(),
            chains: vec![Vec::new(); places.entries.into()],
            next_available: 0,
            next_used: 0,
        }
    }

    /// Back to the beginning: nothing is under way. Nobody serves it.
    pub(crate) fn reset(&mut self, indirect: bool) -> io::Result<()> {
        *self = Self { indirect, ..Self::new(self.area.clone(), self.index) };
        self.write(self.places.available(), &[0; ELEMENTS])?;
        self.write(self.places.used(), &[0; ELEMENTS])
    }

    /// Where it is, for a backend.
    pub(crate) fn setup<'a>(&self, kick: BorrowedFd<'a>, call: BorrowedFd<'a>) -> RingSetup<'a> {
        let at = |offset| self.area.mapped.as_ptr() as u64 + (self.base + offset) as u64;
        let (available, used) = (at(self.places.available()), at(self.places.used()));
        RingSetup { size: self.places.entries, descriptors: at(DESCRIPTORS), available, used, kick, call }
    }

    /// Puts a chain of at most as many buffers as the ring has entries into the ring and gives the number by which it comes back; `None` while
    /// there is no room. A buffer is for the backend to write if it is said so.
    pub(crate) fn add(&mut self, buffers: &[(Buffer, bool)]) -> io::Result<Option<u16>> {
        let needed = if self.indirect { 1 } else { buffers.len() };
        if buffers.is_empty() || needed > self.free.len() {
            return Ok(None);
        }
        let taken = self.free.split_off(self.free.len() - needed);
        let head = taken[0];
        let flags = |write| if write { WRITE } else { 0 };
        if self.indirect && buffers.len() > 1 {
            let table = self.places.tables() + usize::from(head) * self.places.table_len();
            for (n, &(buffer, write)) in (0u16..).zip(buffers) {
                let more = if usize::from(n) + 1 < buffers.len() { NEXT } else { 0 };
                self.describe(table, n, buffer, flags(write) | more, n + 1)?;
            }
            let at = GPA + (self.base + table) as u64;
            let len = (buffers.len() * DESCRIPTOR_LEN) as u32;
            self.describe(DESCRIPTORS, head, Buffer { at, len }, INDIRECT, 0)?;
        } else {
            for (n, &(buffer, write)) in buffers.iter().enumerate() {
                let next = taken.get(n + 1).copied();
                let more = if next.is_some() { NEXT } else { 0 };
                self.describe(DESCRIPTORS, taken[n], buffer, flags(write) | more, next.unwrap_or(0))?;
            }
        }
        self.chains[usize::from(head)] = taken;
        let entry = usize::from(self.next_available % self.places.entries);
        self.write(self.places.available() + ELEMENTS + 2 * entry, &head.to_le_bytes())?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(head))
    }

    /// Shows the backend what was added, and says whether it wants to be kicked.
    pub(crate) fn publish(&self) -> io::Result<bool> {
        let memory = self.area.mapped.as_volatile_slice();
        let index = self.base + self.places.available() + INDEX;
        inside(memory.store(self.next_available.to_le(), index, Ordering::Release))?;
        // It has to see that before it is looked whether it sleeps (2.7.21).
        fence(Ordering::SeqCst);
        Ok(self.load(self.places.used())? & NO_NOTIFY == 0)
    }

    /// A chain that has come back, with how many bytes the backend says it has written.
    pub(crate) fn take_used(&mut self) -> Result<Option<(u16, u32)>, BackendError> {
        if self.load(self.places.used() + INDEX)? == self.next_used {
            return Ok(None);
        }
        let mut entry = [0; USED_LEN];
        let at = self.places.used() + ELEMENTS + USED_LEN * usize::from(self.next_used % self.places.entries);
        inside(self.area.mapped.as_volatile_slice().read_slice(&mut entry, self.base + at))?;
        let [head, len] = [0, 4].map(|at| u32::from_le_bytes([0, 1, 2, 3].map(|n| entry[at + n])));
        let chain = self.chains.get_mut(head as usize).map(std::mem::take).unwrap_or_default();
        if chain.is_empty() {
            return Err(BackendError::Nonsense("it gives back a chain that it does not have"));
        }
        self.free.extend(chain);
        self.next_used = self.next_used.wrapping_add(1);
        Ok(Some((head as u16, len)))
    }

    fn describe(&self, table: usize, n: u16, buffer: Buffer, flags: u16, next: u16) -> io::Result<()> {
        let mut bytes = [0; DESCRIPTOR_LEN];
        bytes[..8].copy_from_slice(&buffer.at.to_le_bytes());
        bytes[8..12].copy_from_slice(&buffer.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(table + DESCRIPTOR_LEN * usize::from(n), &bytes)
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        inside(self.area.mapped.as_volatile_slice().write_slice(bytes, self.base + offset))
    }

    fn load(&self, offset: usize) -> io::Result<u16> {
        let word = self.area.mapped.as_volatile_slice().load::<u16>(self.base + offset, Ordering::Acquire);
        inside(word).map(u16::from_le)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(indirect: bool) -> Shadow {
        let mut ring = Shadow::new(Arc::new(Area::new(2, 256).unwrap()), 1);
        ring.reset(indirect).unwrap();
        ring
    }

    /// A backend gives a chain back, and says so.
    fn give_back(ring: &Shadow, n: u16, head: u32, len: u32) {
        let bytes = [head.to_le_bytes(), len.to_le_bytes()].concat();
        ring.write(ring.places.used() + ELEMENTS + USED_LEN * usize::from(n % 256), &bytes).unwrap();
        ring.write(ring.places.used() + INDEX, &n.wrapping_add(1).to_le_bytes()).unwrap();
    }

    fn descriptor(ring: &Shadow, at: usize) -> (u64, u32, u16, u16) {
        let mut b = [0; DESCRIPTOR_LEN];
        ring.area.mapped.as_volatile_slice().read_slice(&mut b, ring.base + at).unwrap();
        let half = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
        (
            u64::from_le_bytes(b[..8].try_into().unwrap()),
            u32::from_le_bytes(b[8..12].try_into().unwrap()),
            half(12),
            half(14),
        )
    }

    const BUFFERS: [(Buffer, bool); 2] =
        [(Buffer { at: 0x1000, len: 16 }, false), (Buffer { at: 0x2000, len: 512 }, true)];

    #[test]
    fn a_chain_is_made_available_with_or_without_a_table() {
        let mut direct = ring(false);
        let head = direct.add(&BUFFERS).unwrap().unwrap();
        assert!(direct.publish().unwrap());
        let first = descriptor(&direct, usize::from(head) * DESCRIPTOR_LEN);
        assert_eq!((first.0, first.1, first.2), (0x1000, 16, NEXT));
        let second = descriptor(&direct, usize::from(first.3) * DESCRIPTOR_LEN);
        assert_eq!((second.0, second.1, second.2), (0x2000, 512, WRITE));
        assert_eq!(direct.load(direct.places.available() + INDEX).unwrap(), 1);
        let mut tables = ring(true);
        let head = tables.add(&BUFFERS).unwrap().unwrap();
        let outer = descriptor(&tables, usize::from(head) * DESCRIPTOR_LEN);
        assert_eq!((outer.1, outer.2), (32, INDIRECT));
        let inner = (outer.0 - GPA) as usize - tables.base;
        assert_eq!(descriptor(&tables, inner), (0x1000, 16, NEXT, 1));
        assert_eq!(descriptor(&tables, inner + DESCRIPTOR_LEN).2, WRITE);
    }

    #[test]
    fn descriptors_serve_again_and_again() {
        for indirect in [false, true] {
            let mut ring = ring(indirect);
            for n in 0..70_000u32 {
                let head = ring.add(&BUFFERS).unwrap().expect("there is room");
                assert_eq!(ring.take_used().unwrap(), None);
                give_back(&ring, n as u16, head.into(), 7);
                assert_eq!(ring.take_used().unwrap(), Some((head, 7)));
            }
            let room = (0..).take_while(|_| ring.add(&BUFFERS).unwrap().is_some()).count();
            assert_eq!(room, if indirect { 256 } else { 128 });
        }
    }

    #[test]
    fn a_backend_may_ask_not_to_be_kicked() {
        let mut ring = ring(true);
        ring.add(&BUFFERS).unwrap();
        ring.write(ring.places.used(), &NO_NOTIFY.to_le_bytes()).unwrap();
        assert!(!ring.publish().unwrap());
    }

    #[test]
    fn what_a_backend_does_not_have_it_cannot_give_back() {
        let mut ring = ring(false);
        let head = ring.add(&BUFFERS).unwrap().unwrap();
        for wrong in [u32::from(head) ^ 1, 256, 0x1_0000 + u32::from(head), u32::MAX] {
            give_back(&ring, 0, wrong, 0);
            assert!(matches!(ring.take_used(), Err(BackendError::Nonsense(_))), "{wrong}");
        }
        give_back(&ring, 0, head.into(), 0);
        assert!(ring.take_used().unwrap().is_some());
        give_back(&ring, 1, head.into(), 0);
        assert!(ring.take_used().is_err(), "twice");
    }
}
