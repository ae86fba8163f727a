//! Guest memory accesses of Rust code: tier 0, the CPU's own accesses to tables, and what generated code cannot do in
//! place (accesses that leave a page, devices, pages with code).

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use ruse_arch::{
    Exception,
    flags::cr4,
    paging::{Access, is_canonical},
};
use ruse_engine::IoAddress;

use crate::{
    cpu::{Cpu, Who, request},
    tier0::debug::{self, Watch},
};

/// Where an access within one page leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// RAM at this host address.
    Ram(*mut u8),
    /// RAM with translated code on its page: host address.
    Code(*mut u8),
    /// Not RAM, or a write to RAM that vCPUs can only read: guest physical address.
    Device(u64),
}

const PAGE: u64 = 4096;

/// Bytes of an access of `len` at `la` that lie in its first page.
fn first_part(la: u64, len: usize) -> usize {
    ((PAGE - la % PAGE) as usize).min(len)
}

impl Cpu {
    /// Translates `size` bytes at linear address `la` that lie within one page.
    #[inline]
    pub fn place(&mut self, la: u64, size: usize, access: Access, who: Who) -> Result<Place, Exception> {
        let view = match who {
            Who::Current => self.mmu.view(),
            Who::System => self.mmu.system_view(self.paging.cr4 & cr4::SMAP != 0),
        };
        if let Some(host) = view.lookup(la, size as u64, access) {
            return Ok(Place::Ram(host));
        }
        self.place_slow(la, access, who)
    }

    #[cold]
    fn place_slow(&mut self, la: u64, access: Access, who: Who) -> Result<Place, Exception> {
        let rights = self.privilege(who);
        self.counters.miss(access, rights.user);
        let mode = self.paging;
        let fault = |error| Exception::pf(la, error);
        let (found, host) = self.mmu.fill(&mode, la, access, rights).map_err(fault)?;
        Ok(match host {
            Some(host) => Place::Ram(host),
            None => match self.mmu.writable_page(found.gpa) {
                Some(page) => Place::Code(page.wrapping_add((found.gpa % PAGE) as usize)),
                None => Place::Device(found.gpa),
            },
        })
    }

    /// Reads `buf.len()` (at most 4096) bytes at a linear address. All pages are checked before a device is touched.
    pub fn read_linear(&mut self, la: u64, buf: &mut [u8], who: Who) -> Result<(), Exception> {
        let la = self.wrap(la);
        debug::note(self, la, buf.len(), Watch::Read, who);
        let split = first_part(la, buf.len());
        let first = self.place(la, split, Access::Read, who)?;
        if split == buf.len() {
            self.read_place(first, buf);
            return Ok(());
        }
        let second =
            self.place(self.wrap(la.wrapping_add(split as u64)), buf.len() - split, Access::Read, who)?;
        let (head, tail) = buf.split_at_mut(split);
        self.read_place(first, head);
        self.read_place(second, tail);
        Ok(())
    }

    /// Writes bytes (at most 4096) at a linear address. All pages are checked before the first byte is written.
    pub fn write_linear(&mut self, la: u64, bytes: &[u8], who: Who) -> Result<(), Exception> {
        let la = self.wrap(la);
        debug::note(self, la, bytes.len(), Watch::Write, who);
        let split = first_part(la, bytes.len());
        let first = self.place(la, split, Access::Write, who)?;
        if split == bytes.len() {
            self.write_place(first, bytes);
            return Ok(());
        }
        let second =
            self.place(self.wrap(la.wrapping_add(split as u64)), bytes.len() - split, Access::Write, who)?;
        let (head, tail) = bytes.split_at(split);
        self.write_place(first, head);
        self.write_place(second, tail);
        Ok(())
    }

    /// Checks that `len` bytes at `la` could be accessed, and sets accessed (and, for writes, dirty) bits.
    pub fn probe_linear(&mut self, la: u64, len: usize, access: Access, who: Who) -> Result<(), Exception> {
        let la = self.wrap(la);
        let split = first_part(la, len);
        self.place(la, split, access, who)?;
        if split < len {
            self.place(self.wrap(la.wrapping_add(split as u64)), len - split, access, who)?;
        }
        Ok(())
    }

    /// Sets and clears bits of one byte as a locked operation, for the accessed and busy bits of descriptors.
    pub fn update_byte(&mut self, la: u64, set: u8, clear: u8, who: Who) -> Result<(), Exception> {
        let la = self.wrap(la);
        match self.place(la, 1, Access::Write, who)? {
            Place::Ram(host) | Place::Code(host) => {
                change_byte(host, set, clear);
                self.ram_written(host, 1);
            }
            Place::Device(gpa) => {
                let mut byte = [0];
                let from = self.place(la, 1, Access::Read, who)?;
                self.read_place(from, &mut byte);
                self.device_write(gpa, &[byte[0] & !clear | set]);
            }
        }
        Ok(())
    }

    /// Reads what a place holds.
    pub fn read_place(&mut self, place: Place, buf: &mut [u8]) {
        match place {
            Place::Ram(host) | Place::Code(host) => load(host, buf),
            Place::Device(gpa) => self.device_read(gpa, buf),
        }
    }

    /// Writes to a place; translations of code there become void.
    pub fn write_place(&mut self, place: Place, bytes: &[u8]) {
        match place {
            Place::Ram(host) | Place::Code(host) => {
                store(host, bytes);
                self.ram_written(host, bytes.len());
            }
            Place::Device(gpa) => self.device_write(gpa, bytes),
        }
    }

    /// This vCPU has written `len` bytes of a page of RAM at a host address: translations of code there become void.
    ///
    /// Whether there are any is looked at now: others do not wait for what tier 0 writes when they watch a page
    /// ([`CodeMap::watch`]), so one may have begun to translate since the place was found.
    ///
    /// [`CodeMap::watch`]: super::watch::CodeMap::watch
    pub fn ram_written(&mut self, host: *const u8, len: usize) {
        fence(Ordering::SeqCst);
        if let Some(gpa) = self.mmu.gpa_of_host(host as u64)
            && self.mmu.code.has_code(gpa)
        {
            self.mmu.code.written(gpa, Some(self.id));
            self.written_code.push((gpa, len as u32));
            self.shared().raise(request::MEMORY);
        }
    }

    /// Linear addresses outside 64-bit mode have 32 bits.
    #[inline]
    pub fn wrap(&self, la: u64) -> u64 {
        if self.mode.long { la } else { la & 0xffff_ffff }
    }

    /// Whether `la` can be used for data in the current mode.
    #[inline]
    pub fn is_canonical(&self, la: u64) -> bool {
        !self.mode.code64 || is_canonical(la)
    }

    fn device_read(&mut self, gpa: u64, buf: &mut [u8]) {
        let mut at = gpa;
        for part in device_parts(gpa, buf.len()) {
            let from = (at - gpa) as usize;
            self.bus().mmio_read(self.id, at, &mut buf[from..from + part]);
            at += part as u64;
        }
    }

    fn device_write(&mut self, gpa: u64, bytes: &[u8]) {
        let mut at = gpa;
        for part in device_parts(gpa, bytes.len()) {
            let from = (at - gpa) as usize;
            let part_bytes = &bytes[from..from + part];
            if !self.doorbells.ring(IoAddress::Memory(at), part_bytes) {
                self.bus().mmio_write(self.id, at, part_bytes);
            }
            at += part as u64;
        }
    }
}

/// Splits an access to a device into aligned parts of 1, 2, 4 or 8 bytes.
fn device_parts(gpa: u64, len: usize) -> impl Iterator<Item = usize> {
    let mut at = gpa;
    let end = gpa + len as u64;
    std::iter::from_fn(move || {
        let left = end - at;
        if left == 0 {
            return None;
        }
        let part = [8u64, 4, 2, 1].into_iter().find(|&p| p <= left && at.is_multiple_of(p))?;
        at += part;
        Some(part as usize)
    })
}

/// Clears, then sets bits of a byte of guest RAM atomically.
fn change_byte(host: *mut u8, set: u8, clear: u8) {
    // SAFETY: the caller has translated the byte for writing; other CPUs may change it too, hence the atomic.
    let byte = unsafe { AtomicU8::from_ptr(host) };
    if clear != 0 {
        byte.fetch_and(!clear, Ordering::SeqCst);
    }
    if set != 0 {
        byte.fetch_or(set, Ordering::SeqCst);
    }
}

/// Copies from guest RAM; 2, 4 and 8 bytes are a single access, as on hardware: atomic where they lie in a cache line
/// (SDM volume 3, 9.1.1).
pub(crate) fn load(host: *const u8, buf: &mut [u8]) {
    let aligned = (host as usize).is_multiple_of(buf.len().max(1));
    let at = host.cast_mut();
    // SAFETY: the caller has translated `buf.len()` bytes of mapped guest RAM at `host`. Other CPUs may write there at
    // the same time: single accesses are atomic; for the rest the guest gets what the race gives, as on hardware.
    unsafe {
        match (buf.len(), aligned) {
            (1, _) => buf[0] = AtomicU8::from_ptr(at).load(Ordering::Acquire),
            (2, true) => {
                buf.copy_from_slice(&AtomicU16::from_ptr(at.cast()).load(Ordering::Acquire).to_le_bytes())
            }
            (4, true) => {
                buf.copy_from_slice(&AtomicU32::from_ptr(at.cast()).load(Ordering::Acquire).to_le_bytes())
            }
            (8, true) => {
                buf.copy_from_slice(&AtomicU64::from_ptr(at.cast()).load(Ordering::Acquire).to_le_bytes())
            }
            (2, false) => buf.copy_from_slice(&host.cast::<u16>().read_unaligned().to_le_bytes()),
            (4, false) => buf.copy_from_slice(&host.cast::<u32>().read_unaligned().to_le_bytes()),
            (8, false) => buf.copy_from_slice(&host.cast::<u64>().read_unaligned().to_le_bytes()),
            _ => std::ptr::copy_nonoverlapping(host, buf.as_mut_ptr(), buf.len()),
        }
    }
}

/// Copies to guest RAM, as [`load`] does from there.
pub(crate) fn store(host: *mut u8, bytes: &[u8]) {
    let aligned = (host as usize).is_multiple_of(bytes.len().max(1));
    // SAFETY: as in `load`; the caller has translated for writing.
    unsafe {
        match *bytes {
            [b] => AtomicU8::from_ptr(host).store(b, Ordering::Release),
            [a, b] if aligned => {
                AtomicU16::from_ptr(host.cast()).store(u16::from_le_bytes([a, b]), Ordering::Release)
            }
            [a, b, c, d] if aligned => {
                AtomicU32::from_ptr(host.cast()).store(u32::from_le_bytes([a, b, c, d]), Ordering::Release)
            }
            [a, b, c, d, e, f, g, h] if aligned => AtomicU64::from_ptr(host.cast())
                .store(u64::from_le_bytes([a, b, c, d, e, f, g, h]), Ordering::Release),
            [a, b] => host.cast::<u16>().write_unaligned(u16::from_le_bytes([a, b])),
            [a, b, c, d] => host.cast::<u32>().write_unaligned(u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                host.cast::<u64>().write_unaligned(u64::from_le_bytes([a, b, c, d, e, f, g, h]))
            }
            _ => std::ptr::copy_nonoverlapping(bytes.as_ptr(), host, bytes.len()),
        }
    }
}

/// Copies within guest RAM, as if the source were read before anything is written.
pub(crate) fn copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller has translated both ranges, which lie in mapped guest RAM. Races with other CPUs give the guest
    // what the race gives.
    unsafe { std::ptr::copy(from, to, len) }
}

/// Fills guest RAM.
pub(crate) fn fill(to: *mut u8, byte: u8, len: usize) {
    // SAFETY: the caller has translated the range for writing, so that it lies in mapped guest RAM.
    unsafe { std::ptr::write_bytes(to, byte, len) }
}
