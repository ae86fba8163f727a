//! One address space of the guest as a sandbox has it.

use std::collections::{HashMap, HashSet};

use ruse_arch::paging::{Access, Privilege, Translation};
use ruse_memory::GuestRam;
use ruse_sandbox::{Rights, Sandbox, SandboxError};

use super::{
    mappings::{Mappings, Run},
    scan::{self, Page, Verdict},
};
use crate::{
    cpu::Cpu,
    mmu::{access::load, changes::Change},
};

const PAGE: u64 = 4096;
/// Bytes around a page that is touched that are mapped with it, where the guest has marked them as accessed: an aligned block,
/// twice as large if the one before was the neighbour of this one.
const AROUND: u64 = 16 * PAGE;
const MOST_AROUND: u64 = 512 * PAGE;
/// Mappings at most. Linux allows a process 65530 (`vm.max_map_count`), and needs some while it changes them.
const MOST_RUNS: usize = 50_000;

/// Why no page was mapped for a page fault of user code that runs directly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unresolved {
    /// The fault is the guest's: the error code.
    Fault(u32),
    /// The instruction has to be executed by other means: a device, a page that cannot be mapped.
    Elsewhere,
    /// A write to a page with translated code.
    Code(u64),
    /// A jump to a page that has to be looked through ([`Space::look_through`]).
    Suspicious(u64),
    /// A jump to a page that cannot run directly.
    Detour,
}

/// What has become of an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Followed {
    /// It is the same.
    Same,
    /// It seems to be another one, or cannot be in this sandbox.
    Other,
}

/// An address space with its sandbox.
pub struct Space {
    /// CR3 without its flags.
    pub root: u64,
    /// Its process.
    pub sandbox: Sandbox,
    /// For least-recently-used replacement.
    pub used: u64,
    ram: GuestRam,
    pcid: u16,
    mappings: Mappings,
    /// Pages of RAM that may be mapped to be executed, by their GPA: most that are written are not.
    code: HashSet<u64>,
    /// Pages of code that is not to run directly, and how often it should have.
    avoided: HashMap<u64, u32>,
    /// Bytes of the largest page of the guest's of which something was mapped.
    largest: u64,
    /// The last block that was mapped: first address and bytes.
    block: (u64, u64),
    /// Where the guest has had a page fault: it will have a page there.
    awaited: Option<u64>,
    /// Changes of the MMU's that have been followed.
    seen: u64,
}

impl Space {
    /// A sandbox with nothing mapped for the address space in force.
    pub fn new(cpu: &mut Cpu, root: u64) -> Result<Self, SandboxError> {
        let ram = cpu.mmu.ram().clone();
        Ok(Self {
            root,
            sandbox: Sandbox::new(ram.file())?,
            ram,
            used: 0,
            pcid: cpu.mmu.pcid(),
            mappings: Mappings::default(),
            code: HashSet::new(),
            avoided: HashMap::new(),
            largest: PAGE,
            block: (0, AROUND),
            awaited: None,
            seen: cpu.mmu.changes.now(),
        })
    }

    /// Whether code at an address is not to run directly.
    pub fn avoids(&self, rip: u64) -> bool {
        self.avoided.contains_key(&(rip & !(PAGE - 1)))
    }

    /// Follows what the guest has flushed, and who must not write any more.
    pub fn follow(&mut self, cpu: &mut Cpu) -> Followed {
        let seen = std::mem::replace(&mut self.seen, cpu.mmu.changes.now());
        let moved = std::mem::replace(&mut self.pcid, cpu.mmu.pcid()) != self.pcid;
        if seen == self.seen && !moved {
            return Followed::Same;
        }
        let Some(changes) = cpu.mmu.changes.since(seen).filter(|_| !moved) else {
            return self.check_everything(cpu, true);
        };
        let all = |change: &Change| matches!(change, Change::Space(pcid) if *pcid == self.pcid);
        let everything = changes.iter().any(all);
        let writers = changes.contains(&Change::Writers);
        if (everything || writers) && self.check_everything(cpu, writers) == Followed::Other {
            return Followed::Other;
        }
        for change in changes {
            match change {
                // A large page is flushed by any of its addresses.
                Change::Page(va) if !everything => self.check(cpu, va & !(self.largest - 1), self.largest),
                Change::Writer(gpa) => self.take_writers(gpa),
                _ => {}
            }
        }
        Followed::Same
    }

    /// Whether one of the guest's pages lies where the sandbox itself does.
    fn hides_pages(&self, cpu: &mut Cpu) -> bool {
        self.sandbox.own_pages().step_by(PAGE as usize).any(|va| look(cpu, va).is_some())
    }

    /// Compares all mappings with the page tables, and takes the right to write from all pages if it is to go.
    fn check_everything(&mut self, cpu: &mut Cpu, writers: bool) -> Followed {
        self.avoided.clear();
        if self.hides_pages(cpu) {
            return Followed::Other;
        }
        if writers {
            for run in self.mappings.all().into_iter().filter(|run| run.rights.write) {
                self.map(Run { rights: Rights { write: false, ..run.rights }, ..run });
            }
        }
        let before = self.mappings.len();
        self.check(cpu, 0, u64::MAX);
        if self.mappings.len() * 2 <= before { Followed::Other } else { Followed::Same }
    }

    /// Compares the mappings of a range with the page tables.
    fn check(&mut self, cpu: &mut Cpu, from: u64, size: u64) {
        let to = from.saturating_add(size);
        let mut changed = Vec::new();
        for run in self.mappings.within(from, size) {
            let (mut va, end) = (run.va.max(from), (run.va + run.size).min(to));
            while va < end {
                let gpa = run.gpa + (va - run.va);
                let found = look(cpu, va).filter(|found| found.gpa == gpa);
                let page = found
                    .map_or(PAGE, |found| (1 << found.page_shift) - (va & ((1 << found.page_shift) - 1)));
                let size = page.min(end - va);
                // What can be written gets no copy.
                let now = found.filter(|found| !(run.copied && found.writable)).map(|found| Rights {
                    write: run.rights.write && found.writable && found.dirty,
                    execute: run.rights.execute && found.executable,
                });
                if now != Some(run.rights) {
                    changed.push((Run { va, size, gpa, ..run }, now));
                }
                va += size;
            }
        }
        for (run, now) in joined(changed) {
            match now {
                Some(rights) if !run.copied => self.map(Run { rights, ..run }),
                _ => self.unmap(cpu, run.va, run.size),
            }
        }
    }

    fn take_writers(&mut self, gpa: u64) {
        for page in self.mappings.of(gpa).into_iter().filter(|page| page.rights.write) {
            self.map(Run { rights: Rights { write: false, ..page.rights }, ..page });
        }
    }

    /// A page of RAM is not executed directly any more: its bytes change.
    pub fn forget_code(&mut self, cpu: &mut Cpu, gpa: u64) {
        if !self.code.remove(&(gpa & !(PAGE - 1))) {
            return;
        }
        for page in self.mappings.of(gpa).into_iter().filter(|page| page.rights.execute) {
            self.unmap(cpu, page.va, page.size);
        }
    }

    /// No page is executed directly any more.
    pub fn forget_all_code(&mut self, cpu: &mut Cpu) {
        self.code.clear();
        for run in self.mappings.all().into_iter().filter(|run| run.rights.execute) {
            self.unmap(cpu, run.va, run.size);
        }
    }

    /// Makes a page of code executable, if it is known what its suspicious bytes are. `roots` are offsets of instructions that
    /// are executed; those that were replaced are given back, `None` where the page is not executable. A page that user code
    /// can write gets no copy, as just-in-time compilers read what they have written.
    pub fn look_through(&mut self, cpu: &mut Cpu, va: u64, gpa: u64, roots: Vec<u16>) -> Option<Vec<u16>> {
        let (va, gpa) = (va & !(PAGE - 1), gpa & !(PAGE - 1));
        let found = look(cpu, va).filter(|found| found.gpa & !(PAGE - 1) == gpa)?;
        self.guard(cpu, gpa);
        let mut page = code(cpu, va, gpa)?;
        let run = page_run(va, gpa, Rights { write: false, execute: true });
        let replaced = match scan::look(&page, roots) {
            Verdict::Clean => {
                self.map(run);
                Vec::new()
            }
            Verdict::Replace(instructions) if !found.writable => {
                scan::replace(&mut page, &instructions);
                self.sandbox.map_copy(va, &page[..scan::PAGE]).ok()?;
                self.enter(Run { copied: true, ..run });
                instructions
            }
            Verdict::Unknown | Verdict::Replace(_) => return None,
        };
        self.avoided.remove(&va);
        Some(replaced)
    }

    fn unmap(&mut self, cpu: &mut Cpu, va: u64, size: u64) {
        cpu.counters.direct.unmaps += 1;
        self.mappings.remove(va, size);
        // What is known is what could be mapped.
        let _ = self.sandbox.unmap(va, size);
    }

    /// Maps a run of pages of RAM where that is possible.
    fn map(&mut self, run: Run) {
        if let Some(offset) = self.ram.file_offset(run.gpa)
            && self.sandbox.map(run.va, run.size, offset, run.rights).is_ok()
        {
            self.enter(run);
        }
    }

    /// A run is mapped.
    fn enter(&mut self, run: Run) {
        if run.rights.execute {
            self.code.extend((run.gpa..run.gpa + run.size).step_by(PAGE as usize));
        }
        self.mappings.insert(run);
    }

    /// Maps the page of a page fault at `va`, if it is not the guest's fault.
    pub fn resolve(&mut self, cpu: &mut Cpu, va: u64, access: Access) -> Result<(), Unresolved> {
        let page = va & !(PAGE - 1);
        if !self.sandbox.can_map(page, PAGE) {
            return Err(Unresolved::Elsewhere);
        }
        let mode = cpu.paging;
        let found =
            cpu.mmu.walk(&mode, va, access, Privilege { user: true, ac: false }).map_err(|error| {
                self.awaited = Some(page);
                Unresolved::Fault(error)
            })?;
        let Some(run) = self.page(cpu, page, &found, access) else {
            if access != Access::Fetch || cpu.mmu.host_page(found.gpa).is_none() {
                return Err(Unresolved::Elsewhere);
            }
            // Memory of a file other than RAM's, which the process does not have: code there is translated.
            self.avoided.insert(page, 1);
            cpu.counters.direct.detours += 1;
            return Err(Unresolved::Detour);
        };
        if self.mappings.len() > MOST_RUNS {
            self.mappings.clear();
            self.code.clear();
            self.sandbox.clear();
        }
        match access {
            Access::Write if !run.rights.write && cpu.mmu.writable_page(found.gpa).is_none() => {
                return Err(Unresolved::Elsewhere);
            }
            Access::Write if !run.rights.write => return Err(Unresolved::Code(found.gpa)),
            Access::Fetch if !run.rights.execute => return Err(self.avoid(cpu, page, found.gpa)),
            _ => {}
        }
        cpu.counters.direct.mapped += 1;
        self.map_around(cpu, run);
        Ok(())
    }

    /// Code of a page should have run. What is known of the page grows, so that it is looked through now and then.
    fn avoid(&mut self, cpu: &mut Cpu, page: u64, gpa: u64) -> Unresolved {
        if is_due(self.avoided.entry(page).or_default()) {
            return Unresolved::Suspicious(gpa);
        }
        cpu.counters.direct.detours += 1;
        Unresolved::Detour
    }

    /// The code at RIP is interrupted, and would run directly if its page was not avoided: the page in RAM, if it is time to
    /// look through it again. A program may stay on it, so that nothing else asks for it.
    pub fn reconsider(&mut self, cpu: &mut Cpu) -> Option<u64> {
        let page = cpu.rip & !(PAGE - 1);
        if !is_due(self.avoided.get_mut(&page)?) {
            return None;
        }
        let gpa = look(cpu, page)?.gpa;
        self.ram.file_offset(gpa).map(|_| gpa)
    }

    /// A page and what user code may do directly with it: execute it or write to it, not both, as code is looked through
    /// before it runs. `None` where there is no RAM that can be mapped.
    fn page(&mut self, cpu: &mut Cpu, va: u64, found: &Translation, access: Access) -> Option<Run> {
        self.ram.file_offset(found.gpa)?;
        self.largest = self.largest.max(1 << found.page_shift);
        let writable = found.writable && found.dirty;
        // Who writes to the page goes on to, until it is executed: at this address or another one.
        let is_code = || !writable && !cpu.mmu.code.is_writer(found.gpa, cpu.id);
        let rights = if found.executable && (access == Access::Fetch || is_code()) {
            self.guard(cpu, found.gpa);
            let clean = code(cpu, va, found.gpa).is_some_and(|code| !scan::is_suspicious(&code));
            Rights { write: false, execute: clean }
        } else {
            let write = writable && cpu.mmu.may_write(found.gpa, access == Access::Write);
            Rights { write, execute: false }
        };
        Some(page_run(va, found.gpa, rights))
    }

    /// See [`crate::mmu::Mmu::guard`].
    fn guard(&mut self, cpu: &mut Cpu, gpa: u64) {
        if cpu.mmu.guard(gpa) {
            self.take_writers(gpa);
        }
    }

    /// Maps the page at which the guest had a fault, if it is there now.
    pub fn map_awaited(&mut self, cpu: &mut Cpu) {
        let Some(va) = self.awaited.take() else { return };
        let Some(found) = look(cpu, va) else { return };
        let access = if found.writable && found.dirty { Access::Write } else { Access::Read };
        if let Some(run) = self.page(cpu, va, &found, access) {
            self.map_around(cpu, run);
        }
    }

    /// Maps a page, and those around it that the guest uses and that are not mapped yet.
    fn map_around(&mut self, cpu: &mut Cpu, touched: Run) {
        let (before, size) = self.block;
        let grown = (2 * size).min(MOST_AROUND);
        let near = touched.va.wrapping_sub(before.wrapping_sub(grown)) < 2 * grown + size;
        let size = if near { grown } else { AROUND };
        let first = touched.va & !(size - 1);
        self.block = (first, size);
        let mut runs: Vec<Run> = Vec::new();
        for va in (first..first + size).step_by(PAGE as usize) {
            let run = if va == touched.va { Some(touched) } else { self.unmapped(cpu, va) };
            let Some(run) = run else { continue };
            match runs.last_mut() {
                Some(last) if last.leads_to(&run) => last.size += PAGE,
                _ => runs.push(run),
            }
        }
        cpu.counters.direct.maps += runs.len() as u64;
        runs.into_iter().for_each(|run| self.map(run));
    }

    /// A page that the guest uses, if it can be mapped and is not yet.
    fn unmapped(&mut self, cpu: &mut Cpu, va: u64) -> Option<Run> {
        if self.mappings.at(va).is_some() || !self.sandbox.can_map(va, PAGE) {
            return None;
        }
        let found = look(cpu, va)?;
        self.page(cpu, va, &found, Access::Read)
    }
}

/// A page is met that is avoided: whether it is time to look through it again.
fn is_due(times: &mut u32) -> bool {
    *times += 1;
    times.is_power_of_two()
}

/// See [`crate::mmu::Mmu::look`].
fn look(cpu: &mut Cpu, va: u64) -> Option<Translation> {
    let mode = cpu.paging;
    cpu.mmu.look(&mode, va)
}

/// A run of the one page at `va`.
fn page_run(va: u64, gpa: u64, rights: Rights) -> Run {
    Run { va, size: PAGE, gpa: gpa & !(PAGE - 1), rights, copied: false }
}

/// Puts together what becomes of pages that lie one behind the other.
fn joined(changed: Vec<(Run, Option<Rights>)>) -> Vec<(Run, Option<Rights>)> {
    let mut all: Vec<(Run, Option<Rights>)> = Vec::new();
    for (run, now) in changed {
        match all.last_mut() {
            Some((last, same))
                if *same == now
                    && last.va + last.size == run.va
                    && (now.is_none() || last.leads_to(&run)) =>
            {
                last.size += run.size;
            }
            _ => all.push((run, now)),
        }
    }
    all
}

/// A page of code and what follows it.
fn code(cpu: &mut Cpu, va: u64, gpa: u64) -> Option<Page> {
    // What is not known behind the page could be anything: a 0F at its end counts.
    let mut page = [0xa2; scan::PAGE + scan::LONGEST];
    load(cpu.mmu.host_page(gpa)?, &mut page[..scan::PAGE]);
    let next = look(cpu, va + PAGE).and_then(|next| cpu.mmu.host_page(next.gpa));
    if let Some(next) = next {
        load(next, &mut page[scan::PAGE..]);
    }
    Some(page)
}
