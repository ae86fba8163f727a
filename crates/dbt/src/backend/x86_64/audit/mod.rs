//! Looks through the code of a region: does it reach guest RAM and the vCPU block only?
//!
//! Each memory operand has to lie in the vCPU block, where regions may read or write, or at an address that a probe has
//! found, within the bytes and with the right that it has asked for; the host's stack is used by calls, returns and the
//! push of the flags alone. Nothing is executed that is the system's, and direct jumps stay in the region or lead to
//! shared code. For that the scratch registers are followed along all ways through the code (`state`, `effect`): what
//! is known where ways meet is what holds on all of them.
//!
//! Two things are taken on trust: that shared code does what is said of it, and in loops that the rounds which were counted
//! before are no more than their pages have room for ([`Code::rounds`]).
//!
//! Tests switch it on, for all the code that they make.

mod effect;
mod fields;
mod state;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use iced_x86::{
    Code as Opcode, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, OpKind, Register, UsedMemory,
};

use self::{
    effect::is_block,
    state::{Address, Scratch, State},
};
use super::{
    emit::Code,
    thunks::{JUMP_HOST, Thunks},
};
use crate::{ir::ACCESS_SIZES, mmu::tlb::Entry};

/// Looks through a region's code for the address `at`, before it is linked. Says what is wrong with it.
pub fn audit(code: &Code, at: u64, thunks: &Thunks) -> Result<(), String> {
    let rounds = at + u64::from(code.rounds.start)..at + u64::from(code.rounds.end);
    let mut audit = Audit {
        code: &code.bytes,
        at,
        rounds,
        thunks,
        info: InstructionInfoFactory::new(),
        arriving: BTreeMap::new(),
        seen: BTreeSet::new(),
        jumps: BTreeSet::new(),
        constants: BTreeSet::new(),
        lowered: false,
    };
    loop {
        audit.lowered = false;
        // What is known gets less with each pass: what is wrong now stays wrong.
        audit.pass().map_err(|what| what + &audit.listing())?;
        if !audit.lowered {
            break;
        }
    }
    match audit.jumps.iter().find(|&jump| !audit.seen.contains(jump)) {
        Some(jump) => Err(format!("a jump leads to {jump:#x}, where no instruction begins")),
        None => Ok(()),
    }
}

struct Audit<'a> {
    code: &'a [u8],
    at: u64,
    rounds: Range<u64>,
    thunks: &'a Thunks,
    info: InstructionInfoFactory,
    /// What is known where jumps lead.
    arriving: BTreeMap<u64, State>,
    /// Where instructions begin, and jumps lead.
    seen: BTreeSet<u64>,
    jumps: BTreeSet<u64>,
    /// Where the region's constants of 8 bytes lie, which are not executed.
    constants: BTreeSet<u64>,
    /// Less is known than before where the pass has been.
    lowered: bool,
}

/// Where the code goes on.
struct Next {
    /// What is known there; nothing if only jumps lead there.
    state: Option<State>,
    /// Bytes of data before it.
    data: usize,
}

impl Next {
    fn on(state: State) -> Self {
        Self { state: Some(state), data: 0 }
    }

    fn elsewhere() -> Self {
        Self { state: None, data: 0 }
    }
}

impl Audit<'_> {
    /// Goes through the code once from its beginning to its end.
    fn pass(&mut self) -> Result<(), String> {
        let mut decoder = Decoder::with_ip(64, self.code, self.at, DecoderOptions::NONE);
        let mut state = Some(State::default());
        let mut i = Instruction::new();
        while decoder.can_decode() {
            if state.is_none() && self.constants.contains(&decoder.ip()) {
                self.skip(&mut decoder, CONSTANT)?;
                continue;
            }
            decoder.decode_out(&mut i);
            self.seen.insert(i.ip());
            let before = match (state, self.arriving.get(&i.ip())) {
                (Some(on), Some(arriving)) => on.meet(arriving),
                (Some(known), None) => known,
                (None, Some(&arriving)) => arriving,
                // Nothing is known to lead here: from elsewhere, with anything.
                (None, None) => State::default(),
            };
            let next = self.instruction(&i, &before);
            let next = next.map_err(|what| format!("{what}: {i} at {:#x}, with {before:?}", i.ip()))?;
            state = next.state;
            self.skip(&mut decoder, next.data)?;
        }
        Ok(())
    }

    /// Passes data.
    fn skip(&self, decoder: &mut Decoder, bytes: usize) -> Result<(), String> {
        let to = (decoder.position() + bytes).min(self.code.len());
        decoder.set_position(to).map_err(|error| error.to_string())?;
        decoder.set_ip(self.at + to as u64);
        Ok(())
    }

    /// The code as text.
    fn listing(&self) -> String {
        let decoder = Decoder::with_ip(64, self.code, self.at, DecoderOptions::NONE);
        decoder.into_iter().map(|i| format!("\n{:x} {i}", i.ip())).collect()
    }

    fn instruction(&mut self, i: &Instruction, before: &State) -> Result<Next, String> {
        if i.is_invalid() || is_the_systems(i) {
            return Err("an instruction that must not run".into());
        }
        self.stack(i, before)?;
        let used = self.info.info(i).clone();
        let constant = i.is_ip_rel_memory_operand();
        if constant {
            self.constant(i)?;
        }
        for memory in used.used_memory().iter().filter(|memory| !constant || memory.base() == Register::RSP) {
            let counted = self.rounds.contains(&i.ip()) && is_operand(i, memory);
            match check_access(i, before, memory) {
                Err(_) if counted => {}
                checked => checked?,
            }
        }
        let mut after = *before;
        for register in used.used_registers() {
            let written =
                !matches!(register.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
            let register = register.register();
            if written && (register.is_segment_register() || register.is_cr() || register.is_dr()) {
                return Err("a register of the system is written".into());
            }
            if written && register.is_gpr() {
                after.forget((register.full_register() as usize - Register::RAX as usize) as u8);
            }
        }
        if i.rflags_modified() != 0 {
            after.compared = state::Compared::Nothing;
        }
        after.pushed = matches!(i.mnemonic(), Mnemonic::Pushfq | Mnemonic::Push);
        match i.flow_control() {
            FlowControl::Next => {
                after.learn(before, i);
                Ok(Next::on(after))
            }
            _ => self.flow(i, before, after),
        }
    }

    /// A constant of the region is compared or pushed. What lies there is data from now on.
    fn constant(&mut self, i: &Instruction) -> Result<(), String> {
        let at = i.ip_rel_memory_address();
        let behind = self.at + self.code.len() as u64;
        let compared = i.code() == Opcode::Cmp_r64_rm64;
        let reads = (compared || i.code() == Opcode::Push_rm64) && i.segment_prefix() == Register::None;
        if !reads || at <= i.ip() || at + CONSTANT as u64 > behind {
            return Err("an address that is no constant of the region".into());
        }
        self.constants.insert(at);
        Ok(())
    }

    /// The host's stack takes flags and constants for a moment, and return addresses.
    fn stack(&self, i: &Instruction, before: &State) -> Result<(), String> {
        let pops = i.mnemonic() == Mnemonic::Pop;
        if pops != before.pushed {
            return Err("something is left on the stack, or taken from it".into());
        }
        let allowed = match i.mnemonic() {
            Mnemonic::Pushfq | Mnemonic::Call => true,
            Mnemonic::Push => i.is_ip_rel_memory_operand(),
            Mnemonic::Pop => {
                i.op0_kind() == OpKind::Memory && (is_block(i) || i.memory_base() == Register::R14)
            }
            Mnemonic::Ret => i.op_count() == 0,
            _ => !i.is_stack_instruction(),
        };
        // CMP is how the room on it is looked at.
        let named = (0..i.op_count())
            .any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).full_register() == Register::RSP);
        if !allowed || (named && i.mnemonic() != Mnemonic::Cmp) {
            return Err("the host's stack is touched".into());
        }
        Ok(())
    }

    fn flow(&mut self, i: &Instruction, before: &State, after: State) -> Result<Next, String> {
        match i.flow_control() {
            FlowControl::ConditionalBranch => {
                let target = i.near_branch_target();
                if target != self.thunks.unforeseen_return {
                    self.arrive(i, target, before.taken(i))?;
                }
                Ok(Next::on(before.not_taken(i)))
            }
            FlowControl::UnconditionalBranch => {
                let Thunks { interpret, system_call, system_return, .. } = *self.thunks;
                let target = i.near_branch_target();
                if ![interpret, system_call, system_return].contains(&target) {
                    self.arrive(i, target, *before)?;
                }
                Ok(Next::elsewhere())
            }
            FlowControl::Call => self.call(i.near_branch_target(), i, before, after),
            FlowControl::IndirectBranch
                if i.memory_base() == Register::R15
                    && i.memory_displacement64() == JUMP_HOST as u64
                    && before.t1 == (Scratch::Jump { matched: true }) =>
            {
                Ok(Next::elsewhere())
            }
            FlowControl::IndirectCall
                if effect::operand(i, 0) == effect::Operand::Entry(JUMP_HOST.into())
                    && before.t1 == (Scratch::Jump { matched: true }) =>
            {
                Ok(Next::on(State::default()))
            }
            FlowControl::Return => Ok(Next::elsewhere()),
            _ => Err("a jump to anywhere".into()),
        }
    }

    fn call(
        &mut self,
        target: u64,
        i: &Instruction,
        before: &State,
        mut after: State,
    ) -> Result<Next, String> {
        let t = self.thunks;
        if target == t.exit_link || target == t.lookup_link {
            // The link's number.
            return Ok(Next { state: None, data: 4 });
        }
        if target == t.exit_poll || target == t.exit_miss {
            return Ok(Next::elsewhere());
        }
        let sizes = ACCESS_SIZES.into_iter().zip(t.slow_access);
        let access = sizes.flat_map(|(size, to)| [(size, false, to[0]), (size, true, to[1])]);
        if let Some((size, write, _)) = access.into_iter().find(|&(.., to)| to == target) {
            after.set_t1(Scratch::Any);
            after.t0 = Address::Host { span: size.into(), write, of: None };
        } else if target == t.slow_group {
            let Scratch::Constant(kind) = before.t1 else { return Err("a group of any size".into()) };
            after.set_t1(Scratch::Any);
            after.t0 = Address::HostOrZero { span: (kind & 0xffff) as u32, write: kind >> 16 != 0 };
        } else if target == t.step {
            after.forget_registers();
        } else if target == t.forget_returns {
            after.set_t1(Scratch::Any);
        } else if ![t.load_vectors, t.load_x87].contains(&target) {
            after = State::default();
            self.arrive(i, target, after)?;
        }
        Ok(Next::on(after))
    }

    /// A jump leads to `target` with what is known there.
    fn arrive(&mut self, i: &Instruction, target: u64, state: State) -> Result<(), String> {
        if !(self.at..self.at + self.code.len() as u64).contains(&target) {
            return Err(format!("a jump out of the region to {target:#x}"));
        }
        self.jumps.insert(target);
        let known = self.arriving.get(&target).map_or(state, |known| known.meet(&state));
        let old = self.arriving.insert(target, known);
        self.lowered |= old != Some(known) && target <= i.ip();
        Ok(())
    }
}

/// Bytes of a constant.
const CONSTANT: usize = 8;

/// Whether an instruction is for the system, or lets the program see or change how the host runs.
fn is_the_systems(i: &Instruction) -> bool {
    use Mnemonic as M;
    let odd = matches!(
        i.mnemonic(),
        M::Syscall
            | M::Sysenter
            | M::Popf
            | M::Popfq
            | M::Std
            | M::Cpuid
            | M::Rdtscp
            | M::Rdpid
            | M::Rdpru
            | M::Rdpmc
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Rdfsbase
            | M::Rdgsbase
            | M::Wrfsbase
            | M::Wrgsbase
            | M::Xgetbv
            | M::Rdpkru
            | M::Wrpkru
            | M::Monitorx
            | M::Mwaitx
            | M::Umonitor
            | M::Umwait
            | M::Tpause
            | M::Senduipi
            | M::Stui
            | M::Clui
            | M::Enter
            | M::Leave
    );
    odd || i.is_privileged()
        || matches!(
            i.flow_control(),
            FlowControl::Interrupt | FlowControl::XbeginXabortXend | FlowControl::Exception
        )
        || matches!(i.code(), Opcode::Retfq | Opcode::Retfd | Opcode::Retfw)
}

/// Whether an access may be one by an address that was looked up before the rounds of a loop: explicit, without a segment, by
/// any register but the host's stack pointer.
fn is_operand(i: &Instruction, memory: &UsedMemory) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
        && memory.segment() == Register::DS
        && memory.base().is_gpr64()
        && memory.base() != Register::RSP
        && (1..=32).contains(&memory.memory_size().size())
}

/// Looks at one access of an instruction.
fn check_access(i: &Instruction, before: &State, memory: &UsedMemory) -> Result<(), String> {
    let (reads, writes) = match memory.access() {
        OpAccess::NoMemAccess | OpAccess::None => return Ok(()),
        OpAccess::Read | OpAccess::CondRead => (true, false),
        OpAccess::Write | OpAccess::CondWrite => (false, true),
        _ => (true, true),
    };
    let size = memory.memory_size().size();
    let displacement = memory.displacement() as i64;
    let bare = memory.index() == Register::None;
    match (memory.segment(), memory.base()) {
        (Register::GS, Register::None) if bare => {
            let pointer = displacement == fields::TLB && before.t0 != Address::View;
            let fits = size > 0
                && (!reads || fields::may_read(displacement, size))
                && (!writes || (fields::may_write(displacement, size) && !pointer));
            fits.then_some(()).ok_or_else(|| "a field of the vCPU block that regions leave alone".into())
        }
        (Register::FS | Register::GS, _) => Err("a segment".into()),
        // Pushes, pops, calls and returns.
        (Register::SS, Register::RSP) if i.is_stack_instruction() => Ok(()),
        (_, Register::R14) if bare => {
            let Address::Host { span, write, .. } = before.t0 else {
                return Err("an address that no probe has found".into());
            };
            let fits = size > 0 && displacement >= 0 && displacement + size as i64 <= span.into();
            let bit = bit_stays(i, before, size);
            let allowed = fits && bit && (write || !writes);
            allowed.then_some(()).ok_or_else(|| format!("{size} bytes that the probe has not asked for"))
        }
        (_, Register::R14) if memory.index() == Register::R15 && memory.scale() == 1 => {
            let Some((span, write)) = before.sum_of_both() else {
                return Err("a sum that no probe has found".into());
            };
            let fits = size > 0 && displacement == 0 && size <= span as usize;
            let allowed = fits && bit_stays(i, before, size) && (write || !writes);
            allowed.then_some(()).ok_or_else(|| format!("{size} bytes that the probe has not asked for"))
        }
        (_, Register::R15) if bare && !writes => {
            let last = match before.t1 {
                Scratch::Entry | Scratch::Matched { .. } => i64::from(Entry::HOST_OFFSET),
                Scratch::Jump { .. } => i64::from(JUMP_HOST),
                _ => return Err("an address that is no entry".into()),
            };
            let fits = size == 8 && (0..=last).contains(&displacement);
            fits.then_some(()).ok_or_else(|| "bytes behind an entry".into())
        }
        (_, Register::RSI | Register::RDI) if i.has_rep_prefix() => {
            let copies =
                matches!(i.mnemonic(), Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq);
            let fills =
                matches!(i.mnemonic(), Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq);
            let allowed = (copies || fills) && before.may_repeat(i.memory_size().size() as u32, copies);
            allowed.then_some(()).ok_or_else(|| "a string that may leave its page".into())
        }
        _ => Err("an address that is not T0's".into()),
    }
}

/// Whether the bit of an instruction that counts bits from its operand on lies in the operand.
fn bit_stays(i: &Instruction, before: &State, size: usize) -> bool {
    let counts = matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    if !counts || i.op1_kind() != OpKind::Register {
        return true;
    }
    let masked = matches!(before.t1, Scratch::Bits(bits) if bits < 8 * size as u64);
    i.op1_register().full_register() == Register::R15 && masked
}
