//! Accesses of a region that lie together: one probe serves them all.
//!
//! Registers are followed through the region as an unknown plus a known distance, so that pushes, locals and the fields of
//! a structure are seen to be neighbours. The first access of a group, its leader, makes sure that all of its bytes lie on
//! one page that may be accessed, and leaves their host address in the vCPU block. The others take it from there, without
//! a look at the TLB and without harm to the flags. What the leader found holds to the region's end: nobody takes an
//! entry of the TLB away but between regions.
//!
//! A region whose end leads back to its beginning is a loop and stays in itself. Groups whose addresses move on by the same
//! distance in each round, or stand still, are [`Stride`]s: how many rounds they stay on their pages is known before the
//! rounds are made. Where the address walks in another way or lies in a small table, a leader remembers the page that it
//! was on, and looks at the TLB when it comes to another.

mod strides;

pub use strides::{Part, Stride};

use iced_x86::{
    Code, Instruction, InstructionInfoFactory, InstructionInfoOptions, OpAccess, OpKind, Register,
};

use crate::{
    ir::{Base, MemUse, Node, Op, Region, Value},
    tier0::operand::gpr_index,
};

/// Most groups of a region: as many places as the block has for them.
pub const GROUPS: usize = 16;
/// Most bytes from the first to the last of a group. The more, the more often they lie on two pages.
const SPAN: i64 = 128;

/// Most groups of a loop that remember their pages. More of them cost more on entry than the few rounds of a large loop
/// bring.
const WALKERS: usize = 4;

/// An access of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Number of the group.
    pub group: u8,
    /// Bytes from the group's first one.
    pub at: u8,
    /// What the first access of a group has to make sure of.
    pub leads: Option<Lead>,
}

/// A group as its leader sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lead {
    /// Bytes from the group's first to its last.
    pub span: u16,
    /// Somebody writes.
    pub write: bool,
    /// It has other members.
    pub followed: bool,
    /// It remembers its page.
    pub walks: bool,
}

/// What is found about the accesses of a region.
#[derive(Default)]
pub struct Plan {
    /// The places of its nodes; empty if there are no groups.
    pub places: Vec<Places>,
    /// The node that leads back to the beginning, if the region is a loop.
    pub back: Option<usize>,
    /// Groups whose leaders remember their pages.
    pub walking: Vec<u8>,
    /// Groups that move on evenly.
    pub strides: Vec<Stride>,
    /// A register that moves on by so much in each round, if one of the strides moves.
    pub counter: Option<(u8, i32)>,
}

/// The places of a node's accesses: of its memory operand, of its push or pop.
pub type Places = [Option<Member>; 2];
/// Index of a memory operand in [`Places`].
pub const OPERAND: usize = 0;
/// Index of a push or pop in [`Places`].
pub const STACK: usize = 1;

/// A value in terms of one that is not known.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Known {
    root: u16,
    distance: i64,
}

/// What the addresses of a group have in common.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    base: u16,
    index: u16,
    scale: u8,
    segment: Register,
}

/// The root of addresses that are constants, or have no index.
const NONE: u16 = 0;

struct Group {
    key: Key,
    min: i64,
    max: i64,
    write: bool,
    /// Branches before its leader.
    branches: u32,
    /// Node and place of its accesses, with their distance.
    members: Vec<(usize, usize, i64)>,
    open: bool,
    /// Its address walks or stands still from round to round of the loop.
    walks: bool,
    /// All of its members are operands of the identity lane, made of the very registers that are its key.
    direct: bool,
    stride: Option<Stride>,
}

/// Finds the groups of a region.
pub fn find(region: &Region, info: &mut InstructionInfoFactory) -> Plan {
    let back = back_edge(region);
    let least = if back.is_some() { 1 } else { 2 };
    if region.nodes.iter().map(|node| accesses(&node.op)).sum::<usize>() < least {
        return Plan { back, ..Plan::default() };
    }
    let mut finder = Finder::new(info);
    let (round, rest) = region.nodes.split_at(back.map_or(0, |back| back + 1));
    for (n, node) in round.iter().enumerate() {
        finder.node_of_loop(n, node);
    }
    let counter = back.and_then(|_| finder.course());
    for (n, node) in rest.iter().enumerate() {
        finder.node(round.len() + n, node);
    }
    finder.plan(region.nodes.len(), back, counter)
}

/// The branch that makes the region a loop. Flags that would have to come along are too much trouble, as is a view of
/// memory that changes.
fn back_edge(region: &Region) -> Option<usize> {
    let leads_back = |node: &Node| matches!(node.op, Op::Branch { target, .. } | Op::Jump { target } if target == region.start);
    let back = region.nodes.iter().rposition(|node| leads_back(node) && node.live_at_exit == 0)?;
    let changes_view = |node: &Node| matches!(node.op, Op::SwapGs | Op::WriteBase(_) | Op::UserAccess(_));
    (!region.nodes[..back].iter().any(changes_view)).then_some(back)
}

/// How many accesses an operation makes that may be in a group.
fn accesses(op: &Op) -> usize {
    match op {
        Op::Host(Some(_)) | Op::Pop(_) | Op::PushFlags | Op::Leave | Op::Call { .. } | Op::Return(_) => 1,
        Op::Push(Value::Mem) | Op::CallTo(Value::Mem) => 2,
        Op::Push(_) | Op::CallTo(_) | Op::JumpTo(Value::Mem) => 1,
        _ => 0,
    }
}

struct Finder<'a> {
    info: &'a mut InstructionInfoFactory,
    registers: [Known; 16],
    roots: u16,
    branches: u32,
    groups: Vec<Group>,
    /// Registers to which others were added, which walk if nothing else happens to them.
    added: u16,
    /// Registers that changed.
    changed: u16,
    /// Roots that are never more than something small: an index of this kind stays in its table.
    small: Vec<(u16, u32)>,
}

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RSP: usize = 4;
const RBP: usize = 5;
const RSI: usize = 6;
const RDI: usize = 7;
const WORD: MemUse = MemUse { write: false, size: 8 };
const PUSHED: MemUse = MemUse { write: true, size: 8 };

impl<'a> Finder<'a> {
    fn new(info: &'a mut InstructionInfoFactory) -> Self {
        let registers = std::array::from_fn(|n| Known { root: initial(n), distance: 0 });
        Self {
            info,
            registers,
            roots: 17,
            branches: 0,
            groups: Vec::new(),
            added: 0,
            changed: 0,
            small: Vec::new(),
        }
    }

    /// As [`Self::node`]; keeps account of the registers that change.
    fn node_of_loop(&mut self, n: usize, node: &Node) {
        let before = self.registers;
        self.node(n, node);
        for (register, (before, now)) in before.iter().zip(&self.registers).enumerate() {
            self.changed |= u16::from(before != now) << register;
        }
    }

    fn node(&mut self, n: usize, node: &Node) {
        let insn = &node.insn;
        match node.op {
            Op::Host(mem) => {
                if let Some(mem) = mem {
                    self.operand(n, insn, mem, self.direct(insn));
                }
                self.host(insn);
            }
            Op::Address => self.address(insn),
            Op::Push(value) => {
                if value == Value::Mem {
                    self.operand(n, insn, WORD, false);
                }
                self.push(n);
            }
            Op::CallTo(value) => {
                let before = self.registers[RSP];
                self.push(n);
                if value == Value::Mem {
                    let after = std::mem::replace(&mut self.registers[RSP], before);
                    self.operand(n, insn, WORD, false);
                    self.registers[RSP] = after;
                }
            }
            Op::PushFlags | Op::Call { .. } => self.push(n),
            Op::JumpTo(Value::Mem) => self.operand(n, insn, WORD, false),
            Op::Pop(register) => {
                self.stack(n, self.registers[RSP], WORD);
                self.registers[RSP].distance += 8;
                self.forget(register.into());
            }
            Op::Return(_) => self.stack(n, self.registers[RSP], WORD),
            Op::Leave => {
                let frame = self.registers[RBP];
                self.stack(n, frame, WORD);
                self.registers[RSP] = Known { distance: frame.distance.wrapping_add(8), ..frame };
                self.forget(RBP);
            }
            Op::ReadSelector { to, .. } => self.forget(to.into()),
            Op::ReadBase(Base { register, .. }) => self.forget(register.into()),
            Op::ReadControl { to, .. } => self.forget(to.into()),
            Op::TimeStamp { .. } => [RAX, RCX, RDX].into_iter().for_each(|register| self.forget(register)),
            Op::Branch { .. } => self.branches += 1,
            Op::Repeat(_) => [RCX, RSI, RDI].into_iter().for_each(|register| self.forget(register)),
            // Another segment, another view of memory, or anything at all.
            Op::SwapGs | Op::WriteBase(_) | Op::UserAccess(_) => self.close(),
            Op::Step | Op::Interpret => {
                self.close();
                (0..16).for_each(|register| self.forget(register));
            }
            Op::Nop
            | Op::DisableInterrupts
            | Op::EnableInterrupts
            | Op::ClearDirection
            | Op::BitString(_)
            | Op::Jump { .. }
            | Op::JumpTo(_) => {}
        }
    }

    fn close(&mut self) {
        self.groups.iter_mut().for_each(|group| group.open = false);
    }

    /// A register gets a value of which nothing is known.
    fn forget(&mut self, register: usize) {
        self.registers[register] = Known { root: self.roots, distance: 0 };
        self.roots += 1;
    }

    fn push(&mut self, n: usize) {
        let rsp = &mut self.registers[RSP];
        rsp.distance = rsp.distance.wrapping_sub(8);
        let at = *rsp;
        self.stack(n, at, PUSHED);
    }

    fn stack(&mut self, n: usize, at: Known, mem: MemUse) {
        let key = Key { base: at.root, index: NONE, scale: 1, segment: Register::None };
        self.join((n, STACK, at.distance), key, mem, false);
    }

    /// What an instruction of the identity lane does to the registers.
    fn host(&mut self, i: &Instruction) {
        let target = (i.op_count() > 0 && i.op0_kind() == OpKind::Register).then(|| i.op0_register());
        if let Some(target) = target.filter(|r| r.is_gpr64()).and_then(gpr_index) {
            if matches!(
                i.code(),
                Code::Add_rm64_r64 | Code::Add_r64_rm64 | Code::Sub_rm64_r64 | Code::Sub_r64_rm64
            ) && self.registers[target].root == initial(target)
            {
                self.added |= 1 << target;
            }
            let distance = match i.code() {
                Code::Add_rm64_imm8 | Code::Add_rm64_imm32 | Code::Add_RAX_imm32 => {
                    Some(i.immediate(1) as i64)
                }
                Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 | Code::Sub_RAX_imm32 => {
                    Some((i.immediate(1) as i64).wrapping_neg())
                }
                Code::Inc_rm64 => Some(1),
                Code::Dec_rm64 => Some(-1),
                _ => None,
            };
            if let Some(distance) = distance {
                let value = &mut self.registers[target];
                value.distance = value.distance.wrapping_add(distance);
                return;
            }
            if matches!(i.code(), Code::Mov_r64_rm64 | Code::Mov_rm64_r64)
                && i.op1_kind() == OpKind::Register
                && let Some(source) = gpr_index(i.op1_register())
            {
                self.registers[target] = self.registers[source];
                return;
            }
        }
        let written = self.info.info_options(i, InstructionInfoOptions::NO_MEMORY_USAGE);
        let mut mask = 0u16;
        for used in written.used_registers() {
            if !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess)
                && let Some(register) = gpr_index(used.register().full_register())
            {
                mask |= 1 << register;
            }
        }
        (0..16).filter(|register| mask >> register & 1 != 0).for_each(|register| self.forget(register));
        if let Some(most) = strides::most_after(i) {
            self.small.push((self.roots - 1, most));
        }
    }

    /// LEA.
    fn address(&mut self, i: &Instruction) {
        let Some(target) = gpr_index(i.op0_register()) else { return };
        match self.known(i) {
            Some((key, distance)) if i.op0_register().is_gpr64() && key.index == NONE && key.base != NONE => {
                self.registers[target] = Known { root: key.base, distance };
            }
            _ => self.forget(target),
        }
    }

    /// The address of a memory operand without its segment; nothing for one of 32 bits.
    fn known(&self, i: &Instruction) -> Option<(Key, i64)> {
        if i.is_ip_rel_memory_operand() {
            // The scale tells it from an address that stays where it is when the code moves.
            let key = Key { base: NONE, index: NONE, scale: 0, segment: Register::None };
            return (i.memory_base() == Register::RIP).then_some((key, i.memory_displacement64() as i64));
        }
        let part = |register: Register| match register {
            Register::None => Some(Known { root: NONE, distance: 0 }),
            _ => {
                register.is_gpr64().then(|| self.registers[gpr_index(register).expect("a general register")])
            }
        };
        let (base, index) = (part(i.memory_base())?, part(i.memory_index())?);
        let scale = i.memory_index_scale() as u8;
        let distance = base
            .distance
            .wrapping_add(index.distance.wrapping_mul(scale.into()))
            .wrapping_add(i.memory_displacement64() as i64);
        Some((Key { base: base.root, index: index.root, scale, segment: Register::None }, distance))
    }

    fn operand(&mut self, n: usize, i: &Instruction, mem: MemUse, direct: bool) {
        let Some((mut key, distance)) = self.known(i) else { return };
        if matches!(i.memory_segment(), Register::FS | Register::GS) {
            key.segment = i.memory_segment();
        }
        self.join((n, OPERAND, distance), key, mem, direct);
    }

    /// Whether the registers of a memory operand are still those that held their roots at the beginning, or the index is one
    /// into a table.
    fn direct(&self, i: &Instruction) -> bool {
        let root = |register| gpr_index(register).map(|r| (r, self.registers[r].root));
        let own = |register| root(register).is_none_or(|(r, root)| root == initial(r));
        let small = |register| root(register).is_some_and(|(_, root)| self.small.iter().any(|s| s.0 == root));
        own(i.memory_base()) && (own(i.memory_index()) || small(i.memory_index()))
    }

    /// Puts an access into the latest group that it fits, or into one of its own. A write that may not come about does not
    /// make its group one that needs the right to write.
    fn join(&mut self, member: (usize, usize, i64), key: Key, mem: MemUse, direct: bool) {
        let distance = member.2;
        let end = distance.wrapping_add(mem.size.into());
        let branches = self.branches;
        let fits = |group: &&mut Group| {
            let (min, max) = (group.min.min(distance), group.max.max(end));
            group.open
                && group.key == key
                && max.checked_sub(min).is_some_and(|span| (0..=SPAN).contains(&span))
                && (!mem.write || group.write || group.branches == branches)
        };
        match self.groups.iter_mut().rev().find(fits) {
            Some(group) => {
                (group.min, group.max) = (group.min.min(distance), group.max.max(end));
                group.write |= mem.write;
                group.direct &= direct;
                group.members.push(member);
            }
            None => self.groups.push(Group {
                key,
                min: distance,
                max: end,
                write: mem.write,
                branches,
                members: vec![member],
                open: true,
                walks: false,
                direct,
                stride: None,
            }),
        }
    }

    fn plan(self, nodes: usize, back: Option<usize>, counter: Option<(u8, i32)>) -> Plan {
        let mut plan = Plan { back, counter, ..Plan::default() };
        let worth = |group: &&Group| group.walks || group.stride.is_some() || group.members.len() > 1;
        for (number, group) in (0u8..).zip(self.groups.iter().filter(worth).take(GROUPS)) {
            plan.places.resize(nodes, Places::default());
            if group.walks {
                plan.walking.push(number);
            }
            if let Some(stride) = group.stride {
                plan.strides.push(Stride { group: number, ..stride });
            }
            let mut leads = Some(group.lead());
            for &(n, place, distance) in &group.members {
                let at = (distance - group.min) as u8;
                plan.places[n][place] = Some(Member { group: number, at, leads: leads.take() });
            }
        }
        plan
    }
}

impl Group {
    fn lead(&self) -> Lead {
        Lead {
            span: (self.max - self.min) as u16,
            write: self.write,
            followed: self.members.len() > 1,
            walks: self.walks,
        }
    }
}

/// The root of what a register holds when the region begins.
fn initial(register: usize) -> u16 {
    register as u16 + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::x86_64::{CodeMode, Lifter, Piece};

    fn groups(code: &[u8]) -> Vec<Places> {
        plan(code).places
    }

    pub(super) fn plan(code: &[u8]) -> Plan {
        let mode =
            CodeMode { kernel: true, x87: true, sse: true, avx: true, tsc: true, bases: true, plain: false };
        let region = Lifter::new(Box::new(|_| true), true)
            .lift(0x1000, Piece { start: 0x1000, bytes: code }, mode)
            .unwrap();
        find(&region, &mut InstructionInfoFactory::new())
    }

    fn member(group: u8, at: u8) -> Option<Member> {
        Some(Member { group, at, leads: None })
    }

    fn leader(group: u8, at: u8, span: u16, write: bool) -> Option<Member> {
        Some(Member { group, at, leads: Some(Lead { span, write, followed: true, walks: false }) })
    }

    #[test]
    fn pushes_and_locals_are_one_group() {
        // push rbp; mov rbp, rsp; push rbx; sub rsp, 18h; mov [rbp-20h], rdi; mov rax, [rsp+8]; ret
        let code = [
            0x55, 0x48, 0x89, 0xe5, 0x53, 0x48, 0x83, 0xec, 0x18, 0x48, 0x89, 0x7d, 0xe0, 0x48, 0x8b, 0x44,
            0x24, 0x08, 0xc3,
        ];
        let places = groups(&code);
        let at: Vec<_> = places.iter().flatten().flatten().map(|member| (member.group, member.at)).collect();
        assert_eq!(at, [(0, 32), (0, 24), (0, 0), (0, 8), (0, 0)]);
        assert_eq!(places[0][STACK], leader(0, 32, 40, true));
    }

    #[test]
    fn a_register_that_changes_leads_to_another_group() {
        // mov eax, [rdi]; mov ecx, [rdi+4]; mov rdi, [rdi+8]; mov eax, [rdi]; mov ecx, [rdi+4]; ret
        let code = [0x8b, 0x07, 0x8b, 0x4f, 0x04, 0x48, 0x8b, 0x7f, 0x08, 0x8b, 0x07, 0x8b, 0x4f, 0x04, 0xc3];
        let places = groups(&code);
        assert_eq!(places[0][OPERAND], leader(0, 0, 16, false));
        assert_eq!((places[1][OPERAND], places[2][OPERAND]), (member(0, 4), member(0, 8)));
        assert_eq!((places[3][OPERAND], places[4][OPERAND]), (leader(1, 0, 8, false), member(1, 4)));
    }

    #[test]
    fn the_high_byte_of_a_register_is_part_of_it() {
        // mov ecx, [rax]; mov ah, 1; mov ecx, [rax+4]; ret
        assert!(groups(&[0x8b, 0x08, 0xb4, 0x01, 0x8b, 0x48, 0x04, 0xc3]).is_empty());
    }

    #[test]
    fn a_write_behind_a_branch_asks_no_right_of_a_read_before_it() {
        // mov eax, [rdi]; test eax, eax; je +2; mov [rdi], ecx; mov [rdi+4], ecx; ret
        let code = [0x8b, 0x07, 0x85, 0xc0, 0x74, 0x02, 0x89, 0x0f, 0x89, 0x4f, 0x04, 0xc3];
        let places = groups(&code);
        assert_eq!(places[0][OPERAND], None);
        assert_eq!((places[3][OPERAND], places[4][OPERAND]), (leader(0, 0, 8, true), member(0, 4)));
        // mov eax, [rdi]; mov [rdi+4], ecx; ret
        let places = groups(&[0x8b, 0x07, 0x89, 0x4f, 0x04, 0xc3]);
        assert_eq!(places[0][OPERAND], leader(0, 0, 8, true));
    }

    #[test]
    fn what_is_far_apart_or_behind_a_barrier_is_not_a_group() {
        // mov eax, [rdi]; mov ecx, [rdi+80h]; ret
        assert!(groups(&[0x8b, 0x07, 0x8b, 0x8f, 0x80, 0, 0, 0, 0xc3]).is_empty());
        // mov eax, [rdi]; stac; mov ecx, [rdi]; ret
        assert!(groups(&[0x8b, 0x07, 0x0f, 0x01, 0xcb, 0x8b, 0x0f, 0xc3]).is_empty());
        // mov eax, [rdi]; rep movsb; mov ecx, [rdi]; ret
        assert!(groups(&[0x8b, 0x07, 0xf3, 0xa4, 0x8b, 0x0f, 0xc3]).is_empty());
    }

    #[test]
    fn an_index_that_moves_on_is_followed() {
        // mov eax, [rdi+rcx*4]; inc rcx; add eax, [rdi+rcx*4]; mov edx, [rdi+rcx*8]; ret
        let code = [0x8b, 0x04, 0x8f, 0x48, 0xff, 0xc1, 0x03, 0x04, 0x8f, 0x8b, 0x14, 0xcf, 0xc3];
        let places = groups(&code);
        assert_eq!((places[0][OPERAND], places[2][OPERAND]), (leader(0, 0, 8, false), member(0, 4)));
        assert_eq!(places[3][OPERAND], None);
    }

    #[test]
    fn a_loop_that_needs_flags_or_changes_the_view_is_none() {
        // adc rax, [rdi]; dec rcx; jne; ret
        assert_eq!(plan(&[0x48, 0x13, 0x07, 0x48, 0xff, 0xc9, 0x75, 0xf8, 0xc3]).back, None);
        // stac; mov [rdi], al; clac; dec rcx; jne; ret
        let code = [0x0f, 0x01, 0xcb, 0x88, 0x07, 0x0f, 0x01, 0xca, 0x48, 0xff, 0xc9, 0x75, 0xf3, 0xc3];
        assert_eq!(plan(&code).back, None);
    }

    #[test]
    fn constants_and_segments_are_told_apart() {
        // mov eax, [rip+100h]; mov ecx, [rip+100h]; mov edx, gs:[8]; mov esi, gs:[10h]; mov edi, [8]; ret
        let code = [
            0x8b, 0x05, 0, 1, 0, 0, 0x8b, 0x0d, 0, 1, 0, 0, 0x65, 0x8b, 0x14, 0x25, 8, 0, 0, 0, 0x65, 0x8b,
            0x34, 0x25, 0x10, 0, 0, 0, 0x8b, 0x3c, 0x25, 8, 0, 0, 0, 0xc3,
        ];
        let places = groups(&code);
        assert_eq!((places[0][OPERAND], places[1][OPERAND]), (leader(0, 0, 10, false), member(0, 6)));
        assert_eq!((places[2][OPERAND], places[3][OPERAND]), (leader(1, 0, 12, false), member(1, 8)));
        assert_eq!(places[4][OPERAND], None);
    }
}
