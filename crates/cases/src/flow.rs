//! How control and flags flow through a case.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, RflagsBits};

use crate::case::{Case, MOST};

/// The six arithmetic flags.
pub const ARITHMETIC: u64 = 0x8d5;

/// Flags of RFLAGS by the decoder's notation.
pub fn flags(bits: u32) -> u64 {
    [
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
        (RflagsBits::AF, 4),
        (RflagsBits::ZF, 6),
        (RflagsBits::SF, 7),
        (RflagsBits::OF, 11),
    ]
    .into_iter()
    .filter(|(bit, _)| bits & bit != 0)
    .map(|(_, at)| 1 << at)
    .sum()
}

/// Whether the instruction is a shift, which by nothing leaves the flags alone.
fn is_shift(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

/// Flags that are undefined behind an instruction. One that may leave the flags alone takes nothing back.
pub fn undefined_after(i: &Instruction, before: u64) -> u64 {
    let conditional = is_shift(i) || i.is_string_instruction();
    let defined = if conditional { 0 } else { flags(i.rflags_modified() & !i.rflags_undefined()) };
    before & !defined | flags(i.rflags_undefined())
}

/// Flags that an instruction gives new values, whatever its operands.
fn overwritten(i: &Instruction) -> u64 {
    let by_nothing = is_shift(i) && {
        let count = i.op_count() - 1;
        let bits = if i.op0_register().is_gpr64() { 63 } else { 31 };
        i.op_kind(0) != OpKind::Register
            || i.op_kind(count) == OpKind::Register
            || i.immediate(count) & bits == 0
    };
    if by_nothing || i.is_string_instruction() { 0 } else { flags(i.rflags_modified()) }
}

/// The instructions of a case and where each may lead.
pub struct Flow {
    instructions: Vec<Instruction>,
    successors: Vec<Vec<usize>>,
    /// Where each may lead is not all known.
    open: Vec<bool>,
}

impl Flow {
    /// The flow of a case.
    pub fn of(case: &Case) -> Self {
        let instructions: Vec<_> = (0..case.count).map(|n| case.instruction(n)).collect();
        // Addresses that the program takes: of labels, and of what lies behind a call.
        let taken: Vec<usize> = (instructions.iter())
            .filter_map(|i| match i.flow_control() {
                FlowControl::Call | FlowControl::IndirectCall => case.index_of(i.next_ip()),
                _ if i.is_ip_rel_memory_operand() => case.index_of(i.memory_displacement64()),
                _ => None,
            })
            .collect();
        let target = |i: &Instruction| case.index_of(i.near_branch_target());
        let successors = (instructions.iter().enumerate())
            .map(|(n, i)| match i.flow_control() {
                FlowControl::Next | FlowControl::Exception => vec![n + 1],
                FlowControl::ConditionalBranch => [Some(n + 1), target(i)].into_iter().flatten().collect(),
                FlowControl::UnconditionalBranch | FlowControl::Call => target(i).into_iter().collect(),
                _ => taken.clone(),
            })
            .collect();
        let open = instructions.iter().map(|i| {
            matches!(
                i.flow_control(),
                FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::Return
            )
        });
        Self { open: open.collect(), instructions, successors }
    }

    /// Flags that are undefined before each instruction, and at the end.
    pub fn undefined(&self) -> [u64; MOST + 1] {
        let mut before = [0; MOST + 1];
        loop {
            let old = before;
            for (n, i) in self.instructions.iter().enumerate() {
                let after = undefined_after(i, before[n]);
                for &next in &self.successors[n] {
                    before[next] |= after;
                }
            }
            if before == old {
                return before;
            }
        }
    }

    /// Flags that some continuation from the numbered instruction reads before it overwrites them.
    pub fn live_before(&self, index: usize) -> u64 {
        let mut live = vec![0; self.instructions.len() + 1];
        live[self.instructions.len()] = ARITHMETIC;
        loop {
            let old = live.clone();
            for (n, i) in self.instructions.iter().enumerate().rev() {
                let behind = self.successors[n].iter().fold(0, |all, &next| all | live[next]);
                let behind = if self.open[n] { ARITHMETIC } else { behind };
                live[n] = flags(i.rflags_read()) | behind & !overwritten(i);
            }
            if live == old {
                return live[index];
            }
        }
    }

    /// The first instruction that reads a flag that is undefined there.
    pub fn reads_undefined(&self, undefined: &[u64; MOST + 1]) -> Option<usize> {
        let mut each = self.instructions.iter().zip(undefined);
        each.position(|(i, before)| flags(i.rflags_read()) & before != 0)
    }
}
