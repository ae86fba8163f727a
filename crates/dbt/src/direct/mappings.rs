//! What is mapped into a sandbox: runs of pages of RAM.

use std::collections::BTreeMap;

use ruse_sandbox::Rights;

const PAGE: u64 = 4096;

/// Pages of RAM that lie one behind the other in linear and in guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First linear address.
    pub va: u64,
    /// Bytes.
    pub size: u64,
    /// First guest physical address.
    pub gpa: u64,
    /// What user code may do.
    pub rights: Rights,
    /// A copy of the page, in which instructions are replaced, is in its place.
    pub copied: bool,
}

impl Run {
    fn end(&self) -> u64 {
        self.va + self.size
    }

    /// The part of it within a range.
    fn cut(&self, from: u64, to: u64) -> Option<Self> {
        let (from, to) = (self.va.max(from), self.end().min(to));
        (from < to).then(|| Self { va: from, size: to - from, gpa: self.gpa + (from - self.va), ..*self })
    }

    /// Whether `next` goes on where this one ends.
    pub fn leads_to(&self, next: &Self) -> bool {
        let alike = self.rights == next.rights && !self.copied && !next.copied;
        alike && self.end() == next.va && self.gpa + self.size == next.gpa
    }
}

/// The mappings of a sandbox, as its process has them once it has done what is queued for it.
#[derive(Debug, Default)]
pub struct Mappings {
    /// By first linear address.
    runs: BTreeMap<u64, Run>,
}

impl Mappings {
    /// What is mapped at an address.
    pub fn at(&self, va: u64) -> Option<Run> {
        let run = self.runs.range(..=va).next_back()?.1;
        (va < run.end()).then_some(*run)
    }

    /// Runs. The kernel has as many mappings at most.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Enters a run in place of what was there.
    pub fn insert(&mut self, mut run: Run) {
        self.remove(run.va, run.size);
        if let Some(before) = self.runs.range(..run.va).next_back().map(|(_, before)| *before)
            && before.leads_to(&run)
        {
            self.runs.remove(&before.va);
            run = Run { size: before.size + run.size, ..before };
        }
        if let Some(next) = self.runs.get(&run.end()).copied()
            && run.leads_to(&next)
        {
            self.runs.remove(&next.va);
            run.size += next.size;
        }
        self.runs.insert(run.va, run);
    }

    /// Removes what lies in a range.
    pub fn remove(&mut self, va: u64, size: u64) {
        let end = va.saturating_add(size);
        for run in self.within(va, size) {
            self.runs.remove(&run.va);
            for rest in [run.cut(run.va, va), run.cut(end, run.end())].into_iter().flatten() {
                self.runs.insert(rest.va, rest);
            }
        }
    }

    /// Removes everything.
    pub fn clear(&mut self) {
        self.runs.clear();
    }

    /// The runs that have pages in a range, whole.
    pub fn within(&self, va: u64, size: u64) -> Vec<Run> {
        let end = va.saturating_add(size);
        let first = self.at(va).map_or(va, |run| run.va);
        self.runs.range(first..end).map(|(_, run)| *run).collect()
    }

    /// All runs.
    pub fn all(&self) -> Vec<Run> {
        self.runs.values().copied().collect()
    }

    /// The pages that lead to a page of RAM.
    pub fn of(&self, gpa: u64) -> Vec<Run> {
        let gpa = gpa & !(PAGE - 1);
        let page = |run: &Run| run.cut(run.va + gpa.wrapping_sub(run.gpa), run.va + (gpa - run.gpa) + PAGE);
        let holds = |run: &&Run| gpa.wrapping_sub(run.gpa) < run.size;
        self.runs.values().filter(holds).filter_map(page).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const RW: Rights = Rights { write: true, execute: false };

    /// Against a plain table of pages.
    #[test]
    fn runs_hold_what_pages_would() {
        let mut seed = 7u64;
        let mut random = |n: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % n
        };
        let (mut mappings, mut plain) = (Mappings::default(), HashMap::new());
        for _ in 0..20_000 {
            let (va, pages, gpa) = (random(64) * PAGE, 1 + random(8), random(16) * PAGE);
            let rights = Rights { write: random(2) == 0, execute: false };
            if random(3) == 0 {
                mappings.remove(va, pages * PAGE);
                plain.retain(|page: &u64, _| page.wrapping_sub(va) >= pages * PAGE);
            } else {
                mappings.insert(Run { va, size: pages * PAGE, gpa, rights, copied: false });
                plain.extend((0..pages).map(|i| (va + i * PAGE, (gpa + i * PAGE, rights))));
            }
            for va in (0..80).map(|i| i * PAGE) {
                let page = mappings.at(va).map(|run| (run.gpa + (va - run.va), run.rights));
                assert_eq!(page, plain.get(&va).copied());
            }
            let there = plain.values().filter(|page| page.0 == gpa).count();
            assert_eq!(mappings.of(gpa + 5).len(), there);
        }
    }

    #[test]
    fn neighbours_become_one() {
        let mut mappings = Mappings::default();
        for page in [0, 2, 1] {
            mappings.insert(Run {
                va: page * PAGE,
                size: PAGE,
                gpa: (10 + page) * PAGE,
                rights: RW,
                copied: false,
            });
        }
        assert_eq!(
            mappings.all(),
            [Run { va: 0, size: 3 * PAGE, gpa: 10 * PAGE, rights: RW, copied: false }]
        );
    }
}
