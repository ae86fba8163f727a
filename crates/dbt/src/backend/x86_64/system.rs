//! Operations on the CPU's own state: flags beside the arithmetic ones, segment bases, the time-stamp counter, and the
//! bits of bit strings.

use iced_x86::Mnemonic;
use ruse_arch::{flags::rflags, state::seg};

use super::{
    Home,
    asm::{
        Mem, cc,
        host::{T0, T1},
    },
    block,
    emit::{Emitter, merged},
    groups::OPERAND,
    home,
    operands::lea,
    out_of_line::{Stub, StubKind},
};
use crate::{
    ir::{Base, MemUse, Node},
    tier0::operand::gpr_index,
};

const RCX: u8 = 1;

impl Emitter<'_> {
    /// Sets or clears a flag that is kept in the block. Destroys the host's flags.
    pub(super) fn system_flag(&mut self, flag: u64, on: bool) {
        let (operation, mask) = if on { (1, flag as u32) } else { (4, !flag as u32) };
        // or / and dword [rflags], mask
        self.asm.mem(&[], false, &[0x81], operation, block::RFLAGS);
        self.asm.bytes(&mask.to_le_bytes());
        self.in_host = false;
    }

    /// STI. If an interrupt waits, tier 0 sees to it that it is let in behind the next instruction.
    pub(super) fn enable_interrupts(&mut self) {
        self.asm.cmp_imm32(block::IRQ_WAITING, 0);
        let branch = self.asm.jcc(cc::NE, 0);
        self.stubs.push(Stub { branch, kind: StubKind::Interpret(self.guest_offset) });
        self.system_flag(rflags::IF, true);
    }

    /// STAC and CLAC choose the view of memory.
    pub(super) fn user_access(&mut self, allowed: bool) {
        self.system_flag(rflags::AC, allowed);
        self.held = None;
        self.asm.load(T0, block::kernel_tlb(allowed));
        self.asm.store(block::TLB, T0);
    }

    /// The guest's counter is the host's plus offsets.
    pub(super) fn time_stamp(&mut self, aux: bool) {
        if aux {
            // RDTSCP waits for what is before it (SDM volume 2).
            self.asm.bytes(&[0x0f, 0xae, 0xe8]); // lfence
            self.asm.mem(&[], false, &[0x8b], RCX, block::TSC_AUX); // mov ecx, [aux]
        }
        self.asm.bytes(&[0x0f, 0x31]); // rdtsc
        self.asm.bytes(&[0x48, 0xc1, 0xe2, 32]); // shl rdx, 32
        self.asm.bytes(&[0x48, 0x09, 0xd0]); // or rax, rdx
        self.asm.mem(&[], true, &[0x03], 0, block::TSC_OFFSET); // add rax, [offset]
        self.asm.mem(&[], true, &[0x03], 0, block::TSC_ADJUST);
        self.asm.mov(2, 0);
        self.asm.bytes(&[0x48, 0xc1, 0xea, 32]); // shr rdx, 32
        self.asm.bytes(&[0x89, 0xc0]); // mov eax, eax
        self.in_host = false;
    }

    /// A bit that a register counts from the memory operand on (SDM volume 2, BT).
    pub(super) fn bit_string(&mut self, node: &Node, mem: MemUse) {
        let i = &node.insn;
        let bit = gpr_index(i.op1_register()).expect("the front end has looked") as u8;
        let wide = mem.size == 8;
        let at = self.access(OPERAND, mem, |this| {
            this.address(i);
            let r = this.loaded(bit, T1);
            let opcode: &[u8] = if wide { &[0x8b] } else { &[0x63] };
            this.asm.regs(true, opcode, T1, r); // mov or movsxd T1, bit
            let log = if wide { 6 } else { 5 };
            this.asm.bytes(&[0x49, 0xc1, 0xf8 | T1 & 7, log]); // sar T1, log
            lea(&mut this.asm, T0, Some(T0), Some((T1, log - 3)), 0, true);
        });
        let r = self.loaded(bit, T1);
        self.asm.regs(false, &[0x8b], T1, r);
        self.and_t1(if wide { 63 } else { 31 });
        let merged = merged(node);
        if merged != 0 {
            self.asm.store(block::scratch(0), T1);
            self.restore_flags(merged);
            self.asm.load(T1, block::scratch(0));
        }
        let opcode = match i.mnemonic() {
            Mnemonic::Bts => 0xab,
            Mnemonic::Btr => 0xb3,
            Mnemonic::Btc => 0xbb,
            _ => 0xa3,
        };
        let lock: &[u8] = if i.has_lock_prefix() { &[0xf0] } else { &[] };
        self.asm.mem(lock, wide, &[0x0f, opcode], T1, Mem::At(T0, at));
        (self.in_host, self.in_block) = (true, false);
    }

    /// RDFSBASE and RDGSBASE.
    pub(super) fn read_base(&mut self, what: Base) {
        let base = block::segment_base(what.segment.into());
        self.load_into(what.register, what.wide, base);
    }

    /// WRFSBASE and WRGSBASE, which fault with an address that is not canonical.
    pub(super) fn write_base(&mut self, what: Base) {
        self.held = None;
        let r = self.loaded(what.register, T0);
        self.asm.regs(what.wide, &[0x8b], T0, r);
        if what.wide {
            self.asm.mov(T1, T0);
            self.asm.bytes(&[0x49, 0xc1, 0xe0 | T1 & 7, 16]); // shl T1, 16
            self.asm.bytes(&[0x49, 0xc1, 0xf8 | T1 & 7, 16]); // sar T1, 16
            self.asm.regs(true, &[0x3b], T1, T0);
            let branch = self.asm.jcc(cc::NE, 0);
            self.stubs.push(Stub { branch, kind: StubKind::Interpret(self.guest_offset) });
            self.in_host = false;
        }
        self.asm.store(block::segment_base(what.segment.into()), T0);
    }

    /// MOV from a control register.
    pub(super) fn read_control(&mut self, control: u8, to: u8) {
        self.load_into(to, true, block::control(control));
    }

    /// Loads a general register from the block.
    fn load_into(&mut self, guest: u8, wide: bool, from: Mem) {
        match home(guest) {
            Home::Host(r) => self.asm.mem(&[], wide, &[0x8b], r, from),
            Home::Block(at) => {
                self.held = None;
                self.asm.mem(&[], wide, &[0x8b], T0, from);
                self.asm.store(Mem::Block(at), T0);
            }
        }
    }

    pub(super) fn read_selector(&mut self, segment: u8, to: u8, size: u8) {
        self.held = None;
        let (dst, home) = match home(to) {
            Home::Host(r) => (r, None),
            Home::Block(at) => (T0, Some(Mem::Block(at))),
        };
        let selector = block::selector(segment.into());
        if size == 2 {
            if let Some(home) = home {
                self.asm.load(T0, home);
            }
            self.asm.mem(&[0x66], false, &[0x8b], dst, selector); // mov dst16, [selector]
        } else {
            self.asm.mem(&[], false, &[0x0f, 0xb7], dst, selector); // movzx dst32, word [selector]
        }
        if let Some(home) = home {
            self.asm.store(home, T0);
        }
    }

    pub(super) fn swap_gs(&mut self) {
        let base = block::segment_base(seg::GS);
        self.held = None;
        self.asm.load(T0, base);
        self.asm.load(T1, block::KERNEL_GS_BASE);
        self.asm.store(base, T1);
        self.asm.store(block::KERNEL_GS_BASE, T0);
    }
}
