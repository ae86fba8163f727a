//! A CPU over a little RAM for tests of the executors.
//!
//! RAM is 16 MiB and mapped one to one for everybody: the first 2 MiB by 4 KiB pages (the page table at
//! [`PAGE_TABLE`], so that a test can take a page away), the rest by 2 MiB pages.

use std::sync::Arc;

use ruse_arch::{
    Exception, Segment, VcpuState,
    flags::{cr0, cr4, efer, rflags},
    state::{reg, seg},
};
use ruse_engine::{Bus, Clock, CpuidEntry, CpuidTable};
use ruse_memory::GuestRam;

use crate::{
    cpu::{Cpu, CpuBox},
    mmu::{Mmu, watch::CodeMap},
};

/// Where [`Machine::load`] puts code.
pub const CODE: u64 = 0x1_0000;
/// The stack pointer at the start; there is room on both sides.
pub const STACK: u64 = 0x2_8000;
/// Room for data, 64 KiB.
pub const DATA: u64 = 0x3_0000;
/// The page table of the first 2 MiB: 512 entries of 8 bytes.
pub const PAGE_TABLE: u64 = 0x4000;
/// The global descriptor table: null, 64-bit code, data, 32-bit code, 16-bit code, each flat.
pub const GDT: u64 = 0x5000;

/// A machine with nothing in it.
pub struct NullBus;

impl Bus for NullBus {}

/// A CPU and its RAM.
pub struct Machine {
    /// The CPU.
    pub cpu: CpuBox,
    /// The RAM.
    pub ram: GuestRam,
}

/// CPUID with every feature that tier 0 executes.
fn cpuid() -> CpuidTable {
    let entry = |leaf, subleaf, regs| CpuidEntry { leaf, subleaf, regs };
    CpuidTable(vec![
        entry(0, None, [0xd, 0, 0, 0]),
        entry(1, None, [0, 0, !(1 << 5), !0]),
        entry(7, Some(0), [1, 0x219c_0529, 1 << 22 | 7 << 8, 1 << 14]),
        entry(0xd, Some(0), [7, 832, 832, 0]),
        entry(0xd, Some(1), [7, 832, 0, 0]),
        entry(0xd, Some(2), [256, 576, 0, 0]),
        entry(0x8000_0000, None, [0x8000_0008, 0, 0, 0]),
        entry(0x8000_0001, None, [0, 0, 1 << 5 | 1 << 8 | 1, 1 << 11 | 1 << 20 | 1 << 27 | 1 << 29]),
        entry(0x8000_0008, None, [0x302e, 0, 0, 0]),
    ])
}

fn flat(selector: u16, attr: u16) -> Segment {
    Segment { base: 0, limit: 0xffff_ffff, attr, selector }
}

impl Machine {
    /// 64-bit mode at CPL 0 with flat segments, SSE, AVX and XSAVE enabled, interrupts off.
    pub fn long() -> Self {
        let mut state = VcpuState {
            cr0: cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::MP | cr0::WP,
            cr3: 0x1000,
            cr4: cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE | cr4::PGE,
            efer: efer::LME | efer::LMA | efer::NXE | efer::SCE,
            xcr0: 7,
            ..VcpuState::default()
        };
        state.seg = [flat(0x10, 0xc093); 6];
        state.seg[seg::CS] = flat(0x8, 0xa09b);
        Self::with_state(state)
    }

    /// 32-bit protected mode without paging, flat.
    pub fn flat32() -> Self {
        let mut state = VcpuState {
            cr0: cr0::PE | cr0::ET | cr0::NE | cr0::MP,
            cr4: cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE,
            xcr0: 7,
            ..VcpuState::default()
        };
        state.seg = [flat(0x10, 0xc093); 6];
        state.seg[seg::CS] = flat(0x18, 0xc09b);
        Self::with_state(state)
    }

    /// Real mode. CS is based at [`CODE`], SS at 0x20000 (SP is 0x8000), the others at [`DATA`].
    pub fn real() -> Self {
        let mut state = VcpuState { cr0: cr0::ET, ..VcpuState::default() };
        let at = |base: u64, attr| Segment { base, limit: 0xffff, attr, selector: (base >> 4) as u16 };
        state.seg = [at(DATA, 0x93); 6];
        state.seg[seg::CS] = at(CODE, 0x9b);
        state.seg[seg::SS] = at(0x2_0000, 0x93);
        let mut machine = Self::with_state(state);
        machine.cpu.gpr[reg::RSP] = 0x8000;
        machine.cpu.rip = 0;
        machine
    }

    fn with_state(mut state: VcpuState) -> Self {
        state.rip = CODE;
        state.rflags = rflags::FIXED;
        state.gpr = [0; 16];
        state.gpr[reg::RSP] = STACK;
        state.gdtr = ruse_arch::DescriptorTable { base: GDT, limit: 0x27 };
        let ram = GuestRam::new(16 << 20).expect("a little RAM");
        let mmu = Mmu::new(ram.clone(), CodeMap::new(ram.clone()), 0);
        let clock = Arc::new(Clock::with_frequency(2_000_000_000));
        let mut machine = Self { cpu: CpuBox::new(0, cpuid(), clock, mmu), ram };
        machine.write_tables();
        machine.cpu.load_state(&state);
        machine
    }

    fn write_tables(&mut self) {
        self.write_u64(0x1000, 0x2007);
        self.write_u64(0x2000, 0x3007);
        self.write_u64(0x3000, PAGE_TABLE | 7);
        for i in 1..512 {
            self.write_u64(0x3000 + 8 * i, i << 21 | 0x87);
        }
        for i in 0..512 {
            self.write_u64(PAGE_TABLE + 8 * i, i << 12 | 7);
        }
        let descriptors =
            [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_9b00_0000_ffff, 0x008f_9b00_0000_ffff];
        for (i, descriptor) in descriptors.into_iter().enumerate() {
            self.write_u64(GDT + 8 * i as u64, descriptor);
        }
    }

    fn host(&self, gpa: u64) -> *mut u8 {
        self.ram.host_page(gpa).expect("RAM").wrapping_add(gpa as usize & 0xfff)
    }

    /// Writes bytes to physical memory.
    pub fn write(&mut self, gpa: u64, bytes: &[u8]) {
        for (i, &byte) in bytes.iter().enumerate() {
            crate::mmu::access::store(self.host(gpa + i as u64), &[byte]);
        }
    }

    /// Writes 8 bytes to physical memory.
    pub fn write_u64(&mut self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    /// Reads bytes from physical memory.
    pub fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        std::array::from_fn(|i| {
            let mut byte = [0];
            crate::mmu::access::load(self.host(gpa + i as u64), &mut byte);
            byte[0]
        })
    }

    /// Reads 8 bytes from physical memory.
    pub fn read_u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.read(gpa))
    }

    /// Puts code at [`CODE`] and RIP at its start.
    pub fn load(&mut self, code: &[u8]) {
        self.write(CODE, code);
        self.cpu.rip = if self.cpu.mode.real { 0 } else { CODE };
    }

    /// Takes the 4 KiB page at `gpa` (below 2 MiB) out of the page table.
    pub fn unmap(&mut self, gpa: u64) {
        self.write_u64(PAGE_TABLE + (gpa >> 12) * 8, 0);
        self.cpu.mmu.flush_all();
        self.cpu.update_mode();
    }

    /// Executes one instruction.
    pub fn step(&mut self) -> Result<(), Exception> {
        self.cpu.with_bus(&NullBus, super::step)
    }

    /// Loads the code and executes it up to its end, or to the first exception.
    pub fn run(&mut self, code: &[u8]) -> Result<(), Exception> {
        self.load(code);
        let end = self.cpu.rip + code.len() as u64;
        self.cpu.with_bus(&NullBus, |cpu: &mut Cpu| {
            while cpu.rip != end {
                super::step(cpu)?;
            }
            Ok(())
        })
    }
}
