//! Makes host code of a region.

use std::ops::Range;

use iced_x86::{Encoder, Instruction, InstructionInfoFactory, RflagsBits};
use ruse_arch::flags::rflags;

use super::{
    asm::{
        Asm, Mem, Relocation, cc,
        host::{T0, T1},
    },
    block,
    groups::{self, Member, OPERAND, Plan, STACK},
    loops::Round,
    operands::{At, names_block},
    out_of_line::{SlowPath, Stub, StubKind},
    scratch::Copies,
    strings::SlowString,
    thunks::{JUMP_HOST, Thunks},
};
use crate::{
    frontend::x86_64::ARITH,
    ir::{MemUse, Node, Op, Region, Value},
};

/// A jump of a region to another one that can be made direct.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Linear address of the target.
    pub target: u64,
    /// Offset in the region's code of the displacement that leads to the target once it is known.
    pub site: u32,
    /// Offset of the code that the displacement leads to as long as it is not.
    pub unresolved: u32,
    /// For a target on another page: [`GUARD`] bytes before the site lies a constant that is compared with the
    /// generation of mappings.
    pub guarded: bool,
    /// It leads to code without groups of accesses.
    pub plain: bool,
    /// It leads on to higher addresses: no loop is made of such links alone, so they need not look at the requests.
    pub ahead: bool,
}

/// Distance of a link's guard from its site: the constant, a conditional jump, the opcode of the jump.
pub const GUARD: u32 = 4 + 6 + 1;

/// Bytes of the look at the requests at a region's beginning.
pub const POLL: u32 = 9 + 6;

/// Where in the host code a guest instruction begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Offset in the region's code.
    pub host: u32,
    /// Offset of the guest instruction from the region's start.
    pub guest: u16,
    /// The arithmetic flags are in the host's flags, not in the block, if the host instruction here faults.
    pub host_flags: bool,
}

/// Code made of a region.
#[derive(Debug)]
pub struct Code {
    /// The bytes, for the address that the emitter was made for.
    pub bytes: Vec<u8>,
    /// Jumps to other regions.
    pub links: Vec<Link>,
    /// Guest instructions, by ascending host offset.
    pub marks: Vec<Mark>,
    /// Offsets of the rounds of a loop that were counted before.
    pub rounds: Range<u32>,
    /// What would be another constant in a copy elsewhere.
    pub relocations: Vec<Relocation>,
}

/// Makes the code of one region.
pub struct Emitter<'a> {
    pub(super) asm: Asm,
    pub(super) encoder: &'a mut Encoder,
    pub(super) info: &'a mut InstructionInfoFactory,
    pub(super) slow_paths: Vec<SlowPath>,
    pub(super) guest_offset: u16,
    /// The group whose address T0 holds.
    pub(super) held: Option<u8>,
    /// What else T0 and T1 hold.
    pub(super) copies: Copies,
    /// The arithmetic flags are in the host's flags.
    pub(super) in_host: bool,
    /// Groups of accesses.
    pub(super) plan: Plan,
    /// Where a region that is a loop goes on after a round.
    pub(super) round: Round,
    /// Groups whose way to host memory is in a register.
    pub(super) pins: Vec<(u8, u8)>,
    /// The node that is being made.
    node: usize,
    pub(super) thunks: &'a Thunks,
    pub(super) stubs: Vec<Stub>,
    /// See [`Code::rounds`].
    pub(super) rounds: Range<u32>,
    pub(super) links: Vec<Link>,
    pub(super) marks: Vec<Mark>,
    pub(super) slow_strings: Vec<SlowString>,
    /// Number that the region's first link will have.
    pub(super) first_link: u32,
    pub(super) start: u64,
    /// The arithmetic flags are in the block.
    pub(super) in_block: bool,
    /// How far the guest's RSP is from what its host register holds.
    pub(super) moved: i32,
    x87_loaded: bool,
    /// The host has RORX.
    pub(super) rorx: bool,
}

impl<'a> Emitter<'a> {
    /// An emitter for code that will lie at `base`. Its links will have the numbers from `first_link` on.
    pub fn new(
        base: u64,
        first_link: u32,
        encoder: &'a mut Encoder,
        info: &'a mut InstructionInfoFactory,
        thunks: &'a Thunks,
    ) -> Self {
        Self {
            asm: Asm::new(base),
            encoder,
            info,
            slow_paths: Vec::new(),
            guest_offset: 0,
            held: None,
            copies: Copies::default(),
            in_host: false,
            plan: Plan::default(),
            round: Round::Only(0),
            pins: Vec::new(),
            node: 0,
            thunks,
            stubs: Vec::new(),
            rounds: 0..0,
            links: Vec::new(),
            marks: Vec::new(),
            slow_strings: Vec::new(),
            first_link,
            start: 0,
            in_block: true,
            moved: 0,
            x87_loaded: false,
            rorx: std::arch::is_x86_feature_detected!("bmi2"),
        }
    }

    /// Makes the code. `grouped`: one probe may serve several accesses.
    pub fn emit(mut self, region: &Region, grouped: bool) -> Code {
        self.start = region.start;
        if grouped {
            self.plan = groups::find(region, self.info);
        }
        self.mark();
        self.asm.cmp_imm32(block::REQUESTS, 0);
        let branch = self.asm.jcc(cc::NE, 0);
        self.stubs.push(Stub { branch, kind: StubKind::Poll(0) });
        debug_assert_eq!(self.asm.code.len() as u32, POLL);
        if region.nodes.iter().any(|n| n.vector) {
            self.asm.cmp_imm32(block::VECTORS_RESIDENT, 0);
            let over = self.asm.jcc(cc::NE, 0);
            self.asm.call(self.thunks.load_vectors);
            self.asm.bind(over);
        }
        if self.plan.back.is_some() {
            self.first_round();
        }
        self.nodes(region);
        self.second_copy(region);
        self.out_of_line();
        let Asm { code: bytes, relocations, .. } = self.asm;
        Code { bytes, links: self.links, marks: self.marks, rounds: self.rounds, relocations }
    }

    /// As at the region's beginning.
    pub(super) fn begin_again(&mut self) {
        self.guest_offset = 0;
        (self.in_host, self.in_block, self.x87_loaded) = (false, true, false);
        self.forget_copies();
    }

    pub(super) fn nodes(&mut self, region: &Region) {
        let mut ended = false;
        for (n, node) in region.nodes.iter().enumerate() {
            self.node = n;
            self.guest_offset = node.insn.ip().wrapping_sub(region.start) as u16;
            if !self.may_move_later(node) {
                self.move_stack();
            }
            if self.destroys_flags(&node.op) || node.x87 {
                self.spill_flags(live_in(node));
            }
            self.mark();
            ended = self.node(node);
            if ended {
                break;
            }
        }
        if !ended {
            self.move_stack();
            self.fall_through(region);
        }
    }

    /// The place of an access of the current node in a group.
    pub(super) fn place(&self, place: usize) -> Option<Member> {
        self.plan.places.get(self.node)?[place]
    }

    /// Whether an access of the current node has its address from another of its group.
    pub(super) fn follows(&self, place: usize) -> bool {
        self.place(place).is_some_and(|member| member.leads.is_none())
    }

    /// Whether the code made for the operation of the current node destroys the host's flags before the operation itself
    /// looks at them.
    fn destroys_flags(&self, op: &Op) -> bool {
        let on_stride = || self.place(OPERAND).is_some_and(|member| self.stride(member).is_some());
        match op {
            Op::Host(Some(_)) => !self.follows(OPERAND) && !on_stride(),
            Op::Push(Value::Mem) => !self.follows(OPERAND) || !self.follows(STACK),
            Op::Push(_) | Op::Pop(_) | Op::Leave => !self.follows(STACK),
            _ => op.probes(),
        }
    }

    fn mark(&mut self) {
        let host = self.asm.code.len() as u32;
        self.marks.push(Mark { host, guest: self.guest_offset, host_flags: self.in_host && !self.in_block });
    }

    fn fall_through(&mut self, region: &Region) {
        self.spill_flags(region.live_at_end);
        self.in_host = false;
        self.exit_to(region.end);
    }

    /// Emits one node; `true` if nothing runs after it.
    fn node(&mut self, node: &Node) -> bool {
        let i = &node.insn;
        self.copies_at(&node.op);
        if node.x87 && !self.x87_loaded {
            self.load_x87();
        }
        match node.op {
            Op::Nop => {}
            Op::Host(mem) => {
                if self.host_node(node, mem).is_err() {
                    self.move_stack();
                    self.interpret(i.ip(), live_in(node));
                    return true;
                }
            }
            Op::Address => self.lea_node(i),
            Op::Push(value) => self.push(node, value),
            Op::Pop(guest) => self.pop(guest),
            Op::PushFlags => self.push_flags(),
            Op::Leave => self.leave(),
            Op::SwapGs => self.swap_gs(),
            Op::DisableInterrupts => self.system_flag(rflags::IF, false),
            Op::EnableInterrupts => self.enable_interrupts(),
            Op::ClearDirection => self.system_flag(rflags::DF, false),
            Op::UserAccess(allowed) => self.user_access(allowed),
            Op::TimeStamp { aux } => self.time_stamp(aux),
            Op::BitString(mem) => self.bit_string(node, mem),
            Op::ReadBase(what) => self.read_base(what),
            Op::WriteBase(what) => self.write_base(what),
            Op::ReadControl { control, to } => self.read_control(control, to),
            Op::Branch { condition, .. } if self.plan.back == Some(self.node) => {
                return self.go_back(node, condition as u8 - 1);
            }
            Op::Jump { .. } if self.plan.back == Some(self.node) => self.next_round(),
            Op::Branch { condition, target } => self.branch(node, condition as u8 - 1, target),
            Op::Jump { target } => {
                self.spill_flags(node.live_at_exit);
                self.in_host = false;
                self.exit_to(target);
            }
            Op::Call { target } => self.call(i, target),
            Op::JumpTo(value) => {
                self.value(node, value);
                self.find_jump(StubKind::Miss);
                self.asm.jmp_mem(Mem::At(T1, JUMP_HOST));
            }
            Op::CallTo(value) => self.call_to(node, value),
            Op::Return(extra) => self.return_node(extra),
            Op::ReadSelector { segment, to, size } => self.read_selector(segment, to, size),
            Op::Repeat(what) => self.repeat(i, what),
            Op::Step => {
                self.call_step(i.ip(), i.len() as u64);
                self.flags_are_in_block();
            }
            Op::Interpret => self.interpret_last(i, live_in(node)),
        }
        node.op.ends_region()
    }

    /// Calls tier 0 for one instruction.
    pub(super) fn call_step(&mut self, ip: u64, len: u64) {
        self.asm.mov_address(T0, ip);
        self.asm.mov_imm(T1, len);
        self.asm.call(self.thunks.step);
    }

    /// After code that may have called tier 0: the flags are in the block, the x87 registers may be as well.
    pub(super) fn flags_are_in_block(&mut self) {
        (self.in_host, self.in_block, self.x87_loaded) = (false, true, false);
        self.forget_copies();
    }

    /// The identity lane.
    fn host_node(&mut self, node: &Node, mem: Option<MemUse>) -> Result<(), super::operands::Unencodable> {
        let needed = node.reads | merged(node);
        let at = mem.map(|mem| match self.place(OPERAND).and_then(|m| Some((m, self.stride(m)?))) {
            Some((member, stride)) => self.on_stride(&stride, &node.insn, member.at),
            None if self.place(OPERAND).is_none() && needed == 0 && !names_block(&node.insn) => {
                self.address(&node.insn);
                self.probe_apart(mem)
            }
            None => At::from_t0(self.operand(&node.insn, mem)),
        });
        let complete = self.restore_flags(needed);
        self.host_insn(&node.insn, at)?;
        if node.writes {
            self.in_host = true;
            self.in_block = false;
        } else {
            self.in_host &= complete;
        }
        Ok(())
    }

    /// Puts the flags into the block if one of `live` would be lost with the host's flags.
    pub(super) fn spill_flags(&mut self, live: u32) {
        if live != 0 && self.in_host && !self.in_block {
            self.save_flags();
            self.in_block = true;
        }
    }

    /// Puts the host's flags into the block.
    pub(super) fn save_flags(&mut self) {
        self.asm.bytes(&[0x9c]); // pushfq
        self.asm.mem(&[], false, &[0x8f], 0, block::ARITH); // pop [arith]
    }

    /// Puts the flags `needed` into the host's flags. Says whether all of them are there now.
    pub(super) fn restore_flags(&mut self, needed: u32) -> bool {
        if self.in_host || needed == 0 {
            return self.in_host;
        }
        if needed == RflagsBits::CF {
            self.asm.mem(&[], false, &[0x0f, 0xba], 4, block::ARITH); // bt dword [arith], 0
            self.asm.bytes(&[0]);
            return false;
        }
        // POPFQ takes some twenty cycles; SAHF sets all but OF, which an addition sets before.
        const RAX: u8 = 0;
        self.changes(T1);
        self.asm.mov(T1, RAX);
        self.asm.mem(&[], false, &[0x8b], RAX, block::ARITH); // mov eax, [arith]
        self.asm.bytes(&[0x86, 0xe0]); // xchg al, ah
        self.asm.bytes(&[0x24, 0x08]); // and al, OF >> 8
        self.asm.bytes(&[0x04, 0x78]); // add al, 80h - (OF >> 8)
        self.asm.bytes(&[0x9e]); // sahf
        self.asm.mov(RAX, T1);
        self.in_host = true;
        true
    }

    fn load_x87(&mut self) {
        self.asm.cmp_imm32(block::X87_RESIDENT, 0);
        let over = self.asm.jcc(cc::NE, 0);
        self.asm.call(self.thunks.load_x87);
        self.asm.bind(over);
        self.forget_copies();
        self.in_host = false;
        self.x87_loaded = true;
    }

    /// Loads a value into T0.
    pub(super) fn value(&mut self, node: &Node, value: Value) {
        match value {
            Value::Mem => {
                let at = self.operand(&node.insn, MemUse { write: false, size: 8 });
                self.asm.load(T0, Mem::At(T0, at));
            }
            Value::Reg(guest) => {
                let r = self.loaded(guest, T0);
                if r != T0 {
                    self.asm.mov(T0, r);
                }
            }
            Value::Imm(value) => self.asm.mov_imm(T0, value),
        }
        self.held = None;
    }

    /// Makes the instruction's memory operand accessible: its distance from T0.
    fn operand(&mut self, i: &Instruction, mem: MemUse) -> i32 {
        self.access(OPERAND, mem, |this| this.address(i))
    }

    /// `and T1d, mask`: the upper half becomes zero.
    pub(super) fn and_t1(&mut self, mask: u32) {
        self.asm.bytes(&[0x41, 0x81, 0xe0 | T1 & 7]);
        self.asm.bytes(&mask.to_le_bytes());
    }
}

/// Flags that must be in the host's flags beside those that a node changes: alive ones that it leaves alone.
pub(super) fn merged(node: &Node) -> u32 {
    if node.writes { node.live_out & !node.kills } else { 0 }
}

/// Flags that are live before a node.
fn live_in(node: &Node) -> u32 {
    let exit = if node.op.ends_region() { 0 } else { node.live_at_exit };
    ((node.live_out & !node.kills) | node.reads | exit) & ARITH
}
