//! Fields of the FXSAVE image and the vector registers by number (SDM volume 1, 10.5.1).

use crate::cpu::FpuArea;

/// Bits of MXCSR (SDM volume 1, 10.2.3).
pub(super) mod mxcsr {
    /// The sticky flags.
    pub const FLAGS: u32 = 0x3f;
    /// Invalid, denormal and division by zero: found before the operation.
    pub const BEFORE: u32 = 0x7;
    /// Underflow.
    pub const UE: u32 = 1 << 4;
    /// The masks.
    pub const MASKS: u32 = 0x1f80;
    /// Distance from a flag to its mask.
    pub const MASK_SHIFT: u32 = 7;
    /// Flush results to zero.
    pub const FTZ: u32 = 1 << 15;
    /// Value after a reset.
    pub const DEFAULT: u32 = 0x1f80;
    /// Bits that exist, as MXCSR_MASK tells.
    pub const DEFINED: u32 = 0xffff;
}

/// Bits of the x87 status word (SDM volume 1, 8.1.3).
pub(super) mod fsw {
    /// The exception flags without stack fault.
    pub const FLAGS: u16 = 0x3f;
    /// Invalid, overflow and underflow: a store that raises them unmasked stores nothing.
    pub const NO_STORE: u16 = 0x19;
    /// Stack fault.
    pub const SF: u16 = 1 << 6;
    /// Error summary, and busy, which mirrors it.
    pub const SUMMARY: u16 = 1 << 7 | 1 << 15;
}

/// FCW after FNINIT.
pub(super) const FCW_INIT: u16 = 0x37f;

impl FpuArea {
    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.fxsave[at], self.fxsave[at + 1]])
    }
    fn set_word(&mut self, at: usize, value: u16) {
        self.fxsave[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// x87 control word.
    pub(super) fn fcw(&self) -> u16 {
        self.word(0)
    }
    /// Sets the x87 control word; bit 6 is always one (seen on hardware), and undefined bits are zero.
    pub(super) fn set_fcw(&mut self, value: u16) {
        self.set_word(0, value & 0x1f3f | 0x40);
    }
    /// x87 status word.
    pub(super) fn fsw(&self) -> u16 {
        self.word(2)
    }
    /// Sets the status word of a stack that keeps its registers: the image holds them in stack order, so they turn
    /// with the top.
    pub(super) fn turn_to_fsw(&mut self, value: u16) {
        let by = (usize::from(value >> 11 & 7) + 8 - self.top()) % 8;
        self.fxsave[32..160].rotate_left(16 * by);
        self.set_fsw(value);
    }
    /// Any MMX instruction but EMMS sets the stack's top to 0 and all registers to not empty (SDM volume 1, 9.5.1).
    pub(super) fn enter_mmx(&mut self) {
        self.turn_to_fsw(self.fsw() & !(7 << 11));
        self.fxsave[4] = 0xff;
    }
    /// Sets the x87 status word as it is.
    pub(super) fn set_fsw(&mut self, value: u16) {
        self.set_word(2, value);
    }
    /// Makes the error summary say what flags and masks say.
    pub(super) fn update_summary(&mut self) {
        let fsw = self.fsw() & !fsw::SUMMARY;
        self.set_fsw(if self.x87_pending() { fsw | fsw::SUMMARY } else { fsw });
    }
    /// Whether an x87 exception waits for the next waiting instruction.
    pub(super) fn x87_pending(&self) -> bool {
        self.fsw() & !self.fcw() & fsw::FLAGS != 0
    }
    /// Takes a pending exception away, so that the host's unit does not raise it; what is returned goes back into the
    /// status word.
    pub(super) fn take_pending(&mut self) -> u16 {
        let bits = if self.x87_pending() { fsw::FLAGS | fsw::SUMMARY } else { fsw::SUMMARY };
        let taken = if self.x87_pending() { self.fsw() & bits } else { 0 };
        self.set_fsw(self.fsw() & !bits);
        taken
    }
    /// Number of the register on the top of the stack.
    pub(super) fn top(&self) -> usize {
        usize::from(self.fsw() >> 11 & 7)
    }
    /// Opcode, instruction pointer and data pointer of the last x87 instruction: bytes 6 to 23 of the image.
    pub(super) fn last_x87(&self) -> [u8; 18] {
        self.fxsave[6..24].try_into().expect("18 bytes")
    }
    /// Puts the pointers to the last x87 instruction back.
    pub(super) fn set_last_x87(&mut self, saved: [u8; 18]) {
        self.fxsave[6..24].copy_from_slice(&saved);
    }
    /// Opcode of the last x87 instruction.
    pub(super) fn fop(&self) -> u16 {
        self.word(6)
    }
    /// Sets the opcode of the last x87 instruction.
    pub(super) fn set_fop(&mut self, value: u16) {
        self.set_word(6, value & 0x7ff);
    }
    /// Instruction pointer of the last x87 instruction.
    pub(super) fn fip(&self) -> u64 {
        u64::from_le_bytes(self.fxsave[8..16].try_into().expect("eight bytes"))
    }
    /// Sets the instruction pointer of the last x87 instruction.
    pub(super) fn set_fip(&mut self, value: u64) {
        self.fxsave[8..16].copy_from_slice(&value.to_le_bytes());
    }
    /// Data pointer of the last x87 instruction.
    pub(super) fn fdp(&self) -> u64 {
        u64::from_le_bytes(self.fxsave[16..24].try_into().expect("eight bytes"))
    }
    /// Sets the data pointer of the last x87 instruction.
    pub(super) fn set_fdp(&mut self, value: u64) {
        self.fxsave[16..24].copy_from_slice(&value.to_le_bytes());
    }
    /// MXCSR.
    pub(super) fn mxcsr(&self) -> u32 {
        u32::from_le_bytes(self.fxsave[24..28].try_into().expect("four bytes"))
    }
    /// Sets MXCSR.
    pub(super) fn set_mxcsr(&mut self, value: u32) {
        self.fxsave[24..28].copy_from_slice(&value.to_le_bytes());
    }

    /// The x87 pointers and words as after FNINIT; the contents of the registers stay.
    pub(super) fn init_x87(&mut self) {
        self.set_fcw(FCW_INIT);
        self.turn_to_fsw(0);
        self.fxsave[4] = 0;
        self.set_last_x87([0; 18]);
    }

    /// A YMM register.
    pub(super) fn ymm(&self, i: usize) -> [u8; 32] {
        let mut value = [0; 32];
        value[..16].copy_from_slice(&self.fxsave[160 + 16 * i..][..16]);
        for (part, word) in value[16..].chunks_exact_mut(8).zip(self.ymm_high[i]) {
            part.copy_from_slice(&word.to_le_bytes());
        }
        value
    }
    /// Sets a whole YMM register.
    pub(super) fn set_ymm(&mut self, i: usize, value: &[u8; 32]) {
        self.fxsave[160 + 16 * i..][..16].copy_from_slice(&value[..16]);
        for (word, part) in self.ymm_high[i].iter_mut().zip(value[16..].chunks_exact(8)) {
            *word = u64::from_le_bytes(part.try_into().expect("eight bytes"));
        }
    }
}
