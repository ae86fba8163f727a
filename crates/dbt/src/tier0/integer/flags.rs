//! Results of arithmetic with their flags (SDM volume 1, 3.4.3.1), and conditions (appendix B).

use iced_x86::ConditionCode;
use ruse_arch::flags::rflags::{ARITH, CF, OF, PF, SF, ZF};

use crate::{cpu::Cpu, tier0::operand::mask};

/// The highest bit of `size` bytes.
pub const fn sign(size: usize) -> u64 {
    1 << (size * 8 - 1)
}

/// Sign-extends the low `size` bytes.
pub const fn extend(value: u64, size: usize) -> i64 {
    let unused = 64 - size as u32 * 8;
    (value as i64) << unused >> unused
}

/// A flag if `on`.
#[inline]
pub fn flag(bit: u64, on: bool) -> u64 {
    if on { bit } else { 0 }
}

/// SF, ZF and PF of a result, which fits in `size` bytes.
#[inline]
pub fn szp(value: u64, size: usize) -> u64 {
    flag(SF, value & sign(size) != 0)
        | flag(ZF, value == 0)
        | flag(PF, (value as u8).count_ones().is_multiple_of(2))
}

/// CF, AF (which lies one above bit 3) and OF out of the carries of each bit and the overflow, in the sign bit.
#[inline]
fn carries(out: u64, overflow: u64, size: usize) -> u64 {
    flag(CF, out & sign(size) != 0) | (out & 8) << 1 | flag(OF, overflow & sign(size) != 0)
}

/// `a + b + carry`.
#[inline]
pub fn add(a: u64, b: u64, carry: u64, size: usize) -> (u64, u64) {
    let sum = a.wrapping_add(b).wrapping_add(carry) & mask(size);
    let out = a & b | (a | b) & !sum;
    (sum, szp(sum, size) | carries(out, (a ^ sum) & (b ^ sum), size))
}

/// `a - b - borrow`.
#[inline]
pub fn sub(a: u64, b: u64, borrow: u64, size: usize) -> (u64, u64) {
    let difference = a.wrapping_sub(b).wrapping_sub(borrow) & mask(size);
    let out = !a & b | (!a | b) & difference;
    (difference, szp(difference, size) | carries(out, (a ^ b) & (a ^ difference), size))
}

/// A result of AND, OR, XOR: CF and OF are clear, and so is AF, which the manual leaves undefined.
#[inline]
pub fn logic(value: u64, size: usize) -> (u64, u64) {
    (value, szp(value, size))
}

/// Whether a condition holds.
pub fn holds(flags: u64, condition: ConditionCode) -> bool {
    let is = |bit: u64| flags & bit != 0;
    let less = is(SF) != is(OF);
    match condition {
        ConditionCode::None => true,
        ConditionCode::o => is(OF),
        ConditionCode::no => !is(OF),
        ConditionCode::b => is(CF),
        ConditionCode::ae => !is(CF),
        ConditionCode::e => is(ZF),
        ConditionCode::ne => !is(ZF),
        ConditionCode::be => is(CF | ZF),
        ConditionCode::a => !is(CF | ZF),
        ConditionCode::s => is(SF),
        ConditionCode::ns => !is(SF),
        ConditionCode::p => is(PF),
        ConditionCode::np => !is(PF),
        ConditionCode::l => less,
        ConditionCode::ge => !less,
        ConditionCode::le => less || is(ZF),
        ConditionCode::g => !less && !is(ZF),
    }
}

impl Cpu {
    /// Sets all six arithmetic flags.
    #[inline]
    pub(super) fn set_arith(&mut self, flags: u64) {
        self.set_flags(ARITH, flags);
    }

    /// Sets the flags in `which`.
    #[inline]
    pub(super) fn set_flags(&mut self, which: u64, flags: u64) {
        self.rflags = self.rflags & !which | flags & which;
    }
}
