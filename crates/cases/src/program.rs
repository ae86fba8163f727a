//! Random programs: loops, jumps, calls, the stack, strings and stores into the program's own code.

use iced_x86::{BlockEncoder, BlockEncoderOptions, Code, Instruction, InstructionBlock, OpKind};

use ruse_random::Random;

use crate::{
    case::{CODE, CODE_BYTES, Case, MOST, State, WINDOW, WINDOW_BYTES},
    flow::Flow,
    generate::{blank, state},
    items::Builder,
    operands::place,
    pools::Pools,
};

/// Stands for the address of item `n` of a program that has no place yet.
pub const ITEMS: u64 = 1 << 20;
/// Stands for the address of instruction `n`, times 16.
const INSTRUCTIONS: u64 = 1 << 24;
/// Stands for the address of an instruction of a program that has no place yet.
pub fn own_label(instruction: usize) -> u64 {
    INSTRUCTIONS + 16 * instruction as u64
}

/// What lies around a program: it faults.
const HLT: u8 = 0xf4;
/// Number of RSP.
pub const RSP: u64 = 4;

/// What some registers are for, by number, so that a program does not soon run into faults, and ends. The rest of the
/// program leaves them alone, mostly.
#[derive(Clone)]
pub struct Roles {
    /// Pointers to the data.
    pub pointers: Vec<u64>,
    /// An index for addresses.
    pub index: u64,
    /// What every jump backwards decrements.
    pub counter: u64,
    /// What counts the rounds of a loop over the data while one is made.
    pub rounds: Option<u64>,
    /// Pointers are multiples of this.
    pub align: u64,
}

impl Roles {
    fn new(random: &mut Random) -> Self {
        let mut free: Vec<u64> = (0..16).filter(|&r| r != RSP).collect();
        let mut take = |among: fn(&u64) -> bool| {
            let some: Vec<u64> = free.iter().copied().filter(among).collect();
            let r = random.pick(&some);
            free.retain(|&other| other != r);
            r
        };
        // One that the encoding or the translator treats in a way of its own comes first.
        let special = take(|r| matches!(r, 5 | 12..=15));
        let (other, index, counter) = (take(|_| true), take(|_| true), take(|_| true));
        let align = random.pick(&[1, 8, 32, 32, 32, 32]);
        Self { pointers: vec![RSP, special, other], index, counter, rounds: None, align }
    }

    /// Whether the register has a role.
    pub fn has(&self, r: u64) -> bool {
        self.pointers.contains(&r) || r == self.index || self.counts(r)
    }

    /// Whether the program's end depends on the register.
    pub fn counts(&self, r: u64) -> bool {
        r == self.counter || Some(r) == self.rounds
    }

    /// Gives the registers values that suit their roles.
    fn assign(&self, state: &mut State, random: &mut Random) {
        for &r in &self.pointers {
            let align = if r == RSP { self.align.max(8) } else { self.align };
            state.gpr[r as usize] = match random.below(20) {
                0 => place(random, 8),
                1 | 2 => WINDOW + 4096 - random.below(4) * align,
                3 => WINDOW + WINDOW_BYTES as u64 - random.below(8) * align,
                _ => (WINDOW + 512 + random.below(WINDOW_BYTES as u64 - 1024)) & !(align - 1),
            };
        }
        state.gpr[self.index as usize] =
            if random.chance(85) { random.below(4) * 4 } else { random.below(40) };
        state.gpr[self.counter as usize] = 1 + random.below(10);
    }
}

/// A store into code: its place and its aim are not known before the program's.
pub struct Patch {
    /// The instruction with the address.
    pub store: usize,
    /// The instruction that it changes.
    pub victim: usize,
    /// It changes the last four bytes, not the first.
    pub at_end: bool,
}

/// The program for a seed, with the inputs of a variant.
pub fn program(pools: &Pools, seed: u64, variant: u64) -> Case {
    let mut random = Random::new(seed);
    let mut case = blank(seed ^ variant << 56, 0, &mut random);
    let roles = Roles::new(&mut random);
    let mut inputs = Random::new(case.seed);
    case.state = state(&mut inputs);
    roles.assign(&mut case.state, &mut inputs);
    loop {
        let mut list = Builder::new(pools, roles.clone(), Random::new(random.word())).finish();
        if list.put_into(&mut case, &mut random).is_some() {
            return case;
        }
    }
}

/// A program that has no place yet.
pub struct Program {
    /// The instructions; the last one marks the end.
    pub list: Vec<Instruction>,
    /// The instruction at which each item begins.
    pub items: Vec<usize>,
    /// Stores into it.
    pub patches: Vec<Patch>,
}

/// A program in its place.
struct Laid {
    code: Vec<u8>,
    /// Offsets of the instructions.
    starts: Vec<u32>,
}

impl Program {
    /// Puts the program somewhere into the case's code. `None`: it has too many instructions, or jumps too far.
    fn put_into(&mut self, case: &mut Case, random: &mut Random) -> Option<()> {
        case.count = self.list.len() - 1;
        if case.count > MOST {
            return None;
        }
        let offset = offset(self.lay(0)?.code.len() as u64, random);
        loop {
            let laid = self.lay(offset)?;
            case.code.fill(HLT);
            for (to, from) in case.code[offset as usize..].iter_mut().zip(&laid.code) {
                *to = *from;
            }
            for (to, from) in case.starts.iter_mut().zip(&laid.starts) {
                *to = (offset + u64::from(*from)) as u16;
            }
            let flow = Flow::of(case);
            case.undefined = flow.undefined();
            let Some(n) = flow.reads_undefined(&case.undefined) else { return Some(()) };
            self.list[n] = Instruction::with(Code::Nopd);
        }
    }

    /// The code for a place.
    fn lay(&self, offset: u64) -> Option<Laid> {
        let mut list = self.list.clone();
        let item = |label: u64| {
            let item = label.checked_sub(ITEMS).filter(|&n| n < self.items.len() as u64)?;
            Some(own_label(self.items[item as usize]))
        };
        let address = |label: u64| if label >= INSTRUCTIONS { Some(label) } else { item(label) };
        for (n, i) in list.iter_mut().enumerate() {
            i.set_ip(own_label(n));
            if i.op_count() > 0 && i.op0_kind() == OpKind::NearBranch64 {
                i.set_near_branch64(address(i.near_branch64())?);
            } else if i.is_ip_rel_memory_operand()
                && let Some(target) = item(i.memory_displacement64())
            {
                i.set_memory_displacement64(target);
            }
        }
        let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS
            | BlockEncoderOptions::RETURN_CONSTANT_OFFSETS;
        let laid = BlockEncoder::encode(64, InstructionBlock::new(&list, CODE + offset), options).ok()?;
        let (mut code, starts) = (laid.code_buffer, laid.new_instruction_offsets);
        // A jump that was made of several instructions has no one place.
        if starts.contains(&u32::MAX) {
            return None;
        }
        for patch in &self.patches {
            let next = starts[patch.store + 1];
            let aim = if patch.at_end { starts[patch.victim + 1] - 4 } else { starts[patch.victim] };
            let at = starts[patch.store] as usize + laid.constant_offsets[patch.store].displacement_offset();
            code[at..at + 4].copy_from_slice(&aim.wrapping_sub(next).to_le_bytes());
        }
        Some(Laid { code, starts })
    }
}

/// Where a program of some length goes: on one page, over the end of a page, or over the end of the code.
fn offset(len: u64, random: &mut Random) -> u64 {
    const BYTES: u64 = CODE_BYTES as u64;
    match random.below(20) {
        0..=8 => random.below(64),
        9..=17 => 4096 - random.below(len.min(4096)),
        18 => BYTES - 1 - random.below(len.saturating_sub(4).max(1)),
        _ => BYTES - len,
    }
}
