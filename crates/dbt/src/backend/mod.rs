//! Back ends: make host code of regions, one host instruction set each.

pub mod x86_64;
