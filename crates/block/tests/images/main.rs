//! Images against QEMU's tools: what Ruse writes, they find right; what they write, Ruse reads.

mod kill;
mod qemu;
