//! The `ruse` program.

fn main() {}
