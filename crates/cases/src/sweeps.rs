//! Loops of many rounds over the data: what walks through memory, and how far, is what translators count on.

use iced_x86::{Code, Instruction, MemoryOperand, Register};

use crate::{
    case::WINDOW,
    items::{Builder, label, load, near, r32, r64, store, two, with_constant},
    operands::nth,
    program::own_label,
};

impl Builder<'_> {
    /// A loop with a count of its own, whose pointers move on in each round. Behind it they are what they were, mostly.
    pub fn sweep(&mut self, n: u64) {
        let count = self.free();
        let rounds = self.random.pick(&[2, 3, 4, 5, 6, 9, 17, 40, 130, 300]);
        self.push(with_constant(Code::Mov_r32_imm32, r32(count), rounds));
        self.roles.rounds = Some(count);
        let top = self.program.list.len();
        let moves = self.moves();
        let before = self.random.below(3);
        for _ in 0..self.random.below(5) + before {
            self.part(n);
        }
        for &(register, step) in &moves {
            self.move_on(register, step);
            if self.random.chance(30) {
                self.part(n);
            }
        }
        self.next_round(n, count, top);
        self.roles.rounds = None;
        for (register, step) in moves {
            if self.random.chance(80) {
                self.move_on(register, -step.wrapping_mul(rounds));
            }
        }
    }

    /// Registers that move on, and by how much.
    fn moves(&mut self) -> Vec<(u64, i32)> {
        let mut moves = Vec::new();
        let candidates = [self.roles.pointers[1], self.roles.pointers[2], self.roles.index];
        for register in candidates {
            if self.random.chance(60) {
                let unit = if self.random.chance(90) { self.roles.align as i32 } else { 1 };
                let most = if self.random.chance(80) { 4 } else { 300 };
                let step = (1 + self.random.below(most) as i32) * unit.max(1);
                moves.push((register, if self.random.chance(30) { -step } else { step }));
            }
        }
        moves
    }

    fn move_on(&mut self, register: u64, step: i32) {
        let r = r64(register);
        let i = match (self.random.below(4), step) {
            (0, _) => by_address(register, step),
            (1, 1) => Instruction::with1(Code::Inc_rm64, r).expect("INC"),
            (1, -1) => Instruction::with1(Code::Dec_rm64, r).expect("DEC"),
            (1 | 2, _) => with_constant(Code::Sub_rm64_imm32, r, -step),
            _ => with_constant(Code::Add_rm64_imm32, r, step),
        };
        self.push(i);
    }

    /// Something in the loop.
    fn part(&mut self, n: u64) {
        match self.random.below(20) {
            0 => self.conditional(n),
            1..=6 => self.of(&self.pools.vector),
            7 => self.of(&self.pools.x87),
            9..=11 => self.look_up(),
            8 => self.push_or_pop(),
            _ => self.plain(),
        }
    }

    /// An access to a table, by an index that is not large.
    fn look_up(&mut self) {
        let (index, value) = (self.free(), self.free());
        let (pointer, near_it) = (self.pointer(), self.random.below(64) as i64 - 32);
        let small = match self.random.below(3) {
            0 => {
                let from = self.random.below(16);
                two(Code::Movzx_r32_rm8, r32(index), nth(Register::AL, from))
            }
            1 => load(Code::Movzx_r32_rm8, r32(index), near(pointer, near_it)),
            _ => with_constant(Code::And_rm32_imm8, r32(index), self.random.pick(&[7, 15, 63, 127])),
        };
        self.push(small);
        let (base, displacement) = match self.random.below(10) {
            0 => (Register::None, WINDOW as i64 + 512 + near_it),
            _ => (r64(pointer), near_it),
        };
        let scale = 1 << self.random.below(4);
        let at = MemoryOperand::with_base_index_scale_displ_size(base, r64(index), scale, displacement, 8);
        let access = match self.random.below(4) {
            0 => store(Code::Mov_rm32_r32, at, r32(value)),
            1 => load(Code::Xor_r32_rm32, r32(value), at),
            2 => load(Code::Add_r64_rm64, r64(value), at),
            _ => load(Code::Movzx_r32_rm8, r32(value), at),
        };
        self.push(access);
    }

    /// The end of a round.
    fn next_round(&mut self, n: u64, count: u64, top: usize) {
        let r = r64(count);
        match self.random.below(3) {
            0 => self.push(Instruction::with1(Code::Dec_rm64, r).expect("DEC")),
            1 => self.push(with_constant(Code::Sub_rm64_imm8, r, 1)),
            _ => {
                self.push(by_address(count, -1));
                self.push(two(Code::Test_rm64_r64, r, r));
            }
        }
        let back = |code| Instruction::with_branch(code, own_label(top)).expect("a branch");
        if self.random.chance(20) {
            let out = label(n + 1);
            self.push(Instruction::with_branch(Code::Jle_rel32_64, out).expect("a branch"));
            self.push(back(Code::Jmp_rel32_64));
        } else {
            self.push(back(Code::Jg_rel32_64));
        }
    }
}

fn by_address(register: u64, step: i32) -> Instruction {
    Instruction::with2(Code::Lea_r64_m, r64(register), near(register, step.into())).expect("LEA")
}
