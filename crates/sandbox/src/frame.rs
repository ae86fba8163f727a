//! The signal frame of a trap: user code's registers (`struct rt_sigframe` of Linux on x86-64).

use std::ptr::NonNull;

use crate::{
    filter::X86_64,
    layout::{REPORT_SIZE, STACK_OFFSET},
};

/// General registers and flags of user code, in the order of the kernel's `struct sigcontext_64`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Registers {
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub rdx: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rsp: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// Why user code stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// SYSCALL; RIP is behind it, RCX and R11 are what the instruction left.
    SystemCall,
    /// Another way into the kernel, INT 80h; RIP is behind it.
    OldSystemCall,
    /// A page fault at an address, with its error code (SDM volume 3, 4.7).
    PageFault {
        /// Linear address.
        address: u64,
        /// Error code.
        error: u32,
    },
    /// Another exception, by its vector. RIP is at the instruction for faults, behind it for traps.
    Exception(u8),
    /// The monitor asked for it.
    Kicked,
}

/// Bytes of the state component that follows the legacy area: the XSAVE header (SDM volume 1, 13.4.2).
const HEADER: usize = 512;
/// Where the upper halves of YMM0 to YMM15 lie (SDM volume 1, 13.4.2; CPUID says the same on all CPUs).
const YMM: usize = 576;
/// In the legacy area: where the kernel says what it saved (`struct _fpx_sw_bytes`).
const SOFTWARE: usize = 464;
const MAGIC: u32 = 0x4650_5853;

const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;

/// In place of the signal's number: the frame is not a new one.
const ANSWERED: i32 = 0;
/// `si_code` of signals for which the kernel has no other.
const SI_KERNEL: i32 = 0x80;

/// Selectors of CS and SS in 64-bit user code of Linux.
const CS: u16 = 0x33;
const SS: u16 = 0x2b;

/// Offsets in the frame.
const SIGNAL_STACK: usize = 8 + 16;
const REGISTERS: usize = 8 + 40;
const SELECTORS: usize = REGISTERS + 144;
const SIGNAL_MASK: usize = REGISTERS + 256;
const TRAP_NUMBER: usize = REGISTERS + 160;
const ERROR: usize = REGISTERS + 152;
const ADDRESS: usize = REGISTERS + 176;
const FPU: usize = REGISTERS + 184;
const INFO: usize = 8 + 304;
const FRAME_SIZE: usize = INFO + 128;

/// A frame that lies where it should. User code can write to it while it runs: it says what user code's registers are, and
/// nothing else of it is relied on.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// The frame, in the monitor's mapping.
    at: *mut u8,
    /// The XSAVE area.
    fpu: *mut u8,
    /// The frame's address in the sandbox.
    address: u64,
}

// SAFETY: a description of memory that nobody owns alone.
unsafe impl Send for Frame {}

impl Frame {
    /// Before the first trap: nothing but zeroes.
    pub fn none(mapped: NonNull<u8>) -> Self {
        let at = mapped.as_ptr().wrapping_add(STACK_OFFSET as usize);
        Self { at, fpu: at, address: 0 }
    }

    /// The frame at `address` in a sandbox whose report begins at `report`, mapped here at `mapped`. `None` if it is not
    /// within the signal stack.
    ///
    /// # Safety
    /// [`REPORT_SIZE`] bytes are mapped at `mapped` as long as the frame is used.
    pub unsafe fn find(mapped: NonNull<u8>, report: u64, address: u64) -> Option<Self> {
        let inside = |address: u64, size: usize| {
            let offset = address.checked_sub(report)?;
            (offset >= STACK_OFFSET && offset.checked_add(size as u64)? <= REPORT_SIZE && offset % 8 == 0)
                .then_some(offset as usize)
        };
        let mapped = mapped.as_ptr();
        let at = mapped.wrapping_add(inside(address, FRAME_SIZE)?);
        let mut frame = Self { at, fpu: at, address };
        let fpu = inside(frame.read(FPU), YMM + 256)?;
        frame.fpu = mapped.wrapping_add(fpu);
        let magic: u32 = Self::read_at(frame.fpu, SOFTWARE);
        (magic == MAGIC).then_some(frame)
    }

    /// The state components that the kernel saves in the frame, as XCR0 has them.
    pub fn components(&self) -> u64 {
        Self::read_at(self.fpu, SOFTWARE + 8)
    }

    /// Why user code stopped. `None` if it was nothing that user code causes.
    pub fn trap(&self) -> Option<Trap> {
        let signal: i32 = self.read(INFO);
        let code: i32 = self.read(INFO + 8);
        match signal {
            libc::SIGSYS => {
                let architecture: u32 = self.read(INFO + 28);
                Some(if architecture == X86_64 { Trap::SystemCall } else { Trap::OldSystemCall })
            }
            crate::KICK => Some(Trap::Kicked),
            // Of the kernel's own, without an exception before.
            libc::SIGILL if code == SI_KERNEL => Some(Trap::Exception(6)),
            // From the kernel only: not sent by another process.
            _ if code > 0 => {
                let number: u64 = self.read(TRAP_NUMBER);
                Some(match number {
                    14 => {
                        Trap::PageFault { address: self.read(ADDRESS), error: self.read::<u64>(ERROR) as u32 }
                    }
                    n => Trap::Exception(n as u8),
                })
            }
            _ => None,
        }
    }

    /// User code's registers.
    pub fn registers(&self) -> Registers {
        self.read(REGISTERS)
    }
    /// Sets user code's registers.
    pub fn set_registers(&mut self, registers: &Registers) {
        self.write(REGISTERS, *registers);
    }

    /// Selector of CS; not that of 64-bit code if user code has jumped to another.
    pub fn code_selector(&self) -> u16 {
        self.read(SELECTORS)
    }

    /// The frame's address in the sandbox.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Whether [`Frame::prepare`] has been called since the trap.
    pub fn is_answered(&self) -> bool {
        self.read::<i32>(INFO) == ANSWERED
    }

    /// Makes everything of the frame beside the registers what it is in 64-bit code that has changed nothing, and marks it as
    /// answered; returns the address that the stack pointer has to have for the return. `report` is where the report begins in
    /// the sandbox.
    pub fn prepare(&mut self, report: u64) -> u64 {
        self.write(INFO, ANSWERED);
        self.write(SELECTORS, [CS, 0, 0, SS]);
        self.write(SIGNAL_MASK, 0u64);
        self.write(SIGNAL_STACK, [report + STACK_OFFSET, 0, REPORT_SIZE - STACK_OFFSET]);
        self.address + 8
    }

    /// Copies x87 and SSE registers (the first 416 bytes of an FXSAVE image) and the upper halves of the YMM registers.
    pub fn load_fpu(&self, fxsave: &mut [u8; 512], ymm_high: &mut [[u64; 2]; 16]) {
        let present: u64 = Self::read_at(self.fpu, HEADER);
        let saved: [u8; 416] = Self::read_at(self.fpu, 0);
        fxsave[..416].copy_from_slice(&saved);
        // MXCSR's reserved bits, which user code could have set in a frame of its own.
        fxsave[26..28].fill(0);
        if present & X87 == 0 {
            // As FNINIT leaves them; MXCSR and its mask are between.
            fxsave[..24].copy_from_slice(&INITIAL_X87);
            fxsave[32..160].fill(0);
        }
        if present & SSE == 0 {
            fxsave[160..416].fill(0);
        }
        *ymm_high = if present & AVX != 0 { Self::read_at(self.fpu, YMM) } else { [[0; 2]; 16] };
    }

    /// Sets x87, SSE and AVX registers; all others become what they are after reset.
    pub fn store_fpu(&mut self, fxsave: &[u8; 512], ymm_high: &[[u64; 2]; 16]) {
        let avx = self.components() & AVX;
        Self::write_at::<[u8; 416]>(self.fpu, 0, *fxsave.first_chunk().expect("416 of 512 bytes"));
        Self::write_at(self.fpu, HEADER, X87 | SSE | avx);
        if avx != 0 {
            Self::write_at(self.fpu, YMM, *ymm_high);
        }
    }

    fn read<T: Copy>(&self, offset: usize) -> T {
        Self::read_at(self.at, offset)
    }
    fn write<T: Copy>(&mut self, offset: usize, value: T) {
        Self::write_at(self.at, offset, value);
    }
    fn read_at<T: Copy>(base: *const u8, offset: usize) -> T {
        // SAFETY: `find` has made sure that all offsets used here lie in the mapping, and only plain integers are read.
        // The sandbox is stopped; if it writes nevertheless, the value is arbitrary, which it may be anyway.
        unsafe { base.add(offset).cast::<T>().read_unaligned() }
    }
    fn write_at<T: Copy>(base: *mut u8, offset: usize, value: T) {
        // SAFETY: as in `read_at`.
        unsafe { base.add(offset).cast::<T>().write_unaligned(value) }
    }
}

/// FCW 37Fh, everything else 0 (SDM volume 1, 13.6).
const INITIAL_X87: [u8; 24] = {
    let mut bytes = [0; 24];
    (bytes[0], bytes[1]) = (0x7f, 0x03);
    bytes
};
