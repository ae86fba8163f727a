//! Generated user code with its inputs, and the host's CPU as what says how it should run.
//!
//! The differential tests of the translator compare with it instruction by instruction; the stress program runs the same
//! code as a process of a guest.

pub mod case;
pub mod compare;
pub mod flow;
pub mod generate;
mod items;
pub mod native;
mod operands;
pub mod pools;
pub mod program;
mod sweeps;
