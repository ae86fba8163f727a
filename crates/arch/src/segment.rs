//! Segment registers and descriptors (SDM volume 3, 3.4).

use serde::{Deserialize, Serialize};

/// A segment register with its hidden part.
///
/// `attr` has the layout of bits 40 to 55 of a descriptor, the limit's bits left out: type in bits 0–3, S in 4,
/// DPL in 5–6, P in 7, AVL in 12, L in 13, D/B in 14, G in 15 (the layout of a VMX access-rights field).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Base linear address.
    pub base: u64,
    /// Last valid offset in bytes, granularity already applied.
    pub limit: u32,
    /// Access rights; zero for an unusable (null) segment.
    pub attr: u16,
    /// The visible selector.
    pub selector: u16,
}

impl Segment {
    /// Type bit: a data segment is writable, a code segment readable.
    pub const WRITABLE: u16 = 1 << 1;
    /// Type bit: an expand-down data segment or a conforming code segment.
    pub const EXPAND_DOWN: u16 = 1 << 2;
    /// Type bit: a code segment.
    pub const CODE: u16 = 1 << 3;
    /// Code or data, not a system segment.
    pub const S: u16 = 1 << 4;
    /// Present.
    pub const P: u16 = 1 << 7;
    /// 64-bit code.
    pub const L: u16 = 1 << 13;
    /// Default operand size 32, or big stack.
    pub const DB: u16 = 1 << 14;
    /// The limit counts 4 KiB units.
    pub const G: u16 = 1 << 15;

    /// Unpacks an 8-byte descriptor that `selector` named.
    pub const fn from_descriptor(selector: u16, raw: u64) -> Self {
        let attr = ((raw >> 40) & 0xf0ff) as u16;
        let limit = ((raw & 0xffff) | ((raw >> 32) & 0xf_0000)) as u32;
        let limit = if attr & Self::G != 0 { (limit << 12) | 0xfff } else { limit };
        let base = ((raw >> 16) & 0xff_ffff) | ((raw >> 32) & 0xff00_0000);
        Self { base, limit, attr, selector }
    }

    /// Packs into an 8-byte descriptor (the low 32 bits of the base only).
    pub const fn to_descriptor(&self) -> u64 {
        let limit = if self.attr & Self::G != 0 { self.limit >> 12 } else { self.limit } as u64;
        (limit & 0xffff)
            | ((limit & 0xf_0000) << 32)
            | ((self.base & 0xff_ffff) << 16)
            | ((self.base & 0xff00_0000) << 32)
            | ((self.attr as u64 & 0xf0ff) << 40)
    }

    /// Descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        ((self.attr >> 5) & 3) as u8
    }
    /// Type field, four bits.
    pub const fn kind(&self) -> u8 {
        (self.attr & 15) as u8
    }
    /// Whether the segment may be used at all.
    pub const fn is_present(&self) -> bool {
        self.attr & Self::P != 0
    }
    /// Whether this is a code segment.
    pub const fn is_code(&self) -> bool {
        self.attr & (Self::S | Self::CODE) == Self::S | Self::CODE
    }
}

/// GDTR or IDTR.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear address of the table.
    pub base: u64,
    /// Last valid offset in bytes.
    pub limit: u16,
}
