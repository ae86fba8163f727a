//! The store of translated regions ("blocks") of one vCPU: found by where their code lies, linked to each other, thrown
//! away when their code is written.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
};

use iced_x86::{Encoder, InstructionInfoFactory};

use crate::{
    backend::x86_64::{
        emit::{Code, Emitter, Mark},
        thunks::{SlowAccess, Thunks},
    },
    code_memory::CodeMemory,
    frontend::x86_64::{CodeMode, Lifter},
    ir::Region,
};

/// Bytes of generated code that a vCPU keeps at most.
const CODE_BYTES: usize = 32 << 20;

/// What a block was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    /// Linear address.
    va: u64,
    /// Host address of the code's page.
    page: u64,
    mode: u32,
}

/// A multiplicative hash: keys are addresses, not chosen against us in any way that matters.
#[derive(Default)]
struct KeyHasher(u64);

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

type Map<K, V> = HashMap<K, V, BuildHasherDefault<KeyHasher>>;

/// Where the guest code of a block lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Host address of the page on which it begins.
    pub page: u64,
    /// Host address of the page on which it ends, where that is another one.
    pub second: Option<u64>,
    /// Offset in the first page.
    start: u32,
    /// Bytes.
    len: u32,
}

impl Source {
    /// The code of a region on one or two pages.
    pub fn new(region: &Region, page: u64, second: Option<u64>) -> Self {
        let len = region.end.wrapping_sub(region.start) as u32;
        Self { page, second, start: (region.start & 0xfff) as u32, len }
    }

    fn overlaps(&self, page: u64, bytes: &std::ops::Range<u32>) -> bool {
        let end = self.start + self.len;
        (page == self.page && self.start < bytes.end && end > bytes.start)
            || (Some(page) == self.second && bytes.start + 4096 < end)
    }
}

/// A translated region.
struct Block {
    key: Key,
    /// Its guest code.
    guest: Source,
    /// Offset of its code.
    host: u32,
    marks: Box<[Mark]>,
    /// Links that lead here.
    incoming: Vec<u32>,
    alive: bool,
}

/// A jump between blocks.
struct Link {
    target: u64,
    /// Offsets in the code memory.
    site: u32,
    unresolved: u32,
    guard: Option<u32>,
    to: Option<u32>,
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
    by_key: Map<Key, u32>,
    by_page: Map<u64, Vec<u32>>,
    links: Vec<Link>,
    /// Blocks made since the last call that asked.
    pub made: u64,
    /// Guest instructions in them.
    pub made_instructions: u64,
    /// Blocks thrown away.
    pub dropped: u64,
}

impl Blocks {
    /// An empty store.
    pub fn new(slow: SlowAccess, lifter: Lifter, avx: bool) -> std::io::Result<Self> {
        let mut memory = CodeMemory::new(CODE_BYTES)?;
        let (thunks, code) = Thunks::build(memory.rx_ptr() as u64, slow, avx);
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
            by_key: Map::default(),
            by_page: Map::default(),
            links: Vec::new(),
            made: 0,
            made_instructions: 0,
            dropped: 0,
        })
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

    /// Bytes of generated code.
    pub fn used(&self) -> usize {
        self.memory.used()
    }

    /// The block for the code at `va` on the page at host address `page`, if there is one.
    pub fn find(&self, va: u64, page: u64, mode: CodeMode) -> Option<u32> {
        self.by_key.get(&Key { va, page, mode: mode.bits() }).copied()
    }

    /// Whether any block was made from the page at this host address.
    pub fn has_page(&self, page: u64) -> bool {
        self.by_page.contains_key(&page)
    }

    /// Host address at which a block begins.
    pub fn entry(&self, block: u32) -> *const u8 {
        self.memory.rx_ptr().wrapping_add(self.blocks[block as usize].host as usize)
    }

    /// Lifts the code at `va` without translating it. `bytes` is the page's content from there to its end.
    pub fn lift(&mut self, va: u64, bytes: &[u8], mode: CodeMode) -> Option<Region> {
        self.lifter.lift(va, bytes, mode)
    }

    /// The second page of a block's code, if it has one.
    pub fn second_page(&self, block: u32) -> Option<u64> {
        self.blocks[block as usize].guest.second
    }

    /// Lifts the one instruction at `va`, whose bytes lie on two pages.
    pub fn lift_one(&mut self, va: u64, bytes: &[u8], mode: CodeMode) -> Option<Region> {
        self.lifter.lift_one(va, bytes, mode)
    }

    /// Translates a region. `None`: no room; the caller calls [`Blocks::clear`] and tries again.
    pub fn translate(&mut self, region: &Region, source: Source, mode: CodeMode) -> Option<u32> {
        let first_link = self.links.len() as u32;
        let offset = self.memory.used().next_multiple_of(16);
        let base = self.memory.rx_ptr() as u64 + offset as u64;
        let emitter = Emitter::new(base, first_link, &mut self.encoder, &mut self.info, &self.thunks);
        let Code { bytes, links, marks } = emitter.emit(region);
        self.memory.push(&bytes, 16)?;
        let absolute = |at: u32| at + offset as u32;
        self.links.extend(links.iter().map(|l| Link {
            target: l.target,
            site: absolute(l.site),
            unresolved: absolute(l.unresolved),
            guard: l.guard.map(absolute),
            to: None,
        }));
        let key = Key { va: region.start, page: source.page, mode: mode.bits() };
        let id = self.blocks.len() as u32;
        self.blocks.push(Block {
            key,
            guest: source,
            host: offset as u32,
            marks: marks.into(),
            incoming: Vec::new(),
            alive: true,
        });
        self.by_key.insert(key, id);
        for page in [Some(source.page), source.second].into_iter().flatten() {
            self.by_page.entry(page).or_default().push(id);
        }
        self.made += 1;
        self.made_instructions += region.nodes.len() as u64;
        Some(id)
    }

    /// Linear address to which a link leads; `None` if the number means nothing (any more).
    pub fn link_target(&self, link: u32) -> Option<u64> {
        self.links.get(link as usize).map(|l| l.target)
    }

    /// Makes a link lead directly to a block. `generation` is that of the executable mappings in the target's half of
    /// the address space; it guards a link that leaves its page.
    pub fn resolve(&mut self, link: u32, block: u32, generation: u32) {
        let to = self.blocks[block as usize].host;
        let Some(l) = self.links.get_mut(link as usize) else { return };
        if l.to != Some(block) {
            l.to = Some(block);
            self.blocks[block as usize].incoming.push(link);
        }
        let rel = to.wrapping_sub(l.site + 4);
        let mut done = self.memory.write(l.site as usize, &rel.to_le_bytes());
        if let Some(guard) = l.guard {
            done &= self.memory.write(guard as usize, &generation.to_le_bytes());
        }
        debug_assert!(done, "links lie in the code memory");
    }

    fn unlink(&mut self, link: u32, block: u32) {
        let l = &mut self.links[link as usize];
        if l.to != Some(block) {
            return;
        }
        l.to = None;
        if let Some(guard) = l.guard {
            let _ = self.memory.write(guard as usize, &0u32.to_le_bytes());
        }
        let rel = l.unresolved.wrapping_sub(l.site + 4);
        let _ = self.memory.write(l.site as usize, &rel.to_le_bytes());
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
            if !block.guest.overlaps(page, &bytes) {
                return true;
            }
            block.alive = false;
            let (key, incoming) = (block.key, std::mem::take(&mut block.incoming));
            if self.by_key.get(&key) == Some(&id) {
                self.by_key.remove(&key);
            }
            for link in incoming {
                self.unlink(link, id);
            }
            self.dropped += 1;
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
        self.memory.truncate(self.thunks_end);
        self.blocks.clear();
        self.by_key.clear();
        self.links.clear();
        self.by_page.drain().map(|(page, _)| page).collect()
    }

    /// Which guest instruction the generated code at host address `pc` belongs to.
    pub fn locate(&self, pc: u64) -> Option<GuestPoint> {
        let offset = u32::try_from(pc.checked_sub(self.memory.rx_ptr() as u64)?).ok()?;
        let index = self.blocks.partition_point(|b| b.host <= offset).checked_sub(1)?;
        let block = &self.blocks[index];
        let inside = offset - block.host;
        let mark = &block.marks[block.marks.partition_point(|m| m.host <= inside).checked_sub(1)?];
        Some(GuestPoint {
            rip: block.key.va.wrapping_add(u64::from(mark.guest)),
            host_flags: mark.host_flags,
        })
    }
}
