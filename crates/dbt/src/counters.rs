//! What a vCPU of the translator counts. Nothing is counted by generated code, which would pay for it.

use iced_x86::Mnemonic;
use ruse_arch::paging::Access;

use crate::backend::x86_64::exit;

/// Exceptions by vector.
const EXCEPTIONS: usize = 32;

/// The counters of a vCPU, but for those that its blocks and its MMU keep.
#[derive(Clone, Debug)]
pub struct Counters {
    /// Instructions that tier 0 began.
    pub tier0: u64,
    /// Instructions that tier 0 had decoded, by [`Mnemonic`].
    pub by_mnemonic: Vec<u64>,
    /// Walks of the page tables because the TLB had no entry with the right, by kind of access and privilege.
    misses: [[u64; 2]; 3],
    /// Entries into translated code from the dispatcher.
    pub dispatches: u64,
    /// Ways back to the dispatcher, by the numbers of [`exit`].
    exits: [u64; exit::COUNTERS.len()],
    /// Calls of helpers by translated code.
    pub helpers: Helpers,
    /// Exceptions delivered, by vector.
    exceptions: [u64; EXCEPTIONS],
    /// Interrupts delivered, with those that cannot be masked.
    pub interrupts: u64,
    /// Nanoseconds spent in translation.
    pub translation_ns: u64,
    /// Direct execution.
    pub direct: Direct,
}

/// What direct execution of user code counts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Direct {
    /// Address spaces that were given a process.
    pub spaces: u64,
    /// Times that user code was entered.
    pub runs: u64,
    /// Ways out of user code: system calls, page faults, other exceptions, and because somebody asked.
    pub system_calls: u64,
    /// See above.
    pub faults: u64,
    /// See above.
    pub exceptions: u64,
    /// See above.
    pub kicks: u64,
    /// Page faults that were not the guest's: a mapping was made.
    pub mapped: u64,
    /// Ranges mapped and unmapped.
    pub maps: u64,
    /// See above.
    pub unmaps: u64,
    /// Jumps to pages with instructions that must not run directly.
    pub detours: u64,
}

/// Calls of helpers by translated code, and how many of them did not lead back to where they came from.
#[derive(Clone, Copy, Debug, Default)]
pub struct Helpers {
    /// Accesses without an entry in the TLB, or over the end of a page.
    pub access: u64,
    /// Those that tier 0 had to make.
    pub access_refused: u64,
    /// Groups of accesses without an entry in the TLB.
    pub group: u64,
    /// Those that went on in code without groups.
    pub group_refused: u64,
    /// Instructions that tier 0 executed inside a region.
    pub step: u64,
    /// Those after which the region was left.
    pub step_left: u64,
    /// Instructions that tier 0 executed at the end of a region.
    pub interpret: u64,
    /// Those after which translated code was left.
    pub interpret_left: u64,
}

const MISSES: [[&str; 2]; 3] = [
    ["tlb.misses.read.kernel", "tlb.misses.read.user"],
    ["tlb.misses.write.kernel", "tlb.misses.write.user"],
    ["tlb.misses.fetch.kernel", "tlb.misses.fetch.user"],
];

impl Default for Counters {
    fn default() -> Self {
        Self {
            tier0: 0,
            by_mnemonic: vec![0; Mnemonic::values().len()],
            misses: Default::default(),
            dispatches: 0,
            exits: Default::default(),
            helpers: Helpers::default(),
            exceptions: [0; EXCEPTIONS],
            interrupts: 0,
            translation_ns: 0,
            direct: Direct::default(),
        }
    }
}

impl Counters {
    /// The page tables are walked for an access.
    pub fn miss(&mut self, access: Access, user: bool) {
        let kind = match access {
            Access::Read => 0,
            Access::Write => 1,
            Access::Fetch => 2,
        };
        self.misses[kind][usize::from(user)] += 1;
    }

    /// Translated code was left for one of the reasons of [`exit`].
    pub fn exit(&mut self, reason: u32) {
        self.exits[reason as usize] += 1;
    }

    /// An exception is delivered.
    pub fn exception(&mut self, vector: u8) {
        self.exceptions[usize::from(vector) % EXCEPTIONS] += 1;
    }

    /// All of them by name.
    pub fn named(&self) -> ruse_engine::Counters {
        let h = &self.helpers;
        let mut all = ruse_engine::Counters::from_iter([
            ("dispatches", self.dispatches),
            ("helpers.access", h.access),
            ("helpers.access.refused", h.access_refused),
            ("helpers.group", h.group),
            ("helpers.group.refused", h.group_refused),
            ("helpers.step", h.step),
            ("helpers.step.left", h.step_left),
            ("helpers.interpret", h.interpret),
            ("helpers.interpret.left", h.interpret_left),
            ("events.interrupts", self.interrupts),
            ("tier0", self.tier0),
            ("translation.ns", self.translation_ns),
        ]);
        let d = &self.direct;
        all.extend([
            ("direct.spaces", d.spaces),
            ("direct.runs", d.runs),
            ("direct.system_calls", d.system_calls),
            ("direct.faults", d.faults),
            ("direct.faults.mapped", d.mapped),
            ("direct.exceptions", d.exceptions),
            ("direct.kicks", d.kicks),
            ("direct.maps", d.maps),
            ("direct.unmaps", d.unmaps),
            ("direct.detours", d.detours),
        ]);
        all.extend(exit::COUNTERS.into_iter().zip(self.exits));
        all.extend(MISSES.into_iter().flatten().zip(self.misses.into_iter().flatten()));
        let happened = |&(_, count): &(_, u64)| count != 0;
        let exceptions = (0u64..).zip(self.exceptions).filter(happened);
        all.extend(exceptions.map(|(vector, count)| (format!("events.exceptions.{vector}"), count)));
        let mnemonics =
            Mnemonic::values().zip(self.by_mnemonic.iter().copied()).filter(|&(_, count)| count != 0);
        all.extend(mnemonics.map(|(mnemonic, count)| (format!("tier0.{mnemonic:?}").to_lowercase(), count)));
        all
    }
}
