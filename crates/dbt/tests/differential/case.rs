//! What an executor is given, and what it answers.

use iced_x86::{Decoder, DecoderOptions};

use crate::random::Random;

/// Where the data lies, in the guest and on the host. The pages around it are not mapped.
pub const WINDOW: u64 = 0x1000_0000;
/// Bytes of data.
pub const WINDOW_BYTES: usize = 8192;
/// Where the code lies.
pub const CODE: u64 = 0x2b60_0000;
/// Each instruction begins at a multiple of this.
pub const SLOT: usize = 16;
/// Most instructions of a case.
pub const MOST: usize = 8;
/// Vector that stands for the death of the executor.
pub const DIED: u64 = 0x1000;
/// No exception.
pub const NONE: u64 = u64::MAX;

/// Registers.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// XSAVE image in the standard format with x87, SSE and AVX.
    pub fpu: [u8; 832],
    /// General registers in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub flags: u64,
}

impl State {
    /// All zero.
    pub const ZERO: Self = Self { fpu: [0; 832], gpr: [0; 16], rip: 0, flags: 0 };
}

/// A sequence of instructions with its inputs.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Case {
    /// What the generator began with.
    pub seed: u64,
    /// Registers at the start.
    pub state: State,
    /// The instructions, each at a multiple of [`SLOT`], with NOPs between.
    pub code: [u8; SLOT * MOST],
    /// How many.
    pub count: usize,
    /// Flags that are undefined before each of them, and at the end.
    pub undefined: [u64; MOST + 1],
}

impl Case {
    /// The data at the start.
    pub fn fill(&self, window: &mut [u8]) {
        let mut random = Random::new(self.seed ^ 0x5555);
        for (n, part) in window.chunks_exact_mut(8).enumerate() {
            let value = match n % 7 {
                0 => f64::from(random.next() as i32 >> 8).to_bits(),
                1 => (u64::from((random.next() as i16 as f32).to_bits()) << 32) | random.next() & 0xff,
                2 => random.below(300),
                _ => random.next(),
            };
            part.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Address behind the last instruction.
    pub fn end(&self) -> u64 {
        CODE + (SLOT * self.count) as u64
    }

    /// The instructions as text.
    pub fn listing(&self) -> String {
        let mut text = String::new();
        for n in 0..self.count {
            let (at, bytes) = (CODE + (n * SLOT) as u64, &self.code[n * SLOT..(n + 1) * SLOT]);
            let i = Decoder::with_ip(64, bytes, at, DecoderOptions::NONE).decode();
            let hex: String = bytes[..i.len().max(1)].iter().map(|b| format!("{b:02x}")).collect();
            text += &format!("  {at:x} {hex:32} {:?} {i}\n", i.code());
        }
        text
    }

    /// Name of the instruction at which the earlier of two outcomes stopped; of the last one if neither did.
    pub fn instruction_at(&self, a: &Outcome, b: &Outcome) -> String {
        let slot = |o: &Outcome| (o.state.rip.wrapping_sub(CODE) / SLOT as u64) as usize;
        let n = slot(a).min(slot(b)).min(self.count - 1);
        let bytes = &self.code[n * SLOT..(n + 1) * SLOT];
        let i = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
        format!("{:?}", i.code())
    }
}

/// What an executor made of a case.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Outcome {
    /// Registers at the end or at the fault.
    pub state: State,
    /// Vector of the exception that ended it, [`NONE`] or [`DIED`].
    pub vector: u64,
    /// Its error code.
    pub error: u64,
    /// Its address, for a page fault.
    pub address: u64,
    /// The data.
    pub window: [u8; WINDOW_BYTES],
}

impl Outcome {
    /// Nothing yet.
    pub const EMPTY: Self =
        Self { state: State::ZERO, vector: DIED, error: 0, address: 0, window: [0; WINDOW_BYTES] };
}

/// Runs cases.
pub trait Executor {
    /// For messages.
    fn name(&self) -> &'static str;
    /// Runs each of the cases from its inputs.
    fn run(&mut self, cases: &[Case]) -> Vec<Outcome>;
}
