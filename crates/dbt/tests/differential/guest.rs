//! What the executors run cases on: a CPU at CPL 3 over a little RAM, with the data and the code at the same addresses
//! as on the host.

use std::sync::Arc;

use ruse_arch::{
    Exception, Segment, VcpuState,
    flags::{cr0, cr4, efer, rflags},
    state::seg,
};
use ruse_cases::case::{CODE, CODE_BYTES, Case, GS_BASE, NONE, Outcome, WINDOW, WINDOW_BYTES, digest};
use ruse_dbt::{
    cpu::{Cpu, CpuBox},
    cpuid,
    mmu::{Mmu, watch::CodeMap},
};
use ruse_engine::{Bus, Clock};
use ruse_memory::GuestRam;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
/// Page table of the data.
pub const DATA_TABLE: u64 = 0x4000;
/// Page table of the code.
pub const CODE_TABLE: u64 = 0x5000;
const DATA: u64 = 0x1_0000;
/// Where the code lies in RAM.
pub const CODE_PAGES: u64 = 0x2_0000;

/// Distances at which the same pages lie once more after [`add_aliases`].
pub const ALIASES: [u64; 2] = [16 << 30, 0x5500_0000_0000];

/// A machine with nothing in it.
pub struct NullBus;

impl Bus for NullBus {}

/// The state of a CPU in 64-bit mode at CPL 3, as a program of a usual system has it.
fn user_state() -> VcpuState {
    let mut state = VcpuState {
        cr0: cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::MP | cr0::WP,
        cr3: PML4,
        cr4: cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::PGE,
        efer: efer::LME | efer::LMA | efer::NXE | efer::SCE,
        xcr0: 7,
        rflags: rflags::FIXED | rflags::IF,
        rip: CODE,
        ..VcpuState::default()
    };
    state.seg = [Segment { base: 0, limit: 0xffff_ffff, attr: 0xc0f3, selector: 0x2b }; 6];
    state.seg[seg::GS].base = GS_BASE;
    state.seg[seg::CS] = Segment { base: 0, limit: 0xffff_ffff, attr: 0xa0fb, selector: 0x33 };
    state
}

/// Page tables for the code and the data, with no accessed and dirty bits.
fn write_tables(ram: &GuestRam) {
    let user = 7;
    let mut entries = vec![
        (PML4, PDPT | user),
        (PDPT, PD | user),
        (PD + (WINDOW >> 21) * 8, DATA_TABLE | user),
        (PD + (CODE >> 21) * 8, CODE_TABLE | user),
    ];
    for page in 0..CODE_BYTES as u64 / 4096 {
        entries.push((CODE_TABLE + page * 8, (CODE_PAGES + page * 4096) | user));
    }
    for page in 0..WINDOW_BYTES as u64 / 4096 {
        entries.push((DATA_TABLE + page * 8, data_page(page) | user | 1 << 63));
    }
    for (at, value) in entries {
        copy_in(ram, at, &u64::to_le_bytes(value));
    }
}

/// Maps all of the code and the data at [`ALIASES`], too.
pub fn add_aliases(ram: &GuestRam) {
    let user = 7;
    copy_in(ram, PDPT + (ALIASES[0] >> 30) * 8, &(PD | user).to_le_bytes());
    copy_in(ram, PML4 + (ALIASES[1] >> 39) * 8, &(PDPT | user).to_le_bytes());
}

/// Where a page of the data lies: what follows on in the program's memory does not in the guest's.
pub fn data_page(page: u64) -> u64 {
    DATA + (WINDOW_BYTES as u64 / 4096 - 1 - page) * 4096
}

/// A CPU in 64-bit mode with everything that the engine offers, and its RAM.
pub fn machine() -> (CpuBox, GuestRam) {
    let ram = GuestRam::new(2 << 20).expect("a little RAM");
    write_tables(&ram);
    let mmu = Mmu::new(ram.clone(), CodeMap::new(ram.clone()), 0);
    let clock = Arc::new(Clock::with_frequency(2_000_000_000));
    let mut cpu = CpuBox::new(0, cpuid::supported(), clock, mmu);
    cpu.load_state(&user_state());
    (cpu, ram)
}

/// Forgets all translations of addresses, and with what they were found out.
pub fn forget_addresses(cpu: &mut Cpu, ram: &GuestRam) {
    write_tables(ram);
    cpu.mmu.flush_all();
    cpu.update_mode();
}

fn host(ram: &GuestRam, gpa: u64) -> *mut u8 {
    ram.host_page(gpa).expect("RAM").wrapping_add(gpa as usize % 4096)
}

fn copy_in(ram: &GuestRam, gpa: u64, bytes: &[u8]) {
    for (n, part) in bytes.chunks(4096).enumerate() {
        // SAFETY: the part lies within one page of RAM (callers begin at pages or stay in one), and no guest runs.
        unsafe { host(ram, gpa + n as u64 * 4096).copy_from_nonoverlapping(part.as_ptr(), part.len()) };
    }
}

fn copy_out(ram: &GuestRam, gpa: u64, bytes: &mut [u8]) {
    for (n, part) in bytes.chunks_mut(4096).enumerate() {
        // SAFETY: as in `copy_in`.
        unsafe { host(ram, gpa + n as u64 * 4096).copy_to_nonoverlapping(part.as_mut_ptr(), part.len()) };
    }
}

/// Writes the pages of code that are to change, as a device would.
fn load_code(cpu: &mut Cpu, ram: &GuestRam, code: &[u8]) {
    for (gpa, page) in (CODE_PAGES..).step_by(4096).zip(code.chunks(4096)) {
        let mut old = [0; 4096];
        copy_out(ram, gpa, &mut old);
        if old != page {
            copy_in(ram, gpa, page);
            cpu.mmu.code.written(gpa, None);
        }
    }
}

/// Puts a case's inputs into a CPU, which will execute the code at an address that is so much higher.
pub fn load(cpu: &mut Cpu, ram: &GuestRam, case: &Case, higher: u64) {
    let mut window = [0; WINDOW_BYTES];
    case.fill(&mut window);
    for (page, part) in window.chunks(4096).enumerate() {
        copy_in(ram, data_page(page as u64), part);
    }
    load_code(cpu, ram, &case.code);
    let s = &case.state;
    cpu.gpr = s.gpr;
    cpu.rip = case.entry() + higher;
    cpu.rflags = s.flags;
    cpu.fpu.fxsave.copy_from_slice(&s.fpu[..512]);
    for (n, high) in cpu.fpu.ymm_high.iter_mut().enumerate() {
        *high = [0, 8].map(|at| u64::from_le_bytes(s.fpu[576 + 16 * n + at..][..8].try_into().unwrap()));
    }
}

/// What has become of it: every case ends with an exception, most of them with the one at their end. RIP is said as if
/// the code were not higher.
pub fn unload(cpu: &Cpu, ram: &GuestRam, case: &Case, higher: u64, fault: Exception) -> Outcome {
    let mut o = Outcome { vector: NONE, ..Outcome::EMPTY };
    let rip = cpu.rip.wrapping_sub(higher);
    if fault != Exception::UD || rip != case.end() {
        o.vector = u64::from(fault.vector);
        o.error = u64::from(fault.error.unwrap_or(0));
        o.address = fault.payload;
    }
    (o.state.gpr, o.state.rip, o.state.flags) = (cpu.gpr, rip, cpu.rflags);
    o.state.fpu[..512].copy_from_slice(&cpu.fpu.fxsave);
    for (n, high) in cpu.fpu.ymm_high.iter().enumerate() {
        o.state.fpu[576 + 16 * n..][..8].copy_from_slice(&high[0].to_le_bytes());
        o.state.fpu[584 + 16 * n..][..8].copy_from_slice(&high[1].to_le_bytes());
    }
    for (page, part) in o.window.chunks_mut(4096).enumerate() {
        copy_out(ram, data_page(page as u64), part);
    }
    let mut code = [0; CODE_BYTES];
    copy_out(ram, CODE_PAGES, &mut code);
    o.code = digest(&code);
    o
}
