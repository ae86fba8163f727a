//! What an executor is given, and what it answers.

use iced_x86::{Decoder, DecoderOptions, Instruction};

use ruse_random::Random;

/// Where the data lies, in the guest and on the host. The pages around it are not mapped.
pub const WINDOW: u64 = 0x1000_0000;
/// Bytes of data.
pub const WINDOW_BYTES: usize = 8192;
/// Where the code lies. The pages around it are not mapped.
pub const CODE: u64 = 0x2b60_0000;
/// Bytes for code.
pub const CODE_BYTES: usize = 8192;
/// Most instructions of a case.
pub const MOST: usize = 96;
/// Base of GS.
pub const GS_BASE: u64 = 0x60;
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
    /// The code with UD2 at its end, and NOPs where instructions do not follow each other.
    pub code: [u8; CODE_BYTES],
    /// Offsets of the instructions in the code, and of its end (which may lie behind the code's pages).
    pub starts: [u16; MOST + 1],
    /// How many instructions.
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
                0 => f64::from(random.word() as i32 >> 8).to_bits(),
                1 => (u64::from((random.word() as i16 as f32).to_bits()) << 32) | random.word() & 0xff,
                2 => random.below(300),
                _ => random.word(),
            };
            part.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Address of the first instruction.
    pub fn entry(&self) -> u64 {
        CODE + u64::from(self.starts[0])
    }

    /// Address behind the last instruction.
    pub fn end(&self) -> u64 {
        CODE + u64::from(self.starts[self.count])
    }

    /// Which instruction begins at an address; [`Case::count`] at the end.
    pub fn index_of(&self, rip: u64) -> Option<usize> {
        let offset = u16::try_from(rip.checked_sub(CODE)?).ok()?;
        self.starts[..=self.count].binary_search(&offset).ok()
    }

    /// An instruction by number, decoded.
    pub fn instruction(&self, n: usize) -> Instruction {
        let at = usize::from(self.starts[n]);
        let bytes = self.code.get(at..).unwrap_or_default();
        Decoder::with_ip(64, bytes, CODE + at as u64, DecoderOptions::NONE).decode()
    }

    /// The instructions as text.
    pub fn listing(&self) -> String {
        let mut text = String::new();
        for n in 0..self.count {
            let (i, at) = (self.instruction(n), usize::from(self.starts[n]));
            let bytes = self.code.get(at..at + i.len().max(1)).unwrap_or_default();
            let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            text += &format!("  {:x} {hex:32} {:?} {i}\n", i.ip(), i.code());
        }
        text
    }

    /// Name of the instruction at which the earlier of two outcomes stopped; of the last one if neither did.
    pub fn instruction_at(&self, a: &Outcome, b: &Outcome) -> String {
        let index = |o: &Outcome| self.index_of(o.state.rip).unwrap_or(self.count);
        let n = index(a).min(index(b)).min(self.count - 1);
        format!("{:?}", self.instruction(n).code())
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
    /// [`digest`] of the code.
    pub code: u64,
}

impl Outcome {
    /// Nothing yet.
    pub const EMPTY: Self =
        Self { state: State::ZERO, vector: DIED, error: 0, address: 0, window: [0; WINDOW_BYTES], code: 0 };
}

/// A number that tells different contents apart.
pub fn digest(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
    words.fold(0, |sum: u64, word| (sum.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// Runs cases.
pub trait Executor {
    /// For messages.
    fn name(&self) -> &'static str;
    /// Whether flags that no continuation reads may be anything after a fault.
    fn forgets_dead_flags(&self) -> bool {
        false
    }
    /// Runs each of the cases from its inputs.
    fn run(&mut self, cases: &[Case]) -> Vec<Outcome>;
}
