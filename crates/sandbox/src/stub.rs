//! The code that a sandbox runs beside user code, and the program file that it is started from.
//!
//! One thread makes the system calls that the monitor orders, mostly those that change mappings. It has no stack and reads
//! only [`Orders`], which user code cannot write, so that nothing that user code does leads it elsewhere. The other thread
//! runs user code. Each of its traps is a signal: the handler stops in a system call that the kernel tells the monitor
//! about (seccomp's user notification), and returns from the signal with the registers that the monitor has left in the
//! frame. While the monitor has not answered, the thread cannot run. User code that calls the stop itself has stopped,
//! too, and what its frame holds is no more than its own word.

use std::{arch::global_asm, mem::offset_of};

use crate::layout::{CODE_SIZE, Call, ORDERS_SIZE, Orders, PAGE, Report};

/// Number of the call by which the handler stops until the monitor answers. No system call of Linux has it.
pub const STOP: u32 = 0x7275;

global_asm!(
    ".pushsection .rodata.ruse_sandbox_stub, \"a\", @progbits",
    include_str!("stub.s"),
    ".popsection",
    code_size = const CODE_SIZE,
    orders_size = const ORDERS_SIZE,
    number = const offset_of!(Orders, number),
    count = const offset_of!(Orders, count),
    parent = const offset_of!(Orders, parent),
    calls = const offset_of!(Orders, calls),
    args = const offset_of!(Call, args),
    call_size = const size_of::<Call>(),
    done = const offset_of!(Report, done),
    fs_base = const offset_of!(Report, fs_base),
    gs_base = const offset_of!(Report, gs_base),
    frame = const offset_of!(Report, frame),
    flags = const offset_of!(Report, flags),
    read = const libc::PROT_READ,
    shared_fixed = const libc::MAP_SHARED | libc::MAP_FIXED,
    mmap = const libc::SYS_mmap,
    futex = const libc::SYS_futex,
    futex_wait = const libc::FUTEX_WAIT,
    futex_wake = const libc::FUTEX_WAKE,
    clone = const libc::SYS_clone,
    ioctl = const libc::SYS_ioctl,
    exit_group = const libc::SYS_exit_group,
    rt_sigreturn = const libc::SYS_rt_sigreturn,
    prctl = const libc::SYS_prctl,
    set_death_signal = const libc::PR_SET_PDEATHSIG,
    kill = const libc::SIGKILL,
    getppid = const libc::SYS_getppid,
    stop = const STOP,
);

unsafe extern "C" {
    static ruse_stub_start: [u8; 0];
    static ruse_stub_trap: [u8; 0];
    static ruse_stub_stop: [u8; 0];
    static ruse_stub_return: [u8; 0];
    static ruse_stub_end: [u8; 0];
}

/// Addresses in a stub that lies at some place.
#[derive(Clone, Copy, Debug)]
pub struct Stub {
    /// Where it lies.
    pub base: u64,
}

impl Stub {
    /// The signal handler.
    pub fn trap(self) -> u64 {
        self.address(&raw const ruse_stub_trap)
    }
    /// Behind the system call by which the handler stops.
    pub fn stop(self) -> u64 {
        self.address(&raw const ruse_stub_stop)
    }
    /// Behind the system call that goes back to user code.
    pub fn sigreturn(self) -> u64 {
        self.address(&raw const ruse_stub_return)
    }
    /// [`Orders`].
    pub fn orders(self) -> u64 {
        self.base + CODE_SIZE
    }
    /// [`Report`].
    pub fn report(self) -> u64 {
        self.orders() + ORDERS_SIZE
    }
    /// A field of [`Orders::data`].
    pub fn data(self, offset: usize) -> u64 {
        self.orders() + (offset_of!(Orders, data) + offset) as u64
    }

    fn address(self, at: *const [u8; 0]) -> u64 {
        self.base + (at as u64 - start())
    }

    /// A program file (ELF, statically linked) that begins at the stub: one page for its headers, one for the code.
    pub fn program(self) -> Vec<u8> {
        const HEADERS: usize = 64 + 56;
        let mut file = Vec::with_capacity(2 * PAGE as usize);
        file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        // ET_EXEC, EM_X86_64, EV_CURRENT.
        file.extend([2u16, 62].iter().flat_map(|n| n.to_le_bytes()));
        file.extend(1u32.to_le_bytes());
        file.extend([self.base, 64, 0].iter().flat_map(|n| n.to_le_bytes()));
        file.extend(0u32.to_le_bytes());
        file.extend([64u16, 56, 1, 0, 0, 0].iter().flat_map(|n| n.to_le_bytes()));
        // PT_LOAD, PF_R | PF_X.
        file.extend([1u32, 5].iter().flat_map(|n| n.to_le_bytes()));
        let part = [PAGE, self.base, self.base, code().len() as u64, code().len() as u64, PAGE];
        file.extend(part.iter().flat_map(|n| n.to_le_bytes()));
        debug_assert_eq!(file.len(), HEADERS);
        file.resize(PAGE as usize, 0);
        file.extend(code());
        file
    }
}

fn start() -> u64 {
    &raw const ruse_stub_start as u64
}

fn code() -> &'static [u8] {
    let end = &raw const ruse_stub_end as u64;
    // SAFETY: both labels are in one section of this program, the second behind the first.
    unsafe { std::slice::from_raw_parts(start() as *const u8, (end - start()) as usize) }
}
