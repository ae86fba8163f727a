//! The intermediate representation of a region: a straight run of guest instructions with side exits.
//!
//! Guest and host are both x86-64 here, so most operations are the *identity lane* ([`Op::Host`]): the guest
//! instruction itself, which the backend re-encodes with its registers and its memory operand replaced. What touches
//! the stack, leaves the region or changes the CPU's mode has operations of its own.

use std::ops::Range;

use iced_x86::{ConditionCode, Instruction};

use crate::frontend::x86_64::ARITH;

/// Sizes in bytes that a [`MemUse`] may have.
pub const ACCESS_SIZES: [u8; 7] = [1, 2, 4, 8, 10, 16, 32];

/// How an instruction uses its memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemUse {
    /// Writes (perhaps after reading).
    pub write: bool,
    /// One of [`ACCESS_SIZES`].
    pub size: u8,
}

/// A value that an operation takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// General register by index, all 64 bits.
    Reg(u8),
    /// A constant.
    Imm(u64),
    /// The memory operand of the instruction.
    Mem,
}

/// A move between the base of a segment and a general register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// FS or GS.
    pub segment: u8,
    /// General register.
    pub register: u8,
    /// 64 bits; else 32, the others zero.
    pub wide: bool,
}

/// A repeated string instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repeat {
    /// It copies; else it fills.
    pub copies: bool,
    /// Bytes of an element: 1, 2, 4 or 8.
    pub size: u8,
}

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Nothing.
    Nop,
    /// The identity lane.
    Host(Option<MemUse>),
    /// An address computation (LEA).
    Address,
    /// Pushes 8 bytes.
    Push(Value),
    /// Pops 8 bytes into a register.
    Pop(u8),
    /// Pushes the flags.
    PushFlags,
    /// MOV RSP, RBP; POP RBP.
    Leave,
    /// Exchanges GS's base with IA32_KERNEL_GS_BASE.
    SwapGs,
    /// Clears IF.
    DisableInterrupts,
    /// Sets IF. Never a region's last operation, for interrupts stay blocked for one more instruction.
    EnableInterrupts,
    /// Clears DF.
    ClearDirection,
    /// Sets or clears AC, which opens or closes user pages to the kernel (STAC, CLAC).
    UserAccess(bool),
    /// Reads the time-stamp counter.
    TimeStamp {
        /// IA32_TSC_AUX as well (RDTSCP).
        aux: bool,
    },
    /// BT and its kin on memory, with a bit offset in a register that reaches beyond the operand.
    BitString(MemUse),
    /// Reads the base of FS or GS.
    ReadBase(Base),
    /// Sets the base of FS or GS.
    WriteBase(Base),
    /// Reads CR0, CR2, CR3 or CR4 into a general register.
    ReadControl {
        /// Number of the control register.
        control: u8,
        /// General register.
        to: u8,
    },
    /// Leaves to `target` if the condition holds.
    Branch {
        /// Condition on the flags.
        condition: ConditionCode,
        /// Linear address.
        target: u64,
    },
    /// Leaves to `target`.
    Jump {
        /// Linear address.
        target: u64,
    },
    /// Pushes the return address and leaves to `target`.
    Call {
        /// Linear address.
        target: u64,
    },
    /// Leaves to the address that the value holds.
    JumpTo(Value),
    /// Pushes the return address and leaves to the address that the value holds.
    CallTo(Value),
    /// Pops the return address, drops that many bytes more, and leaves.
    Return(u16),
    /// Reads the selector of a segment register, by index, into a general register of so many bytes.
    ReadSelector {
        /// Segment register.
        segment: u8,
        /// General register.
        to: u8,
        /// Bytes that are written; 4 and 8 clear the rest.
        size: u8,
    },
    /// REP MOVS or REP STOS: from page to page at most, else as [`Op::Step`].
    Repeat(Repeat),
    /// Tier 0 executes this instruction, and the region goes on.
    Step,
    /// Leaves to tier 0, which executes this instruction.
    Interpret,
}

impl Op {
    /// Whether nothing of the region runs after it.
    pub fn ends_region(&self) -> bool {
        matches!(
            self,
            Op::Jump { .. } | Op::Call { .. } | Op::JumpTo(_) | Op::CallTo(_) | Op::Return(_) | Op::Interpret
        )
    }

    /// Whether the code made for it destroys the host's flags before the operation itself looks at them.
    pub fn probes(&self) -> bool {
        match self {
            Op::Host(mem) => mem.is_some(),
            Op::Push(_)
            | Op::Pop(_)
            | Op::PushFlags
            | Op::Leave
            | Op::DisableInterrupts
            | Op::EnableInterrupts
            | Op::UserAccess(_)
            | Op::ClearDirection
            | Op::TimeStamp { .. }
            | Op::BitString(_)
            | Op::WriteBase(_)
            | Op::Repeat(_)
            | Op::Step
            | Op::Call { .. }
            | Op::JumpTo(_)
            | Op::CallTo(_)
            | Op::Return(_) => true,
            _ => false,
        }
    }
}

/// An operation with what the passes need to know of it.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    /// What to do.
    pub op: Op,
    /// The guest instruction.
    pub insn: Instruction,
    /// Flags that it reads (iced's `RflagsBits`; only the six arithmetic ones).
    pub reads: u32,
    /// Flags that it gives new values in every case.
    pub kills: u32,
    /// Whether it changes any arithmetic flag.
    pub writes: bool,
    /// Flags that somebody may read after it.
    pub live_out: u32,
    /// Flags that somebody may read at the target of its exit.
    pub live_at_exit: u32,
    /// The x87 or MMX registers must be in the host's unit.
    pub x87: bool,
    /// The vector registers must be in the host's.
    pub vector: bool,
}

/// A region: what is translated as one piece.
#[derive(Clone, Debug)]
pub struct Region {
    /// Linear address of the first instruction.
    pub start: u64,
    /// Linear address behind the last one.
    pub end: u64,
    /// The operations in order.
    pub nodes: Vec<Node>,
    /// Flags that are read at the fall-through after the last operation.
    pub live_at_end: u32,
    /// Linear addresses of the code on which it depends: its own, and what was looked at for the flags behind its exits.
    pub seen: Range<u64>,
}

impl Region {
    /// Computes which flags are live after each operation, and at the exits of branches that lead back to the beginning.
    pub fn compute_liveness(&mut self) {
        let mut live = 0;
        loop {
            self.set_live_at_start(live);
            let found = self.live_at_start();
            if found & !live == 0 {
                return;
            }
            live |= found;
        }
    }

    /// Says which flags are live where a branch leads back to the beginning.
    fn set_live_at_start(&mut self, live: u32) {
        let start = self.start;
        let leads_back = |node: &&mut Node| matches!(node.op, Op::Branch { target, .. } | Op::Jump { target } if target == start);
        self.nodes.iter_mut().filter(leads_back).for_each(|node| node.live_at_exit = live);
    }

    /// Computes which flags are live after each operation, from the end backwards, and those before the first.
    fn live_at_start(&mut self) -> u32 {
        let mut live = self.live_at_end;
        for node in self.nodes.iter_mut().rev() {
            if node.op.ends_region() {
                live = node.live_at_exit;
            }
            node.live_out = live;
            live = (live & !node.kills) | node.reads;
            if !node.op.ends_region() {
                live |= node.live_at_exit;
            }
        }
        live
    }

    /// Makes all flags live behind every way out.
    pub fn keep_flags(&mut self) {
        self.live_at_end = ARITH;
        for node in &mut self.nodes {
            if node.op.ends_region() || matches!(node.op, Op::Branch { .. }) {
                node.live_at_exit = ARITH;
            }
        }
        self.live_at_start();
    }
}
