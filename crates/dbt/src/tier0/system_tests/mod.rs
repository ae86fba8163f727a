//! Tests of the system instructions and of delivery.

mod control;
mod fuzz;
mod interrupts;
mod transfers;
mod tsc;

use ruse_arch::{
    DescriptorTable, Segment,
    state::{reg, seg},
};

use super::testing::{GDT, Machine};

/// Selectors that [`with_levels`] makes, beside those of [`Machine`].
pub(crate) const CODE3: u16 = 0x2b;
pub(super) const DATA3: u16 = 0x33;
pub(super) const TSS: u16 = 0x38;
/// The slot after the TSS's (two, for a 64-bit one).
pub(super) const FREE: u16 = 0x48;
pub(super) const TSS_BASE: u64 = 0x6000;
pub(super) const IDT: u64 = 0x7000;
pub(crate) const HANDLER: u64 = 0x1_8000;
pub(super) const KERNEL_STACK: u64 = 0x2_4000;

/// Descriptor of a TSS at `base`.
pub(super) fn tss_descriptor(base: u64) -> u64 {
    Segment { base, limit: 0x2067, attr: 0x89, selector: 0 }.to_descriptor()
}

/// A gate of the IDT, low half.
pub(super) fn gate(selector: u16, offset: u64, attr: u64) -> u64 {
    offset & 0xffff | u64::from(selector) << 16 | attr << 40 | (offset >> 16 & 0xffff) << 48
}

/// Adds level 3 segments, a TSS with a stack and an IDT whose gates all lead to [`HANDLER`].
pub(crate) fn with_levels(mut m: Machine) -> Machine {
    let long = m.cpu.mode.long;
    let code3 = if long { 0x00af_fb00_0000_ffff } else { 0x00cf_fb00_0000_ffff };
    m.write_u64(GDT + 0x28, code3);
    m.write_u64(GDT + 0x30, 0x00cf_f300_0000_ffff);
    m.write_u64(GDT + 0x38, tss_descriptor(TSS_BASE));
    m.write_u64(GDT + 0x40, 0);
    m.cpu.gdtr.limit = 0xff;
    m.cpu.tr = Segment { base: TSS_BASE, limit: 0x2067, attr: 0x8b, selector: TSS };
    if long {
        m.write_u64(TSS_BASE + 4, KERNEL_STACK);
        m.write_u64(TSS_BASE + 0x24, KERNEL_STACK - 0x1000 + 8);
    } else {
        m.write_u64(TSS_BASE + 4, 0x10 << 32 | KERNEL_STACK);
    }
    let cs = if long { 8 } else { 0x18 };
    for vector in 0..256 {
        let raw = gate(cs, HANDLER, 0x8e);
        let at = IDT + vector * if long { 16 } else { 8 };
        m.write_u64(at, raw);
        if long {
            m.write_u64(at + 8, 0);
        }
    }
    m.cpu.idtr = DescriptorTable { base: IDT, limit: if long { 0xfff } else { 0x7ff } };
    m
}

/// Goes to level 3, flat.
pub(crate) fn to_user(m: &mut Machine) {
    let long = m.cpu.mode.long;
    m.cpu.seg[seg::CS] =
        Segment { base: 0, limit: !0, attr: if long { 0xa0fb } else { 0xc0fb }, selector: CODE3 };
    for s in [seg::SS, seg::DS, seg::ES, seg::FS, seg::GS] {
        m.cpu.seg[s] = Segment { base: 0, limit: !0, attr: 0xc0f3, selector: DATA3 };
    }
    m.cpu.update_mode();
}

/// The word at `n` words of `size` bytes above the stack pointer.
pub(super) fn stacked(m: &Machine, n: u64, size: u64) -> u64 {
    let value = m.read_u64(m.cpu.gpr[reg::RSP] + n * size);
    if size == 4 { value & 0xffff_ffff } else { value }
}
