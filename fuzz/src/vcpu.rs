//! vCPUs in random states that are valid for their mode, over a few pages of RAM with tables that mostly mean something
//! and code that is the input.

use arbitrary::Unstructured;
use ruse_arch::flags::{cr0, cr4, efer, rflags};
use ruse_arch::state::{reg, seg};
use ruse_arch::{DescriptorTable, Segment, VcpuState};
use ruse_memory::{GuestRam, PAGE_SIZE};
use ruse_random::Random;
use vm_memory::{Bytes, GuestAddress};

use crate::input::{byte, number, one_in, pick};

/// Pages of RAM.
const PAGES: u64 = 24;

/// What is in which page. The first has the vectors of real mode; all from the stack on have random bytes.
mod page {
    pub const PML4: u64 = 1;
    pub const PDPT: u64 = 2;
    pub const DIRECTORY: u64 = 3;
    pub const TABLE: u64 = 4;
    /// 32-bit paging.
    pub const DIRECTORY32: u64 = 5;
    pub const TABLE32: u64 = 6;
    pub const GDT: u64 = 7;
    pub const IDT: u64 = 8;
    pub const TSS: u64 = 9;
    pub const STACK: u64 = 11;
    pub const CODE: u64 = 16;
    pub const HANDLERS: u64 = 19;
}

const fn at(page: u64) -> u64 {
    page * PAGE_SIZE
}

/// Descriptors at fixed places of the GDT (selectors without RPL).
mod selector {
    pub const CODE64: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const CODE32: u16 = 0x18;
    pub const CODE16: u16 = 0x20;
    pub const USER_DATA: u16 = 0x28;
    pub const USER64: u16 = 0x30;
    pub const USER32: u16 = 0x38;
    pub const TSS: u16 = 0x40;
    pub const OTHER_TSS: u16 = 0x50;
    pub const LDT: u16 = 0x60;
    pub const CALL_GATE: u16 = 0x70;
    pub const TASK_GATE: u16 = 0x80;
}

/// A mode to begin in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Real,
    Vm86,
    Protected,
    Compatible,
    Long,
}

/// A vCPU's state and what is in RAM.
pub(crate) struct Guest {
    pub(crate) state: VcpuState,
    image: Image,
    /// For what the input need not spell out.
    pub(crate) seed: u64,
}

impl Guest {
    /// A guest in one of `modes`: the input begins with its code, and goes on with its state.
    pub(crate) fn new(u: &mut Unstructured, modes: &[Mode]) -> Self {
        let mode = pick(u, modes);
        let len = usize::from(byte(u)).min(u.len());
        let code_bytes = u.bytes(len).expect("so many are left");
        let seed = u.arbitrary().unwrap_or(0);
        let damage = byte(u) % 16;
        let mut state = state(u, mode);
        // Near the end of a page as often as not.
        let offset = if one_in(u, 2) { PAGE_SIZE - u64::from(byte(u) % 64) } else { u64::from(byte(u)) };
        let code = at(page::CODE) + offset;
        set_rip(&mut state, u, mode, code);
        let mut image = Image::new(&mut Random::new(seed), mode, damage);
        image.put(code, code_bytes);
        Self { state, image, seed }
    }

    /// RAM with nothing in it yet.
    pub(crate) fn ram() -> GuestRam {
        GuestRam::new(at(PAGES)).expect("a little RAM")
    }

    /// Puts the guest into RAM.
    pub(crate) fn load(&self, ram: &GuestRam) {
        ram.memory().write_slice(&self.image.0, GuestAddress(0)).expect("an image as large as RAM");
    }
}

/// A value for a register: an address in RAM, or a number.
fn value(u: &mut Unstructured) -> u64 {
    let address = |u: &mut Unstructured| {
        let page = u64::from(byte(u)) % (PAGES + 2);
        at(page).wrapping_add_signed(i64::from(byte(u) as i8))
    };
    match byte(u) % 6 {
        0..=2 => address(u),
        3 => address(u) | 0xffff_ff80_0000_0000,
        _ => number(u),
    }
}

fn state(u: &mut Unstructured, mode: Mode) -> VcpuState {
    let mut s = VcpuState::default();
    s.gpr.iter_mut().for_each(|register| *register = value(u));
    s.gpr[reg::RSP] = if one_in(u, 4) { value(u) } else { at(page::STACK) + u64::from(byte(u)) * 8 };
    if !matches!(mode, Mode::Compatible | Mode::Long) {
        s.gpr[8..].fill(0);
        s.gpr.iter_mut().for_each(|register| *register &= 0xffff_ffff);
    }
    let flags = rflags::ARITH | rflags::IF | rflags::DF | rflags::IOPL | rflags::NT | rflags::AC | rflags::ID;
    s.rflags = number(u) & flags | rflags::FIXED;
    if one_in(u, 8) {
        s.rflags |= rflags::TF;
    }
    if one_in(u, 8) {
        s.rflags |= rflags::RF;
    }
    control_registers(u, &mut s, mode);
    segments(u, &mut s, mode);
    vector_state(u, &mut s);
    if one_in(u, 8) {
        s.dr = std::array::from_fn(|_| value(u) & ((1 << 47) - 1));
        s.dr7 = number(u) & 0xffff_2fff | 0x400;
    }
    let canonical = |value: u64| ((value << 16) as i64 >> 16) as u64;
    [s.lstar, s.cstar] = [canonical(value(u)), canonical(value(u))];
    s.star = number(u);
    s.sfmask = number(u) & 0xffff_ffff;
    s.kernel_gs_base = canonical(value(u));
    [s.sysenter_esp, s.sysenter_eip] = [canonical(value(u)), canonical(value(u))];
    s.sysenter_cs = u64::from(selector::CODE64);
    s.interrupt_shadow = one_in(u, 16);
    s.nmi_blocked = one_in(u, 4);
    s.nmi_pending = one_in(u, 8);
    s
}

fn control_registers(u: &mut Unstructured, s: &mut VcpuState, mode: Mode) {
    s.cr0 = cr0::ET | number(u) & (cr0::NE | cr0::WP | cr0::AM | cr0::MP);
    if one_in(u, 8) {
        s.cr0 |= number(u) & (cr0::EM | cr0::TS);
    }
    let options = cr4::TSD
        | cr4::DE
        | cr4::PSE
        | cr4::MCE
        | cr4::PGE
        | cr4::UMIP
        | cr4::FSGSBASE
        | cr4::SMEP
        | cr4::SMAP;
    s.cr4 = number(u) & options;
    if !one_in(u, 4) {
        s.cr4 |= cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        s.cr4 &= !(cr4::SMEP | cr4::SMAP);
    }
    s.xcr0 = pick(u, &[7, 7, 3, 1]);
    s.efer = number(u) & (efer::SCE | efer::NXE);
    if mode != Mode::Real {
        s.cr0 |= cr0::PE;
    }
    if matches!(mode, Mode::Compatible | Mode::Long) {
        s.cr0 |= cr0::PG;
        s.cr4 |= cr4::PAE | pick(u, &[0, cr4::PCIDE]);
        s.efer |= efer::LME | efer::LMA | efer::NXE;
        s.cr3 = at(page::PML4);
    } else if mode != Mode::Real {
        match byte(u) % 3 {
            0 => s.cr3 = value(u) & 0xffff_f000,
            1 => {
                s.cr0 |= cr0::PG;
                s.cr3 = at(page::DIRECTORY32);
            }
            _ => {
                s.cr0 |= cr0::PG;
                s.cr4 |= cr4::PAE;
                s.cr3 = at(page::PDPT);
                s.pdpte = [at(page::DIRECTORY) | 1, 0, 0, at(page::DIRECTORY) | 1];
            }
        }
    }
}

fn vector_state(u: &mut Unstructured, s: &mut VcpuState) {
    let mut random = Random::new(u.arbitrary().unwrap_or(0));
    s.fpu.ymm = std::array::from_fn(|_| std::array::from_fn(|_| random.word()));
    s.fpu.st.iter_mut().for_each(|st| random.fill(st));
    s.fpu.mxcsr = if one_in(u, 4) { number(u) as u32 & 0xffff } else { 0x1f80 };
    s.fpu.fcw = if one_in(u, 4) { number(u) as u16 & 0x1f3f | 0x40 } else { 0x37f };
    s.fpu.fsw = random.word() as u16 & 0x7f7f;
    if s.fpu.fsw & !s.fpu.fcw & 0x3f != 0 {
        // An exception that is not masked waits.
        s.fpu.fsw |= 0x8080;
    }
    s.fpu.ftw = random.word() as u8;
}

fn flat(selector: u16, attr: u16) -> Segment {
    Segment { base: 0, limit: u32::MAX, attr, selector }
}

/// Segments as a system of the mode has them, one or two of them odd.
fn segments(u: &mut Unstructured, s: &mut VcpuState, mode: Mode) {
    s.gdtr =
        DescriptorTable { base: at(page::GDT), limit: if one_in(u, 8) { number(u) as u16 } else { 0xfff } };
    s.idtr =
        DescriptorTable { base: at(page::IDT), limit: if one_in(u, 8) { number(u) as u16 } else { 0xfff } };
    let long = matches!(mode, Mode::Compatible | Mode::Long);
    s.tr = Segment { base: at(page::TSS), limit: 0x1fff, attr: 0x8b, selector: selector::TSS };
    s.ldtr = Segment { base: at(page::GDT), limit: 0x7ff, attr: 0x82, selector: selector::LDT };
    match mode {
        Mode::Real => {
            s.idtr = DescriptorTable { base: 0, limit: 0x3ff };
            s.seg = std::array::from_fn(|_| real_segment(u, 0x93));
        }
        Mode::Vm86 => {
            s.rflags |= rflags::VM;
            s.seg = std::array::from_fn(|_| real_segment(u, 0xf3));
        }
        _ => {
            let user = !one_in(u, 2);
            let rights = |attr: u16| if user { attr | 0x60 } else { attr };
            let data = if user { selector::USER_DATA | 3 } else { selector::DATA };
            s.seg = [flat(data, rights(0xc093)); 6];
            s.seg[seg::CS] = match (mode, user) {
                (Mode::Long, false) => flat(selector::CODE64, 0xa09b),
                (Mode::Long, true) => flat(selector::USER64 | 3, 0xa0fb),
                (_, true) => flat(selector::USER32 | 3, 0xc0fb),
                (_, false) if one_in(u, 4) => flat(selector::CODE16, 0x009b),
                (_, false) => flat(selector::CODE32, 0xc09b),
            };
            for n in [seg::ES, seg::DS, seg::FS, seg::GS] {
                match byte(u) % 8 {
                    0 => s.seg[n] = Segment::default(),
                    1 => {
                        s.seg[n].base =
                            if long { value(u) & 0x7fff_ffff_ffff } else { value(u) & 0xffff_ffff }
                    }
                    2 => s.seg[n].limit = number(u) as u32,
                    3 if !long => s.seg[n].attr |= Segment::EXPAND_DOWN,
                    _ => {}
                }
            }
        }
    }
}

fn real_segment(u: &mut Unstructured, attr: u16) -> Segment {
    let selector = if one_in(u, 4) { number(u) as u16 } else { u16::from(byte(u)) << 5 };
    Segment { base: u64::from(selector) << 4, limit: 0xffff, attr, selector }
}

/// Leads CS:RIP to the code.
fn set_rip(s: &mut VcpuState, u: &mut Unstructured, mode: Mode, code: u64) {
    s.rip = code;
    match mode {
        Mode::Real | Mode::Vm86 => {
            let selector = (code >> 4) as u16 - u16::from(byte(u)) * 2;
            s.seg[seg::CS].selector = selector;
            s.seg[seg::CS].base = u64::from(selector) << 4;
            s.seg[seg::CS].attr = if mode == Mode::Real { 0x9b } else { 0xf3 };
            s.rip = code - s.seg[seg::CS].base;
        }
        Mode::Long if one_in(u, 4) => s.rip = code | 0xffff_ff80_0000_0000,
        _ => {}
    }
}

/// What RAM holds at first.
struct Image(Vec<u8>);

impl Image {
    /// Tables for all modes, random data, and some damage to the tables.
    fn new(random: &mut Random, mode: Mode, damage: u8) -> Self {
        let mut image = Self(vec![0; at(PAGES) as usize]);
        random.fill(&mut image.0[at(page::STACK) as usize..]);
        image.page_tables();
        image.descriptors(mode);
        image.vectors(random, mode);
        for _ in 0..damage {
            let entries = if random.below(2) == 0 { 32 } else { 512 };
            let entry = at(random.below(page::STACK)) + 8 * random.below(entries);
            let value = match random.below(3) {
                0 => random.word(),
                1 => at(random.below(PAGES + 4)) | random.below(0x1000),
                _ => 0,
            };
            image.put_u64(entry, value);
        }
        image
    }

    fn put(&mut self, gpa: u64, bytes: &[u8]) {
        self.0[gpa as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn put_u64(&mut self, gpa: u64, value: u64) {
        self.put(gpa, &value.to_le_bytes());
    }

    /// The first 2 MiB are mapped one to one, from 0, from the highest 512 GiB and, with 32-bit paging, from 3 GiB.
    fn page_tables(&mut self) {
        const RIGHTS: u64 = 0x67;
        for entry in [0, 511] {
            self.put_u64(at(page::PML4) + 8 * entry, at(page::PDPT) | RIGHTS);
        }
        self.put_u64(at(page::PDPT), at(page::DIRECTORY) | RIGHTS);
        self.put_u64(at(page::DIRECTORY), at(page::TABLE) | RIGHTS);
        self.put_u64(at(page::DIRECTORY) + 8, 0x20_0000 | RIGHTS | 0x80);
        for entry in 0..512 {
            self.put_u64(at(page::TABLE) + 8 * entry, at(entry) | RIGHTS);
        }
        for entry in [0, 768] {
            self.put(
                at(page::DIRECTORY32) + 4 * entry,
                &(at(page::TABLE32) as u32 | RIGHTS as u32).to_le_bytes(),
            );
        }
        for entry in 0..1024 {
            self.put(at(page::TABLE32) + 4 * entry, &(at(entry) as u32 | RIGHTS as u32).to_le_bytes());
        }
    }

    fn descriptors(&mut self, mode: Mode) {
        let code64 = matches!(mode, Mode::Compatible | Mode::Long);
        let code = if code64 { selector::CODE64 } else { selector::CODE32 };
        let gate = |kind: u64, offset: u64| {
            offset & 0xffff | u64::from(code) << 16 | (offset >> 16 & 0xffff) << 48 | kind << 40
        };
        let system = |base, limit, attr| Segment { base, limit, attr, selector: 0 }.to_descriptor();
        for (selector, descriptor) in [
            (selector::CODE64, flat(0, 0xa09b).to_descriptor()),
            (selector::DATA, flat(0, 0xc093).to_descriptor()),
            (selector::CODE32, flat(0, 0xc09b).to_descriptor()),
            (selector::CODE16, flat(0, 0x809b).to_descriptor()),
            (selector::USER_DATA, flat(0, 0xc0f3).to_descriptor()),
            (selector::USER64, flat(0, 0xa0fb).to_descriptor()),
            (selector::USER32, flat(0, 0xc0fb).to_descriptor()),
            (selector::TSS, system(at(page::TSS), 0x1fff, 0x8b)),
            (selector::OTHER_TSS, system(at(page::TSS) + 0x800, 0x7ff, 0xe9)),
            (selector::LDT, system(at(page::GDT), 0x7ff, 0x82)),
            (selector::CALL_GATE, gate(0xec, at(page::HANDLERS))),
            (selector::TASK_GATE, 0xe5 << 40 | u64::from(selector::OTHER_TSS) << 16),
        ] {
            self.put_u64(at(page::GDT) + u64::from(selector), descriptor);
        }
        self.task_states(code64);
    }

    /// Stacks for all levels, and a second task of 32 bits.
    fn task_states(&mut self, long: bool) {
        let tss = at(page::TSS);
        if long {
            for stack in 0..12 {
                self.put_u64(tss + 4 + 8 * stack, at(page::STACK) + 0x800);
            }
            return;
        }
        for task in [tss, tss + 0x800] {
            let mut image = [0u32; 26];
            for level in 0..3 {
                image[1 + 2 * level] = at(page::STACK) as u32 + 0x800;
                image[2 + 2 * level] = u32::from(selector::DATA) + level as u32;
            }
            image[7] = at(page::PDPT) as u32;
            image[8] = at(page::HANDLERS) as u32;
            image[9] = 0x202;
            image[14] = at(page::STACK) as u32 + 0x400;
            image[18] = selector::DATA.into();
            image[19] = selector::CODE32.into();
            image[20] = selector::DATA.into();
            image[21] = selector::DATA.into();
            image[25] = 0x68 << 16;
            let bytes: Vec<u8> = image.iter().flat_map(|field| field.to_le_bytes()).collect();
            self.put(task, &bytes);
        }
    }

    /// Vectors into the page of handlers, which is random code that mostly begins with a return.
    fn vectors(&mut self, random: &mut Random, mode: Mode) {
        let long = matches!(mode, Mode::Compatible | Mode::Long);
        let code = u64::from(if long { selector::CODE64 } else { selector::CODE32 });
        for vector in 0..256u64 {
            let handler = at(page::HANDLERS) + 8 * vector;
            let segment = handler >> 4;
            self.put(4 * vector, &((segment << 16 | handler & 15) as u32).to_le_bytes());
            let kind = [0x8e, 0xee, 0xef, 0x8f, 0x86][random.below(5) as usize];
            let low = handler & 0xffff | code << 16 | kind << 40 | (handler >> 16 & 0xffff) << 48;
            let size = if long { 16 } else { 8 };
            let task = u64::from(selector::OTHER_TSS) << 16 | 0xe5 << 40;
            let gate = if !long && random.below(32) == 0 { task } else { low };
            self.put_u64(at(page::IDT) + size * vector, gate);
            if random.below(4) != 0 {
                let leave: &[u8] = if has_error_code(vector) { &[0x83, 0xc4, 4, 0xcf] } else { &[0xcf] };
                self.put(handler, if long { &[0x48, 0xcf] } else { leave });
            }
        }
    }
}

fn has_error_code(vector: u64) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}
