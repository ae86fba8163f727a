//! What programs are made of.

use iced_x86::{
    Code, Encoder, Instruction, InstructionInfoFactory, MemoryOperand, OpAccess, OpKind, Register,
    RepPrefixKind,
};
use ruse_random::Random;

use crate::{
    case::{CODE, GS_BASE},
    generate::pad,
    operands::{instruction, nth, place},
    pools::Pools,
    program::{ITEMS, Patch, Program, RSP, Roles},
};

const RCX: u64 = 1;
const RBP: u64 = 5;
const RSI: u64 = 6;
const RDI: u64 = 7;
/// Bytes of an instruction that is replaced as a whole, with the NOP behind it.
const REPLACED: usize = 8;

pub fn r64(n: u64) -> Register {
    nth(Register::RAX, n)
}

pub fn r32(n: u64) -> Register {
    nth(Register::EAX, n)
}

pub fn label(item: u64) -> u64 {
    ITEMS + item
}

/// Memory at an address that is encoded relative to RIP.
fn relative(address: u64) -> MemoryOperand {
    MemoryOperand::with_base_displ_size(Register::RIP, address as i64, 8)
}

pub fn near(r: u64, displacement: i64) -> MemoryOperand {
    MemoryOperand::with_base_displ_size(r64(r), displacement, 8)
}

pub fn two(code: Code, a: Register, b: Register) -> Instruction {
    Instruction::with2(code, a, b).expect("operands that the form has")
}

pub fn with_constant(code: Code, r: Register, value: i32) -> Instruction {
    Instruction::with2(code, r, value).expect("operands that the form has")
}

pub fn load(code: Code, r: Register, from: MemoryOperand) -> Instruction {
    Instruction::with2(code, r, from).expect("operands that the form has")
}

pub fn store(code: Code, to: MemoryOperand, r: Register) -> Instruction {
    Instruction::with2(code, to, r).expect("operands that the form has")
}

fn jump(code: Code, item: u64) -> Instruction {
    Instruction::with_branch(code, label(item)).expect("a branch")
}

/// Makes a program.
pub struct Builder<'a> {
    pub pools: &'a Pools,
    info: InstructionInfoFactory,
    pub random: Random,
    pub roles: Roles,
    pub program: Program,
    /// How many items come before the subroutines.
    main: u64,
    /// Lengths of the subroutines in items.
    subroutines: Vec<u64>,
    /// Percent of items by kind: vector, x87, string, stack, jumps, stores into code, loops over the data.
    shares: [u64; 7],
}

impl<'a> Builder<'a> {
    /// Nothing yet.
    pub fn new(pools: &'a Pools, roles: Roles, mut random: Random) -> Self {
        let shares = random.pick(&[
            [16, 6, 6, 8, 18, 4, 4],
            [4, 0, 0, 4, 20, 2, 0],
            [4, 0, 2, 30, 20, 0, 0],
            [60, 10, 0, 0, 8, 0, 4],
            [10, 50, 0, 4, 8, 0, 4],
            [4, 2, 40, 4, 12, 2, 0],
            [6, 0, 4, 6, 20, 24, 2],
            [10, 2, 2, 4, 10, 0, 20],
            [4, 0, 0, 2, 4, 1, 30],
        ]);
        let main = 3 + random.below(30);
        let subroutines = (0..random.below(3)).map(|_| 1 + random.below(5)).collect();
        let program = Program { list: Vec::new(), items: Vec::new(), patches: Vec::new() };
        Self { pools, info: InstructionInfoFactory::new(), random, roles, program, main, subroutines, shares }
    }

    /// The program.
    pub fn finish(mut self) -> Program {
        for n in 0..self.main {
            self.begin_item();
            self.item(n);
        }
        self.begin_item();
        self.push(jump(Code::Jmp_rel32_64, self.end()));
        for len in self.subroutines.clone() {
            for _ in 0..len {
                self.begin_item();
                self.without_store();
            }
            self.begin_item();
            let drop = self.random.below(3) as u32 * 8;
            self.push(match drop {
                0 => Instruction::with(Code::Retnq),
                _ => Instruction::with1(Code::Retnq_imm16, drop).expect("RET"),
            });
        }
        self.begin_item();
        self.push(Instruction::with(Code::Ud2));
        self.program
    }

    /// The item behind everything.
    fn end(&self) -> u64 {
        self.main + 1 + self.subroutines.iter().map(|len| len + 1).sum::<u64>()
    }

    /// The first item of one of the subroutines.
    fn subroutine(&mut self) -> Option<u64> {
        let n = self.random.below(self.subroutines.len() as u64) as usize;
        let before = self.subroutines.get(..n)?.iter().map(|len| len + 1).sum::<u64>();
        (!self.subroutines.is_empty()).then_some(self.main + 1 + before)
    }

    fn begin_item(&mut self) {
        self.program.items.push(self.program.list.len());
    }

    pub fn push(&mut self, i: Instruction) {
        self.program.list.push(i);
    }

    /// A register without a role.
    pub fn free(&mut self) -> u64 {
        loop {
            let r = self.random.below(16);
            if !self.roles.has(r) {
                return r;
            }
        }
    }

    /// A register without a role that no string instruction takes for a pointer, for addresses of code.
    fn without_strings(&mut self) -> u64 {
        loop {
            let r = self.free();
            if r != RSI && r != RDI {
                return r;
            }
        }
    }

    pub fn pointer(&mut self) -> u64 {
        self.random.pick(&self.roles.pointers)
    }

    fn item(&mut self, n: u64) {
        let mut at = self.random.below(100);
        let kind = self.shares.iter().position(|&share| {
            let here = at < share;
            at = at.wrapping_sub(share);
            here
        });
        match kind {
            Some(0) => self.of(&self.pools.vector),
            Some(1) => self.of(&self.pools.x87),
            Some(2) => self.string(),
            Some(3) => self.stack(),
            Some(4) => self.control(n),
            Some(5) => self.store_into_code(),
            Some(6) => self.sweep(n),
            _ => self.plain(),
        }
    }

    /// An integer instruction.
    pub fn plain(&mut self) {
        let pools = self.pools;
        let codes = if self.random.chance(75) { &pools.common } else { &pools.integer };
        self.of(codes);
    }

    /// An integer instruction that cannot change where a subroutine returns to.
    fn without_store(&mut self) {
        for _ in 0..20 {
            let code = self.random.pick(&self.pools.common);
            let Some(i) = self.with_operands(code, 0) else { continue };
            let stores = self.info.info(&i).used_memory().iter().any(|used| !is_read(used.access()));
            if !stores && !self.disturbs(&i, &[], false) {
                return self.push(i);
            }
        }
    }

    /// An instruction of one of the forms, which leaves the registers with roles alone, as a rule.
    pub fn of(&mut self, codes: &[Code]) {
        let careless = self.random.chance(2);
        for _ in 0..60 {
            let code = self.random.pick(codes);
            let Some(i) = self.with_operands(code, 0) else { continue };
            if !self.disturbs(&i, &[], careless) {
                return self.push(i);
            }
        }
    }

    fn with_operands(&mut self, code: Code, target: u64) -> Option<Instruction> {
        let roles = self.roles.clone();
        let mut memory = |i: &mut Instruction, n, random: &mut Random| operand(&roles, i, n, random);
        instruction(code, &mut memory, target, &mut self.random)
            .filter(|i| Encoder::new(64).encode(i, CODE).is_ok_and(|len| len <= 15))
    }

    /// Whether the instruction changes a register that has a role and is not among `allowed`. A careless program only
    /// looks after its counter.
    fn disturbs(&mut self, i: &Instruction, allowed: &[u64], careless: bool) -> bool {
        let info = self.info.info(i);
        info.used_registers().iter().any(|used| {
            let full = used.register().full_register();
            let r = (full as u64).wrapping_sub(Register::RAX as u64);
            let keeps = if careless { self.roles.counts(r) } else { self.roles.has(r) };
            !is_read(used.access()) && full.is_gpr64() && keeps && !allowed.contains(&r)
        })
    }

    /// A string instruction, mostly with registers made ready for it.
    fn string(&mut self) {
        if !self.roles.has(RCX) && self.random.chance(85) {
            let count = self.random.below(24) as i32;
            self.push(with_constant(Code::Mov_r32_imm32, r32(RCX), count));
        }
        for r in [RSI, RDI] {
            if !self.roles.has(r) {
                let from = near(self.pointer(), self.random.below(256) as i64 - 128);
                self.push(load(Code::Lea_r64_m, r64(r), from));
            }
        }
        if self.random.chance(20) {
            let code = self.random.pick(&[Code::Std, Code::Cld]);
            self.push(Instruction::with(code));
        }
        for _ in 0..20 {
            let code = self.random.pick(&self.pools.string);
            let Some(i) = self.with_operands(code, 0) else { continue };
            if !self.disturbs(&i, &[RSI, RDI], false) {
                return self.push(i);
            }
        }
    }

    fn stack(&mut self) {
        let step = self.random.below(9) as i32 * 8 - 32;
        let i = match self.random.below(16) {
            0..=2 => Instruction::with1(Code::Push_r64, r64(self.random.below(16))),
            3..=4 => Instruction::with1(Code::Pop_r64, r64(self.free())),
            5 => Instruction::with1(Code::Pushq_imm32, self.random.word() as i32),
            6 => Ok(Instruction::with(Code::Pushfq)),
            7 => Ok(load(Code::Lea_r64_m, r64(RSP), near(RSP, step.into()))),
            8 => Ok(with_constant(Code::Add_rm64_imm8, r64(RSP), step)),
            9 => Ok(with_constant(Code::Sub_rm64_imm8, r64(RSP), step)),
            10 if self.random.chance(40) => {
                Ok(two(Code::Mov_r64_rm64, r64(RSP), r64(self.roles.pointers[1])))
            }
            11 if self.roles.pointers.contains(&RBP) => Ok(Instruction::with(Code::Leaveq)),
            12 if !self.roles.has(RBP) => {
                let (bytes, level) = (self.random.below(64) as i32, self.random.below(3) as i32);
                Instruction::with2(Code::Enterq_imm16_imm8, bytes, level)
            }
            13 if self.random.chance(20) => Instruction::with1(Code::Pop_r64, r64(RSP)),
            _ => return self.push_or_pop(),
        };
        self.push(i.expect("operands that the form has"));
    }

    pub fn push_or_pop(&mut self) {
        for _ in 0..20 {
            let code = self.random.pick(&self.pools.stack);
            let Some(i) = self.with_operands(code, 0) else { continue };
            if !self.disturbs(&i, &[RSP], false) {
                return self.push(i);
            }
        }
    }

    fn control(&mut self, n: u64) {
        match self.random.below(10) {
            0..=3 => self.conditional(n),
            4..=5 if n > 0 => self.back(n),
            6 => {
                let to = self.ahead(n);
                self.push(jump(Code::Jmp_rel32_64, to));
            }
            7 => {
                let to = self.ahead(n);
                self.indirect(to, false);
            }
            _ => match self.subroutine() {
                Some(to) if self.random.chance(60) => self.push(jump(Code::Call_rel32_64, to)),
                Some(to) => self.indirect(to, true),
                None => self.conditional(n),
            },
        }
    }

    /// An item after the `n`th one.
    fn ahead(&mut self, n: u64) -> u64 {
        (n + 1 + self.random.below(6)).min(self.main)
    }

    pub fn conditional(&mut self, n: u64) {
        let to = label(self.ahead(n));
        for _ in 0..20 {
            let code = self.random.pick(&self.pools.conditional);
            let Some(i) = self.with_operands(code, to) else { continue };
            if !self.disturbs(&i, &[], false) {
                return self.push(i);
            }
        }
    }

    /// A jump to an earlier item as long as the counter is positive.
    fn back(&mut self, n: u64) {
        let counter = r64(self.roles.counter);
        match self.random.below(4) {
            0 => self.push(Instruction::with1(Code::Dec_rm64, counter).expect("DEC")),
            1 => self.push(with_constant(Code::Sub_rm64_imm8, counter, 1)),
            2 => self.push(with_constant(Code::Add_rm64_imm8, counter, -1)),
            _ => {
                self.push(load(Code::Lea_r64_m, counter, near(self.roles.counter, -1)));
                self.push(two(Code::Test_rm64_r64, counter, counter));
            }
        }
        if self.random.chance(30) {
            // The flags have to live through it.
            self.of(&self.pools.moves);
        }
        let to = n - 1 - self.random.below(n.min(10));
        self.push(jump(Code::Jg_rel32_64, to));
    }

    /// A jump or call by an address in a register, in memory or on the stack.
    fn indirect(&mut self, to: u64, call: bool) {
        let r = r64(self.without_strings());
        self.push(load(Code::Lea_r64_m, r, relative(label(to))));
        let (by_register, by_memory) =
            if call { (Code::Call_rm64, Code::Call_rm64) } else { (Code::Jmp_rm64, Code::Jmp_rm64) };
        match self.random.below(3) {
            0 => {
                let at = near(self.pointer(), self.random.below(16) as i64 * 8 - 64);
                self.push(store(Code::Mov_rm64_r64, at, r));
                self.push(Instruction::with1(by_memory, at).expect("a jump"));
            }
            1 if !call => {
                self.push(Instruction::with1(Code::Push_r64, r).expect("PUSH"));
                self.push(Instruction::with(Code::Retnq));
            }
            _ => self.push(Instruction::with1(by_register, r).expect("a jump")),
        }
    }

    /// A store into code and the code that it changes, in this order or, for loops, in the other.
    fn store_into_code(&mut self) {
        let victim_first = self.random.chance(40);
        let whole = self.random.chance(40);
        let overwrites_flags = self.random.chance(50);
        let mut victim = 0;
        if victim_first {
            victim = self.victim(whole, overwrites_flags);
            self.between();
        }
        let at = if whole { self.replace(overwrites_flags) } else { self.change_constant() };
        if !victim_first {
            self.between();
            victim = self.victim(whole, overwrites_flags);
        }
        self.program.patches.push(Patch { store: at, victim, at_end: !whole });
    }

    fn between(&mut self) {
        for _ in 0..self.random.below(3) {
            self.plain();
        }
    }

    /// An instruction that is changed: its constant, or all of it. Returns its number.
    fn victim(&mut self, whole: bool, overwrites_flags: bool) -> usize {
        let number = self.program.list.len();
        let r = self.free();
        if whole {
            let i = self.replaceable(overwrites_flags);
            let mut rest = [0; REPLACED];
            let rest = &mut rest[bytes_of(&i).len()..];
            pad(rest);
            self.push(i);
            if !rest.is_empty() {
                self.push(Instruction::with_declare_byte(rest).expect("a few bytes"));
            }
            return number;
        }
        let value = self.random.word() as i32;
        let i = match self.random.below(4) {
            0 => with_constant(Code::Mov_r32_imm32, r32(r), value),
            1 => with_constant(Code::Mov_rm64_imm32, r64(r), value),
            2 => with_constant(Code::Add_rm64_imm32, r64(r), value),
            _ => with_constant(Code::Cmp_rm32_imm32, r32(r), value),
        };
        self.push(i);
        number
    }

    /// A short instruction that gives all flags a value, or leaves all alone.
    fn replaceable(&mut self, overwrites_flags: bool) -> Instruction {
        let (a, b) = (self.free(), self.random.below(16));
        let small = self.random.below(100) as i32;
        match (overwrites_flags, self.random.below(3)) {
            (true, 0) => two(Code::Add_rm64_r64, r64(a), r64(b)),
            (true, 1) => with_constant(Code::Sub_rm32_imm8, r32(a), small),
            (true, _) => two(Code::Cmp_rm64_r64, r64(a), r64(b)),
            (false, 0) => with_constant(Code::Mov_r32_imm32, r32(a), small),
            (false, 1) => load(Code::Lea_r64_m, r64(a), MemoryOperand::with_base_displ(r64(b), small.into())),
            (false, _) => two(Code::Mov_r64_rm64, r64(a), r64(b)),
        }
    }

    /// A store of another instruction. Returns the number of the instruction with the address.
    fn replace(&mut self, overwrites_flags: bool) -> usize {
        let mut bytes = [0; REPLACED];
        let new = bytes_of(&self.replaceable(overwrites_flags));
        bytes[..new.len()].copy_from_slice(&new);
        pad(&mut bytes[new.len()..]);
        let r = r64(self.free());
        self.push(Instruction::with2(Code::Mov_r64_imm64, r, u64::from_le_bytes(bytes)).expect("MOV"));
        self.push(store(Code::Mov_rm64_r64, relative(CODE), r));
        self.program.list.len() - 1
    }

    /// A change of four bytes. Returns the number of the instruction with the address.
    fn change_constant(&mut self) -> usize {
        let (to, r) = (relative(CODE), r32(self.free()));
        let i = match self.random.below(5) {
            0 => store(Code::Mov_rm32_r32, to, r),
            1 => store(Code::Xchg_rm32_r32, to, r),
            2 => store(Code::Movd_rm32_xmm, to, nth(Register::XMM0, self.random.below(16))),
            3 if !self.roles.has(RDI) => load(Code::Lea_r64_m, r64(RDI), to),
            _ => Instruction::with2(Code::Add_rm32_imm8, to, 1).expect("ADD"),
        };
        let number = self.program.list.len();
        self.push(i);
        if i.code() == Code::Lea_r64_m {
            self.push(Instruction::with(Code::Cld));
            self.push(Instruction::with_stosd(64, RepPrefixKind::None).expect("STOS"));
            let back = near(self.pointer(), 0);
            self.push(load(Code::Lea_r64_m, r64(RDI), back));
        }
        number
    }
}

fn is_read(access: OpAccess) -> bool {
    matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess)
}

fn bytes_of(i: &Instruction) -> Vec<u8> {
    let mut encoder = Encoder::new(64);
    encoder.encode(i, CODE).expect("an instruction without an address");
    encoder.take_buffer()
}

/// A memory operand near a pointer; sometimes with an index, a segment, 32-bit addresses, or no register at all.
fn operand(roles: &Roles, i: &mut Instruction, n: u32, random: &mut Random) {
    i.set_op_kind(n, OpKind::Memory);
    let size = i.memory_size().size().max(1) as i64;
    let kind = random.below(30);
    if kind < 2 {
        if kind == 0 {
            i.set_memory_base(Register::RIP);
        }
        i.set_memory_displacement64(place(random, 32));
        i.set_memory_displ_size(8);
        return;
    }
    let narrow = kind == 2;
    let family = if narrow { Register::EAX } else { Register::RAX };
    i.set_memory_base(nth(family, random.pick(&roles.pointers)));
    if random.chance(25) && roles.index != RSP {
        i.set_memory_index(nth(family, roles.index));
        i.set_memory_index_scale(1 << random.below(4));
    }
    let unit = if random.chance(90) { size } else { 1 };
    let mut displacement = unit * (random.below(17) as i64 - 8);
    if kind == 3 {
        i.set_segment_prefix(Register::GS);
        displacement -= GS_BASE as i64;
    }
    let short = i8::try_from(displacement).is_ok();
    i.set_memory_displacement64(if narrow { displacement as u32 as u64 } else { displacement as u64 });
    i.set_memory_displ_size(match (short, narrow) {
        (true, _) => 1,
        (_, true) => 4,
        _ => 8,
    });
}
