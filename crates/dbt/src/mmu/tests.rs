//! Random accesses, changes of page tables and invalidations: every access has to be explained by the tables as they
//! are, or as they were at some moment since which no invalidation has reached its translation (SDM volume 3, 4.10).
//!
//! Each page of RAM that can be mapped knows its number: it can be read, and code on it appends it to RAX and goes on
//! at the next page of the address space. Accesses are made by tier 0's functions and by translated code in turn.

use std::collections::BTreeMap;

use iced_x86::code_asm::*;
use ruse_arch::{
    Exception, Segment,
    flags::{cr0, cr4, efer, rflags},
    paging::{self, Access, PagingMode, PhysMemory, Privilege, Translation, pte},
    state::{reg, seg},
};
use ruse_memory::GuestRam;
use ruse_random::Random;

use super::{
    access::{load, store},
    tlb::ENTRIES,
};
use crate::{
    DbtOptions,
    cpu::{Cpu, Who},
    runtime::vcpu::DbtVcpu,
    tier0::testing::{CODE, Machine, NullBus, PAGE_TABLE},
};

const PAGE: u64 = 4096;
const LARGE: u64 = 2 << 20;
/// Address spaces with tables of their own; process-context identifiers share them.
const ROOTS: u64 = 3;
/// More identifiers than the MMU keeps views for.
const PCIDS: u64 = 11;
/// Where the tables of the address spaces begin; each has [`TABLES`] pages.
const TABLES_AT: u64 = 2 << 20;
/// Root, then for both halves: directory pointers, directory, tables of areas A, B and C.
const TABLES: u64 = 1 + 2 * 5;
/// Pages that are mapped one by one, and large pages.
const FRAMES_AT: u64 = 4 << 20;
const LARGE_AT: u64 = 6 << 20;
const FRAMES: u64 = 12;
const LARGE_FRAMES: u64 = 2;
/// Pages of an area.
const AREA: u64 = 4;
/// The halves' base addresses.
const HALVES: [u64; 2] = [1 << 39, 0xffff_ff80_0000_0000];
/// Offsets in a page: its number, code, and a place for writes. The number is in the last bytes too.
const NUMBER: u64 = 0;
const ENTRY: u64 = 0x100;
const SCRATCH: u64 = 0x900;
/// Programs at CPL 0, and a page behind them those at CPL 3.
const KERNEL_CODE: u64 = CODE;
const USER_CODE: u64 = CODE + PAGE;

/// Offset of an area: B is one large page, or pages; A and C have the same places in the TLB.
fn area(n: u64) -> u64 {
    [0, LARGE, ENTRIES as u64 * PAGE][n as usize]
}

/// The tables at one moment.
#[derive(Clone)]
struct Tables(BTreeMap<u64, u64>);

impl PhysMemory for Tables {
    fn read_entry(&mut self, gpa: u64, _: bool) -> u64 {
        self.0.get(&gpa).copied().unwrap_or(0)
    }
    fn set_bits(&mut self, _: u64, _: bool, _: u64, _: u64) -> bool {
        true
    }
}

/// A state of tables and CR3 during which translations may have been cached.
struct Moment {
    tables: Tables,
    mode: PagingMode,
    pcid: u64,
}

/// What an invalidation reaches.
#[derive(Clone, Copy, Debug)]
enum Reach {
    /// INVLPG.
    Page { va: u64, pcid: u64 },
    /// INVPCID of one address.
    PageOf { va: u64, pcid: u64 },
    /// MOV to CR3, INVPCID of one identifier.
    Space(u64),
    /// INVPCID of everything that is not global.
    NonGlobal,
}

impl Reach {
    fn covers(self, va: u64, pcid: u64, found: &Translation) -> bool {
        let same_page = |at: u64| at >> found.page_shift == va >> found.page_shift;
        match self {
            Self::Page { va: at, pcid: p } => same_page(at) && (p == pcid || found.global),
            Self::PageOf { va: at, pcid: p } => same_page(at) && p == pcid && !found.global,
            Self::Space(p) => p == pcid && !found.global,
            Self::NonGlobal => !found.global,
        }
    }
}

struct World {
    vcpu: DbtVcpu,
    ram: GuestRam,
    random: Random,
    tables: Tables,
    /// Since the last invalidation of everything.
    moments: Vec<Moment>,
    /// Each with the number of moments before it.
    invalidations: Vec<(usize, Reach)>,
    pcid: u64,
    /// Written values are unique.
    writes: u64,
    /// How often a stale translation explained what the present one did not.
    stale: u64,
    log: Vec<String>,
}

fn table(root: u64, n: u64) -> u64 {
    TABLES_AT + (root * TABLES + n) * PAGE
}

/// Guest physical addresses of all pages with a number.
fn frames() -> impl Iterator<Item = u64> {
    let large = (0..LARGE_FRAMES).flat_map(|n| (0..AREA).map(move |p| LARGE_AT + n * LARGE + p * PAGE));
    (0..FRAMES).map(|n| FRAMES_AT + n * PAGE).chain(large)
}

fn number(gpa: u64) -> Option<u8> {
    frames().position(|frame| frame == gpa & !(PAGE - 1)).map(|n| n as u8 + 1)
}

/// Code that appends the page's number to RAX, and goes on at the next page as long as ECX says.
fn code_of(number: u8) -> Vec<u8> {
    let mut code = vec![0x48, 0xc1, 0xe0, 8, 0xb0, number, 0xff, 0xc9, 0x0f, 0x85];
    let end = code.len() as u32 + 4;
    code.extend((PAGE as u32 - end).to_le_bytes());
    code.extend([0x0f, 0x0b]);
    code
}

/// The programs, each at its place on the page.
#[derive(Clone, Copy, PartialEq)]
enum Program {
    Read,
    Write,
    Jump,
    InvalidatePage,
    LoadCr3,
    Invalidate,
    LoadCr0,
}

const PROGRAM_BYTES: u64 = 32;

type Step = fn(&mut CodeAssembler) -> Result<(), IcedError>;

fn programs() -> Vec<u8> {
    let steps: [Step; 7] = [
        |a| a.mov(rax, qword_ptr(rbx)),
        |a| a.mov(qword_ptr(rbx), rax),
        |a| a.jmp(rbx),
        |a| a.invlpg(ptr(rbx)),
        |a| a.mov(cr3, rax),
        |a| a.invpcid(rax, xmmword_ptr(rbx)),
        |a| a.mov(cr0, rax),
    ];
    let mut code = Vec::new();
    for step in steps {
        let mut a = CodeAssembler::new(64).unwrap();
        step(&mut a).unwrap();
        a.ud2().unwrap();
        code.extend(a.assemble(0).unwrap());
        code.resize(code.len().next_multiple_of(PROGRAM_BYTES as usize), 0x90);
    }
    code
}

fn flat(attr: u16) -> Segment {
    Segment { base: 0, limit: 0xffff_ffff, attr, selector: 0x10 }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut machine = Machine::long();
        let ram = machine.ram.clone();
        for (page, flags) in [(KERNEL_CODE, pte::P | pte::W), (USER_CODE, pte::P | pte::W | pte::U)] {
            machine.write(page, &programs());
            machine.write_u64(PAGE_TABLE + (page >> 12) * 8, page | flags);
        }
        for frame in frames() {
            let n = number(frame).unwrap();
            machine.write(frame + NUMBER, &[n; 8]);
            machine.write(frame + PAGE - 8, &[n; 8]);
            machine.write(frame + ENTRY, &code_of(n));
        }
        let mut state = machine.cpu.save_state();
        let mut maybe = |bits: [u64; 4]| bits.into_iter().filter(|_| random.chance(60)).sum::<u64>();
        state.cr4 |= maybe([cr4::PCIDE, cr4::SMEP, cr4::SMAP, 0]);
        if random.chance(30) {
            state.cr4 &= !cr4::PGE;
        }
        state.efer |= efer::NXE;
        state.cr3 = table(0, 0);
        machine.cpu.load_state(&state);
        let vcpu = DbtVcpu::new(machine.cpu, DbtOptions::default()).unwrap();
        let mut world = Self {
            vcpu,
            ram,
            random,
            tables: Tables(BTreeMap::new()),
            moments: Vec::new(),
            invalidations: Vec::new(),
            pcid: 0,
            writes: 0,
            stale: 0,
            log: Vec::new(),
        };
        world.make_tables();
        world.forget_history();
        world
    }

    fn make_tables(&mut self) {
        let link = pte::P | pte::W | pte::U;
        for root in 0..ROOTS {
            self.set(table(root, 0), 0x2000 | link);
            for (h, half) in HALVES.into_iter().enumerate() {
                let first = 1 + 5 * h as u64;
                self.set(table(root, 0) + (half >> 39 & 511) * 8, table(root, first) | link);
                self.set(table(root, first), table(root, first + 1) | link);
                for n in 0..3 {
                    let at = table(root, first + 1) + (area(n) >> 21) * 8;
                    self.set(at, table(root, first + 2 + n) | link);
                    for page in 0..AREA {
                        self.change_page(root, h as u64, n, page);
                    }
                }
            }
        }
    }

    fn set(&mut self, gpa: u64, value: u64) {
        self.tables.0.insert(gpa, value);
        store(self.host(gpa), &value.to_le_bytes());
    }

    fn host(&self, gpa: u64) -> *mut u8 {
        self.ram.host_page(gpa).expect("RAM").wrapping_add((gpa % PAGE) as usize)
    }

    fn read(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        load(self.host(gpa), &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn cpu(&mut self) -> &mut Cpu {
        self.vcpu.cpu_mut()
    }

    /// Rights of a mapping, at random.
    fn rights(&mut self) -> u64 {
        let mut some = |bit: u64, percent| if self.random.chance(percent) { bit } else { 0 };
        some(pte::P, 90) | some(pte::W, 75) | some(pte::U, 65) | some(pte::G, 30) | some(pte::NX, 20)
    }

    fn change_page(&mut self, root: u64, half: u64, n: u64, page: u64) {
        let at = table(root, 1 + 5 * half + 2 + n) + (area(n) >> 12 & 511) * 8 + page * 8;
        // Often only the rights change.
        let old = self.tables.0.get(&at).filter(|_| self.random.chance(40)).map(|entry| entry & 0xffff_f000);
        let frame = old.unwrap_or(FRAMES_AT + self.random.below(FRAMES) * PAGE);
        let value = frame | self.rights();
        self.set(at, value);
    }

    /// Changes one page of the tables, or makes area B a large page or small ones.
    fn change_tables(&mut self) {
        let [root, half, n, page] = [ROOTS, 2, 3, AREA].map(|n| self.random.below(n));
        if n == 1 && self.random.chance(50) {
            let at = table(root, 1 + 5 * half + 1) + (area(1) >> 21) * 8;
            let value = match self.random.chance(60) {
                true => (LARGE_AT + self.random.below(LARGE_FRAMES) * LARGE) | pte::PS | self.rights(),
                false => table(root, 1 + 5 * half + 3) | pte::P | pte::W | pte::U,
            };
            self.log.push(format!("directory entry {at:#x} of root {root} becomes {value:#x}"));
            self.set(at, value);
        } else {
            self.change_page(root, half, n, page);
            self.log.push(format!("root {root} half {half} area {n} page {page} changes"));
        }
        self.remember();
        if self.random.chance(65) {
            for page in 0..AREA {
                self.invalidate_page(HALVES[half as usize] + area(n) + page * PAGE);
            }
        }
    }

    /// The tables as they are now may be cached from now on.
    fn remember(&mut self) {
        let mode = self.cpu().paging;
        self.moments.push(Moment { tables: self.tables.clone(), mode, pcid: self.pcid });
    }

    fn forget_history(&mut self) {
        self.moments.clear();
        self.invalidations.clear();
        self.remember();
    }

    fn invalidated(&mut self, reach: Reach) {
        self.log.push(format!("{reach:x?}"));
        self.invalidations.push((self.moments.len(), reach));
        self.remember();
    }

    /// What a walk says at a moment, with the CPU's other registers as they are now.
    fn walk(&self, moment: &Moment, va: u64, access: Access, who: Privilege) -> Result<Translation, u32> {
        let mode = PagingMode { cr3: moment.mode.cr3, ..self.vcpu.cpu().paging };
        paging::walk(&mode, va, access, who, &mut moment.tables.clone())
    }

    fn now(&self, va: u64, access: Access, who: Privilege) -> Result<Translation, u32> {
        self.walk(self.moments.last().expect("there is always one"), va, access, who)
    }

    /// Whether an access may lead to `gpa`.
    fn explains(&mut self, va: u64, access: Access, who: Privilege, gpa: u64) -> bool {
        if self.now(va, access, who).is_ok_and(|found| found.gpa == gpa) {
            return true;
        }
        let explained = self.moments.iter().enumerate().any(|(n, moment)| {
            self.walk(moment, va, access, who).is_ok_and(|found| {
                let mut later = self.invalidations.iter().filter(|&&(before, _)| before > n);
                found.gpa == gpa
                    && (moment.pcid == self.pcid || found.global)
                    && !later.any(|&(_, reach)| reach.covers(va, moment.pcid, &found))
            })
        });
        self.stale += u64::from(explained);
        explained
    }

    fn check(&mut self, va: u64, access: Access, who: Privilege, gpa: u64) {
        let good = self.explains(va, access, who, gpa);
        assert!(good, "{access:?} of {va:#x} {who:?} went to {gpa:#x}\n{}", self.story());
        if self.moments.len() == 1 {
            let missing = pte::A | if access == Access::Write { pte::D } else { 0 };
            let leaf = self.read(self.leaf(va));
            assert_eq!(
                leaf & missing,
                missing,
                "{access:?} of {va:#x} did not mark {leaf:#x}\n{}",
                self.story()
            );
        }
    }

    fn check_fault(&mut self, va: u64, access: Access, who: Privilege, fault: Exception) {
        let expected = self.now(va, access, who).map(|found| found.gpa);
        let expected = expected.map_err(|error| Exception::pf(va, error));
        assert_eq!(Err(fault), expected, "{access:?} of {va:#x} {who:?}\n{}", self.story());
    }

    /// Guest physical address of the entry that maps a page now.
    fn leaf(&self, va: u64) -> u64 {
        let root = self.vcpu.cpu().paging.cr3 & !0xfff;
        let level = |table: u64, shift: u32| table + (va >> shift & 511) * 8;
        let next = |at: u64| self.tables.0[&at] & 0x000f_ffff_ffff_f000;
        let directory = level(next(level(next(level(root, 39)), 30)), 21);
        if self.tables.0[&directory] & pte::PS != 0 { directory } else { level(next(directory), 12) }
    }

    fn story(&self) -> String {
        let cpu = self.vcpu.cpu();
        let from = self.log.len().saturating_sub(40);
        let place =
            format!("pcid {} rip {:x} registers {:x?} {:x?}", self.pcid, cpu.rip, cpu.gpr, cpu.paging);
        format!("{place}\n{}", self.log[from..].join("\n"))
    }

    /// Chooses a privilege, and makes the CPU have it.
    fn privilege(&mut self) -> Privilege {
        let (user, ac) = (self.random.chance(45), self.random.chance(40));
        let cpu = self.cpu();
        let (code, data) = if user { (0xa0fb, 0xc0f3) } else { (0xa09b, 0xc093) };
        (cpu.seg[seg::CS], cpu.seg[seg::SS]) = (flat(code), flat(data));
        cpu.rflags = rflags::FIXED | if ac { rflags::AC } else { 0 };
        cpu.update_mode();
        Privilege { user, ac }
    }

    /// Runs one of the programs; `None`: it came to its end.
    fn run(&mut self, program: Program, value: u64, address: u64, who: Privilege) -> Option<Exception> {
        let page = if who.user { USER_CODE } else { KERNEL_CODE };
        let cpu = self.cpu();
        cpu.rip = page + program as u64 * PROGRAM_BYTES;
        (cpu.gpr[reg::RAX], cpu.gpr[reg::RBX]) = (value, address);
        let fault = self.vcpu.run_until_fault(&NullBus);
        (fault != Exception::UD).then_some(fault)
    }

    fn system(&mut self, program: Program, value: u64, address: u64) {
        let kernel = loop {
            let who = self.privilege();
            if !who.user {
                break who;
            }
        };
        let fault = self.run(program, value, address, kernel);
        assert_eq!(fault, None, "{}", self.story());
    }

    fn invalidate_page(&mut self, va: u64) {
        self.system(Program::InvalidatePage, 0, va);
        self.invalidated(Reach::Page { va, pcid: self.pcid });
    }

    /// An address of a page that may be mapped.
    fn page(&mut self) -> u64 {
        let half = HALVES[self.random.below(2) as usize];
        half + area(self.random.below(3)) + self.random.below(AREA) * PAGE
    }

    fn read_somewhere(&mut self) {
        let who = self.privilege();
        let page = self.page();
        let crosses = page / PAGE % AREA < AREA - 1 && self.random.chance(20);
        let va = page + if crosses { PAGE - 4 } else { NUMBER };
        self.log.push(format!("read {va:#x} {who:?}"));
        let result = if self.random.chance(50) {
            let fault = self.run(Program::Read, 0, va, who);
            fault.map_or(Ok(self.cpu().gpr[reg::RAX].to_le_bytes()), Err)
        } else {
            let mut bytes = [0; 8];
            self.cpu().read_linear(va, &mut bytes, Who::Current).map(|()| bytes)
        };
        match result {
            Ok(bytes) => {
                let (first, last) = (frame(bytes[0]), frame(bytes[7]));
                self.check(va, Access::Read, who, first + va % PAGE);
                if crosses {
                    self.check((va | 0xfff) + 1, Access::Read, who, last);
                }
            }
            Err(fault) => self.check_fault(fault.payload, Access::Read, who, fault),
        }
    }

    fn write_somewhere(&mut self) {
        let who = self.privilege();
        let va = self.page() + SCRATCH;
        self.writes += 1;
        let value = self.writes;
        self.log.push(format!("write {va:#x} {who:?}"));
        let fault = if self.random.chance(50) {
            self.run(Program::Write, value, va, who)
        } else {
            self.cpu().write_linear(va, &value.to_le_bytes(), Who::Current).err()
        };
        match fault {
            Some(fault) => self.check_fault(va, Access::Write, who, fault),
            None => {
                let to = frames().find(|&f| self.read(f + SCRATCH) == value).expect("it went to some page");
                self.check(va, Access::Write, who, to + SCRATCH);
                self.check_log(to);
            }
        }
    }

    /// While the dirty log is on, a page that was written is in it. Now and then the log is taken.
    fn check_log(&mut self, page: u64) {
        if !self.cpu().mmu.code.is_logging() {
            return;
        }
        let (tracker, offset) = self.ram.tracker(page).expect("RAM");
        assert!(tracker.take_dirty(offset), "{page:#x} is not in the log\n{}", self.story());
        tracker.note_write(offset);
        if self.random.chance(30) {
            self.log.push("the log is taken".into());
            self.ram.take_dirty();
            self.cpu().mmu.drop_all_writers();
        }
    }

    /// Turns the dirty log on or off.
    fn switch_log(&mut self) {
        let code = self.cpu().mmu.code.clone();
        code.log_writes(!code.is_logging());
        self.cpu().mmu.drop_all_writers();
    }

    fn execute_somewhere(&mut self) {
        let who = self.privilege();
        let va = self.page() + ENTRY;
        let count = 1 + self.random.below(AREA - va / PAGE % AREA);
        self.cpu().gpr[reg::RCX] = count;
        self.log.push(format!("execute {count} pages from {va:#x} {who:?}"));
        let fault = self.run(Program::Jump, 0, va, who);
        let mut path: Vec<u8> =
            self.cpu().gpr[reg::RAX].to_be_bytes().into_iter().skip_while(|&n| n == 0).collect();
        path.truncate(count as usize);
        for (n, &number) in path.iter().enumerate() {
            self.check(va + n as u64 * PAGE, Access::Fetch, who, frame(number) + ENTRY);
        }
        match fault {
            None => assert_eq!(path.len() as u64, count, "{}", self.story()),
            Some(fault) => {
                // At the next page, or where a page that an old translation allowed is looked up again.
                let next = va + path.len() as u64 * PAGE;
                assert!(
                    [next & !0xfff, next.wrapping_sub(PAGE) & !0xfff].contains(&(fault.payload & !0xfff))
                );
                self.check_fault(fault.payload, Access::Fetch, who, fault);
            }
        }
    }

    fn load_cr3(&mut self) {
        let pcide = self.cpu().paging.cr4 & cr4::PCIDE != 0;
        let next = self.random.below(PCIDS);
        let keep = pcide && self.random.chance(60);
        let pcid = if pcide { next } else { 0 };
        let value = table(next % ROOTS, 0) | pcid | u64::from(keep) << 63;
        self.log.push(format!("CR3 becomes {value:#x}"));
        self.system(Program::LoadCr3, value, 0);
        self.pcid = pcid;
        if keep {
            self.remember();
        } else {
            self.invalidated(Reach::Space(pcid));
        }
    }

    fn invalidate(&mut self, kind: u64) {
        const DESCRIPTOR: u64 = KERNEL_CODE + 0x800;
        let pcide = self.cpu().paging.cr4 & cr4::PCIDE != 0;
        let pcid = if pcide { self.random.below(PCIDS) } else { 0 };
        let va = self.page();
        store(self.host(DESCRIPTOR), &pcid.to_le_bytes());
        store(self.host(DESCRIPTOR + 8), &va.to_le_bytes());
        self.system(Program::Invalidate, kind, DESCRIPTOR);
        match kind {
            0 => self.invalidated(Reach::PageOf { va, pcid }),
            1 => self.invalidated(Reach::Space(pcid)),
            2 => self.forget_history(),
            _ => self.invalidated(Reach::NonGlobal),
        }
    }

    fn step(&mut self) {
        if self.moments.len() > 80 {
            self.invalidate(2);
        }
        match self.random.below(100) {
            0..=29 => self.read_somewhere(),
            30..=49 => self.write_somewhere(),
            50..=77 => self.execute_somewhere(),
            78..=88 => self.change_tables(),
            89..=94 => self.load_cr3(),
            95 => {
                let va = self.page();
                self.invalidate_page(va);
            }
            96..=98 => {
                let kind = self.random.below(4);
                self.invalidate(kind);
            }
            99 if self.random.chance(50) => self.switch_log(),
            _ => {
                let value = self.cpu().paging.cr0 ^ cr0::WP;
                self.log.push(format!("CR0 becomes {value:#x}"));
                self.system(Program::LoadCr0, value, 0);
            }
        }
    }
}

/// Where the page with a number is.
fn frame(number: u8) -> u64 {
    frames().nth(usize::from(number) - 1).expect("a page's number")
}

/// `RUSE_TLB_WORLDS` says how many machines, each with 2000 steps.
#[test]
fn no_access_gets_what_the_tables_have_not_allowed_since_the_invalidation() {
    let worlds = std::env::var("RUSE_TLB_WORLDS").ok().and_then(|n| n.parse().ok()).unwrap_or(24);
    let mut stale = 0;
    for seed in 1..=worlds {
        let mut world = World::new(seed);
        for _ in 0..2000 {
            world.step();
        }
        stale += world.stale;
    }
    assert!(stale > worlds, "the TLB held something: {stale}");
}
