//! Faults in the middle of computations, whose handlers look at all registers, change some, and go on; single steps;
//! and a timer that interrupts all of it and must not show.

mod code;
mod handlers;

use std::arch::naked_asm;
use std::mem::offset_of;

use ruse_random::Random;

use crate::memory::{Mapping, NONE, PAGE, R, RW, RX};

/// Where the code is. Addresses are part of what is found, so that they are the same everywhere.
const CODE: u64 = 0x20_0000_0000;
/// Bytes for code.
const CODE_BYTES: usize = 4 * PAGE;
/// Where the data is: pages to read and write, ...
const DATA: u64 = 0x20_1000_0000;
/// ... one that the handlers make readable and writable when it is missed, ...
const COMES_AND_GOES: u64 = DATA + PAGE as u64;
/// ... one to read, ...
const READ_ONLY: u64 = DATA + 2 * PAGE as u64;
/// ... one without access, and nothing behind it.
const NO_ACCESS: u64 = DATA + 3 * PAGE as u64;
const UNMAPPED: u64 = DATA + 4 * PAGE as u64;

/// What the code works with, at the beginning of the data.
#[repr(C)]
struct Block {
    /// All registers but RSP and R15, which is the address of this.
    gpr: [u64; 14],
    /// Rounds to go.
    rounds: u64,
    /// MXCSR with all exceptions masked, and without the one of division by zero.
    mxcsr: [u32; 2],
    /// The same for the x87 unit.
    fcw: [u16; 2],
}

const GPR: usize = offset_of!(Block, gpr);
const ROUNDS: usize = offset_of!(Block, rounds);
const MXCSR: usize = offset_of!(Block, mxcsr);
const FCW: usize = offset_of!(Block, fcw);

/// What happens at an address at which the code faults.
struct Site {
    /// The address that the handler is told.
    at: u64,
    then: Then,
}

/// How it goes on.
#[derive(Clone, Copy)]
enum Then {
    /// At this address.
    At(u64),
    /// At this address, by so many single steps, and with the page that comes and goes gone.
    Steps(u64, u64),
    /// At the same address, with the page that comes and goes there.
    Again,
    /// Where the function that could not be called returns to.
    Return,
}

/// Runs random code that faults.
pub fn run(random: &mut Random) -> u64 {
    let text = Mapping::at(CODE as usize, CODE_BYTES, RW);
    let data = Mapping::at(DATA as usize, 4 * PAGE, RW);
    for (page, protection) in [(COMES_AND_GOES, NONE), (READ_ONLY, R), (NO_ACCESS, NONE)] {
        data.protect((page - DATA) as usize, PAGE, protection);
    }
    let (bytes, sites) = code::generate(random);
    assert!(bytes.len() <= CODE_BYTES);
    let block = Block {
        gpr: std::array::from_fn(|_| random.word()),
        rounds: 20 + random.below(100),
        mxcsr: [0x1f80, 0x1d80],
        fcw: [0x37f, 0x37b],
    };
    // SAFETY: both mappings are this function's and large enough.
    unsafe {
        text.start().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        data.start().cast::<Block>().write(block);
    }
    text.protect(0, CODE_BYTES, RX);
    handlers::with(sites, random.below(2000) as i64, || {
        // SAFETY: the code is there, with its data and handlers for its faults.
        unsafe { enter(DATA, CODE) };
    })
}

/// Calls the code with the registers of the block, and puts them back there.
#[unsafe(naked)]
unsafe extern "sysv64" fn enter(_block: u64, _code: u64) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov r15, rdi", "push rsi",
        "mov rax, [r15 + {gpr}]", "mov rcx, [r15 + {gpr} + 8]", "mov rdx, [r15 + {gpr} + 16]",
        "mov rbx, [r15 + {gpr} + 24]", "mov rbp, [r15 + {gpr} + 32]", "mov rsi, [r15 + {gpr} + 40]",
        "mov rdi, [r15 + {gpr} + 48]", "mov r8, [r15 + {gpr} + 56]", "mov r9, [r15 + {gpr} + 64]",
        "mov r10, [r15 + {gpr} + 72]", "mov r11, [r15 + {gpr} + 80]", "mov r12, [r15 + {gpr} + 88]",
        "mov r13, [r15 + {gpr} + 96]", "mov r14, [r15 + {gpr} + 104]",
        "call [rsp]",
        "pop rax", "cld",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        gpr = const GPR,
    )
}
