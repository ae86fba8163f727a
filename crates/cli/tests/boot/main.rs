//! Real guests under the `ruse` program, judged by what they print and how they end.

mod bare;
mod clock;
mod disk;
mod linux;
mod log;
mod machine;
mod modes;
mod pci;
mod terminal;
mod vmlinux;
