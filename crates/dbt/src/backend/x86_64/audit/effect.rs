//! What a host instruction does to what is known.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::{
    fields,
    state::{Address, Compared, Remembered, Scratch, State},
};
use crate::{
    backend::x86_64::asm::host::{T0, T1},
    mmu::tlb::{ENTRIES, Entry, JUMPS, Jump},
    tier0::operand::gpr_index,
};

const RCX: u8 = 1;
const RSI: u8 = 6;
const RDI: u8 = 7;
const PAGE: u32 = 4096;
const HOST: i64 = Entry::HOST_OFFSET as i64;

/// A source or destination of an instruction, as far as it counts here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    Register(u8),
    Number(u64),
    /// In the vCPU block.
    Block(i64),
    /// So far from T1.
    Entry(i64),
    Other,
}

/// An operand of an instruction.
pub fn operand(i: &Instruction, n: u32) -> Operand {
    match i.op_kind(n) {
        OpKind::Register => match gpr_index(i.op_register(n)) {
            Some(register) => Operand::Register(register as u8),
            None => Operand::Other,
        },
        OpKind::Memory if is_block(i) => Operand::Block(i.memory_displacement64() as i64),
        OpKind::Memory if i.memory_base() == Register::R15 && i.memory_index() == Register::None => {
            Operand::Entry(i.memory_displacement64() as i64)
        }
        OpKind::Immediate8
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32
        | OpKind::Immediate32to64
        | OpKind::Immediate64 => Operand::Number(i.immediate(n)),
        _ => Operand::Other,
    }
}

/// Whether the memory operand is GS's base and a displacement.
pub fn is_block(i: &Instruction) -> bool {
    i.memory_segment() == Register::GS
        && i.memory_base() == Register::None
        && i.memory_index() == Register::None
}

/// Which right the tag at this distance from an entry stands for.
fn right_of(at: i64) -> Option<bool> {
    [false, true].into_iter().find(|&write| i64::from(Entry::tag_offset(write)) == at)
}

impl State {
    /// After `i`, whose written registers have been forgotten in `self`; `before` is as it was. Only what makes something
    /// known is dealt with.
    pub fn learn(&mut self, before: &State, i: &Instruction) {
        use Operand::{Block, Number, Register};
        let (a, b) = match i.op_count() {
            0 => (Operand::Other, Operand::Other),
            1 => (operand(i, 0), Operand::Other),
            _ => (operand(i, 0), operand(i, 1)),
        };
        let wide = matches!(a, Register(_)) && i.op0_register().size() == 8;
        match (i.mnemonic(), a, b) {
            (Mnemonic::Mov, Register(T0), b) if wide => self.t0 = before.loaded(b),
            (Mnemonic::Mov, Register(T1), Number(value)) => self.t1 = Scratch::Constant(value),
            (Mnemonic::Mov, Register(T1), Operand::Entry(HOST)) if wide => self.t0 = before.page_apart(),
            (Mnemonic::Mov, Register(T0), Number(value)) => self.t0 = Address::Constant(value),
            (Mnemonic::Mov, Register(T1), Register(of)) if !wide => self.t1 = Scratch::Low(of),
            (Mnemonic::Mov, Register(T1), Block(at)) if wide && at == fields::SAVED => {
                self.t1 = before.saved_scratch;
            }
            (Mnemonic::Mov, Register(RSI), Block(at)) if at == fields::SAVED => self.rsi = before.saved,
            (Mnemonic::Mov, Register(RDI), Register(T0)) => self.rdi = before.t0,
            (Mnemonic::Mov, Block(at), source) => self.stored(before, at, source),
            (Mnemonic::Sub, Register(T0), b) if wide => self.t0 = before.distance(b),
            (Mnemonic::Add, Register(T0), b) if wide => self.t0 = before.sum(b),
            (Mnemonic::And, Register(T1), Number(mask)) => {
                self.t1 = match before.t1 {
                    Scratch::Low(of) if mask == u64::from(PAGE) - 1 => Scratch::Place(of),
                    _ => Scratch::Bits(mask & 0xffff_ffff),
                };
            }
            (Mnemonic::Shl, Register(T1), Number(by)) => {
                if let Some(bits) = before.bits()
                    && by < 32
                {
                    self.t1 = Scratch::Bits(bits << by);
                }
            }
            (Mnemonic::Add, Register(T1), Block(at)) => self.t1 = before.table(at),
            (Mnemonic::Lea, Register(T1), _) if wide => self.t1 = before.end_of_run(i),
            (Mnemonic::Cmp, Register(T0), Number(limit)) if wide => {
                self.compared = limit_of(limit, Compared::T0)
            }
            (Mnemonic::Cmp, Register(T1), Number(limit)) if wide => {
                self.compared = limit_of(limit, Compared::T1)
            }
            (Mnemonic::Cmp, Register(RCX), Number(limit)) if wide => {
                self.compared = limit_of(limit, Compared::Rcx);
            }
            (Mnemonic::Cmp, Register(T0), Operand::Entry(0)) if matches!(before.t1, Scratch::Jump { .. }) => {
                self.compared = Compared::Jump;
            }
            (Mnemonic::Test, Register(T0), Register(T0)) if wide => self.compared = Compared::Zero,
            _ => {}
        }
    }

    /// What T0 holds when it was loaded from there.
    fn loaded(&self, from: Operand) -> Address {
        match from {
            Operand::Register(of) => Address::Copy(of),
            Operand::Number(value) => Address::Constant(value),
            Operand::Entry(at) => match (self.t1, right_of(at)) {
                (Scratch::Matched { write }, Some(right)) if right == write => Address::Tag { write },
                (Scratch::Matched { write }, None) if at == HOST => Address::Page { write },
                _ => Address::Any,
            },
            Operand::Block(at) if fields::is_view(at) => Address::View,
            Operand::Block(fields::SAVED) => self.saved,
            Operand::Block(at) => match fields::group(at).map(|group| self.groups[group]) {
                Some(host @ Address::Host { .. }) => host,
                _ => Address::Any,
            },
            Operand::Other => Address::Any,
        }
    }

    /// What T0 holds after a subtraction.
    fn distance(&self, of: Operand) -> Address {
        let register = if let Address::Copy(of) = self.t0 { Some(of) } else { None };
        match of {
            Operand::Entry(at) if matches!(self.t1, Scratch::Entry | Scratch::Matched { .. }) => {
                match right_of(at) {
                    Some(write) => Address::FromTag { write, of: register, limit: None },
                    None => Address::Any,
                }
            }
            Operand::Block(at) => match fields::page(at) {
                Some(group) => Address::FromPage { group, limit: None },
                None => Address::Any,
            },
            _ => Address::Any,
        }
    }

    /// What T0 holds after an addition.
    fn sum(&self, with: Operand) -> Address {
        match (self.t0, with) {
            (Address::FromTag { write, of, limit: Some(limit) }, Operand::Entry(HOST))
                if self.t1 == (Scratch::Matched { write }) =>
            {
                Address::Host { span: PAGE - limit, write, of }
            }
            (Address::FromPage { group, limit: Some(limit) }, Operand::Block(at))
                if fields::host(at) == Some(group) =>
            {
                match self.pages[group] {
                    Remembered::None => Address::Host { span: PAGE - limit, write: true, of: None },
                    Remembered::Known { write } => Address::Host { span: PAGE - limit, write, of: None },
                    _ => Address::Any,
                }
            }
            (Address::Page { write }, Operand::Block(at)) => {
                match fields::group(at).map(|group| self.groups[group]) {
                    Some(Address::FromTag { write: right, limit: Some(limit), .. }) if right == write => {
                        Address::Host { span: PAGE - limit, write, of: None }
                    }
                    _ => Address::Any,
                }
            }
            _ => Address::Any,
        }
    }

    /// T0 where T1 gets the host address of the page from its entry.
    fn page_apart(&self) -> Address {
        match (self.t0, self.t1) {
            (Address::FromTag { write, limit: Some(limit), .. }, Scratch::Matched { write: right })
                if right == write =>
            {
                Address::Sum { span: PAGE - limit, write }
            }
            _ => Address::Any,
        }
    }

    /// T1 is the address of an entry if its bits cannot lead out of the table.
    fn table(&self, base: i64) -> Scratch {
        let fits = |bits: u64, entries: usize, size: usize| {
            bits & (size as u64 - 1) == 0 && bits <= ((entries - 1) * size) as u64
        };
        match self.bits() {
            Some(bits) if base == fields::TLB && fits(bits, ENTRIES, size_of::<Entry>()) => Scratch::Entry,
            Some(bits) if base == fields::JUMPS && fits(bits, JUMPS, size_of::<Jump>()) => {
                Scratch::Jump { matched: false }
            }
            _ => Scratch::Any,
        }
    }

    /// The bits that T1 may have.
    fn bits(&self) -> Option<u64> {
        match self.t1 {
            Scratch::Bits(bits) => Some(bits),
            Scratch::Place(_) => Some(u64::from(PAGE) - 1),
            _ => None,
        }
    }

    /// `lea T1, [T1 + rcx * size]`.
    fn end_of_run(&self, i: &Instruction) -> Scratch {
        match self.t1 {
            Scratch::Place(of)
                if i.memory_base() == Register::R15
                    && i.memory_index() == Register::RCX
                    && i.memory_displacement64() == 0 =>
            {
                Scratch::End { of, size: i.memory_index_scale() }
            }
            _ => Scratch::Any,
        }
    }

    /// Something was stored in the block.
    fn stored(&mut self, before: &State, at: i64, source: Operand) {
        let t0 = if source == Operand::Register(T0) { before.t0 } else { Address::Any };
        if let Some(group) = fields::group(at) {
            self.groups[group] = t0;
        } else if let Some(group) = fields::page(at) {
            self.pages[group] = match t0 {
                Address::Constant(FAR) => Remembered::None,
                Address::Tag { write } => Remembered::Half { write },
                _ => Remembered::Unknown,
            };
        } else if let Some(group) = fields::host(at) {
            self.pages[group] = match (before.pages[group], t0) {
                (Remembered::Half { write }, Address::Page { write: right }) if right == write => {
                    Remembered::Known { write }
                }
                _ => Remembered::Unknown,
            };
        } else if at == fields::SAVED {
            self.saved = t0;
            self.saved_scratch = match before.t1 {
                kept @ Scratch::Bits(_) if source == Operand::Register(T1) => kept,
                _ => Scratch::Any,
            };
        }
    }

    /// Where a conditional jump is not taken.
    pub fn not_taken(&self, i: &Instruction) -> State {
        let mut after = *self;
        match (self.compared, i.code()) {
            (Compared::T0(limit), Code::Ja_rel32_64) if limit < PAGE => match self.t0 {
                Address::FromTag { write, of, .. } => {
                    after.t0 = Address::FromTag { write, of, limit: Some(limit) };
                    after.t1 = Scratch::Matched { write };
                }
                Address::FromPage { group, .. } => after.t0 = Address::FromPage { group, limit: Some(limit) },
                _ => {}
            },
            (Compared::T1(limit), Code::Ja_rel32_64) if limit <= PAGE => {
                if let (Scratch::End { of, size }, Address::Host { of: Some(also), write, .. }, Some(most)) =
                    (self.t1, self.t0, self.rcx)
                    && of == also
                    && most.checked_mul(size).is_some_and(|bytes| bytes <= PAGE)
                {
                    after.t0 = Address::Run { of, size, write };
                }
            }
            (Compared::Rcx(limit), Code::Ja_rel32_64) => after.rcx = Some(limit),
            (Compared::Jump, Code::Jne_rel32_64) => after.t1 = Scratch::Jump { matched: true },
            _ => {}
        }
        after
    }

    /// Where a conditional jump is taken.
    pub fn taken(&self, i: &Instruction) -> State {
        let mut after = *self;
        if let (Compared::Zero, Code::Jne_rel32_64, Address::HostOrZero { span, write }) =
            (self.compared, i.code(), self.t0)
        {
            after.t0 = Address::Host { span, write, of: None };
        }
        after
    }

    /// Whether REP MOVS or REP STOS of elements of `size` bytes stays where it may be.
    pub fn may_repeat(&self, size: u32, copies: bool) -> bool {
        let to = self.rdi == Address::Run { of: RDI, size, write: true };
        let from = matches!(self.rsi, Address::Run { of: RSI, size: of_size, .. } if of_size == size);
        to && (from || !copies)
    }
}

/// No distance from this address is small: it is none of the address space.
const FAR: u64 = 1 << 63;

fn limit_of(number: u64, what: fn(u32) -> Compared) -> Compared {
    u32::try_from(number).map_or(Compared::Nothing, what)
}
