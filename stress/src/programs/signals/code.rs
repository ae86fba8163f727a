//! The code that faults.

use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};
use ruse_random::Random;

use super::{CODE, COMES_AND_GOES, DATA, FCW, MXCSR, NO_ACCESS, READ_ONLY, ROUNDS, Site, Then, UNMAPPED};

/// Registers that the code computes with.
const REGISTERS: [AsmRegister64; 14] = [rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14];
/// Vector registers that it computes with.
const VECTORS: [AsmRegisterXmm; 8] = [xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7];
/// Data that it uses, behind the block.
const SCRATCH: i32 = 512;
/// Single steps at a time, at most.
const MOST_STEPS: u64 = 40;

/// A site whose addresses are not known yet.
struct Mark {
    at: CodeLabel,
    then: Kind,
}

/// How it goes on from there.
enum Kind {
    Behind(CodeLabel),
    Steps(CodeLabel, u64),
    Again,
}

struct Writer<'a> {
    a: CodeAssembler,
    random: &'a mut Random,
    marks: Vec<Mark>,
}

/// Code in a loop, and where it faults.
pub fn generate(random: &mut Random) -> (Vec<u8>, Vec<Site>) {
    let mut writer = Writer { a: CodeAssembler::new(64).expect("64 bits"), random, marks: Vec::new() };
    writer.all().expect("instructions that exist");
    let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let code = writer.a.assemble_options(CODE, options).expect("code in its place");
    let address = |label: &CodeLabel| code.label_ip(label).expect("a label that is set");
    let mut sites: Vec<Site> = writer
        .marks
        .iter()
        .map(|mark| Site {
            at: address(&mark.at),
            then: match &mark.then {
                Kind::Behind(label) => Then::At(address(label)),
                Kind::Steps(label, steps) => Then::Steps(address(label), *steps),
                Kind::Again => Then::Again,
            },
        })
        .collect();
    sites.extend([DATA, READ_ONLY, UNMAPPED].map(|at| Site { at, then: Then::Return }));
    (code.inner.code_buffer, sites)
}

impl Writer<'_> {
    fn all(&mut self) -> Result<(), IcedError> {
        let mut top = self.a.create_label();
        let mut end = self.a.create_label();
        self.a.fninit()?;
        for (n, xmm) in VECTORS.into_iter().enumerate() {
            self.a.movq(xmm, REGISTERS[n])?;
        }
        self.a.set_label(&mut top)?;
        self.a.nop()?;
        for _ in 0..10 + self.random.below(30) {
            match self.random.below(3) {
                0 => self.fault()?,
                _ => self.compute()?,
            }
        }
        self.a.dec(qword_ptr(r15 + ROUNDS as i32))?;
        self.a.jz(end)?;
        self.a.jmp(top)?;
        self.a.set_label(&mut end)?;
        self.a.nop()?;
        // What has been computed is seen by the handler once more.
        self.step_from(0)?;
        self.a.ret()
    }

    fn register(&mut self) -> AsmRegister64 {
        self.random.pick(&REGISTERS)
    }

    fn vector(&mut self) -> AsmRegisterXmm {
        self.random.pick(&VECTORS)
    }

    /// A few instructions without a fault.
    fn compute(&mut self) -> Result<(), IcedError> {
        let (to, from, x, y) = (self.register(), self.register(), self.vector(), self.vector());
        let scratch = SCRATCH + self.random.below(64) as i32 * 8;
        let value = self.random.word() as i32;
        let a = &mut self.a;
        match self.random.below(12) {
            0 => a.add(to, from),
            1 => a.xor(to, value),
            2 => a.imul_3(to, from, value),
            3 => a.rol(to, u32::from(value as u8 & 63)),
            4 => a.lea(to, from + to * 4 + value),
            5 => a.mov(qword_ptr(r15 + scratch), to).and_then(|()| a.mov(from, qword_ptr(r15 + scratch))),
            6 => a.paddq(x, y).and_then(|()| a.pshufd(y, x, value & 0xff)),
            7 => a.movq(x, to).and_then(|()| a.pxor(y, x)),
            8 => {
                a.cvtsi2sd(x, to)?;
                a.mulsd(x, x)?;
                a.movq(from, x)
            }
            9 => {
                a.mov(qword_ptr(r15 + scratch), to)?;
                a.fild(qword_ptr(r15 + scratch))?;
                a.fild(qword_ptr(r15 + scratch))?;
                a.faddp(st1, st0)?;
                a.fstp(qword_ptr(r15 + scratch))?;
                a.mov(from, qword_ptr(r15 + scratch))
            }
            10 => {
                a.push(to)?;
                a.push(from)?;
                a.pop(to)?;
                a.pop(from)
            }
            _ => {
                let mut over = a.create_label();
                a.bt(to, u32::from(value as u8 & 63))?;
                a.jb(over)?;
                a.xor(to, from)?;
                a.set_label(&mut over)?;
                a.nop()
            }
        }
    }

    /// A fault of some kind. Around most of them flags have to survive.
    fn fault(&mut self) -> Result<(), IcedError> {
        let kind = self.random.below(9);
        let (a, b) = (self.register(), self.register());
        let steps = if self.random.chance(40) { self.random.below(MOST_STEPS) } else { 0 };
        if kind < 6 {
            self.a.add(a, b)?;
        }
        match kind {
            0 | 1 => self.miss()?,
            2 => self.refused()?,
            3 => self.step_from(steps)?,
            4 => self.breakpoint()?,
            5 => self.privileged()?,
            6 => return self.divide(),
            7 => return self.floating(),
            _ => return self.call_data(),
        }
        self.a.adc(b, a)
    }

    /// Marks the next instruction as one that is tried again.
    fn again(&mut self) -> Result<(), IcedError> {
        let mut at = self.a.create_label();
        self.a.set_label(&mut at)?;
        self.marks.push(Mark { at, then: Kind::Again });
        Ok(())
    }

    /// An instruction that is not tried again.
    fn once(
        &mut self,
        then: impl FnOnce(CodeLabel) -> Kind,
        instruction: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Result<(), IcedError> {
        let (mut at, mut behind) = (self.a.create_label(), self.a.create_label());
        self.a.set_label(&mut at)?;
        instruction(&mut self.a)?;
        self.a.set_label(&mut behind)?;
        self.marks.push(Mark { at, then: then(behind) });
        self.a.nop()
    }

    /// An instruction behind which it goes on.
    fn skipped(
        &mut self,
        instruction: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Result<(), IcedError> {
        self.once(Kind::Behind, instruction)
    }

    /// An access to the page that comes and goes.
    fn miss(&mut self) -> Result<(), IcedError> {
        let (pointer, other, x) = (rbx, self.register(), self.vector());
        let offset = self.random.below(500) * 8;
        let kind = self.random.below(9);
        let address = match kind {
            0 | 1 => COMES_AND_GOES - 1 - self.random.below(7),
            _ => (COMES_AND_GOES + offset) & !15,
        };
        if kind == 2 {
            return self.miss_by_string();
        }
        self.a.mov(pointer, address)?;
        // The move leaves the flags alone; so does what follows, or it sets them.
        self.again()?;
        let a = &mut self.a;
        match kind {
            0 | 3 => a.mov(other, qword_ptr(pointer)),
            1 | 4 => a.mov(qword_ptr(pointer), other),
            5 => a.lock().add(qword_ptr(pointer), other),
            6 => a.movaps(xmmword_ptr(pointer), x),
            7 => a.adc(other, qword_ptr(pointer)),
            _ => a.xchg(qword_ptr(pointer), other),
        }
    }

    /// A string instruction that comes to the page after a while.
    fn miss_by_string(&mut self) -> Result<(), IcedError> {
        let (before, count) = (self.random.below(40), 41 + self.random.below(100));
        self.a.mov(rsi, DATA + SCRATCH as u64)?;
        self.a.mov(rdi, COMES_AND_GOES - before)?;
        self.a.mov(rcx, count)?;
        let words = self.random.chance(30);
        let fill = self.random.chance(40);
        self.again()?;
        match (fill, words) {
            (true, true) => self.a.rep().stosd(),
            (true, false) => self.a.rep().stosb(),
            (false, true) => self.a.rep().movsd(),
            (false, false) => self.a.rep().movsb(),
        }
    }

    /// An access that is never allowed.
    fn refused(&mut self) -> Result<(), IcedError> {
        let (pointer, other, x) = (r12, self.register(), self.vector());
        let offset = self.random.below(500) * 8;
        let kind = self.random.below(6);
        let address = match kind {
            0 => READ_ONLY + offset,
            1 => NO_ACCESS + offset,
            2 => UNMAPPED + offset,
            3 => 0x8000_0000_0000 + self.random.word() % (1 << 60),
            4 => DATA + SCRATCH as u64 + 8,
            _ => NO_ACCESS - 1 - self.random.below(7),
        };
        self.a.mov(pointer, address)?;
        self.skipped(|a| match kind {
            0 => a.mov(qword_ptr(pointer), other),
            4 => a.movaps(x, xmmword_ptr(pointer)),
            _ => a.mov(other, qword_ptr(pointer)),
        })
    }

    /// An invalid instruction, from which single steps go on.
    fn step_from(&mut self, steps: u64) -> Result<(), IcedError> {
        self.once(|behind| Kind::Steps(behind, steps), CodeAssembler::ud2)
    }

    fn breakpoint(&mut self) -> Result<(), IcedError> {
        self.a.int3()?;
        let mut behind = self.a.create_label();
        self.a.set_label(&mut behind)?;
        self.marks.push(Mark { at: behind, then: Kind::Behind(behind) });
        self.a.nop()
    }

    fn privileged(&mut self) -> Result<(), IcedError> {
        let kind = self.random.below(5);
        self.skipped(|a| match kind {
            0 => a.hlt(),
            1 => a.cli(),
            2 => a.in_(al, dx),
            3 => a.rdmsr(),
            _ => a.mov(rax, cr0),
        })
    }

    /// A division by zero, or one whose quotient is too large.
    fn divide(&mut self) -> Result<(), IcedError> {
        let by = self.random.pick(&[rcx, rdi, r9, r14]);
        match self.random.below(2) {
            0 => {
                self.a.xor(by, by)?;
                self.skipped(|a| a.div(by))
            }
            _ => {
                self.a.mov(by, -1i64)?;
                self.a.mov(rax, i64::MIN)?;
                self.a.cqo()?;
                self.skipped(|a| a.idiv(by))
            }
        }
    }

    /// A division by zero of which the unit is told to complain.
    fn floating(&mut self) -> Result<(), IcedError> {
        let x = self.vector();
        if self.random.chance(50) {
            self.a.ldmxcsr(dword_ptr(r15 + MXCSR as i32 + 4))?;
            self.a.mov(rax, f64::to_bits(1.5))?;
            self.a.movq(x, rax)?;
            self.a.pxor(xmm8, xmm8)?;
            self.skipped(|a| a.divsd(x, xmm8))?;
            return self.a.ldmxcsr(dword_ptr(r15 + MXCSR as i32));
        }
        self.a.fldcw(word_ptr(r15 + FCW as i32 + 2))?;
        self.a.fld1()?;
        self.a.fldz()?;
        self.a.fdivp(st1, st0)?;
        self.skipped(|a| a.wait())?;
        self.a.fninit()
    }

    /// A call of what cannot be executed.
    fn call_data(&mut self) -> Result<(), IcedError> {
        let pointer = self.register();
        let to = self.random.pick(&[DATA, READ_ONLY, UNMAPPED]);
        self.a.mov(pointer, to)?;
        self.a.call(pointer)
    }
}
