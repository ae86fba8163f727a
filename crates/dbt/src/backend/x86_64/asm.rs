//! A small assembler for the fixed shapes of the back end. Guest instructions are re-encoded by iced.

/// Host registers by number.
pub mod host {
    /// Holds the guest's RSP: the host's own stack pointer stays a host stack.
    pub const GUEST_RSP: u8 = 13;
    /// First scratch register: addresses.
    pub const T0: u8 = 14;
    /// Second scratch register.
    pub const T1: u8 = 15;
    /// The host's stack pointer.
    pub const RSP: u8 = 4;
}

/// A memory operand.
#[derive(Clone, Copy, Debug)]
pub enum Mem {
    /// In the vCPU block: GS base plus displacement.
    Block(i32),
    /// Register plus displacement.
    At(u8, i32),
}

/// What a constant in the code is made of, that would be another one in a copy of the code elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relocated {
    /// A guest address, eight bytes.
    Address,
    /// The lower half of a guest address.
    AddressLow,
    /// The displacement of shared code.
    Shared,
    /// The lower half of a host address in the code itself.
    Own,
    /// The number of a link.
    Link,
}

impl Relocated {
    /// Bytes of the constant.
    pub fn size(self) -> usize {
        if self == Self::Address { 8 } else { 4 }
    }
}

/// A constant that depends on where the code lies, or the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relocation {
    /// Offset in the code.
    pub at: u32,
    /// What it is made of.
    pub what: Relocated,
}

/// Host code under construction at a known address.
pub struct Asm {
    /// The bytes so far.
    pub code: Vec<u8>,
    /// Address of the first byte when executed.
    pub base: u64,
    /// Constants that depend on it and on where the guest's code lies, by ascending offset.
    pub relocations: Vec<Relocation>,
}

impl Asm {
    /// Empty code that will lie at `base`.
    pub fn new(base: u64) -> Self {
        Self { code: Vec::with_capacity(1024), base, relocations: Vec::new() }
    }

    /// Address of the next byte.
    pub fn here(&self) -> u64 {
        self.base + self.code.len() as u64
    }

    /// Appends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    /// An instruction with a register and a memory operand. `wide` sets REX.W.
    pub fn mem(&mut self, prefix: &[u8], wide: bool, opcode: &[u8], reg: u8, mem: Mem) {
        if matches!(mem, Mem::Block(_)) {
            self.code.push(0x65);
        }
        self.bytes(prefix);
        let base_high = matches!(mem, Mem::At(base, _) if base >= 8);
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | u8::from(base_high);
        if rex != 0x40 {
            self.code.push(rex);
        }
        self.bytes(opcode);
        let field = (reg & 7) << 3;
        match mem {
            Mem::Block(disp) => {
                self.bytes(&[0x04 | field, 0x25]);
                self.bytes(&disp.to_le_bytes());
            }
            Mem::At(base, disp) => {
                let low = base & 7;
                let short = i8::try_from(disp);
                let form = match (disp, short) {
                    (0, _) if low != 5 => 0x00,
                    (_, Ok(_)) => 0x40,
                    _ => 0x80,
                };
                self.code.push(form | field | low);
                if low == 4 {
                    self.code.push(0x24);
                }
                match (form, short) {
                    (0x40, Ok(d)) => self.code.push(d as u8),
                    (0x80, _) => self.bytes(&disp.to_le_bytes()),
                    _ => {}
                }
            }
        }
    }

    /// An instruction with two register operands: `reg` in ModRM.reg, `rm` in ModRM.rm.
    pub fn regs(&mut self, wide: bool, opcode: &[u8], reg: u8, rm: u8) {
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | rm >> 3;
        if rex != 0x40 {
            self.code.push(rex);
        }
        self.bytes(opcode);
        self.code.push(0xc0 | (reg & 7) << 3 | rm & 7);
    }

    /// `mov reg, [mem]`, 64 bits.
    pub fn load(&mut self, reg: u8, mem: Mem) {
        self.mem(&[], true, &[0x8b], reg, mem);
    }
    /// `mov [mem], reg`, 64 bits.
    pub fn store(&mut self, mem: Mem, reg: u8) {
        self.mem(&[], true, &[0x89], reg, mem);
    }
    /// `mov dst, src`, 64 bits.
    pub fn mov(&mut self, dst: u8, src: u8) {
        self.regs(true, &[0x8b], dst, src);
    }
    /// `lea dst, [base + disp]`, 64 bits.
    pub fn lea(&mut self, dst: u8, base: u8, disp: i32) {
        self.mem(&[], true, &[0x8d], dst, Mem::At(base, disp));
    }
    /// `mov reg, value` in the shortest form. Leaves the flags alone.
    pub fn mov_imm(&mut self, reg: u8, value: u64) {
        if u32::try_from(value).is_ok() {
            if reg >= 8 {
                self.code.push(0x41);
            }
            self.code.push(0xb8 | reg & 7);
            self.bytes(&(value as u32).to_le_bytes());
        } else if i32::try_from(value as i64).is_ok() {
            self.bytes(&[0x48 | reg >> 3, 0xc7, 0xc0 | reg & 7]);
            self.bytes(&(value as u32).to_le_bytes());
        } else {
            self.bytes(&[0x48 | reg >> 3, 0xb8 | reg & 7]);
            self.bytes(&value.to_le_bytes());
        }
    }
    /// [`Asm::mov_imm`] of a guest address in the region or as far from it as an instruction can name.
    pub fn mov_address(&mut self, reg: u8, address: u64) {
        self.mov_imm(reg, address);
        let short = u32::try_from(address).is_ok() || i32::try_from(address as i64).is_ok();
        self.relocated(if short { Relocated::AddressLow } else { Relocated::Address });
    }
    /// The last bytes are such a constant.
    pub fn relocated(&mut self, what: Relocated) {
        self.relocations.push(Relocation { at: (self.code.len() - what.size()) as u32, what });
    }
    /// `mov qword [mem], imm32` sign-extended.
    pub fn store_imm(&mut self, mem: Mem, value: i32) {
        self.mem(&[], true, &[0xc7], 0, mem);
        self.bytes(&value.to_le_bytes());
    }
    /// `mov dword [mem], imm32`.
    pub fn store_imm32(&mut self, mem: Mem, value: u32) {
        self.mem(&[], false, &[0xc7], 0, mem);
        self.bytes(&value.to_le_bytes());
    }
    /// `cmp dword [mem], imm`.
    pub fn cmp_imm32(&mut self, mem: Mem, value: u32) {
        if let Ok(short) = i8::try_from(value as i32) {
            self.mem(&[], false, &[0x83], 7, mem);
            self.code.push(short as u8);
        } else {
            self.mem(&[], false, &[0x81], 7, mem);
            self.bytes(&value.to_le_bytes());
        }
    }
    /// `jmp target`; returns the offset of the displacement.
    pub fn jmp(&mut self, target: u64) -> usize {
        self.code.push(0xe9);
        self.rel32(target)
    }
    /// `call target`; returns the offset of the displacement.
    pub fn call(&mut self, target: u64) -> usize {
        self.code.push(0xe8);
        self.rel32(target)
    }
    /// `jcc target` with the condition in its encoding (0 to 15); returns the offset of the displacement.
    pub fn jcc(&mut self, condition: u8, target: u64) -> usize {
        self.bytes(&[0x0f, 0x80 | condition]);
        self.rel32(target)
    }
    /// Makes the displacement at `at` lead to the next byte.
    pub fn bind(&mut self, at: usize) {
        let rel = (self.code.len() - at - 4) as u32;
        self.code[at..at + 4].copy_from_slice(&rel.to_le_bytes());
    }
    /// `jmp [mem]`.
    pub fn jmp_mem(&mut self, mem: Mem) {
        self.mem(&[], false, &[0xff], 4, mem);
    }

    fn rel32(&mut self, target: u64) -> usize {
        let at = self.code.len();
        let rel = target.wrapping_sub(self.here() + 4) as u32;
        self.bytes(&rel.to_le_bytes());
        // Shared code lies before all other. A target of 0 is not known yet, but will be in the code itself.
        if (1..self.base).contains(&target) {
            self.relocated(Relocated::Shared);
        }
        at
    }
}

/// Condition codes in their encoding.
pub mod cc {
    /// Not equal.
    pub const NE: u8 = 5;
    /// Below, unsigned.
    pub const B: u8 = 2;
    /// Not below, unsigned.
    pub const NB: u8 = 3;
    /// Equal.
    pub const E: u8 = 4;
    /// Above, unsigned.
    pub const A: u8 = 7;
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    use super::*;

    fn text(build: impl FnOnce(&mut Asm)) -> String {
        let mut asm = Asm::new(0x1000);
        build(&mut asm);
        let mut formatter = IntelFormatter::new();
        formatter.options_mut().set_space_after_operand_separator(false);
        let mut out = String::new();
        for i in &mut Decoder::with_ip(64, &asm.code, 0x1000, DecoderOptions::NONE) {
            if !out.is_empty() {
                out.push_str("; ");
            }
            formatter.format(&i, &mut out);
        }
        out
    }

    #[test]
    fn what_is_assembled_is_what_was_asked_for() {
        assert_eq!(text(|a| a.load(14, Mem::Block(0x88))), "mov r14,gs:[88h]");
        assert_eq!(text(|a| a.store(Mem::At(13, 0), 3)), "mov [r13],rbx");
        assert_eq!(text(|a| a.load(1, Mem::At(12, 8))), "mov rcx,[r12+8]");
        assert_eq!(text(|a| a.load(1, Mem::At(4, 0x1000))), "mov rcx,[rsp+1000h]");
        assert_eq!(text(|a| a.lea(13, 13, -8)), "lea r13,[r13-8]");
        assert_eq!(text(|a| a.mov_imm(15, 7)), "mov r15d,7");
        assert_eq!(text(|a| a.mov_imm(15, u64::MAX)), "mov r15,0FFFFFFFFFFFFFFFFh");
        assert_eq!(text(|a| a.mov_imm(15, 1 << 40)), "mov r15,10000000000h");
        assert_eq!(text(|a| a.cmp_imm32(Mem::Block(-64), 0)), "cmp dword ptr gs:[0FFFFFFFFFFFFFFC0h],0");
        assert_eq!(text(|a| a.jmp_mem(Mem::At(15, 8))), "jmp qword ptr [r15+8]");
        assert_eq!(text(|a| _ = a.jcc(cc::NE, 0x1010)), "jne 0000000000001010h");
    }
}
