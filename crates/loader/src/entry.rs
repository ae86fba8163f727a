//! The register states with which a guest starts.

use ruse_arch::flags::{cr0, cr4, efer, rflags};
use ruse_arch::paging::{PHYS_BITS, pte};
use ruse_arch::state::{reg, seg};
use ruse_arch::{DescriptorTable, Segment, VcpuState};
use ruse_memory::LOW_RAM_END;

/// Selector of the code segment (`__BOOT_CS` of boot.rst).
pub const BOOT_CS: u16 = 0x10;
/// Selector of the data segment (`__BOOT_DS` of boot.rst).
pub const BOOT_DS: u16 = 0x18;
/// Selector of the task state segment.
pub const BOOT_TSS: u16 = 0x20;

/// Bytes of the descriptor table that [`gdt`] makes.
pub const GDT_SIZE: u64 = 5 * 8;
/// Bytes of the page tables that [`identity_tables`] makes: one PML4, one PDPT, four page directories.
pub const PAGE_TABLES_SIZE: u64 = 6 * 4096;

/// Writable data, accessed, all 4 GiB.
const DATA_ATTR: u16 = 0x3 | Segment::S | Segment::P | Segment::DB | Segment::G;
/// Readable code, accessed, all 4 GiB; without its operand size.
const CODE_ATTR: u16 = 0xb | Segment::S | Segment::P | Segment::G;
/// Busy TSS (32-bit, or 64-bit in long mode).
const TSS_ATTR: u16 = 0xb | Segment::P;

/// Memory types of MTRRs (SDM volume 3, table 12-2).
mod memory_type {
    pub const UC: u64 = 0;
    pub const WP: u64 = 5;
    pub const WB: u64 = 6;
}

/// The state after power-up: real mode at the reset vector, FFFF_FFF0h.
pub fn reset_vector() -> VcpuState {
    VcpuState::default()
}

/// Real mode at `selector`:`offset`, as firmware leaves it to a boot sector: all segments are `selector`'s, interrupts
/// are off.
pub fn real_mode(selector: u16, offset: u16) -> VcpuState {
    let mut state = firmware_done();
    for segment in &mut state.seg {
        segment.selector = selector;
        segment.base = u64::from(selector) << 4;
    }
    state.rip = u64::from(offset);
    state
}

/// Flat 32-bit protected mode without paging at `entry`, interrupts off. The descriptor table of
/// [`gdt`]`(false)` must be at `gdt_base`. This serves the 32-bit protocol of Linux (boot.rst), PVH and multiboot,
/// which differ only in general registers.
pub fn protected_mode(entry: u32, gdt_base: u64) -> VcpuState {
    let mut state = firmware_done();
    state.rip = u64::from(entry);
    state.cr0 = cr0::PE | cr0::ET;
    load_segments(&mut state, CODE_ATTR | Segment::DB, gdt_base);
    state
}

/// 64-bit mode at `entry`, interrupts off, with the descriptor table of [`gdt`]`(true)` at `gdt_base` and the page
/// tables of [`identity_tables`] at `tables` (boot.rst, "64-bit Boot Protocol").
pub fn long_mode(entry: u64, gdt_base: u64, tables: u64) -> VcpuState {
    let mut state = firmware_done();
    state.rip = entry;
    state.cr0 = cr0::PE | cr0::ET | cr0::PG;
    state.cr3 = tables;
    state.cr4 = cr4::PAE;
    state.efer = efer::LME | efer::LMA;
    load_segments(&mut state, CODE_ATTR | Segment::L, gdt_base);
    state
}

/// Sets the MTRRs as a PC's firmware leaves them: everything is write-back but the VGA window and the hole below
/// 4 GiB. Every vCPU of a VM without firmware needs this; Linux distrusts PAT where MTRRs are off.
pub fn set_mtrrs(state: &mut VcpuState) {
    const ENABLE: u64 = 1 << 11;
    const FIXED_ENABLE: u64 = 1 << 10;
    let each = |kind: u64| kind * 0x0101_0101_0101_0101;
    state.mtrr_def_type = ENABLE | FIXED_ENABLE | memory_type::WB;
    state.mtrr_fixed = [each(memory_type::WP); 11];
    state.mtrr_fixed[0] = each(memory_type::WB);
    state.mtrr_fixed[1] = each(memory_type::WB);
    state.mtrr_fixed[2] = each(memory_type::UC);
    // The hole is naturally aligned: C000_0000h to FFFF_FFFFh.
    let hole = (1u64 << 32) - LOW_RAM_END;
    state.mtrr_variable[0] = (LOW_RAM_END | memory_type::UC, ((1 << PHYS_BITS) - hole) | ENABLE);
}

/// What all entries without firmware have in common.
fn firmware_done() -> VcpuState {
    let mut state = VcpuState { rflags: rflags::FIXED, cr0: cr0::ET, ..VcpuState::default() };
    state.gpr[reg::RDX] = 0;
    for segment in &mut state.seg {
        *segment = Segment { base: 0, limit: 0xffff, attr: 0x93, selector: 0 };
    }
    set_mtrrs(&mut state);
    state
}

fn load_segments(state: &mut VcpuState, code: u16, gdt_base: u64) {
    for segment in &mut state.seg {
        *segment = Segment { base: 0, limit: u32::MAX, attr: DATA_ATTR, selector: BOOT_DS };
    }
    state.seg[seg::CS] = Segment { base: 0, limit: u32::MAX, attr: code, selector: BOOT_CS };
    state.tr = Segment { base: 0, limit: 0x67, attr: TSS_ATTR, selector: BOOT_TSS };
    state.ldtr = Segment::default();
    state.gdtr = DescriptorTable { base: gdt_base, limit: GDT_SIZE as u16 - 1 };
    state.idtr = DescriptorTable { base: 0, limit: 0 };
}

/// The descriptor table that the entries use: two empty descriptors, code, data, task state. (In long mode the last
/// would take sixteen bytes; nothing reads it from memory, for TR is loaded.)
pub fn gdt(long: bool) -> [u8; GDT_SIZE as usize] {
    let code = CODE_ATTR | if long { Segment::L } else { Segment::DB };
    let flat = |attr| Segment { base: 0, limit: u32::MAX, attr, selector: 0 }.to_descriptor();
    let tss = Segment { base: 0, limit: 0x67, attr: TSS_ATTR, selector: 0 }.to_descriptor();
    let mut bytes = [0; GDT_SIZE as usize];
    for (slot, raw) in bytes.chunks_exact_mut(8).skip(2).zip([flat(code), flat(DATA_ATTR), tss]) {
        slot.copy_from_slice(&raw.to_le_bytes());
    }
    bytes
}

/// Page tables that map the first 4 GiB onto themselves by 2 MiB pages, for a place at `base` (page-aligned).
pub fn identity_tables(base: u64) -> Vec<u8> {
    const PAGE: u64 = 4096;
    let table = pte::P | pte::W;
    let mut entries = vec![0u64; (PAGE_TABLES_SIZE / 8) as usize];
    entries[0] = (base + PAGE) | table;
    for i in 0..4 {
        entries[512 + i] = (base + (2 + i as u64) * PAGE) | table;
    }
    for (i, entry) in entries[1024..].iter_mut().enumerate() {
        *entry = (i as u64) << 21 | table | pte::PS;
    }
    entries.iter().flat_map(|e| e.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use ruse_arch::paging::{Access, PagingMode, PhysMemory, Privilege, walk};

    use super::*;

    struct Tables(Vec<u8>);
    impl PhysMemory for Tables {
        fn read_entry(&mut self, gpa: u64, _: bool) -> u64 {
            let at = (gpa - 0x9000) as usize;
            u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap())
        }
        fn set_bits(&mut self, gpa: u64, wide: bool, old: u64, bits: u64) -> bool {
            assert_eq!(self.read_entry(gpa, wide), old);
            let at = (gpa - 0x9000) as usize;
            self.0[at..at + 8].copy_from_slice(&(old | bits).to_le_bytes());
            true
        }
    }

    #[test]
    fn four_gib_are_mapped_onto_themselves() {
        let state = long_mode(0x100_0200, 0x1000, 0x9000);
        let mode =
            PagingMode { cr0: state.cr0, cr3: state.cr3, cr4: state.cr4, efer: state.efer, pdpte: [0; 4] };
        let mut tables = Tables(identity_tables(0x9000));
        let kernel = Privilege { user: false, ac: false };
        for addr in [0, 0x7000, 0x100_0200, 0xbfff_ffff, 0xffff_ffff] {
            assert_eq!(walk(&mode, addr, Access::Write, kernel, &mut tables).unwrap().gpa, addr);
        }
        assert!(walk(&mode, 1 << 32, Access::Read, kernel, &mut tables).is_err());
    }

    #[test]
    fn segments_agree_with_their_descriptors() {
        for (long, state) in
            [(true, long_mode(0, 0x1000, 0x9000)), (false, protected_mode(0x10_0000, 0x1000))]
        {
            let table = gdt(long);
            let descriptor = |selector: u16| {
                let at = usize::from(selector);
                let raw = u64::from_le_bytes(table[at..at + 8].try_into().unwrap());
                Segment::from_descriptor(selector, raw)
            };
            assert_eq!(state.seg[seg::CS], descriptor(BOOT_CS));
            assert_eq!(state.seg[seg::DS], descriptor(BOOT_DS));
            assert_eq!(state.tr, descriptor(BOOT_TSS));
            assert_eq!(state.rflags & rflags::IF, 0);
        }
    }

    #[test]
    fn the_hole_is_uncached() {
        let state = real_mode(0x7c0, 0);
        let (base, mask) = state.mtrr_variable[0];
        assert_eq!((base, mask), (0xc000_0000, 0x3fff_c000_0800));
        assert_eq!(state.mtrr_def_type, 0xc06);
        assert_eq!(state.seg[seg::CS].base, 0x7c00);
    }
}
