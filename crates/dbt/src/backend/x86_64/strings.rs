//! Repeated MOVS and STOS: within a page the host's own instruction does them.

use iced_x86::Instruction;
use ruse_arch::flags::rflags;

use super::{
    asm::{
        Mem, cc,
        host::{T0, T1},
    },
    block,
    emit::{Emitter, Mark},
    operands::lea,
};
use crate::{ir::Repeat, mmu::tlb::Entry};

const RCX: u8 = 1;
const RSI: u8 = 6;
const RDI: u8 = 7;
/// Bytes of a page.
const PAGE: u32 = 4096;

/// A repeated instruction that tier 0 has to execute after all.
pub(super) struct SlowString {
    /// Displacements that lead to it.
    branches: Vec<usize>,
    back: u64,
    ip: u64,
    len: u64,
    guest: u16,
}

impl Emitter<'_> {
    /// Copies or fills up to a page. What goes backwards, crosses a page or misses the TLB is tier 0's.
    pub(super) fn repeat(&mut self, i: &Instruction, what: Repeat) {
        self.asm.mem(&[], false, &[0xf7], 0, block::RFLAGS); // test dword [rflags], DF
        self.asm.bytes(&(rflags::DF as u32).to_le_bytes());
        let mut branches = vec![self.asm.jcc(cc::NE, 0)];
        self.asm.bytes(&[0x48, 0x81, 0xf9]); // cmp rcx, elements of a page
        self.asm.bytes(&(PAGE / u32::from(what.size)).to_le_bytes());
        branches.push(self.asm.jcc(cc::A, 0));
        if what.copies {
            branches.extend(self.elements(RSI, false, what.size));
            self.asm.store(block::scratch(0), T0);
        }
        branches.extend(self.elements(RDI, true, what.size));
        // The registers go on from where they were: by what they are from the host addresses.
        self.asm.mov(T1, RDI);
        self.asm.regs(true, &[0x2b], T1, T0); // sub T1, T0
        self.asm.mov(RDI, T0);
        if what.copies {
            self.asm.mov(T0, RSI);
            self.asm.mem(&[], true, &[0x2b], T0, block::scratch(0)); // sub T0, [scratch]
            self.asm.load(RSI, block::scratch(0));
        }
        self.host_string(what);
        if what.copies {
            self.asm.regs(true, &[0x03], RSI, T0); // add rsi, T0
        }
        self.asm.regs(true, &[0x03], RDI, T1); // add rdi, T1
        let slow = SlowString {
            branches,
            back: self.asm.here(),
            ip: i.ip(),
            len: i.len() as u64,
            guest: self.guest_offset,
        };
        self.slow_strings.push(slow);
        self.flags_are_in_block();
    }

    /// Makes T0 the host address of the elements at the address in `pointer`; the jumps are taken if that cannot be.
    fn elements(&mut self, pointer: u8, write: bool, size: u8) -> [usize; 2] {
        self.asm.mov(T0, pointer);
        let missed = self.look_up(1, write);
        self.asm.mem(&[], true, &[0x03], T0, Mem::At(T1, Entry::HOST_OFFSET));
        self.asm.regs(false, &[0x8b], T1, pointer); // mov T1d, pointer
        self.asm.bytes(&[0x41, 0x81, 0xe0 | T1 & 7]); // and T1d, PAGE - 1
        self.asm.bytes(&(PAGE - 1).to_le_bytes());
        lea(&mut self.asm, T1, Some(T1), Some((RCX, size.trailing_zeros() as u8)), 0, true);
        self.asm.bytes(&[0x49, 0x81, 0xf8 | T1 & 7]); // cmp T1, PAGE
        self.asm.bytes(&PAGE.to_le_bytes());
        [missed, self.asm.jcc(cc::A, 0)]
    }

    /// REP MOVS or REP STOS.
    fn host_string(&mut self, what: Repeat) {
        let opcode = if what.copies { 0xa4 } else { 0xaa } | u8::from(what.size > 1);
        match what.size {
            2 => self.asm.bytes(&[0x66, 0xf3, opcode]),
            8 => self.asm.bytes(&[0xf3, 0x48, opcode]),
            _ => self.asm.bytes(&[0xf3, opcode]),
        }
    }

    /// The call of tier 0 for one that was no simple case.
    pub(super) fn slow_string(&mut self, slow: SlowString) {
        slow.branches.iter().for_each(|&branch| self.asm.bind(branch));
        self.marks.push(Mark { host: self.asm.code.len() as u32, guest: slow.guest, host_flags: false });
        self.call_step(slow.ip, slow.len);
        self.asm.jmp(slow.back);
    }
}
