//! Real guests under the `ruse` program, judged by what they print and how they end.

mod balloon;
mod bare;
mod clock;
mod console;
mod disk;
mod image;
mod linux;
mod log;
mod machine;
mod manage;
mod memory;
mod microvm;
mod modes;
mod net;
mod pci;
mod share;
mod terminal;
mod vhost_user;
mod vmlinux;
mod vsock;
mod watchdog;
