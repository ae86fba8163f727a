//! The guest's stack: pushes and pops, calls and returns.
//!
//! Where several of them have one probe, the register that holds the guest's stack pointer is moved once for all.

use iced_x86::{Instruction, Mnemonic, Register};
use ruse_arch::{flags::rflags, state::reg};

use super::{
    Home,
    asm::{
        Mem, Relocated, cc,
        host::{GUEST_RSP, RSP, T0, T1},
    },
    block,
    emit::Emitter,
    groups::STACK,
    home,
    out_of_line::{Stub, StubKind},
    thunks::JUMP_HOST,
};
use crate::ir::{MemUse, Node, Op, Value};

impl Emitter<'_> {
    /// Whether the operation neither looks at the guest's stack pointer, nor can fault, nor leaves the region before it has
    /// moved it.
    pub(super) fn may_move_later(&self, node: &Node) -> bool {
        match node.op {
            Op::Nop => true,
            Op::Push(Value::Reg(guest)) | Op::Pop(guest) => {
                usize::from(guest) != reg::RSP && self.follows(STACK)
            }
            Op::Push(Value::Imm(_)) | Op::Call { .. } | Op::Return(_) => self.follows(STACK),
            Op::Host(None) => {
                let divides = matches!(node.insn.mnemonic(), Mnemonic::Div | Mnemonic::Idiv);
                !node.x87 && !node.vector && !divides && !names_rsp(&node.insn)
            }
            Op::Address => !names_rsp(&node.insn),
            _ => false,
        }
    }

    /// Makes the host register hold the guest's stack pointer. Leaves the flags alone.
    pub(super) fn move_stack(&mut self) {
        if self.moved != 0 {
            self.asm.lea(GUEST_RSP, GUEST_RSP, self.moved);
            self.moved = 0;
        }
    }

    /// Makes the 8 bytes below the stack pointer accessible: their distance from T0.
    fn below_stack(&mut self) -> i32 {
        self.access(STACK, MemUse { write: true, size: 8 }, |this| this.asm.lea(T0, GUEST_RSP, -8))
    }

    /// Makes the 8 bytes at the stack pointer accessible: their distance from T0.
    fn top_of_stack(&mut self) -> i32 {
        self.access(STACK, MemUse { write: false, size: 8 }, |this| this.asm.mov(T0, GUEST_RSP))
    }

    pub(super) fn push(&mut self, node: &Node, value: Value) {
        match value {
            Value::Reg(guest) => {
                let at = self.below_stack();
                let r = self.loaded(guest, T1);
                self.asm.store(Mem::At(T0, at), r);
            }
            Value::Imm(value) => {
                let at = self.below_stack();
                self.store_constant(at, value);
            }
            Value::Mem => {
                self.value(node, value);
                self.asm.store(block::scratch(0), T0);
                let at = self.below_stack();
                self.asm.load(T1, block::scratch(0));
                self.asm.store(Mem::At(T0, at), T1);
            }
        }
        self.moved -= 8;
    }

    /// A call to a linear address that is known.
    pub(super) fn call(&mut self, i: &Instruction, target: u64) {
        let at = self.below_stack();
        self.store_address(at, i.next_ip());
        self.moved -= 8;
        self.move_stack();
        self.make_room();
        let branch = self.asm.call(0);
        if self.is_near(target) {
            self.link(target, branch, false);
        } else {
            self.stubs.push(Stub { branch, kind: StubKind::Exit { target, save_flags: false } });
        }
        self.returned(i.next_ip());
    }

    /// A call to the address that the value holds. The way to it is short, for if it is mispredicted, all waits for it.
    pub(super) fn call_to(&mut self, node: &Node, value: Value) {
        let returns_to = node.insn.next_ip();
        self.make_room();
        let at = self.below_stack();
        // Nothing is pushed if the operand cannot be read, or the target is out of the address space.
        self.asm.store(block::scratch(0), T0);
        self.value(node, value);
        self.find_jump(StubKind::Interpret);
        self.asm.load(T0, block::scratch(0));
        if i32::try_from(returns_to as i64).is_ok() {
            self.store_address(at, returns_to);
        } else {
            self.with_address(&[0xff, 0x35], returns_to); // push [rip + address]
            self.asm.mem(&[], false, &[0x8f], 0, Mem::At(T0, at)); // pop [T0 + at]
        }
        self.asm.lea(GUEST_RSP, GUEST_RSP, -8);
        self.asm.mem(&[], false, &[0xff], 2, Mem::At(T1, JUMP_HOST)); // call [T1]
        self.returned(returns_to);
    }

    /// A return. The code behind the host's `call` compares the address in T0; if it is another, it needs to know where
    /// the return was, by T1.
    pub(super) fn return_node(&mut self, extra: u16) {
        let at = self.top_of_stack();
        self.asm.load(T0, Mem::At(T0, at));
        self.moved += 8 + i32::from(extra);
        self.move_stack();
        let here = self.asm.here() as u32;
        self.asm.mov_imm(T1, here.into());
        self.asm.relocated(Relocated::Own);
        self.asm.bytes(&[0xc3]);
    }

    /// Sees to it that the host stack has room for one more return address.
    pub(super) fn make_room(&mut self) {
        self.asm.mem(&[], true, &[0x3b], RSP, block::STACK_LIMIT); // cmp rsp, [limit]
        let branch = self.asm.jcc(cc::B, 0);
        self.stubs.push(Stub { branch, kind: StubKind::NoRoom(self.asm.here()) });
    }

    /// What comes behind a host `call`: the guest returns, to the linear address in T0. The host's `ret` is predicted, but
    /// the guest may return to elsewhere.
    fn returned(&mut self, expected: u64) {
        if let Ok(short) = i32::try_from(expected as i64) {
            self.asm.bytes(&[0x49, 0x81, 0xf8 | T0 & 7]); // cmp T0, expected
            self.asm.bytes(&short.to_le_bytes());
            self.asm.relocated(Relocated::AddressLow);
        } else {
            self.with_address(&[0x4c, 0x3b, 0x05 | (T0 & 7) << 3], expected); // cmp T0, [rip + expected]
        }
        self.asm.jcc(cc::NE, self.thunks.unforeseen_return);
        self.exit_to(expected);
    }

    /// An instruction, but for its displacement, whose memory operand is a guest address that lies out of line.
    fn with_address(&mut self, instruction: &[u8], address: u64) {
        self.asm.bytes(instruction);
        let branch = self.asm.code.len();
        self.asm.bytes(&[0; 4]);
        self.stubs.push(Stub { branch, kind: StubKind::Address(address) });
    }

    /// Stores a guest address so many bytes from T0.
    fn store_address(&mut self, at: i32, address: u64) {
        if let Ok(short) = i32::try_from(address as i64) {
            self.asm.store_imm(Mem::At(T0, at), short);
            self.asm.relocated(Relocated::AddressLow);
        } else {
            self.asm.mov_address(T1, address);
            self.asm.store(Mem::At(T0, at), T1);
        }
    }

    /// Stores a constant so many bytes from T0.
    fn store_constant(&mut self, at: i32, value: u64) {
        if let Ok(short) = i32::try_from(value as i64) {
            self.asm.store_imm(Mem::At(T0, at), short);
        } else {
            self.asm.mov_imm(T1, value);
            self.asm.store(Mem::At(T0, at), T1);
        }
    }

    pub(super) fn pop(&mut self, guest: u8) {
        let at = self.top_of_stack();
        match home(guest) {
            Home::Host(GUEST_RSP) => self.asm.load(GUEST_RSP, Mem::At(T0, at)),
            Home::Host(r) => {
                self.asm.load(r, Mem::At(T0, at));
                self.moved += 8;
            }
            Home::Block(home) => {
                self.asm.load(T1, Mem::At(T0, at));
                self.asm.store(Mem::Block(home), T1);
                self.moved += 8;
            }
        }
    }

    /// The pushed image has RF and VM clear (SDM volume 2, PUSHF).
    pub(super) fn push_flags(&mut self) {
        let at = self.below_stack();
        self.in_host = false;
        self.asm.load(T1, block::ARITH);
        self.and_t1(rflags::ARITH as u32);
        self.asm.store(block::scratch(0), T1);
        self.asm.load(T1, block::RFLAGS);
        self.and_t1(!(rflags::ARITH | rflags::RF | rflags::VM) as u32);
        self.asm.mem(&[], true, &[0x0b], T1, block::scratch(0)); // or T1, [scratch]
        self.asm.store(Mem::At(T0, at), T1);
        self.moved -= 8;
    }

    pub(super) fn leave(&mut self) {
        const RBP: u8 = 5;
        let at = self.access(STACK, MemUse { write: false, size: 8 }, |this| this.asm.mov(T0, RBP));
        self.asm.load(T1, Mem::At(T0, at));
        self.asm.lea(GUEST_RSP, RBP, 8);
        self.asm.mov(RBP, T1);
    }
}

/// Whether an operand is the stack pointer, or has it in its address.
fn names_rsp(i: &Instruction) -> bool {
    let operands = (0..i.op_count()).map(|op| i.op_register(op));
    operands.chain([i.memory_base(), i.memory_index()]).any(|r| r.full_register() == Register::RSP)
}
