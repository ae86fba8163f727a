//! Code that all regions share: the way in and out of generated code, the call for an access that the TLB cannot serve.

use super::{
    asm::{
        Asm, Mem, cc,
        host::{GUEST_RSP, RSP, T0, T1},
    },
    block, exit,
};
use crate::{
    ir::ACCESS_SIZES,
    mmu::tlb::{Entry, JUMPS, Jump},
};

/// Addresses of the shared code.
#[derive(Clone, Copy, Debug, Default)]
pub struct Thunks {
    /// `extern "C" fn(code)`: runs generated code until it leaves. GS holds the vCPU block.
    pub enter: u64,
    /// Called; the link's number lies behind the call. Leaves with [`exit::LINK`].
    pub exit_link: u64,
    /// Called; the link's number lies behind the call. Goes to the linear address in T0 if the jump cache knows it,
    /// else leaves with [`exit::LINK`].
    pub lookup_link: u64,
    /// Called: leaves with [`exit::POLL`].
    pub exit_poll: u64,
    /// Called: leaves with [`exit::MISS`]; T0 holds the linear address.
    pub exit_miss: u64,
    /// Goes to the linear address in T0, to which the return at the low half of the address in T1 leads other than was
    /// foreseen, if the jump cache knows it, else leaves with [`exit::RETURN`].
    pub unforeseen_return: u64,
    /// Called when the host stack has no more room for return addresses: forgets them. Comes back with the stack as it
    /// is on entry.
    pub forget_returns: u64,
    /// Called with the linear address of an instruction in T0 and its length in T1, the flags in the block: tier 0
    /// executes it. Returns, or leaves with [`exit::AT`]. Destroys the flags.
    pub step: u64,
    /// Tier 0 executes the instruction at the linear address in T0, the flags in the block. Goes to the translated code to
    /// which that leads, or leaves with [`exit::AT`]; or leaves before, with [`exit::INTERPRET`].
    pub interpret: u64,
    /// As `interpret`, for a SYSCALL whose length is in T1.
    pub system_call: u64,
    /// As `system_call`, for a SYSRET.
    pub system_return: u64,
    /// Leaves with [`exit::FAULT`]; T0 holds the host address that faulted. Entered by the signal handler.
    pub exit_fault: u64,
    /// By index of [`ACCESS_SIZES`] and by whether it is a write. Called after a probe that missed: returns the host
    /// address in T0, or leaves with [`exit::FAULT`].
    pub slow_access: [[u64; 2]; ACCESS_SIZES.len()],
    /// Called with the linear address of a group of accesses in T0, its bytes and whether it is written (bit 16) in T1:
    /// returns its host address in T0, or 0 if it cannot be served as one. Destroys the flags.
    pub slow_group: u64,
    /// Called: loads the vector registers and MXCSR into the host's. Destroys the flags.
    pub load_vectors: u64,
    /// Called: loads the x87 registers into the host's unit. Destroys the flags.
    pub load_x87: u64,
}

/// Functions that generated code calls, by way of the thunks of the same names.
#[derive(Clone, Copy)]
pub struct Calls {
    /// Takes the vCPU block, linear address, size and kind, return address in the generated code. Returns the host
    /// address or 0.
    pub slow_access: unsafe extern "C" fn(u64, u64, u64, u64) -> u64,
    /// Takes the vCPU block, the linear address of a group, and size and kind. Returns its host address or 0.
    pub slow_group: unsafe extern "C" fn(u64, u64, u64) -> u64,
    /// Takes the vCPU block, the linear address of an instruction and its length. Returns 0 if generated code must be
    /// left.
    pub step: unsafe extern "C" fn(u64, u64, u64) -> u64,
    /// Without them, generated code is left for each such instruction.
    pub interpret: Option<Interpret>,
}

/// Functions that execute an instruction which may lead anywhere. Each takes the vCPU block and the linear address of the
/// instruction, and returns the host address where generated code goes on, or 0.
#[derive(Clone, Copy)]
pub struct Interpret {
    /// Any instruction.
    pub any: unsafe extern "C" fn(u64, u64) -> u64,
    /// SYSCALL; takes its length as well.
    pub system_call: unsafe extern "C" fn(u64, u64, u64) -> u64,
    /// SYSRET; takes its length as well.
    pub system_return: unsafe extern "C" fn(u64, u64, u64) -> u64,
}

/// Host registers that hold guest registers, with the guest register's index.
const PINNED: [(u8, usize); 13] = [
    (0, 0),
    (1, 1),
    (2, 2),
    (3, 3),
    (GUEST_RSP, 4),
    (5, 5),
    (6, 6),
    (7, 7),
    (8, 8),
    (9, 9),
    (10, 10),
    (11, 11),
    (12, 12),
];

/// Where a jump cache's entry has the address of host code.
pub(super) const JUMP_HOST: i32 = std::mem::offset_of!(Jump, host) as i32;

/// The guest's MXCSR in its FXSAVE image.
const MXCSR: Mem = Mem::Block(block::FPU + 24);
/// All but the sticky flags (SDM volume 1, 10.2.3).
const MXCSR_CONTROL: u32 = 0xffc0;
/// All exceptions masked, round to nearest.
const MXCSR_DEFAULT: u32 = 0x1f80;

/// Bytes of return addresses on the host's stack: as deep as programs go, and little of what a thread has.
const RETURNS: i32 = 64 << 10;

/// Registers that a function keeps for its caller (System V ABI), in push order.
const CALLEE_SAVED: [u8; 6] = [3, 5, 12, 13, 14, 15];

impl Thunks {
    /// Makes the shared code for the address `base`; returns the bytes. `avx`: the host has AVX.
    pub fn build(base: u64, calls: Calls, avx: bool) -> (Self, Vec<u8>) {
        let mut asm = Asm::new(base);
        let load = asm.here();
        load_vectors(&mut asm, avx);
        let store = asm.here();
        store_vectors(&mut asm, avx);
        let mut thunks = Self { load_vectors: load, ..Self::default() };
        let leave = asm.here();
        leave_code(&mut asm, store);
        thunks.exit_link = asm.here();
        pop(&mut asm, T1);
        asm.mem(&[], false, &[0x8b], T1, Mem::At(T1, 0));
        let unknown = asm.here();
        asm.store(block::EXIT_AUX, T1);
        exit_with(&mut asm, exit::LINK, leave);
        let unforeseen = asm.here();
        // The host's `ret` has taken the last word away, which says what is to be done when there are no more.
        asm.lea(RSP, RSP, -8);
        thunks.unforeseen_return = asm.here();
        asm.mem(&[], false, &[0x89], T1, block::RETURN_SITE); // mov [site], T1d
        let miss = probe_jumps(&mut asm);
        asm.jmp_mem(Mem::At(T1, JUMP_HOST));
        asm.bind(miss);
        exit_with(&mut asm, exit::RETURN, leave);
        thunks.forget_returns = asm.here();
        pop(&mut asm, T1);
        forget_returns(&mut asm);
        asm.regs(false, &[0xff], 4, T1); // jmp T1
        thunks.enter = asm.here();
        enter(&mut asm, unforeseen);
        thunks.exit_poll = asm.here();
        pop(&mut asm, T0);
        exit_with(&mut asm, exit::POLL, leave);
        thunks.exit_miss = asm.here();
        pop(&mut asm, T1);
        asm.store(block::EXIT_AUX, T1);
        exit_with(&mut asm, exit::MISS, leave);
        thunks.interpret = asm.here();
        match calls.interpret {
            Some(functions) => {
                interpret(&mut asm, functions.any as usize as u64, store, forget_returns);
                thunks.system_call = asm.here();
                let function = functions.system_call as usize as u64;
                interpret(&mut asm, function, store, |asm| keep_user_returns(asm, unforeseen));
                thunks.system_return = asm.here();
                let function = functions.system_return as usize as u64;
                interpret(&mut asm, function, store, |asm| asm.load(RSP, block::USER_RETURNS));
            }
            None => {
                exit_with(&mut asm, exit::INTERPRET, leave);
                (thunks.system_call, thunks.system_return) = (thunks.interpret, thunks.interpret);
            }
        }
        thunks.exit_fault = asm.here();
        // The flags may be alive in the host's.
        asm.bytes(&[0x9c]);
        asm.mem(&[], false, &[0x8f], 0, block::scratch(1));
        exit_with(&mut asm, exit::FAULT, leave);
        thunks.lookup_link = asm.here();
        lookup(&mut asm, unknown);
        let common = asm.here();
        slow_access(&mut asm, calls.slow_access as usize as u64, load, store);
        thunks.step = asm.here();
        step(&mut asm, calls.step as usize as u64, load, store);
        thunks.slow_group = asm.here();
        slow_group(&mut asm, calls.slow_group as usize as u64, load, store);
        for (size, thunks) in ACCESS_SIZES.into_iter().zip(&mut thunks.slow_access) {
            for write in [false, true] {
                thunks[usize::from(write)] = asm.here();
                // The probe left the address less the tag in T0, the entry's address in T1.
                asm.mem(&[], true, &[0x03], T0, Mem::At(T1, Entry::tag_offset(write)));
                asm.mov_imm(T1, u64::from(size) | u64::from(write) << 8);
                asm.jmp(common);
            }
        }
        thunks.load_x87 = asm.here();
        load_x87(&mut asm);
        (thunks, asm.code)
    }
}

fn push(asm: &mut Asm, reg: u8) {
    if reg >= 8 {
        asm.bytes(&[0x41]);
    }
    asm.bytes(&[0x50 | reg & 7]);
}

fn pop(asm: &mut Asm, reg: u8) {
    if reg >= 8 {
        asm.bytes(&[0x41]);
    }
    asm.bytes(&[0x58 | reg & 7]);
}

/// `add rsp, n`.
fn add_rsp(asm: &mut Asm, n: i8) {
    asm.bytes(&[0x48, 0x83, 0xc4, n as u8]);
}

/// `unforeseen` is where a return leads for which there was no call since.
fn enter(asm: &mut Asm, unforeseen: u64) {
    for reg in CALLEE_SAVED {
        push(asm, reg);
    }
    // Six registers and the return address: one word more aligns the stack for calls.
    add_rsp(asm, -8);
    asm.store(block::HOST_RSP, RSP);
    asm.lea(T0, RSP, -RETURNS);
    asm.store(block::STACK_LIMIT, T0);
    asm.mov_imm(T0, unforeseen);
    push(asm, T0);
    asm.store(block::USER_RETURNS, RSP);
    asm.store(block::scratch(7), 7);
    load_pinned(asm);
    asm.jmp_mem(block::scratch(7));
}

/// Stores the guest's state and returns to the caller of [`Thunks::enter`].
fn leave_code(asm: &mut Asm, store: u64) {
    for (host, guest) in PINNED {
        asm.store(block::gpr(guest), host);
    }
    when_resident(asm, store);
    return_to_caller(asm);
}

/// Calls `thunk` if the vector registers are in the host's.
fn when_resident(asm: &mut Asm, thunk: u64) {
    asm.cmp_imm32(block::VECTORS_RESIDENT, 0);
    let over = asm.jcc(cc::E, 0);
    asm.call(thunk);
    asm.bind(over);
}

fn return_to_caller(asm: &mut Asm) {
    asm.store_imm32(block::VECTORS_RESIDENT, 0);
    asm.load(RSP, block::HOST_RSP);
    add_rsp(asm, 8);
    for reg in CALLEE_SAVED.into_iter().rev() {
        pop(asm, reg);
    }
    asm.bytes(&[0xc3]);
}

fn exit_with(asm: &mut Asm, reason: u32, leave: u64) {
    asm.store(block::EXIT_VALUE, T0);
    asm.store_imm32(block::EXIT_REASON, reason);
    asm.jmp(leave);
}

/// Makes T1 address the jump cache's entry for the linear address in T0. Gives the jump that is taken if it is another's.
/// Destroys the flags.
pub(super) fn probe_jumps(asm: &mut Asm) -> usize {
    asm.regs(false, &[0x8b], T1, T0); // mov T1d, T0d
    asm.bytes(&[0x41, 0xc1, 0xe8 | T1 & 7, 12]); // shr T1d, 12
    asm.regs(false, &[0x33], T1, T0); // xor T1d, T0d
    asm.bytes(&[0x41, 0x81, 0xe0 | T1 & 7]); // and T1d, JUMPS - 1
    asm.bytes(&((JUMPS - 1) as u32).to_le_bytes());
    asm.bytes(&[0x41, 0xc1, 0xe0 | T1 & 7, size_of::<Jump>().trailing_zeros() as u8]); // shl T1d, 4
    asm.mem(&[], true, &[0x03], T1, block::JUMPS); // add T1, [jumps]
    asm.mem(&[], true, &[0x3b], T0, Mem::At(T1, 0)); // cmp T0, [T1]
    asm.jcc(cc::NE, 0)
}

fn lookup(asm: &mut Asm, unknown: u64) {
    pop(asm, T1);
    asm.mem(&[], false, &[0x8b], T1, Mem::At(T1, 0));
    asm.store(block::scratch(2), T1);
    let miss = probe_jumps(asm);
    asm.jmp_mem(Mem::At(T1, JUMP_HOST));
    asm.bind(miss);
    asm.load(T1, block::scratch(2));
    asm.jmp(unknown);
}

fn slow_access(asm: &mut Asm, function: u64, load: u64, store: u64) {
    call_out(asm, function, store, |asm| asm.load(1, Mem::At(RSP, 0)));
    come_back_or_leave(asm, load, exit::FAULT);
}

fn step(asm: &mut Asm, function: u64, load: u64, store: u64) {
    call_out(asm, function, store, |_| {});
    come_back_or_leave(asm, load, exit::AT);
}

/// The host's stack has no return addresses any more, but the word below them, which [`enter`] has put there.
fn forget_returns(asm: &mut Asm) {
    asm.load(RSP, block::HOST_RSP);
    asm.lea(RSP, RSP, -8);
    asm.store(block::USER_RETURNS, RSP);
}

/// The return addresses of user code stay for when the kernel comes back to it. Its own ones end above them. If it changes
/// a mapping in between, all are forgotten.
fn keep_user_returns(asm: &mut Asm, unforeseen: u64) {
    asm.store(block::USER_RETURNS, RSP);
    asm.mov_imm(T1, unforeseen);
    push(asm, T1);
}

/// The code before needed vector registers; whether what comes does is not known. `returns` says what becomes of the return
/// addresses on the host's stack: they hold as long as nothing is changed in mappings, privilege and mode.
fn interpret(asm: &mut Asm, function: u64, store: u64, returns: impl FnOnce(&mut Asm)) {
    call_out(asm, function, store, |_| {});
    asm.store_imm32(block::VECTORS_RESIDENT, 0);
    test_result(asm);
    let failed = asm.jcc(cc::E, 0);
    asm.mov(T0, 0);
    returns(asm);
    load_pinned(asm);
    asm.regs(false, &[0xff], 4, T0); // jmp T0
    asm.bind(failed);
    leave_for(asm, exit::AT);
}

/// A group that lies on two pages is not worth a call: pointers that walk through memory make them.
fn slow_group(asm: &mut Asm, function: u64, load: u64, store: u64) {
    asm.store(block::scratch(2), T0);
    asm.store(block::scratch(3), T1);
    asm.regs(false, &[0x0f, 0xb7], T1, T1); // movzx T1d, T1w
    asm.bytes(&[0x41, 0x81, 0xe0 | T0 & 7]); // and T0d, 0fffh
    asm.bytes(&0xfffu32.to_le_bytes());
    asm.regs(false, &[0x03], T0, T1); // add T0d, T1d
    asm.bytes(&[0x41, 0x81, 0xf8 | T0 & 7]); // cmp T0d, 4096
    asm.bytes(&4096u32.to_le_bytes());
    let crosses = asm.jcc(cc::A, 0);
    asm.load(T0, block::scratch(2));
    asm.load(T1, block::scratch(3));
    call_out(asm, function, store, |_| {});
    come_back(asm, load);
    asm.bind(crosses);
    asm.mov_imm(T0, 0);
    asm.bytes(&[0xc3]);
}

/// Calls a function with the guest's state in the block. Its arguments are the block's address, T0 and T1; `more` sets
/// others.
fn call_out(asm: &mut Asm, function: u64, store: u64, more: impl FnOnce(&mut Asm)) {
    for (host, guest) in PINNED {
        asm.store(block::gpr(guest), host);
    }
    when_resident(asm, store);
    asm.load(7, block::THIS);
    asm.mov(6, T0);
    asm.mov(2, T1);
    more(asm);
    // Calls of generated code leave the stack aligned or not.
    const RBX: u8 = 3;
    asm.mov(RBX, RSP);
    asm.bytes(&[0x48, 0x83, 0xe4, 0xf0]); // and rsp, -16
    asm.mov_imm(0, function);
    asm.bytes(&[0xff, 0xd0]); // call rax
    asm.mov(RSP, RBX);
}

/// After a call: goes on with its result in T0; if that is 0, leaves with the state that the function has left in the
/// block.
fn come_back_or_leave(asm: &mut Asm, load: u64, reason: u32) {
    test_result(asm);
    let failed = asm.jcc(cc::E, 0);
    come_back(asm, load);
    asm.bind(failed);
    leave_for(asm, reason);
}

/// Whether a function has returned 0.
fn test_result(asm: &mut Asm) {
    asm.regs(true, &[0x85], 0, 0); // test rax, rax
}

/// Leaves with the state that is in the block.
fn leave_for(asm: &mut Asm, reason: u32) {
    asm.store_imm32(block::EXIT_REASON, reason);
    return_to_caller(asm);
}

fn load_pinned(asm: &mut Asm) {
    for (host, guest) in PINNED {
        asm.load(host, block::gpr(guest));
    }
}

/// After a call: goes on with its result in T0.
fn come_back(asm: &mut Asm, load: u64) {
    asm.mov(T0, 0);
    when_resident(asm, load);
    load_pinned(asm);
    asm.bytes(&[0xc3]);
}

/// XRSTOR of component 0 only; it wants its mask in EDX:EAX.
fn load_x87(asm: &mut Asm) {
    asm.store(block::scratch(2), 0);
    asm.store(block::scratch(3), 2);
    asm.mov_imm(0, 1);
    asm.mov_imm(2, 0);
    asm.mem(&[], true, &[0x0f, 0xae], 5, Mem::Block(block::FPU)); // xrstor64
    asm.load(0, block::scratch(2));
    asm.load(2, block::scratch(3));
    asm.store_imm32(block::X87_RESIDENT, 1);
    asm.bytes(&[0xc3]);
}

/// Offset of XMM0 in the FXSAVE image.
const XMM: i32 = 160;
/// Offset of the upper halves behind the XSAVE header.
const YMM_HIGH: i32 = 576;

/// Code that loads the vector registers and MXCSR; keeps all general registers. VEX-encoded where there is AVX: legacy SSE instructions between AVX ones cost a state transition each.
fn load_vectors(asm: &mut Asm, avx: bool) {
    for r in 0..16u8 {
        let low = block::FPU + XMM + 16 * i32::from(r);
        if avx {
            vex(asm, 1, 0x78, 0x10, r, low); // vmovups xmm, gs:[...]
            // vinsertf128 ymm, ymm, gs:[...], 1
            vex(asm, 3, (!r & 15) << 3 | 0x05, 0x18, r, block::FPU + YMM_HIGH + 16 * i32::from(r));
            asm.bytes(&[1]);
        } else {
            asm.mem(&[], false, &[0x0f, 0x10], r, Mem::Block(low)); // movups
        }
    }
    asm.mem(&[], false, &[0x0f, 0xae], 2, MXCSR); // ldmxcsr
    asm.store_imm32(block::VECTORS_RESIDENT, 1);
    asm.bytes(&[0xc3]);
}

/// Code that stores the vector registers and MXCSR; destroys RAX. Rust wants MXCSR's default control bits; sticky flags do
/// not disturb it.
fn store_vectors(asm: &mut Asm, avx: bool) {
    for r in 0..16u8 {
        let low = block::FPU + XMM + 16 * i32::from(r);
        if avx {
            vex(asm, 1, 0x78, 0x11, r, low); // vmovups gs:[...], xmm
            // vextractf128 gs:[...], ymm, 1
            vex(asm, 3, 0x7d, 0x19, r, block::FPU + YMM_HIGH + 16 * i32::from(r));
            asm.bytes(&[1]);
        } else {
            asm.mem(&[], false, &[0x0f, 0x11], r, Mem::Block(low));
        }
    }
    asm.mem(&[], false, &[0x0f, 0xae], 3, MXCSR); // stmxcsr
    asm.mem(&[], false, &[0x8b], 0, MXCSR); // mov eax, [mxcsr]
    asm.bytes(&[0x25]); // and eax, control bits
    asm.bytes(&MXCSR_CONTROL.to_le_bytes());
    asm.bytes(&[0x3d]); // cmp eax, default
    asm.bytes(&MXCSR_DEFAULT.to_le_bytes());
    let usual = asm.jcc(cc::E, 0);
    asm.store_imm32(block::HOST_MXCSR, MXCSR_DEFAULT);
    asm.mem(&[], false, &[0x0f, 0xae], 2, block::HOST_MXCSR); // ldmxcsr
    asm.bind(usual);
    asm.bytes(&[0xc3]);
}

/// An instruction with a three-byte VEX prefix and a block operand: opcode map, the prefix's last byte (W, inverted
/// vvvv, L, pp), opcode, register.
fn vex(asm: &mut Asm, map: u8, last: u8, opcode: u8, r: u8, at: i32) {
    let inverted_r = if r >= 8 { 0 } else { 0x80 };
    asm.bytes(&[0x65, 0xc4, inverted_r | 0x60 | map, last, opcode, (r & 7) << 3 | 4, 0x25]);
    asm.bytes(&at.to_le_bytes());
}
