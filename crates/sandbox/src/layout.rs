//! What the monitor and a sandbox share, and where it lies.
//!
//! Below the end of user space a sandbox has nothing of its own but a few pages at a random address:
//!
//! | bytes | what | for the sandbox |
//! | --- | --- | --- |
//! | [`CODE_SIZE`] | the stub's code (`stub.s`) | executable |
//! | [`ORDERS_SIZE`] | [`Orders`]: system calls that it is to make | read-only |
//! | [`REPORT_SIZE`] | [`Report`], and the signal stack with the frame of the last trap | writable |
//!
//! User code may find the last part and write to it: what it holds is no more than that code's own word.

use std::sync::atomic::AtomicU32;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Bytes of the stub's code.
pub const CODE_SIZE: u64 = PAGE;
/// Bytes of [`Orders`].
pub const ORDERS_SIZE: u64 = 2 * PAGE;
/// Bytes of [`Report`] and the signal stack. A frame with AVX-512 takes 3.6 KiB.
pub const REPORT_SIZE: u64 = 4 * PAGE;
/// Bytes of all of it.
pub const STUB_SIZE: u64 = CODE_SIZE + ORDERS_SIZE + REPORT_SIZE;
/// First address behind user space (with four levels of page tables).
pub const USER_END: u64 = 0x7fff_ffff_f000;
/// User code below this address cannot be mapped (Linux's default `vm.mmap_min_addr`).
pub const USER_START: u64 = 0x1_0000;

/// A system call that the sandbox is to make.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Call {
    /// Number.
    pub number: u64,
    /// RDI, RSI, RDX, R10, R8, R9.
    pub args: [u64; 6],
}

impl Call {
    /// A call; arguments that are missing are 0.
    pub fn new<const N: usize>(number: libc::c_long, given: [u64; N]) -> Self {
        let mut args = [0; 6];
        args[..N].copy_from_slice(&given);
        Self { number: number as u64, args }
    }
}

/// Calls of an order at most.
pub const CALLS: usize = 96;
/// Bytes of structures that calls point to.
pub const DATA_SIZE: usize = 2048;

/// What the sandbox is to do. Written by the monitor, read by the stub.
#[repr(C)]
pub struct Orders {
    /// Counts orders; the stub's first thread waits for it.
    pub number: AtomicU32,
    /// How many [`Orders::calls`] there are.
    pub count: u32,
    /// Process of the monitor.
    pub parent: u32,
    /// System calls of the stub's first thread. Those behind a clone are made by the new thread.
    pub calls: [Call; CALLS],
    /// Structures that the calls point to.
    pub data: [u8; DATA_SIZE],
}

/// What the handler of traps and the monitor tell each other.
#[repr(C)]
pub struct Report {
    /// Base of FS with which user code goes on.
    pub fs_base: u64,
    /// Base of GS with which user code goes on.
    pub gs_base: u64,
    /// Where the stack pointer is to be for the return from the signal.
    pub frame: u64,
    /// Flags that a return from a signal does not set: it leaves those of its caller.
    pub flags: u64,
    /// The thread of user code.
    pub thread: u32,
    /// Number of the last order that was carried out.
    pub done: AtomicU32,
}

/// Offset of the signal stack behind the beginning of [`Report`].
pub const STACK_OFFSET: u64 = 64;

const _: () = assert!(size_of::<Orders>() as u64 <= ORDERS_SIZE);
const _: () = assert!(size_of::<Report>() as u64 <= STACK_OFFSET);
