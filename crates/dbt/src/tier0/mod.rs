//! Tier 0: a complete, plain executor of single instructions. It runs 16-bit and rare code, steps, is the oracle of the
//! translator, and finishes instructions that hardware assistance gave up on.

pub mod operand;

pub use operand::Insn;
