//! Page-table formats and the walk, for all three formats (SDM volume 3, chapter 4).
//!
//! The walk is generic over physical memory, so that both executors, debuggers and the tests' plain model share it.

use crate::flags::{cr0, cr4, efer};

/// Bits of a page-table entry.
pub mod pte {
    /// Present.
    pub const P: u64 = 1 << 0;
    /// Writable.
    pub const W: u64 = 1 << 1;
    /// User.
    pub const U: u64 = 1 << 2;
    /// Accessed.
    pub const A: u64 = 1 << 5;
    /// Dirty.
    pub const D: u64 = 1 << 6;
    /// Large page.
    pub const PS: u64 = 1 << 7;
    /// Global.
    pub const G: u64 = 1 << 8;
    /// No execution.
    pub const NX: u64 = 1 << 63;
}

/// Bits of a page fault's error code (SDM volume 3, 4.7).
pub mod fault {
    /// The page was present: a protection violation.
    pub const P: u32 = 1 << 0;
    /// A write.
    pub const W: u32 = 1 << 1;
    /// At CPL 3.
    pub const U: u32 = 1 << 2;
    /// A reserved bit was set.
    pub const RSVD: u32 = 1 << 3;
    /// An instruction fetch.
    pub const I: u32 = 1 << 4;
}

/// Physical address width that Ruse presents (CPUID 80000008h EAX).
pub const PHYS_BITS: u32 = 46;

/// Kind of an access to a linear address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write, or a read that a write of the same instruction follows.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// The registers that a walk depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagingMode {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// PAE's four pointers.
    pub pdpte: [u64; 4],
}

/// Who makes an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Privilege {
    /// At CPL 3 (and not an implicit supervisor access).
    pub user: bool,
    /// EFLAGS.AC at CPL 0: an explicit access may touch user pages under SMAP.
    pub ac: bool,
}

/// Physical memory as a walk sees it.
pub trait PhysMemory {
    /// Reads a 4- or 8-byte entry; memory that is not RAM reads as all ones.
    fn read_entry(&mut self, gpa: u64, wide: bool) -> u64;
    /// Sets `bits` in the entry if it still is `old`; `false` if it changed in the meantime.
    fn set_bits(&mut self, gpa: u64, wide: bool, old: u64, bits: u64) -> bool;
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Guest physical address of the byte asked for.
    pub gpa: u64,
    /// log2 of the page's size: 12, 21, 22 or 30.
    pub page_shift: u32,
    /// User accesses are allowed by every level.
    pub user: bool,
    /// Writes are allowed by every level.
    pub writable: bool,
    /// Fetches are not forbidden by any level.
    pub executable: bool,
    /// The leaf is global.
    pub global: bool,
    /// The leaf's dirty bit is set (after this walk).
    pub dirty: bool,
}

impl Translation {
    /// Whether an access of this kind and privilege is allowed (SDM volume 3, 4.6).
    pub fn allows(&self, mode: &PagingMode, access: Access, who: Privilege) -> bool {
        if who.user {
            return self.user
                && match access {
                    Access::Read => true,
                    Access::Write => self.writable,
                    Access::Fetch => self.executable,
                };
        }
        match access {
            Access::Fetch => self.executable && !(self.user && mode.cr4 & cr4::SMEP != 0),
            _ if self.user && mode.cr4 & cr4::SMAP != 0 && !who.ac => false,
            Access::Read => true,
            Access::Write => self.writable || mode.cr0 & cr0::WP == 0,
        }
    }
}

/// One level of a format: where its index is in the address, and how wide.
struct Level {
    shift: u32,
    bits: u32,
    /// Whether an entry may map a page here.
    leaf: bool,
}

/// Whether `addr` is canonical for 48-bit linear addresses.
pub const fn is_canonical(addr: u64) -> bool {
    ((addr as i64) << 16 >> 16) as u64 == addr
}

/// Walks the page tables for `addr`, sets accessed and dirty bits, and checks the permissions.
///
/// With paging off the address is its own translation. `Err` is the page fault's error code.
pub fn walk(
    mode: &PagingMode,
    addr: u64,
    access: Access,
    who: Privilege,
    memory: &mut impl PhysMemory,
) -> Result<Translation, u32> {
    if mode.cr0 & cr0::PG == 0 {
        return Ok(Translation {
            gpa: addr & 0xffff_ffff,
            page_shift: 12,
            user: true,
            writable: true,
            executable: true,
            global: false,
            dirty: true,
        });
    }
    loop {
        if let Some(result) = walk_once(mode, addr, access, who, memory) {
            return result;
        }
    }
}

/// One attempt; `None` if an entry changed under it.
fn walk_once(
    mode: &PagingMode,
    addr: u64,
    access: Access,
    who: Privilege,
    memory: &mut impl PhysMemory,
) -> Option<Result<Translation, u32>> {
    let nxe = mode.efer & efer::NXE != 0;
    let error = |present: bool, reserved: bool| {
        let fetch =
            access == Access::Fetch && (mode.cr4 & cr4::SMEP != 0 || (nxe && mode.cr4 & cr4::PAE != 0));
        (if present { fault::P } else { 0 })
            | (if access == Access::Write { fault::W } else { 0 })
            | (if who.user { fault::U } else { 0 })
            | (if reserved { fault::RSVD } else { 0 })
            | (if fetch { fault::I } else { 0 })
    };
    let wide = mode.cr4 & cr4::PAE != 0;
    let long = mode.efer & efer::LMA != 0;
    let addr = if long { addr } else { addr & 0xffff_ffff };
    let (levels, mut table): (&[Level], u64) = if long {
        (
            &[
                Level { shift: 39, bits: 9, leaf: false },
                Level { shift: 30, bits: 9, leaf: true },
                Level { shift: 21, bits: 9, leaf: true },
                Level { shift: 12, bits: 9, leaf: true },
            ],
            mode.cr3 & ((1 << PHYS_BITS) - 1) & !0xfff,
        )
    } else if wide {
        let entry = mode.pdpte[(addr >> 30) as usize];
        if entry & pte::P == 0 {
            return Some(Err(error(false, false)));
        }
        (
            &[Level { shift: 21, bits: 9, leaf: true }, Level { shift: 12, bits: 9, leaf: true }],
            entry & ((1 << PHYS_BITS) - 1) & !0xfff,
        )
    } else {
        (
            &[Level { shift: 22, bits: 10, leaf: true }, Level { shift: 12, bits: 10, leaf: true }],
            mode.cr3 & 0xffff_f000,
        )
    };
    let (mut user, mut writable, mut executable) = (true, true, true);
    let mut path = [(0u64, 0u64); 4];
    for (depth, level) in levels.iter().enumerate() {
        let index = (addr >> level.shift) & ((1 << level.bits) - 1);
        let at = table + index * if wide { 8 } else { 4 };
        let entry = memory.read_entry(at, wide);
        if entry & pte::P == 0 {
            return Some(Err(error(false, false)));
        }
        let large =
            level.shift > 12 && entry & pte::PS != 0 && level.leaf && (wide || mode.cr4 & cr4::PSE != 0);
        if reserved_bits(mode, level, large) & entry != 0 {
            return Some(Err(error(true, true)));
        }
        path[depth] = (at, entry);
        user &= entry & pte::U != 0;
        writable &= entry & pte::W != 0;
        executable &= !(nxe && wide && entry & pte::NX != 0);
        if !large && level.shift > 12 {
            table = if wide { entry & ((1 << PHYS_BITS) - 1) & !0xfff } else { entry & 0xffff_f000 };
            continue;
        }
        let size = 1u64 << level.shift;
        let base = if !wide && large {
            // PSE-36: bits 13 to 20 are bits 32 to 39 of the address (SDM volume 3, table 4-4).
            (entry & 0xffc0_0000) | ((entry >> 13) & 0xff) << 32
        } else {
            entry & ((1 << PHYS_BITS) - 1) & !(size - 1) & !0xfff
        };
        let mut found = Translation {
            gpa: base | (addr & (size - 1)),
            page_shift: level.shift,
            user,
            writable,
            executable,
            global: entry & pte::G != 0 && mode.cr4 & cr4::PGE != 0,
            dirty: entry & pte::D != 0,
        };
        if !found.allows(mode, access, who) {
            return Some(Err(error(true, false)));
        }
        for (i, &(at, entry)) in path[..=depth].iter().enumerate() {
            let dirty = if i == depth && access == Access::Write { pte::D } else { 0 };
            let missing = (pte::A | dirty) & !entry;
            if missing != 0 && !memory.set_bits(at, wide, entry, missing) {
                return None;
            }
        }
        found.dirty |= access == Access::Write;
        return Some(Ok(found));
    }
    unreachable!("the last level is always a leaf")
}

/// Bits that must be zero in an entry of this level (SDM volume 3, tables 4-4, 4-9 to 4-11 and 4-15 to 4-20).
fn reserved_bits(mode: &PagingMode, level: &Level, large: bool) -> u64 {
    if mode.cr4 & cr4::PAE == 0 {
        // Bit 21 of a PSE-36 entry; the high bits above 40 do not exist with MAXPHYADDR over 40.
        return if large { 1 << 21 } else { 0 };
    }
    // With four levels bits 52 to 62 are ignored, with PAE they are reserved too.
    let end = if mode.efer & efer::LMA != 0 { 52 } else { 63 };
    let mut reserved = ((1u64 << end) - 1) & !((1 << PHYS_BITS) - 1);
    if mode.efer & efer::NXE == 0 {
        reserved |= pte::NX;
    }
    if large {
        reserved |= ((1u64 << level.shift) - 1) & !0x1fff;
    } else if level.shift == 39 {
        reserved |= pte::PS;
    }
    reserved
}

#[cfg(test)]
mod tests;
