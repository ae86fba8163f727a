//! The software TLB: what generated code probes on each access.
//!
//! An access to `va` of `size` bytes takes the entry at `(va >> 12) % ENTRIES`, subtracts the tag for its kind and
//! hits if the difference is at most `4096 - size`: one comparison finds the wrong page, missing rights and an access
//! that leaves the page. The host address is then the difference plus `host`.

use std::collections::{HashMap, HashSet};

use ruse_arch::paging::Access;

use super::zeroed::{Zeroable, Zeroed};

/// Entries of a view; a power of two.
pub const ENTRIES: usize = 16384;
/// Entries of a jump cache; a power of two.
pub const JUMPS: usize = 4096;

const PAGE: u64 = 4096;

/// One TLB entry. A tag is the page's linear address, or an address that another entry would hold.
#[repr(C, align(32))]
#[derive(Clone, Copy, Debug, Default)]
pub struct Entry {
    /// Tag of reads.
    pub read: u64,
    /// Tag of writes.
    pub write: u64,
    /// Tag of fetches.
    pub exec: u64,
    /// Host address of the page.
    pub host: u64,
}

impl Entry {
    /// Offset of the host address.
    pub const HOST_OFFSET: i32 = std::mem::offset_of!(Entry, host) as i32;

    /// Offset of the tag of reads or writes.
    pub const fn tag_offset(write: bool) -> i32 {
        let at = if write { std::mem::offset_of!(Entry, write) } else { std::mem::offset_of!(Entry, read) };
        at as i32
    }

    const fn empty(index: usize) -> Self {
        Self { read: never(index), write: never(index), exec: never(index), host: 0 }
    }
}

/// One entry of the jump cache: a linear address of code and where its translation begins.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug)]
pub struct Jump {
    /// Linear address, or one that another entry would hold.
    pub va: u64,
    /// Host code.
    pub host: *const u8,
}

impl Jump {
    const fn empty(index: usize) -> Self {
        Self { va: if index == 0 { 1 } else { 0 }, host: std::ptr::null() }
    }
}

// SAFETY: integers and a pointer that nothing in Rust follows.
unsafe impl Zeroable for Entry {}
// SAFETY: as above.
unsafe impl Zeroable for Jump {}
// SAFETY: integers and booleans.
unsafe impl Zeroable for Meta {}

/// What else is known of an entry.
#[derive(Clone, Copy, Default)]
struct Meta {
    global: bool,
    /// log2 of the guest page's size where it is over 12, else 0.
    large: u8,
    /// In the journal.
    used: bool,
}

/// A TLB and a jump cache for one address space and one privilege.
pub struct View {
    entries: Zeroed<Entry>,
    meta: Zeroed<Meta>,
    journal: Vec<u16>,
    jumps: Zeroed<Jump>,
    jump_journal: Vec<u16>,
    /// What the jump cache's code was translated for.
    jump_mode: u32,
    /// Pages of any size from which code was fetched by users of this jump cache. An entry of the TLB may have gone long
    /// before: what jumps there stays.
    code: HashMap<u64, CodePage>,
    /// Large pages that entries were made from.
    large: HashSet<u64>,
}

/// With which kinds of mappings code was fetched from a page.
#[derive(Clone, Copy, Default)]
struct CodePage {
    global: bool,
    local: bool,
}

/// Sizes of pages, as powers of two (SDM volume 3, table 4-1).
const SHIFTS: [u32; 4] = [12, 21, 22, 30];

/// A page of a size, for tables of pages.
fn page_key(va: u64, shift: u32) -> u64 {
    va >> shift << shift | u64::from(shift)
}

/// A tag that no address with this index matches.
const fn never(index: usize) -> u64 {
    if index == 0 { PAGE } else { 0 }
}

/// Index of a linear address in a view.
pub const fn index(va: u64) -> usize {
    (va / PAGE) as usize % ENTRIES
}

/// Index of a linear address in a jump cache. The number of the page takes part: functions of all pages begin at the few
/// offsets that are aligned.
pub const fn jump_index(va: u64) -> usize {
    (va ^ (va / PAGE)) as usize % JUMPS
}

impl View {
    /// An empty view. It takes host memory as it is used.
    pub fn new() -> std::io::Result<Self> {
        // Zeroes are empty entries everywhere but at the first index.
        let (mut entries, mut jumps) = (Zeroed::new(ENTRIES)?, Zeroed::new(JUMPS)?);
        (entries[0], jumps[0]) = (Entry::empty(0), Jump::empty(0));
        Ok(Self {
            entries,
            meta: Zeroed::new(ENTRIES)?,
            journal: Vec::new(),
            jumps,
            jump_journal: Vec::new(),
            jump_mode: 0,
            code: HashMap::new(),
            large: HashSet::new(),
        })
    }

    /// Base of the entries, for generated code.
    pub fn entries_ptr(&mut self) -> *mut Entry {
        self.entries.as_mut_ptr()
    }
    /// Base of the jump cache, for generated code.
    pub fn jumps_ptr(&mut self) -> *mut Jump {
        self.jumps.as_mut_ptr()
    }

    /// Host address of `va` if the entry allows this access for `size` bytes within the page.
    #[inline]
    pub fn lookup(&self, va: u64, size: u64, access: Access) -> Option<*mut u8> {
        let entry = &self.entries[index(va)];
        let tag = match access {
            Access::Read => entry.read,
            Access::Write => entry.write,
            Access::Fetch => entry.exec,
        };
        let offset = va.wrapping_sub(tag);
        (offset <= PAGE - size).then(|| (entry.host + offset) as *mut u8)
    }

    /// Enters a translation; rights that the entry already has from the same mapping stay.
    pub fn fill(&mut self, va: u64, host: u64, fill: Fill) {
        let i = index(va);
        let page = va & !(PAGE - 1);
        let none = never(i);
        let (entry, meta) = (&mut self.entries[i], &mut self.meta[i]);
        let large = if fill.page_shift > 12 { fill.page_shift as u8 } else { 0 };
        let same_page = entry.host == host && [entry.read, entry.write, entry.exec].contains(&page);
        if !same_page || meta.global != fill.global || meta.large != large {
            *entry = Entry { read: none, write: none, exec: none, host };
        }
        if fill.read {
            entry.read = page;
        }
        if fill.write {
            entry.write = page;
        }
        if fill.exec {
            entry.exec = page;
        }
        if !meta.used {
            self.journal.push(i as u16);
        }
        *meta = Meta { global: fill.global, large, used: true };
        if large != 0 {
            self.large.insert(page_key(va, fill.page_shift));
        }
    }

    /// Code is fetched from the page of `va`.
    pub fn note_code(&mut self, va: u64, page_shift: u32, global: bool) {
        let page = self.code.entry(page_key(va, page_shift)).or_default();
        page.global |= global;
        page.local |= !global;
    }

    /// The translation of code of this kind at `va`.
    pub fn find_jump(&self, va: u64, mode: u32) -> Option<*const u8> {
        let jump = &self.jumps[jump_index(va)];
        (self.jump_mode == mode && jump.va == va).then_some(jump.host)
    }

    /// Enters a translation of code into the jump cache.
    pub fn fill_jump(&mut self, va: u64, host: *const u8) {
        let i = jump_index(va);
        self.jumps[i] = Jump { va, host };
        self.jump_journal.push(i as u16);
        if self.jump_journal.len() >= 2 * JUMPS {
            self.jump_journal.sort_unstable();
            self.jump_journal.dedup();
        }
    }

    /// Says for which kind of code the jump cache is to be; another kind's entries go.
    pub fn set_jump_mode(&mut self, mode: u32) {
        if self.jump_mode != mode {
            self.jump_mode = mode;
            self.flush_jumps();
        }
    }

    /// Empties the jump cache.
    pub fn flush_jumps(&mut self) {
        for i in self.jump_journal.drain(..) {
            self.jumps[i as usize] = Jump::empty(i as usize);
        }
    }

    /// Drops all entries, or all that are not global.
    pub fn flush(&mut self, keep_global: bool) {
        let Self { entries, meta, journal, .. } = self;
        journal.retain(|&i| {
            let i = i as usize;
            if keep_global && meta[i].global {
                return true;
            }
            entries[i] = Entry::empty(i);
            meta[i] = Meta::default();
            false
        });
        if !keep_global {
            self.large.clear();
            self.code.clear();
            self.flush_jumps();
            return;
        }
        // Kernel code is global as a rule; what was mapped only for one address space is dropped with its jumps.
        if self.code.values().any(|page| page.local) {
            self.flush_jumps();
            self.code.retain(|_, page| {
                page.local = false;
                page.global
            });
        }
    }

    /// Drops the page of `va` (the whole of it if large). Says whether code had been fetched from it.
    pub fn flush_page(&mut self, va: u64) -> bool {
        let page = va & !(PAGE - 1);
        self.drop_index_if(index(va), |entry, _| [entry.read, entry.write, entry.exec].contains(&page));
        let mut had_code = false;
        for shift in SHIFTS {
            let key = page_key(va, shift);
            had_code |= self.code.remove(&key).is_some();
            if self.large.remove(&key) {
                self.flush_large(va, shift);
            }
        }
        if had_code {
            self.flush_jumps();
        }
        had_code
    }

    fn flush_large(&mut self, va: u64, shift: u32) {
        let hits: Vec<usize> = (self.journal.iter().map(|&i| i as usize))
            .filter(|&i| {
                let entry = &self.entries[i];
                let page = [entry.read, entry.write, entry.exec].into_iter().find(|&t| t != never(i));
                u32::from(self.meta[i].large) == shift && page.is_some_and(|p| p >> shift == va >> shift)
            })
            .collect();
        for i in hits {
            self.drop_index_if(i, |_, _| true);
        }
    }

    /// Takes the right to write directly away from every entry that leads to the host page.
    pub fn drop_writers(&mut self, host: u64) {
        for &i in &self.journal {
            let entry = &mut self.entries[i as usize];
            if entry.host == host {
                entry.write = never(i as usize);
            }
        }
    }

    /// Takes the right to write directly away from every entry.
    pub fn drop_all_writers(&mut self) {
        for &i in &self.journal {
            self.entries[i as usize].write = never(i as usize);
        }
    }

    /// Takes the right to write directly away from the entry at this index, if it leads to the host page.
    pub fn drop_writer(&mut self, index: usize, host: u64) {
        let entry = &mut self.entries[index];
        if entry.host == host {
            entry.write = never(index);
        }
    }

    /// Whether the entry at this index leads to the host page and may write.
    pub fn writes(&self, index: usize, host: u64) -> bool {
        let entry = &self.entries[index];
        entry.host == host && entry.write != never(index)
    }

    fn drop_index_if(&mut self, i: usize, when: impl Fn(&Entry, &Meta) -> bool) {
        if when(&self.entries[i], &self.meta[i]) {
            // The index stays in the journal; a later fill finds `used` set.
            self.entries[i] = Entry::empty(i);
            let used = self.meta[i].used;
            self.meta[i] = Meta { used, ..Meta::default() };
        }
    }
}

/// What a fill allows.
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    /// Reads hit.
    pub read: bool,
    /// Writes hit.
    pub write: bool,
    /// Fetches hit.
    pub exec: bool,
    /// The translation is global.
    pub global: bool,
    /// log2 of the guest page's size.
    pub page_shift: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILL: Fill = Fill { read: true, write: false, exec: false, global: false, page_shift: 12 };

    #[test]
    fn an_empty_view_hits_nowhere() {
        let view = View::new().unwrap();
        for va in [0, 1, 0xfff, 0x1000, 0x1fff, u64::MAX, 1 << 63, 0xffff_8000_0000_0000] {
            assert!(view.lookup(va, 1, Access::Read).is_none(), "{va:#x}");
        }
    }

    #[test]
    fn rights_and_page_ends_are_checked() {
        let mut view = View::new().unwrap();
        view.fill(0, 0x7000, FILL);
        assert_eq!(view.lookup(0xff8, 8, Access::Read), Some(0x7ff8 as *mut u8));
        assert!(view.lookup(0xff9, 8, Access::Read).is_none());
        assert!(view.lookup(0x8, 8, Access::Write).is_none());
        assert!(view.lookup(ENTRIES as u64 * 4096, 1, Access::Read).is_none());
    }

    #[test]
    fn global_entries_survive_a_flush_that_keeps_them() {
        let mut view = View::new().unwrap();
        view.fill(0x1000, 0x7000, FILL);
        view.fill(0x2000, 0x8000, Fill { global: true, ..FILL });
        view.flush(true);
        assert!(view.lookup(0x1000, 1, Access::Read).is_none());
        assert!(view.lookup(0x2000, 1, Access::Read).is_some());
    }

    #[test]
    fn one_page_of_a_large_page_flushes_all_of_it() {
        let mut view = View::new().unwrap();
        view.fill(0x20_1000, 0x7000, Fill { page_shift: 21, ..FILL });
        view.fill(0x40_1000, 0x8000, FILL);
        view.flush_page(0x20_0000);
        assert!(view.lookup(0x20_1000, 1, Access::Read).is_none());
        assert!(view.lookup(0x40_1000, 1, Access::Read).is_some());
    }

    #[test]
    fn rights_of_an_old_mapping_do_not_outlive_it_under_a_global_one() {
        let mut view = View::new().unwrap();
        view.fill(0x1000, 0x7000, Fill { write: true, ..FILL });
        view.fill(0x1000, 0x7000, Fill { global: true, ..FILL });
        view.flush(true);
        assert!(view.lookup(0x1000, 1, Access::Read).is_some());
        assert!(view.lookup(0x1000, 1, Access::Write).is_none());
    }

    #[test]
    fn jumps_to_the_same_place_on_many_pages_are_all_known() {
        let mut view = View::new().unwrap();
        let code = |page: u64| (page * PAGE) as *const u8;
        for page in 1..=1000 {
            view.fill_jump(page * PAGE + 0x40, code(page));
        }
        assert!((1..=1000).all(|page| view.find_jump(page * PAGE + 0x40, 0) == Some(code(page))));
        view.flush_jumps();
        assert!((1..=1000).all(|page| view.find_jump(page * PAGE + 0x40, 0).is_none()));
    }

    #[test]
    fn code_on_a_large_page_is_known_by_each_of_its_addresses() {
        let mut view = View::new().unwrap();
        view.note_code(0x20_1000, 21, true);
        view.flush(true);
        assert!(!view.flush_page(0x40_0000));
        assert!(view.flush_page(0x3f_f000));
        assert!(!view.flush_page(0x20_1000));
    }
}
