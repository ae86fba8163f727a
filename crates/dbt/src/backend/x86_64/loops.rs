//! The rounds of a loop that go on: what each round would look up is looked up once for many.
//!
//! The first rounds of a loop are those of any region. A loop that goes on after them comes to a second copy of its code.
//! Before that, each stride is looked up, and how many rounds all of them stay on their pages is counted: so long, an access
//! is the guest's own address plus a constant, with no look at the TLB and no harm to the flags. Nor does anybody look at the
//! requests; a page is left soon enough.

use iced_x86::{Instruction, Register};
use ruse_arch::state::seg;

use super::{
    Home,
    asm::{
        Mem, cc,
        host::{T0, T1},
    },
    block,
    emit::Emitter,
    groups::{Member, OPERAND, Part, Plan, Stride},
    home,
    operands::{At, lea, lives_in_block, names_block},
    out_of_line::{Missed, Stub, StubKind},
};
use crate::{
    ir::{Node, Op, Region},
    tier0::operand::gpr_index,
};

/// Rounds before the second copy, less one: a loop that ends sooner is not worth the preparations.
pub const FIRST_ROUNDS: u32 = 3;
/// Rounds in the first copy, less one, if a stride cannot be served: it lies on two pages, or not in RAM.
const OTHER_ROUNDS: u32 = 7;
/// As [`FIRST_ROUNDS`], for loops with tables that could not be served: where a table lies, it often stays.
const PATIENT_ROUNDS: u32 = 1023;

/// Where the rounds of a loop go on.
pub(super) enum Round {
    /// No second copy: the loop's beginning.
    Only(u64),
    /// Of the first copy: the loop's beginning, and displacements that lead to the second copy.
    First(u64, Vec<usize>),
    /// Of the second: its beginning, what comes before it, and the beginning of the first.
    Second { top: u64, again: u64, first: u64 },
}

impl Emitter<'_> {
    /// At the beginning of a loop's first copy.
    pub(super) fn first_round(&mut self) {
        if self.plan.strides.is_empty() && self.plan.walking.is_empty() {
            self.round = Round::Only(self.asm.here());
        } else {
            if self.plan.strides.iter().any(|stride| stride.table) {
                self.asm.mem(&[], false, &[0x8b], T0, block::first_rounds(self.start)); // mov T0d, [first]
                self.asm.mem(&[], false, &[0x89], T0, block::ROUNDS); // mov [rounds], T0d
            } else {
                self.asm.store_imm32(block::ROUNDS, FIRST_ROUNDS);
            }
            self.round = Round::First(self.asm.here(), Vec::new());
        }
    }

    /// The end of a round that another one follows. Nobody asks for flags there.
    pub(super) fn next_round(&mut self) {
        match (&mut self.round, self.plan.counter) {
            (Round::First(top, further), _) => {
                let top = *top;
                self.asm.mem(&[], false, &[0x83], 5, block::ROUNDS); // sub dword [rounds], 1
                self.asm.bytes(&[1]);
                self.asm.jcc(cc::NB, top);
                further.push(self.asm.jmp(0));
            }
            (&mut Round::Second { top, again, .. }, Some((register, _))) => {
                let r = self.loaded(register, T0);
                self.asm.mem(&[], true, &[0x3b], r, block::LAST_ROUND); // cmp r, [last]
                self.asm.jcc(cc::NE, top);
                self.asm.jmp(again);
            }
            (&mut (Round::Only(top) | Round::Second { top, .. }), _) => {
                self.asm.cmp_imm32(block::REQUESTS, 0);
                self.asm.jcc(cc::E, top);
                let branch = self.asm.jmp(0);
                self.stubs.push(Stub { branch, kind: StubKind::Poll(0) });
            }
        }
    }

    /// The second copy of a loop, if there is one.
    pub(super) fn second_copy(&mut self, region: &Region) {
        let Round::First(first, further) = &mut self.round else { return };
        let first = *first;
        for at in std::mem::take(further) {
            self.asm.bind(at);
        }
        self.begin_again();
        self.forget_pages();
        let again = self.asm.here();
        self.asm.cmp_imm32(block::REQUESTS, 0);
        let branch = self.asm.jcc(cc::NE, 0);
        self.stubs.push(Stub { branch, kind: StubKind::Poll(0) });
        self.asm.store_imm32(block::ROUNDS, u32::MAX >> 1);
        let strides = std::mem::take(&mut self.plan.strides);
        strides.iter().for_each(|stride| self.prepare(stride));
        self.count_rounds();
        self.pins = pins(region, &self.plan, &strides);
        for (group, register) in self.pins.clone() {
            self.asm.load(register, block::group_host(group));
        }
        self.plan.strides = strides;
        self.round = Round::Second { top: self.asm.here(), again, first };
        self.rounds.start = self.asm.code.len() as u32;
        self.nodes(region);
        self.rounds.end = self.asm.code.len() as u32;
        self.pins.clear();
    }

    /// Groups that remember pages have not been on any.
    fn forget_pages(&mut self) {
        if !self.plan.walking.is_empty() {
            // No distance from an address that is not canonical is small.
            self.asm.mov_imm(T0, 1 << 63);
        }
        for &group in &self.plan.walking {
            self.asm.store(block::group_page(group), T0);
        }
    }

    /// Looks up where a stride is when a round begins; how many rounds it stays on the page counts if no other stays for
    /// less.
    fn prepare(&mut self, stride: &Stride) {
        let Stride { base, first, lead, .. } = *stride;
        // The first entry of a table.
        let index = stride.index.filter(|_| !stride.table);
        self.sum(T0, base, index, stride.scale, first);
        if let Some(base) = segment_base(stride) {
            self.asm.mem(&[], true, &[0x03], T0, base);
        }
        self.probe(lead.span, lead.write, Missed::Stride(lead, stride.table));
        if stride.step != 0 {
            self.rounds_on_page(stride.step, lead.span);
        }
        if !stride.stands_still() {
            // What is left is the way from the registers that change to the host address.
            let (base, index) = (base.filter(|part| part.changes), index.filter(|part| part.changes));
            self.sum(T1, base, index, stride.scale, first);
            self.asm.regs(true, &[0x2b], T0, T1); // sub T0, T1
        }
        self.asm.store(block::group_host(stride.group), T0);
    }

    /// `dst = base + index << scale + first`. Only T1 is used beside.
    fn sum(&mut self, dst: u8, base: Option<Part>, index: Option<Part>, scale: u8, first: i32) {
        let index = index.map(|part| (self.loaded(part.register, T1), scale));
        let base = match (base, index) {
            // A base that lives in the block needs a register beside the index.
            (Some(part), Some((i, scale))) if matches!(home(part.register), Home::Block(_)) => {
                lea(&mut self.asm, dst, None, Some((i, scale)), first, true);
                self.asm.mem(&[], true, &[0x03], dst, block::gpr(part.register.into()));
                return;
            }
            (base, _) => base.map(|part| self.loaded(part.register, dst)),
        };
        lea(&mut self.asm, dst, base, index, first, true);
    }

    /// Lowers the count of rounds to those that a group stays on its page after this one. T0 holds its host address.
    fn rounds_on_page(&mut self, step: i64, span: u16) {
        self.asm.mov(T1, T0);
        self.and_t1(0xfff);
        if step > 0 {
            // 4096 - span - offset
            self.asm.bytes(&[0x41, 0x81, 0xf0 | T1 & 7]); // xor T1d, 0fffh
            self.asm.bytes(&0xfffu32.to_le_bytes());
            self.asm.lea(T1, T1, 1 - i32::from(span));
        }
        let step = step.unsigned_abs() as u32;
        if step.is_power_of_two() {
            self.asm.bytes(&[0x41, 0xc1, 0xe8 | T1 & 7, step.trailing_zeros() as u8]); // shr T1d, n
        } else {
            // For so small numbers the product with the rounded reciprocal is exact.
            self.asm.bytes(&[0x4d, 0x69, 0xc0 | (T1 & 7) << 3 | T1 & 7]); // imul T1, T1, 2^24 / step
            self.asm.bytes(&(1u32 << 24).div_ceil(step).to_le_bytes());
            self.asm.bytes(&[0x49, 0xc1, 0xe8 | T1 & 7, 24]); // shr T1, 24
        }
        self.asm.mem(&[], false, &[0x3b], T1, block::ROUNDS); // cmp T1d, [rounds]
        let over = self.asm.jcc(cc::NB, 0);
        self.asm.mem(&[], false, &[0x89], T1, block::ROUNDS); // mov [rounds], T1d
        self.asm.bind(over);
    }

    /// Out of line: the rounds go on in the first copy for a while.
    pub(super) fn without_strides(&mut self, table: bool) {
        let Round::Second { first, .. } = self.round else { unreachable!("only a second copy has strides") };
        let rounds = if table { PATIENT_ROUNDS } else { OTHER_ROUNDS };
        self.asm.store_imm32(block::ROUNDS, rounds);
        if table {
            self.asm.store_imm32(block::first_rounds(self.start), rounds);
        }
        self.asm.jmp(first);
    }

    /// What the counting register will be when the pages have to be looked up again.
    fn count_rounds(&mut self) {
        let Some((register, step)) = self.plan.counter else { return };
        self.asm.mem(&[], false, &[0x8b], T0, block::ROUNDS); // mov T0d, [rounds]
        self.asm.bytes(&[0x4d, 0x69, 0xc0 | (T0 & 7) << 3 | T0 & 7]); // imul T0, T0, step
        self.asm.bytes(&step.to_le_bytes());
        let r = self.loaded(register, T1);
        lea(&mut self.asm, T0, Some(T0), Some((r, 0)), step, true);
        self.asm.store(block::LAST_ROUND, T0);
    }

    /// The stride that an access is on, in a loop's second copy.
    pub(super) fn stride(&self, member: Member) -> Option<Stride> {
        let on = |stride: &&Stride| stride.group == member.group;
        matches!(self.round, Round::Second { .. }).then(|| self.plan.strides.iter().find(on).copied())?
    }

    /// Where an instruction's operand on a stride lies in host memory. `from_first`: bytes from the group's first one. Uses
    /// T0, unless its way there is in a register.
    pub(super) fn on_stride(&mut self, stride: &Stride, i: &Instruction, from_first: u8) -> At {
        let displacement = i.memory_displacement64() as i32;
        let way = match self.pins.iter().find(|pin| pin.0 == stride.group) {
            Some(&(_, register)) => register,
            None => {
                self.changes(T0);
                self.asm.load(T0, block::group_host(stride.group));
                T0
            }
        };
        let changing = |part: Option<Part>, register| {
            part.filter(|part| part.changes).and_then(|_| gpr_index(register)).map(|r| r as u8)
        };
        match (changing(stride.base, i.memory_base()), changing(stride.index, i.memory_index())) {
            // The address stands still.
            (None, None) => At { base: way, index: None, displacement: from_first.into() },
            (Some(r), None) => self.along(way, r, 0, displacement),
            (None, Some(r)) => self.along(way, r, stride.scale, displacement),
            (Some(base), Some(index)) => {
                let between = self.along(way, base, 0, 0);
                self.changes(T0);
                lea(&mut self.asm, T0, Some(between.base), between.index, 0, true);
                self.along(T0, index, stride.scale, displacement)
            }
        }
    }

    /// `base + register << scale + displacement`.
    fn along(&mut self, base: u8, register: u8, scale: u8, displacement: i32) -> At {
        match home(register) {
            Home::Host(r) => At { base, index: Some((r, scale)), displacement },
            Home::Block(_) => {
                let r = self.loaded(register, T1);
                self.changes(T0);
                lea(&mut self.asm, T0, Some(base), Some((r, scale)), 0, true);
                At { base: T0, index: None, displacement }
            }
        }
    }
}

/// Whether the code made for a node whose access is on a stride needs neither T0 nor T1.
fn leaves_scratch_alone(node: &Node) -> bool {
    let i = &node.insn;
    matches!(node.op, Op::Nop | Op::Host(_) | Op::Address | Op::Branch { .. } | Op::Jump { .. })
        && !node.x87
        && !names_block(i)
        && !lives_in_block(i.memory_base())
        && !lives_in_block(i.memory_index())
}

fn segment_base(stride: &Stride) -> Option<Mem> {
    match stride.segment {
        Register::FS => Some(block::segment_base(seg::FS)),
        Register::GS => Some(block::segment_base(seg::GS)),
        _ => None,
    }
}

/// Strides whose ways to host memory are kept in T0 and T1, if nothing else in the loop asks for those.
fn pins(region: &Region, plan: &Plan, strides: &[Stride]) -> Vec<(u8, u8)> {
    let nodes = &region.nodes[..=plan.back.expect("a loop has an end")];
    let on_stride = |n: usize| {
        let member = plan.places.get(n).and_then(|places| places[OPERAND]);
        member.is_some_and(|member| strides.iter().any(|stride| stride.group == member.group))
    };
    let alone = |(n, node): (usize, &Node)| {
        leaves_scratch_alone(node) && (!matches!(node.op, Op::Host(Some(_))) || on_stride(n))
    };
    if !nodes.iter().enumerate().all(alone) {
        return Vec::new();
    }
    let changes = |part: Option<Part>| part.is_some_and(|part| part.changes);
    let in_place = strides.iter().all(|stride| !(changes(stride.base) && changes(stride.index)));
    let registers: &[u8] = if strides.len() <= 2 && in_place { &[T0, T1] } else { &[T1] };
    strides.iter().map(|stride| stride.group).zip(registers.iter().copied()).collect()
}
