//! Storms of mmap, munmap, mprotect, mremap and madvise: each thread changes an arena of its own, knows what is there,
//! and has its accesses made by itself, by another thread, or by the kernel.

use std::hint;
use std::io::{self, PipeReader, PipeWriter, pipe};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use ruse_random::Random;

use crate::digest::Digest;
use crate::fault::{self, Access};
use crate::memory::{File, NONE, PAGE, R, RW, RWX, RX, check};

/// Where arenas begin: far from where the kernel puts what asks for no address, so that nothing else comes into the holes.
const ARENAS: usize = 0x10_0000_0000;
/// Between the beginnings of arenas.
const APART: usize = 1 << 30;
/// Pages of an arena: two that can be large ones.
const PAGES: usize = 1024;
/// Pages of a file that arenas have, possibly several times.
const FILE_PAGES: usize = 8;
/// Words of a page that are used.
const WORDS: [usize; 3] = [0, 1032, 4088];
/// Changes by each thread.
const CHANGES: u32 = 250;

/// `si_code` of a fault where nothing is mapped.
const UNMAPPED: u64 = 1;
/// `si_code` of a fault where the right is missing.
const REFUSED: u64 = 2;

/// What is at a page.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Page {
    /// Nothing.
    Hole,
    /// Memory of its own, with these rights and words.
    Own(i32, [u64; WORDS.len()]),
    /// A page of the file, with these rights.
    OfFile(i32, usize),
}

/// An access that another thread is to make.
#[derive(Default)]
struct Request {
    /// Counts requests; odd while one waits.
    turn: AtomicU64,
    address: AtomicU64,
    /// Zero: read.
    write: AtomicU64,
    value: AtomicU64,
    fault: AtomicU64,
    over: AtomicU64,
}

impl Request {
    /// Has the access made.
    fn ask(&self, address: u64, write: Option<u64>) -> Access {
        self.address.store(address, Ordering::Relaxed);
        self.write.store(write.unwrap_or(0), Ordering::Relaxed);
        let turn = self.turn.fetch_add(1, Ordering::AcqRel) + 1;
        wait(|| self.turn.load(Ordering::Acquire) != turn);
        Access { value: self.value.load(Ordering::Relaxed), fault: self.fault.load(Ordering::Relaxed) }
    }

    /// Serves until there is nothing more to do. In between it reads the same address again and again, so that its
    /// translation is always at hand.
    fn serve(&self) {
        while self.over.load(Ordering::Acquire) == 0 {
            let turn = self.turn.load(Ordering::Acquire);
            let address = self.address.load(Ordering::Relaxed);
            if turn % 2 == 1 {
                let Access { value, fault } = match self.write.load(Ordering::Relaxed) {
                    0 => access(address, None),
                    write => access(address, Some(write)),
                };
                self.value.store(value, Ordering::Relaxed);
                self.fault.store(fault, Ordering::Relaxed);
                self.turn.fetch_add(1, Ordering::AcqRel);
            } else if turn > 0 {
                access(address, None);
                thread::yield_now();
            }
        }
    }
}

/// Waits until something is so, with the CPU left to others if that takes long.
fn wait(done: impl Fn() -> bool) {
    for turn in 0.. {
        if done() {
            return;
        }
        if turn > 200 { thread::yield_now() } else { hint::spin_loop() }
    }
}

fn access(address: u64, write: Option<u64>) -> Access {
    // SAFETY: an address within an arena; faults are caught.
    unsafe {
        match write {
            None => fault::read(address),
            Some(value) => fault::write(address, value),
        }
    }
}

/// A thread's arena.
struct Arena<'a> {
    start: usize,
    pages: Vec<Page>,
    file: File,
    /// Words of the file's pages.
    words: [[u64; WORDS.len()]; FILE_PAGES],
    other: &'a Request,
    pipe: (PipeReader, PipeWriter),
    random: Random,
    sum: Digest,
}

impl Arena<'_> {
    fn address(&self, page: usize) -> *mut libc::c_void {
        (self.start + page * PAGE) as *mut _
    }

    /// Pages in a row: mostly few.
    fn range(&mut self) -> Range<usize> {
        let most = self.random.pick(&[1, 1, 4, 16, 600]);
        let start = self.random.below(PAGES as u64) as usize;
        start..(start + 1 + self.random.below(most) as usize).min(PAGES)
    }

    fn protection(&mut self) -> i32 {
        self.random.pick(&[NONE, R, RW, RW, RW, RX, RWX])
    }

    fn change(&mut self) {
        let range = self.range();
        let (at, len) = (self.address(range.start), range.len() * PAGE);
        match self.random.below(12) {
            0 | 1 => {
                let protection = self.protection();
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                // SAFETY: here and below, the pages belong to the arena, of which only this thread and the one that
                // accesses memory for it know.
                let found = unsafe { libc::mmap(at, len, protection, flags, -1, 0) };
                assert_eq!(found, at, "mmap: {}", io::Error::last_os_error());
                self.pages[range].fill(Page::Own(protection, [0; WORDS.len()]));
            }
            2 => {
                // SAFETY: as above.
                check(unsafe { libc::munmap(at, len) }, "munmap");
                self.pages[range].fill(Page::Hole);
            }
            3..=6 => self.protect(range),
            7 => self.discard(range),
            8 => {
                let (from, protection) = (self.random.below(FILE_PAGES as u64) as usize, self.protection());
                self.file.map_page(from, at as usize, protection);
                self.pages[range.start] = Page::OfFile(protection, from);
            }
            9 => {
                let advice = self.random.pick(&[libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE]);
                // SAFETY: as above. Holes in the range are an error that changes nothing else.
                unsafe { libc::madvise(at, len, advice) };
            }
            _ => self.move_page(range.start),
        }
    }

    fn protect(&mut self, range: Range<usize>) {
        let protection = self.protection();
        let whole = range.start..range.start + self.mapped(&range);
        let len = whole.len() * PAGE;
        // SAFETY: as in `change`.
        check(unsafe { libc::mprotect(self.address(whole.start), len, protection) }, "mprotect");
        for page in &mut self.pages[whole] {
            match page {
                Page::Own(old, _) | Page::OfFile(old, _) => *old = protection,
                Page::Hole => unreachable!("the range has no holes"),
            }
        }
    }

    /// Pages from the beginning of a range to its first hole.
    fn mapped(&self, range: &Range<usize>) -> usize {
        self.pages[range.clone()].iter().take_while(|page| **page != Page::Hole).count()
    }

    /// Throws away what is in the arena's own pages.
    fn discard(&mut self, range: Range<usize>) {
        let whole = range.start..range.start + self.mapped(&range);
        let len = whole.len() * PAGE;
        // SAFETY: as in `change`.
        check(unsafe { libc::madvise(self.address(whole.start), len, libc::MADV_DONTNEED) }, "madvise");
        for page in &mut self.pages[whole] {
            if let Page::Own(_, words) = page {
                *words = [0; WORDS.len()];
            }
        }
    }

    fn move_page(&mut self, from: usize) {
        let to = self.random.below(PAGES as u64) as usize;
        if self.pages[from] == Page::Hole || to == from {
            return;
        }
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: as in `change`.
        let at = unsafe { libc::mremap(self.address(from), PAGE, PAGE, flags, self.address(to)) };
        assert_eq!(at, self.address(to), "mremap: {}", io::Error::last_os_error());
        self.pages[to] = self.pages[from];
        self.pages[from] = Page::Hole;
    }

    /// Has an access made and compares what comes of it with what should.
    fn check(&mut self, page: usize) {
        let word = self.random.below(WORDS.len() as u64) as usize;
        let address = (self.start + page * PAGE + WORDS[word]) as u64;
        let write = self.random.chance(50).then(|| self.random.word() | 1);
        let mut expected = self.expected(page, word, address, write);
        let found = match self.random.below(8) {
            0..4 => access(address, write),
            4..7 => self.other.ask(address, write),
            _ => {
                expected.fault = if expected.fault == 0 { 0 } else { libc::EFAULT as u64 };
                self.by_the_kernel(address, write)
            }
        };
        let how = if write.is_some() { "write" } else { "read" };
        assert_eq!(found, expected, "{how} of word {word} of page {page}, {:?}", self.pages[page]);
        self.sum.add(found.value ^ found.fault);
    }

    /// Reads over the end of a page.
    fn check_crossing(&mut self, page: usize) {
        let (end, next) = ((self.start + (page + 1) * PAGE) as u64, page + 1);
        let low = self.expected(page, WORDS.len() - 1, end - 4, None);
        let high = self.expected(next, 0, end, None);
        let expected = match (low.fault, high.fault) {
            (0, 0) => Access { value: low.value >> 32 | high.value << 32, fault: 0 },
            (0, _) => high,
            (_, 0) => low,
            // Which page comes first is the CPU's affair.
            _ => return,
        };
        let found = access(end - 4, None);
        assert_eq!(found, expected, "read of {:?} and {:?}", self.pages[page], self.pages[next]);
        self.sum.add(found.value);
    }

    /// What should come of an access; one that is to write has done so afterwards.
    fn expected(&mut self, page: usize, word: usize, address: u64, write: Option<u64>) -> Access {
        let (protection, words) = match &mut self.pages[page] {
            Page::Hole => return Access { value: address, fault: UNMAPPED },
            Page::Own(protection, words) => (*protection, words),
            Page::OfFile(protection, from) => (*protection, &mut self.words[*from]),
        };
        let right = if write.is_some() { libc::PROT_WRITE } else { libc::PROT_READ };
        if protection & right == 0 {
            return Access { value: address, fault: REFUSED };
        }
        words[word] = write.unwrap_or(words[word]);
        Access { value: words[word], fault: 0 }
    }

    /// The access of a system call: from the arena into a pipe, or from there into the arena.
    fn by_the_kernel(&self, address: u64, write: Option<u64>) -> Access {
        let (from, to) = (self.pipe.0.as_raw_fd(), self.pipe.1.as_raw_fd());
        let mut value = write.unwrap_or(0);
        let own: *mut libc::c_void = (&raw mut value).cast();
        let arena = address as *mut libc::c_void;
        let (source, target) = if write.is_some() { (own, arena) } else { (arena, own) };
        // SAFETY: eight bytes of this function's, or of the arena, to which there are no references.
        let fault = unsafe {
            if libc::write(to, source, 8) == 8 && libc::read(from, target, 8) == 8 {
                return Access { value, fault: 0 };
            }
            let error = io::Error::last_os_error().raw_os_error();
            // What could not be read is still in the pipe.
            assert!(write.is_none() || libc::read(from, own, 8) == 8);
            error.unwrap_or(0) as u64
        };
        Access { value: address, fault }
    }
}

/// One or two threads change their arenas, with another one for each that makes accesses.
pub fn run(random: &mut Random) -> u64 {
    fault::catch();
    let seeds: Vec<u64> = (0..1 + random.below(2)).map(|_| random.word()).collect();
    let requests: Vec<Request> = seeds.iter().map(|_| Request::default()).collect();
    let storm = |n: usize| {
        let mut arena = Arena {
            start: ARENAS + n * APART,
            pages: vec![Page::Hole; PAGES],
            file: File::new(FILE_PAGES * PAGE),
            words: [[0; WORDS.len()]; FILE_PAGES],
            other: &requests[n],
            pipe: pipe().expect("a pipe"),
            random: Random::new(seeds[n]),
            sum: Digest::default(),
        };
        for _ in 0..CHANGES {
            arena.change();
            for _ in 0..6 {
                let page = arena.range().start;
                arena.check(page);
            }
            let page = arena.random.below(PAGES as u64 - 1) as usize;
            arena.check_crossing(page);
        }
        requests[n].over.store(1, Ordering::Release);
        arena.sum.value()
    };
    thread::scope(|threads| {
        for request in &requests {
            threads.spawn(|| request.serve());
        }
        let storm = &storm;
        let storms: Vec<_> = (0..seeds.len()).map(|n| threads.spawn(move || storm(n))).collect();
        let mut sum = Digest::default();
        storms.into_iter().for_each(|storm| sum.add(storm.join().expect("a storm")));
        sum.value()
    })
}
