//! The store of translated regions ("blocks") of one vCPU: found by where their code lies, linked to each other, thrown
//! away when their code is written.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hash, Hasher},
    sync::Arc,
};

use hashbrown::HashTable;
use iced_x86::{Encoder, InstructionInfoFactory};

use super::{
    marks::Marks,
    profile::Profile,
    rewritten::Rewritten,
    templates::{Place, Templates, is_movable},
};
use crate::{
    backend::x86_64::{
        audit::audit,
        emit::{self, Emitter},
        thunks::{Calls, Thunks},
    },
    code_memory::CodeMemory,
    frontend::x86_64::{CodeMode, Lifter, Piece},
    ir::Region,
};

mod copies;
#[cfg(test)]
mod copy_tests;

/// Bytes of generated code that a vCPU keeps at most.
const CODE_BYTES: usize = 256 << 20;

/// What a block was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    /// Linear address.
    va: u64,
    /// Host address of the code's page.
    page: u64,
    mode: u32,
}

/// See [`KeyHasher`].
pub(super) fn hash(value: &impl Hash) -> u64 {
    let mut hasher = KeyHasher::default();
    value.hash(&mut hasher);
    hasher.finish()
}

/// A multiplicative hash: keys are addresses, not chosen against us in any way that matters.
#[derive(Default)]
pub(super) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(u64::from(b));
        }
    }
    fn write_u32(&mut self, v: u32) {
        self.write_u64(u64::from(v));
    }
    fn write_u64(&mut self, v: u64) {
        self.0 = (self.0.rotate_left(5) ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

pub(super) type Map<K, V> = HashMap<K, V, BuildHasherDefault<KeyHasher>>;

/// Where the guest code of a block lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Host address of the page on which it begins.
    pub page: u64,
    /// Host address of the page on which it ends, where that is another one.
    pub second: Option<u64>,
}

/// No link, no block: indices never are this.
const NONE: u32 = u32::MAX;

/// A translated region. There are many: kept small.
struct Block {
    /// Linear address.
    va: u64,
    /// Host address of the page on which its guest code begins.
    page: u64,
    /// Host address of the page on which its guest code ends, 0 where that is the same.
    second: u64,
    /// Offset of its code.
    host: u32,
    /// Its table in [`Marks`].
    marks: u32,
    /// First of the links that lead here, or [`NONE`].
    incoming: u32,
    /// Bytes of the page before its guest code, and from there on, on which it depends.
    before: u16,
    len: u16,
    mode: u8,
    /// What it depends on was not written.
    alive: bool,
}

impl Block {
    fn key(&self) -> Key {
        Key { va: self.va, page: self.page, mode: u32::from(self.mode) }
    }

    fn place(&self) -> Place {
        Place::new(self.va, self.page, self.mode.into())
    }

    /// Whether it depends on some of these bytes of the page at host address `page`.
    fn overlaps(&self, page: u64, bytes: &std::ops::Range<u32>) -> bool {
        let start = (self.va & 0xfff) as u32;
        let end = start + u32::from(self.len);
        (page == self.page && start - u32::from(self.before) < bytes.end && end > bytes.start)
            || (page == self.second && bytes.start + 4096 < end)
    }
}

/// A jump between blocks.
#[derive(Clone)]
struct Link {
    target: u64,
    /// Offset of its displacement in the code memory.
    site: u32,
    /// Offset of what it leads to as long as it is not resolved.
    unresolved: u32,
    /// The block that it leads to, or [`NONE`].
    to: u32,
    /// Next link that leads to the same block, or [`NONE`].
    next: u32,
    /// It has a guard.
    guarded: bool,
    /// It leads to a block without groups of accesses.
    plain: bool,
    /// It leads on to higher addresses, past the look at the requests.
    ahead: bool,
}

impl Link {
    /// Writes what makes the link, at these places, lead nowhere.
    fn unlinked(&self, site: u32, unresolved: u32, mut write: impl FnMut(u32, u32)) {
        if self.guarded {
            write(site - emit::GUARD, 0);
        }
        write(site, unresolved.wrapping_sub(site + 4));
    }
}

/// Where a host address in generated code belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestPoint {
    /// Linear address of the guest instruction.
    pub rip: u64,
    /// The arithmetic flags were in the host's flags.
    pub host_flags: bool,
}

/// The blocks of one vCPU.
pub struct Blocks {
    memory: CodeMemory,
    thunks: Thunks,
    thunks_end: usize,
    encoder: Encoder,
    info: InstructionInfoFactory,
    lifter: Lifter,
    blocks: Vec<Block>,
    /// Living blocks by their keys.
    by_key: HashTable<u32>,
    marks: Marks,
    by_page: Map<u64, Vec<u32>>,
    links: Vec<Link>,
    templates: Templates,
    rewritten: Rewritten,
    /// Room for code that is being copied.
    copied: Vec<u8>,
    counts: Counts,
    /// Code is looked through when it is made.
    audited: bool,
    /// Who wants to know of new code.
    profile: Option<Arc<Profile>>,
}

/// What the store counts.
#[derive(Default)]
struct Counts {
    made: u64,
    /// Copied from others.
    copied: u64,
    /// Of those that were made: without groups of accesses, guest instructions, bytes of the guest's and of host code.
    plain: u64,
    instructions: u64,
    guest_bytes: u64,
    host_bytes: u64,
    lookups: u64,
    links: u64,
    /// Thrown away because their code was written, and how often everything was for want of room.
    dropped: u64,
    cleared: u64,
}

impl Blocks {
    /// An empty store.
    pub fn new(calls: Calls, lifter: Lifter, avx: bool) -> std::io::Result<Self> {
        let mut memory = CodeMemory::new(CODE_BYTES)?;
        let (thunks, code) = Thunks::build(memory.rx_ptr() as u64, calls, avx);
        memory.push(&code, 1).ok_or(std::io::ErrorKind::OutOfMemory)?;
        let thunks_end = memory.used();
        Ok(Self {
            memory,
            thunks,
            thunks_end,
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
            lifter,
            blocks: Vec::new(),
            by_key: HashTable::new(),
            marks: Marks::default(),
            by_page: Map::default(),
            links: Vec::new(),
            templates: Templates::default(),
            rewritten: Rewritten::default(),
            copied: Vec::new(),
            counts: Counts::default(),
            audited: false,
            profile: None,
        })
    }

    /// New code is made known to `profile` from now on.
    pub fn tell(&mut self, profile: Arc<Profile>) {
        let at = self.memory.rx_ptr();
        // SAFETY: readable memory that holds the shared code, which nothing changes any more.
        let code = unsafe { std::slice::from_raw_parts(at, self.thunks_end) };
        profile.add("shared_code", at as u64, code);
        self.profile = Some(profile);
    }

    /// All code is looked through when it is made, from now on.
    pub fn audit(&mut self) {
        self.audited = true;
    }

    /// The shared code.
    pub fn thunks(&self) -> &Thunks {
        &self.thunks
    }

    /// Host addresses of generated code without the shared part.
    pub fn code_range(&self) -> std::ops::Range<u64> {
        let base = self.memory.rx_ptr() as u64;
        base + self.thunks_end as u64..base + self.memory.size() as u64
    }

    /// The address in generated code whose lower half is `low`.
    pub fn whole_address(&self, low: u32) -> u64 {
        let base = self.memory.rx_ptr() as u64;
        base + u64::from(low.wrapping_sub(base as u32))
    }

    /// What it counts.
    pub fn counters(&self) -> [(&'static str, u64); 10] {
        let c = &self.counts;
        [
            ("blocks.made", c.made),
            ("blocks.made.plain", c.plain),
            ("blocks.copied", c.copied),
            ("blocks.lookups", c.lookups),
            ("blocks.links", c.links),
            ("blocks.dropped", c.dropped),
            ("blocks.cleared", c.cleared),
            ("translation.instructions", c.instructions),
            ("translation.guest_bytes", c.guest_bytes),
            ("translation.host_bytes", c.host_bytes),
        ]
    }

    /// The block for the code at `va` on the page at host address `page`, if there is one.
    pub fn find(&mut self, va: u64, page: u64, mode: CodeMode) -> Option<u32> {
        self.counts.lookups += 1;
        self.existing(Key { va, page, mode: mode.bits() })
    }

    /// Whether the code at `va`, which has no block, is to be interpreted this time, since it is written again and again.
    pub fn interprets(&mut self, va: u64, page: u64, mode: CodeMode) -> bool {
        self.rewritten.interprets(Place::new(va, page, mode.bits()))
    }

    fn existing(&self, key: Key) -> Option<u32> {
        self.by_key.find(hash(&key), |&id| self.blocks[id as usize].key() == key).copied()
    }

    /// Whether any block was made from the page at this host address.
    pub fn has_page(&self, page: u64) -> bool {
        self.by_page.contains_key(&page)
    }

    /// Offsets on a page at which blocks begin.
    pub fn starts_on(&self, page: u64) -> Vec<u16> {
        let blocks = self.by_page.get(&page).into_iter().flatten().map(|&id| &self.blocks[id as usize]);
        blocks.filter(|b| b.page == page && b.alive).map(|b| (b.va & 0xfff) as u16).collect()
    }

    /// Host address at which a block begins.
    pub fn entry(&self, block: u32) -> *const u8 {
        self.memory.rx_ptr().wrapping_add(self.blocks[block as usize].host as usize)
    }

    /// Lifts the code at `va` without translating it.
    pub fn lift(&mut self, va: u64, piece: Piece, mode: CodeMode) -> Option<Region> {
        self.lifter.lift(va, piece, mode)
    }

    /// The second page of a block's code, if it has one.
    pub fn second_page(&self, block: u32) -> Option<u64> {
        Some(self.blocks[block as usize].second).filter(|&page| page != 0)
    }

    /// Lifts the one instruction at `va`, whose bytes lie on two pages.
    pub fn lift_one(&mut self, va: u64, piece: Piece, mode: CodeMode) -> Option<Region> {
        self.lifter.lift_one(va, piece, mode)
    }

    /// Translates a region. `None`: no room; the caller calls [`Blocks::clear`] and tries again.
    pub fn translate(&mut self, region: &Region, source: Source, mode: CodeMode) -> Option<u32> {
        let first_link = self.links.len() as u32;
        let offset = self.memory.used().next_multiple_of(16);
        let base = self.memory.rx_ptr() as u64 + offset as u64;
        let emitter = Emitter::new(base, first_link, &mut self.encoder, &mut self.info, &self.thunks);
        // A second page may be another one when the links of a block are used that lead to itself.
        let grouped = !mode.plain && source.second.is_none();
        let code = emitter.emit(region, grouped);
        if self.audited
            && let Err(what) = audit(&code, base, &self.thunks)
        {
            panic!("the code of the region at {:#x} (mode {mode:?}): {what}", region.start);
        }
        self.push_code(region.start, mode, &code.bytes)?;
        let absolute = |at: u32| at + offset as u32;
        self.links.extend(code.links.iter().map(|l| Link {
            target: l.target,
            site: absolute(l.site),
            unresolved: absolute(l.unresolved),
            to: NONE,
            next: NONE,
            guarded: l.guarded,
            plain: l.plain,
            ahead: l.ahead,
        }));
        let block = Block {
            va: region.start,
            page: source.page,
            second: source.second.unwrap_or(0),
            host: offset as u32,
            marks: self.marks.push(&code.marks),
            incoming: NONE,
            before: (region.start - region.seen.start) as u16,
            len: (region.seen.end - region.start) as u16,
            mode: mode.bits() as u8,
            alive: true,
        };
        let place = block.place();
        let id = self.add(block);
        // A copy would have to see where the second page is.
        if source.second.is_none() && is_movable(region.start) {
            self.templates.add(place, id, first_link, &code);
        }
        self.counts.made += 1;
        self.counts.plain += u64::from(mode.plain);
        self.counts.instructions += region.nodes.len() as u64;
        self.counts.guest_bytes += region.end.wrapping_sub(region.start);
        self.counts.host_bytes += code.bytes.len() as u64;
        Some(id)
    }

    /// Puts code into the memory.
    fn push_code(&mut self, va: u64, mode: CodeMode, bytes: &[u8]) -> Option<()> {
        let at = self.memory.push(bytes, 16)?;
        if let Some(profile) = &self.profile {
            let (half, plain) =
                (if mode.kernel { "kernel" } else { "user" }, if mode.plain { ".plain" } else { "" });
            profile.add(&format!("{half}_{va:x}{plain}"), at as u64, bytes);
        }
        Some(())
    }

    /// Makes a block known.
    fn add(&mut self, block: Block) -> u32 {
        let id = self.blocks.len() as u32;
        let key = hash(&block.key());
        for page in [block.page, block.second].into_iter().filter(|&page| page != 0) {
            self.by_page.entry(page).or_default().push(id);
        }
        self.blocks.push(block);
        self.by_key.insert_unique(key, id, |&id| hash(&self.blocks[id as usize].key()));
        id
    }

    /// Linear address to which a link leads, and whether it leads to a block without groups of accesses; `None` if the
    /// number means nothing (any more).
    pub fn link_target(&self, link: u32) -> Option<(u64, bool)> {
        self.links.get(link as usize).map(|l| (l.target, l.plain))
    }

    /// Makes a link lead directly to a block. `generation` is that of the executable mappings in the target's half of
    /// the address space; it guards a link that leaves its page.
    pub fn resolve(&mut self, link: u32, block: u32, generation: u32) {
        let Some(old) = self.links.get(link as usize).map(|l| l.to) else { return };
        if old != block {
            self.counts.links += 1;
            self.detach(link, old);
            let l = &mut self.links[link as usize];
            l.to = block;
            l.next = std::mem::replace(&mut self.blocks[block as usize].incoming, link);
        }
        let l = &self.links[link as usize];
        let entry = self.blocks[block as usize].host + if l.ahead { emit::POLL } else { 0 };
        let rel = entry.wrapping_sub(l.site + 4);
        let mut done = self.memory.write(l.site as usize, &rel.to_le_bytes());
        if l.guarded {
            done &= self.memory.write((l.site - emit::GUARD) as usize, &generation.to_le_bytes());
        }
        debug_assert!(done, "links lie in the code memory");
    }

    /// Takes a link out of the list of those that lead to a block.
    fn detach(&mut self, link: u32, block: u32) {
        let Some(block) = self.blocks.get_mut(block as usize) else { return };
        let after = self.links[link as usize].next;
        if block.incoming == link {
            block.incoming = after;
            return;
        }
        let mut at = block.incoming;
        while let Some(l) = self.links.get_mut(at as usize) {
            if l.next == link {
                l.next = after;
                return;
            }
            at = l.next;
        }
    }

    /// Makes the links that lead to a block lead nowhere.
    fn unlink(&mut self, block: u32) {
        let mut next = std::mem::replace(&mut self.blocks[block as usize].incoming, NONE);
        while let Some(l) = self.links.get_mut(next as usize) {
            l.to = NONE;
            next = std::mem::replace(&mut l.next, NONE);
            l.unlinked(l.site, l.unresolved, |at, word| {
                let _ = self.memory.write(at as usize, &word.to_le_bytes());
            });
        }
    }

    /// Throws away the blocks on the page at host address `page` whose guest code overlaps the bytes; all of the page
    /// for `0..4096`. Says whether any was thrown away; jump caches must be emptied then.
    pub fn invalidate(&mut self, page: u64, bytes: std::ops::Range<u32>) -> bool {
        let Some(mut list) = self.by_page.remove(&page) else { return false };
        let before = list.len();
        list.retain(|&id| {
            let block = &mut self.blocks[id as usize];
            if !block.alive {
                return false;
            }
            if !block.overlaps(page, &bytes) {
                return true;
            }
            block.alive = false;
            // What was copied of it, or it of, depends on the same bytes.
            self.templates.remove(block.place());
            self.rewritten.dropped(block.place(), bytes.len());
            if let Ok(entry) = self.by_key.find_entry(hash(&block.key()), |&other| other == id) {
                entry.remove();
            }
            self.unlink(id);
            self.counts.dropped += 1;
            false
        });
        let dropped = list.len() != before;
        if !list.is_empty() {
            self.by_page.insert(page, list);
        }
        dropped
    }

    /// Throws everything away; returns the pages that had blocks.
    pub fn clear(&mut self) -> Vec<u64> {
        self.counts.cleared += 1;
        self.memory.truncate(self.thunks_end);
        self.blocks.clear();
        self.by_key.clear();
        self.links.clear();
        self.marks.clear();
        self.templates.clear();
        self.by_page.drain().map(|(page, _)| page).collect()
    }

    /// Which guest instruction the generated code at host address `pc` belongs to.
    pub fn locate(&self, pc: u64) -> Option<GuestPoint> {
        let offset = u32::try_from(pc.checked_sub(self.memory.rx_ptr() as u64)?).ok()?;
        let index = self.blocks.partition_point(|b| b.host <= offset).checked_sub(1)?;
        let block = &self.blocks[index];
        let inside = offset - block.host;
        let mark = self.marks.find(block.marks, inside)?;
        Some(GuestPoint { rip: block.va.wrapping_add(u64::from(mark.guest)), host_flags: mark.host_flags })
    }
}
