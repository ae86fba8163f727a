//! The software MMU of one vCPU: address spaces with their TLB views, fills by walking the guest's page tables,
//! flushes as the guest asks for them.

pub mod access;
mod alone;
pub mod changes;
mod log;
#[cfg(test)]
mod read_only_tests;
#[cfg(test)]
mod tests;
pub mod tlb;
pub mod watch;
#[cfg(test)]
mod watch_tests;
mod writers;
mod zeroed;

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use ruse_arch::{
    flags::{cr0, cr4},
    paging::{self, Access, PagingMode, PhysMemory, Privilege, Translation},
};
use ruse_memory::{GuestRam, RamRegion};

use self::{
    changes::{Change, Changes},
    tlb::{Entry, Fill, Jump, View},
    watch::CodeMap,
    writers::{Place, Writer, Writers},
};

/// Address spaces whose translations are kept at the same time (Linux uses six process-context identifiers).
const SPACES: usize = 8;

/// Generations of user mappings are unique over the vCPUs of the process.
static GENERATION: AtomicU32 = AtomicU32::new(1);

fn next_generation() -> u32 {
    GENERATION.fetch_add(1, Ordering::Relaxed)
}

/// Views of an address space.
const VIEWS: usize = 3;

/// The views of one address space.
struct Space {
    /// Process-context identifier; 0 without CR4.PCIDE.
    pcid: u16,
    /// For least-recently-used replacement.
    used: u64,
    generation: u32,
    /// By [`view_index`].
    views: [View; VIEWS],
}

/// As with every allocation: without memory there is no way on.
const NO_MEMORY: &str = "the host has memory for tables of the MMU";

const USER: usize = 0;
const KERNEL: usize = 1;
const KERNEL_AC: usize = 2;

fn view_index(user: bool, ac: bool) -> usize {
    match (user, ac) {
        (true, _) => USER,
        (false, false) => KERNEL,
        (false, true) => KERNEL_AC,
    }
}

/// The software MMU.
pub struct Mmu {
    ram: GuestRam,
    regions: Vec<RamRegion>,
    /// Code and writers of each page, shared by the VM's vCPUs.
    pub code: Arc<CodeMap>,
    id: u32,
    spaces: Vec<Space>,
    current: usize,
    view: usize,
    tick: u64,
    kernel_generation: u32,
    /// Mappings with code in the kernel half are all global, so that all address spaces have the same.
    kernel_code_global: bool,
    /// Entries of this vCPU that may write, by page.
    writers: Writers,
    /// For those who keep copies of mappings outside the TLB.
    pub changes: Changes,
    /// Fills made, views flushed, pages flushed.
    fills: u64,
    flushes: u64,
    page_flushes: u64,
}

impl Mmu {
    /// The MMU of vCPU `id` over `ram`.
    pub fn new(ram: GuestRam, code: Arc<CodeMap>, id: u32) -> Self {
        let regions = ram.regions().to_vec();
        let writers = Writers::new(regions.iter().map(|r| (r.gpa, r.size))).expect(NO_MEMORY);
        let mut mmu = Self {
            regions,
            writers,
            ram,
            code,
            id,
            spaces: Vec::new(),
            current: 0,
            view: KERNEL,
            tick: 0,
            kernel_generation: next_generation(),
            kernel_code_global: true,
            changes: Changes::default(),
            fills: 0,
            flushes: 0,
            page_flushes: 0,
        };
        mmu.spaces.push(mmu.new_space(0));
        mmu
    }

    /// What it counts.
    pub fn counters(&self) -> [(&'static str, u64); 3] {
        [
            ("tlb.fills", self.fills),
            ("tlb.flushes.views", self.flushes),
            ("tlb.flushes.pages", self.page_flushes),
        ]
    }

    /// The RAM behind.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Generation of the executable mappings of the user half.
    pub fn user_generation(&self) -> u32 {
        self.spaces[self.current].generation
    }
    /// Generation of the executable mappings of the kernel half.
    pub fn kernel_generation(&self) -> u32 {
        if self.kernel_code_global { self.kernel_generation } else { self.user_generation() }
    }

    /// Chooses the view for a privilege; returns what generated code probes.
    pub fn select(&mut self, user: bool, ac: bool) -> (*mut Entry, *mut Jump) {
        self.view = view_index(user, ac);
        let jumps = self.jump_view().jumps_ptr();
        (self.view_mut(self.view).entries_ptr(), jumps)
    }

    /// Entries of the kernel's views without and with AC.
    pub fn kernel_entries(&mut self, smap: bool) -> [*mut Entry; 2] {
        [!smap, true].map(|ac| self.view_mut(view_index(false, ac)).entries_ptr())
    }

    /// Says which kind of code (a key of the translator) the jump cache in force is for.
    pub fn set_jump_mode(&mut self, mode: u32) {
        self.jump_view().set_jump_mode(mode);
    }

    fn jump_view(&mut self) -> &mut View {
        self.jump_view_of(self.view == USER)
    }

    /// Fetches do not look at AC: both kernel views share a jump cache.
    fn jump_view_of(&mut self, user: bool) -> &mut View {
        self.view_mut(if user { USER } else { KERNEL })
    }

    /// The view in force.
    pub fn view(&mut self) -> &mut View {
        self.view_mut(self.view)
    }

    /// The view of the CPU's own accesses to tables.
    pub fn system_view(&mut self, smap: bool) -> &mut View {
        self.view_mut(view_index(false, !smap))
    }

    /// CR3, CR0 or CR4 were changed: chooses the address space. Does not flush.
    pub fn set_space(&mut self, mode: &PagingMode) {
        let pcid =
            if mode.cr4 & cr4::PCIDE != 0 && mode.cr0 & cr0::PG != 0 { mode.cr3 as u16 & 0xfff } else { 0 };
        self.tick += 1;
        let found = self.spaces.iter().position(|s| s.pcid == pcid);
        self.current = found.unwrap_or_else(|| {
            if self.spaces.len() < SPACES {
                let space = self.new_space(pcid);
                self.spaces.push(space);
                return self.spaces.len() - 1;
            }
            let oldest = (0..SPACES).min_by_key(|&i| self.spaces[i].used).expect("not empty");
            self.flush_space(oldest, false);
            // Others may use links to code that only this one knew to be mapped.
            self.kernel_generation = next_generation();
            self.spaces[oldest].pcid = pcid;
            oldest
        });
        self.spaces[self.current].used = self.tick;
    }

    /// MOV to CR3 without the no-flush bit: what is not global goes (SDM volume 3, 4.10.4.1). Call after
    /// [`Mmu::set_space`].
    pub fn flush_current(&mut self, keep_global: bool) {
        if !keep_global {
            self.kernel_generation = next_generation();
        }
        self.flush_space(self.current, keep_global);
    }

    /// Everything goes, in all address spaces, global or not.
    pub fn flush_all(&mut self) {
        self.kernel_generation = next_generation();
        self.kernel_code_global = true;
        for i in 0..self.spaces.len() {
            self.flush_space(i, false);
        }
    }

    /// Everything that is not global goes, in all address spaces (INVPCID type 3).
    pub fn flush_all_non_global(&mut self) {
        for i in 0..self.spaces.len() {
            self.flush_space(i, true);
        }
    }

    /// Everything of one process-context identifier goes that is not global (INVPCID type 1).
    pub fn flush_pcid(&mut self, pcid: u16) {
        // Also if this MMU has forgotten it.
        self.changes.note(Change::Space(pcid));
        if let Some(i) = self.spaces.iter().position(|s| s.pcid == pcid) {
            self.flush_space(i, true);
        }
    }

    /// The page of `va` goes in all address spaces (INVLPG; more than INVPCID type 0 asks for).
    pub fn flush_page(&mut self, va: u64) {
        self.page_flushes += 1;
        self.changes.note(Change::Page(va));
        let mut code = false;
        for space in &mut self.spaces {
            let mut here = false;
            for view in &mut space.views {
                here |= view.flush_page(va);
            }
            if here {
                space.generation = next_generation();
            }
            code |= here;
        }
        if code && va >> 63 != 0 {
            self.kernel_generation = next_generation();
        }
    }

    /// Sees to it that every write to the page is noticed from now on. Says whether this vCPU may have written to it directly.
    pub fn guard(&mut self, gpa: u64) -> bool {
        let code = self.code.clone();
        code.watch(gpa, self.id);
        let wrote = code.take_writer(gpa, self.id);
        if wrote {
            self.drop_writers(gpa);
        }
        wrote
    }

    /// Other vCPUs or this one must not write directly to the page any more.
    pub fn drop_writers(&mut self, gpa: u64) {
        self.changes.note(Change::Writer(gpa));
        let Some(host) = self.host_page(gpa).map(|host| host as u64) else { return };
        match self.writers.get(gpa) {
            Writer::None => {}
            Writer::One(at) => {
                if let Some(view) = self.view_at(at.view) {
                    view.drop_writer(at.index, host);
                }
            }
            Writer::Many => self.all_views().for_each(|view| view.drop_writers(host)),
        }
        self.writers.set(gpa, Writer::None);
    }

    /// No page must be written to directly any more.
    pub fn drop_all_writers(&mut self) {
        self.changes.note(Change::Writers);
        self.all_views().for_each(|view| view.drop_all_writers());
    }

    /// Empties all jump caches (translations went away).
    pub fn flush_jumps(&mut self) {
        for view in self.all_views() {
            view.flush_jumps();
        }
    }

    /// Host address of the page that holds `gpa`, where it is RAM.
    #[inline]
    pub fn host_page(&self, gpa: u64) -> Option<*mut u8> {
        self.region(gpa).map(|region| page_in(region, gpa))
    }

    /// Host address of the page that holds `gpa`, where it is RAM that vCPUs can write to.
    pub fn writable_page(&self, gpa: u64) -> Option<*mut u8> {
        self.region(gpa).filter(|region| !region.read_only).map(|region| page_in(region, gpa))
    }

    #[inline]
    fn region(&self, gpa: u64) -> Option<&RamRegion> {
        self.regions.iter().find(|r| gpa.wrapping_sub(r.gpa) < r.size)
    }

    /// Guest physical address of the page of RAM at a host address.
    pub fn gpa_of_host(&self, host: u64) -> Option<u64> {
        let region = self.regions.iter().find(|r| host.wrapping_sub(r.host as u64) < r.size)?;
        Some(region.gpa + (host - region.host as u64))
    }

    /// The translation of code of this kind at `va` that the jump cache in force knows.
    pub fn find_jump(&mut self, va: u64, mode: u32) -> Option<*const u8> {
        self.jump_view().find_jump(va, mode)
    }

    /// Enters a translation of code at `va` into the jump cache in force.
    pub fn fill_jump(&mut self, va: u64, host: *const u8) {
        self.jump_view().fill_jump(va, host);
    }

    /// Walks the page tables without touching the TLB.
    pub fn walk(
        &mut self,
        mode: &PagingMode,
        va: u64,
        access: Access,
        who: Privilege,
    ) -> Result<Translation, u32> {
        paging::walk(mode, va, access, who, &mut Physical { mmu: self })
    }

    /// Walks for an access of the view in force and enters the result. `Ok(None)`: not RAM, or a write that cannot be made
    /// directly because there is code on the page or it is read-only.
    pub fn fill(
        &mut self,
        mode: &PagingMode,
        va: u64,
        access: Access,
        who: Privilege,
    ) -> Result<(Translation, Option<*mut u8>), u32> {
        let found = self.walk(mode, va, access, who)?;
        let Some(region) = self.region(found.gpa) else { return Ok((found, None)) };
        let page = page_in(region, found.gpa);
        let read = found.allows(mode, Access::Read, who);
        let allowed = found.dirty && found.allows(mode, Access::Write, who);
        let write = allowed && self.may_write(found.gpa, access == Access::Write);
        let exec = access == Access::Fetch;
        if exec {
            self.jump_view_of(who.user).note_code(va, found.page_shift, found.global);
            self.kernel_code_global &= found.global || va >> 63 == 0;
        }
        let fill = Fill { read, write, exec, global: found.global, page_shift: found.page_shift };
        self.fills += 1;
        let number = view_index(who.user, mode.cr4 & cr4::SMAP == 0 || who.ac);
        self.view_mut(number).fill(va, page as u64, fill);
        if write {
            let view = self.current * VIEWS + number;
            self.note_writer(found.gpa, page as u64, Place { view, index: tlb::index(va) });
        }
        let host = page.wrapping_add(found.gpa as usize & 0xfff);
        Ok((found, (access != Access::Write || write).then_some(host)))
    }

    /// Where a read of user code at `va` leads if it needs no marks in the page tables.
    pub fn look(&mut self, mode: &PagingMode, va: u64) -> Option<Translation> {
        let who = Privilege { user: true, ac: false };
        let mut tables = Unmarked { tables: Physical { mmu: self }, missing: false };
        let found = paging::walk(mode, va, Access::Read, who, &mut tables).ok()?;
        (!tables.missing).then_some(found)
    }

    /// The process-context identifier in force, 0 if there are none.
    pub fn pcid(&self) -> u16 {
        self.spaces[self.current].pcid
    }

    /// The page of RAM may be written directly from now on, by who loses that right again when there is code to be on it;
    /// `false` if it may not, because there is code or it is read-only. While writes are logged, it may only if one
    /// is made now (`written`).
    pub fn may_write(&self, gpa: u64, written: bool) -> bool {
        if self.writable_page(gpa).is_none() {
            return false;
        }
        if self.code.is_logging() {
            if !written {
                return false;
            }
            self.note_write(gpa);
        }
        self.code.allow_writes(gpa, self.id)
    }

    /// For the dirty log: the page may be written from now on.
    fn note_write(&self, gpa: u64) {
        if let Some((tracker, offset)) = self.ram.tracker(gpa) {
            tracker.note_write(offset);
        }
    }

    /// An entry has the right to write to the page now.
    fn note_writer(&mut self, gpa: u64, host: u64, at: Place) {
        let known = match self.writers.get(gpa) {
            Writer::One(old)
                if old != at && self.view_at(old.view).is_some_and(|v| v.writes(old.index, host)) =>
            {
                Writer::Many
            }
            Writer::Many => return,
            _ => Writer::One(at),
        };
        self.writers.set(gpa, known);
    }

    /// The view with this number of a [`Place`].
    fn view_at(&mut self, number: usize) -> Option<&mut View> {
        self.spaces.get_mut(number / VIEWS)?.views.get_mut(number % VIEWS)
    }

    fn new_space(&self, pcid: u16) -> Space {
        let views = std::array::from_fn(|_| View::new().expect(NO_MEMORY));
        Space { pcid, used: 0, generation: next_generation(), views }
    }

    fn view_mut(&mut self, index: usize) -> &mut View {
        &mut self.spaces[self.current].views[index]
    }

    fn all_views(&mut self) -> impl Iterator<Item = &mut View> {
        self.spaces.iter_mut().flat_map(|s| &mut s.views)
    }

    fn flush_space(&mut self, index: usize, keep_global: bool) {
        let space = &mut self.spaces[index];
        self.changes.note(Change::Space(space.pcid));
        space.generation = next_generation();
        for view in &mut space.views {
            self.flushes += 1;
            view.flush(keep_global);
        }
    }
}

/// Host address of the page of a region that holds `gpa`.
#[inline]
fn page_in(region: &RamRegion, gpa: u64) -> *mut u8 {
    region.host.wrapping_add((gpa - region.gpa) as usize & !0xfff)
}

/// Page tables as the walk reads and marks them.
struct Physical<'a> {
    mmu: &'a mut Mmu,
}

impl Physical<'_> {
    fn entry(&self, gpa: u64) -> Option<*mut u8> {
        let page = self.mmu.host_page(gpa)?;
        Some(page.wrapping_add(gpa as usize & 0xfff))
    }

    /// An entry that is to be marked. Those in read-only memory stay as they are.
    fn entry_to_mark(&self, gpa: u64) -> Option<*mut u8> {
        let page = self.mmu.writable_page(gpa)?;
        if self.mmu.code.is_logging() {
            self.mmu.note_write(gpa);
        }
        Some(page.wrapping_add(gpa as usize & 0xfff))
    }
}

/// Page tables that are only looked at.
struct Unmarked<'a> {
    tables: Physical<'a>,
    /// An access would have to mark an entry.
    missing: bool,
}

impl PhysMemory for Unmarked<'_> {
    fn read_entry(&mut self, gpa: u64, wide: bool) -> u64 {
        self.tables.read_entry(gpa, wide)
    }

    fn set_bits(&mut self, _: u64, _: bool, _: u64, _: u64) -> bool {
        self.missing = true;
        true
    }
}

impl PhysMemory for Physical<'_> {
    fn read_entry(&mut self, gpa: u64, wide: bool) -> u64 {
        let Some(at) = self.entry(gpa) else { return u64::MAX };
        // SAFETY: `at` lies in mapped guest RAM and is aligned to the entry; other CPUs may write, hence atomics.
        unsafe {
            if wide {
                AtomicU64::from_ptr(at.cast()).load(Ordering::Acquire)
            } else {
                u64::from(AtomicU32::from_ptr(at.cast()).load(Ordering::Acquire))
            }
        }
    }

    fn set_bits(&mut self, gpa: u64, wide: bool, old: u64, bits: u64) -> bool {
        let Some(at) = self.entry_to_mark(gpa) else { return true };
        // SAFETY: as in `read_entry`.
        let done = unsafe {
            if wide {
                AtomicU64::from_ptr(at.cast())
                    .compare_exchange(old, old | bits, Ordering::SeqCst, Ordering::Relaxed)
                    .is_ok()
            } else {
                let (old, new) = (old as u32, (old | bits) as u32);
                AtomicU32::from_ptr(at.cast())
                    .compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed)
                    .is_ok()
            }
        };
        if done {
            // This vCPU's own translations become void, too.
            self.mmu.code.written(gpa, None);
        }
        done
    }
}
