//! Exceptions (SDM volume 3, chapter 6).

use serde::{Deserialize, Serialize};

/// An exception that an instruction raises, with its error code where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exception {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// The error code that delivery pushes, where the vector has one.
    pub error: Option<u32>,
    /// For a page fault, the linear address that CR2 takes; for a debug exception, the bits that DR6 takes.
    pub payload: u64,
}

impl Exception {
    /// Divide error.
    pub const DE: Self = Self::bare(0);
    /// Breakpoint (INT3).
    pub const BP: Self = Self::bare(3);
    /// Overflow (INTO).
    pub const OF: Self = Self::bare(4);
    /// Bound range exceeded.
    pub const BR: Self = Self::bare(5);
    /// Invalid opcode.
    pub const UD: Self = Self::bare(6);
    /// Device not available.
    pub const NM: Self = Self::bare(7);
    /// x87 floating-point error.
    pub const MF: Self = Self::bare(16);
    /// SIMD floating-point error.
    pub const XM: Self = Self::bare(19);

    /// An exception without an error code.
    pub const fn bare(vector: u8) -> Self {
        Self { vector, error: None, payload: 0 }
    }
    /// An exception with an error code.
    pub const fn with_error(vector: u8, error: u32) -> Self {
        Self { vector, error: Some(error), payload: 0 }
    }
    /// Debug exception that sets `dr6` bits in DR6.
    pub const fn db(dr6: u64) -> Self {
        Self { vector: 1, error: None, payload: dr6 }
    }
    /// Double fault.
    pub const fn df() -> Self {
        Self::with_error(8, 0)
    }
    /// Invalid TSS.
    pub const fn ts(error: u32) -> Self {
        Self::with_error(10, error)
    }
    /// Segment not present.
    pub const fn np(error: u32) -> Self {
        Self::with_error(11, error)
    }
    /// Stack fault.
    pub const fn ss(error: u32) -> Self {
        Self::with_error(12, error)
    }
    /// General protection.
    pub const fn gp(error: u32) -> Self {
        Self::with_error(13, error)
    }
    /// Page fault at linear address `addr`.
    pub const fn pf(addr: u64, error: u32) -> Self {
        Self { vector: 14, error: Some(error), payload: addr }
    }
    /// Alignment check.
    pub const fn ac() -> Self {
        Self::with_error(17, 0)
    }

    /// Whether a second exception of this kind during delivery of a contributory one makes a double fault
    /// (SDM volume 3, table 6-5).
    pub const fn is_contributory(&self) -> bool {
        matches!(self.vector, 0 | 10..=13)
    }
}
