//! The machine side of the native lane: stubs of one instruction each, and the trampoline that loads the guest's
//! registers around them.

use std::{arch::naked_asm, collections::HashMap, io, mem::offset_of};

use crate::{code_memory::CodeMemory, cpu::FpuArea};

/// Bytes of code that a thread keeps.
const CODE_BYTES: usize = 256 << 10;
/// Stubs that a thread keeps.
const MOST_STUBS: usize = 8192;
/// Room in a stub: the longest instruction and RET.
const STUB: usize = 16;

/// Where the memory operand of a stub's instruction lies: above the return address.
pub(super) const OPERAND_FROM_RSP: u64 = 8;
/// XSAVE components that the lane loads and saves: x87, SSE, AVX.
const COMPONENTS: u64 = 7;

/// What goes into a stub and comes out of it, beside the vector registers.
#[repr(C, align(64))]
pub(super) struct Io {
    /// The memory operand.
    pub memory: [u8; 64],
    /// General registers in encoding order; RSP is not loaded.
    pub gpr: [u64; 16],
    /// Arithmetic flags.
    pub flags: u64,
    /// The host has XSAVE with AVX.
    xsave: u64,
}

impl Io {
    /// General registers and flags with an empty memory operand.
    pub fn new(gpr: [u64; 16], flags: u64) -> Self {
        let xsave = std::is_x86_feature_detected!("xsave") && std::is_x86_feature_detected!("avx");
        Self { memory: [0; 64], gpr, flags, xsave: u64::from(xsave) }
    }
}

/// An instruction with what running it takes.
#[derive(Clone, Copy)]
pub(super) struct Stub<M> {
    code: *const u8,
    /// What the owner of the stub wants to know of it.
    pub meta: M,
}

/// The stubs of one thread, by key.
pub(super) struct Stubs<M> {
    code: CodeMemory,
    known: HashMap<u128, Stub<M>>,
}

impl<M: Copy> Stubs<M> {
    /// No stubs.
    pub fn new() -> io::Result<Self> {
        Ok(Self { code: CodeMemory::new(CODE_BYTES)?, known: HashMap::new() })
    }

    /// The stub of a key, if it was made before.
    pub fn get(&self, key: u128) -> Option<Stub<M>> {
        self.known.get(&key).copied()
    }

    /// Makes a stub of one instruction; `None` if that is impossible. The instruction must be one that touches nothing
    /// but vector registers, general registers except RSP, arithmetic flags, and memory within [`Io::memory`].
    pub fn insert(&mut self, key: u128, instruction: &[u8], meta: M) -> Option<Stub<M>> {
        const RET: u8 = 0xc3;
        if instruction.len() >= STUB {
            return None;
        }
        if self.known.len() >= MOST_STUBS {
            self.known.clear();
            self.code.truncate(0);
        }
        let mut bytes = [RET; STUB];
        bytes[..instruction.len()].copy_from_slice(instruction);
        let stub = Stub { code: self.code.push(&bytes, STUB)?, meta };
        self.known.insert(key, stub);
        Some(stub)
    }

    /// Executes the stub's instruction between the registers in `io` and `fpu`. MXCSR must mask all exceptions and have
    /// no reserved bits, and no x87 exception may be pending.
    pub fn run(&self, stub: &Stub<M>, io: &mut Io, fpu: &mut FpuArea) {
        fpu.header = [COMPONENTS, 0, 0, 0, 0, 0, 0, 0];
        // SAFETY: both pointers lead to live, aligned, exclusively borrowed values of the layout that `enter` knows;
        // the stub lies in this thread's code memory, whose content is only replaced by `insert`.
        unsafe { enter(io, fpu, stub.code) }
    }
}

/// Loads the guest's registers, calls the stub, saves them. x87 control word and MXCSR of the host are kept; everything
/// else of the x87 and vector registers belongs to the callee by the ABI.
#[unsafe(naked)]
unsafe extern "sysv64" fn enter(io: *mut Io, fpu: *mut FpuArea, code: *const u8) {
    // The frame: memory operand (64 bytes), old RSP, fpu, io, code, MXCSR and FCW, scratch.
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov rax, rsp",
        "sub rsp, 192",
        "and rsp, -64",
        "mov [rsp + 64], rax", "mov [rsp + 72], rsi", "mov [rsp + 80], rdi", "mov [rsp + 88], rdx",
        "stmxcsr [rsp + 96]", "fnstcw [rsp + 100]",
        "movaps xmm0, [rdi]", "movaps [rsp], xmm0",
        "movaps xmm0, [rdi + 16]", "movaps [rsp + 16], xmm0",
        "movaps xmm0, [rdi + 32]", "movaps [rsp + 32], xmm0",
        "movaps xmm0, [rdi + 48]", "movaps [rsp + 48], xmm0",
        "mov eax, {components}", "xor edx, edx",
        "cmp qword ptr [rdi + {xsave}], 0", "je 2f",
        "xrstor64 [rsi]", "jmp 3f",
        "2:", "fxrstor64 [rsi]",
        "3:",
        "push qword ptr [rdi + {flags}]", "popfq",
        "mov rax, [rdi + {gpr}]", "mov rcx, [rdi + {gpr} + 8]", "mov rdx, [rdi + {gpr} + 16]",
        "mov rbx, [rdi + {gpr} + 24]", "mov rbp, [rdi + {gpr} + 40]", "mov rsi, [rdi + {gpr} + 48]",
        "mov r8, [rdi + {gpr} + 64]", "mov r9, [rdi + {gpr} + 72]", "mov r10, [rdi + {gpr} + 80]",
        "mov r11, [rdi + {gpr} + 88]", "mov r12, [rdi + {gpr} + 96]", "mov r13, [rdi + {gpr} + 104]",
        "mov r14, [rdi + {gpr} + 112]", "mov r15, [rdi + {gpr} + 120]", "mov rdi, [rdi + {gpr} + 56]",
        "call qword ptr [rsp + 88]",
        "mov [rsp + 104], rdi",
        "mov rdi, [rsp + 80]",
        "mov [rdi + {gpr}], rax", "mov [rdi + {gpr} + 8], rcx", "mov [rdi + {gpr} + 16], rdx",
        "mov [rdi + {gpr} + 24], rbx", "mov [rdi + {gpr} + 40], rbp", "mov [rdi + {gpr} + 48], rsi",
        "mov [rdi + {gpr} + 64], r8", "mov [rdi + {gpr} + 72], r9", "mov [rdi + {gpr} + 80], r10",
        "mov [rdi + {gpr} + 88], r11", "mov [rdi + {gpr} + 96], r12", "mov [rdi + {gpr} + 104], r13",
        "mov [rdi + {gpr} + 112], r14", "mov [rdi + {gpr} + 120], r15",
        "mov rax, [rsp + 104]", "mov [rdi + {gpr} + 56], rax",
        "pushfq", "pop qword ptr [rdi + {flags}]",
        "mov rsi, [rsp + 72]",
        "mov eax, {components}", "xor edx, edx",
        "cmp qword ptr [rdi + {xsave}], 0", "je 4f",
        "xsave64 [rsi]", "vzeroupper", "jmp 5f",
        "4:", "fxsave64 [rsi]",
        "5:",
        "movaps xmm0, [rsp]", "movaps [rdi], xmm0",
        "movaps xmm0, [rsp + 16]", "movaps [rdi + 16], xmm0",
        "movaps xmm0, [rsp + 32]", "movaps [rdi + 32], xmm0",
        "movaps xmm0, [rsp + 48]", "movaps [rdi + 48], xmm0",
        "fninit", "fldcw [rsp + 100]", "ldmxcsr [rsp + 96]",
        "mov rsp, [rsp + 64]",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        components = const COMPONENTS,
        gpr = const offset_of!(Io, gpr),
        flags = const offset_of!(Io, flags),
        xsave = const offset_of!(Io, xsave),
    )
}

/// Takes the x87 registers out of the host's unit into the first 160 bytes of an FXSAVE image, except the pointers to
/// the last instruction, and resets the unit.
pub(super) fn take_host_x87(fpu: &mut FpuArea) {
    #[repr(C, align(16))]
    struct Image([u8; 512]);
    let mut image = Image([0; 512]);
    // SAFETY: FXSAVE64 writes the 512 aligned bytes; FNINIT leaves the unit as the ABI wants it.
    unsafe {
        std::arch::asm!("fxsave64 [{at}]", "fninit", at = in(reg) &raw mut image.0,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _, options(nostack));
    }
    fpu.fxsave[..5].copy_from_slice(&image.0[..5]);
    fpu.fxsave[32..160].copy_from_slice(&image.0[32..160]);
}
