//! Front ends: decode and lift one guest instruction set each.

pub mod x86_64;
