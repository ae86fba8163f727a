//! Operands: guest addresses computed in host registers, TLB probes, guest instructions re-encoded.

use iced_x86::{
    Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register,
};
use ruse_arch::state::seg;

use super::{
    Home,
    asm::{
        Asm, Mem, cc,
        host::{T0, T1},
    },
    block,
    emit::Emitter,
    groups::{Lead, Member},
    home,
    loops::Round,
    out_of_line::{Missed, SlowPath},
};
use crate::{
    ir::MemUse,
    mmu::tlb::{ENTRIES, Entry},
    tier0::operand::gpr_index,
};

/// The instruction has no form that fits the host registers at hand.
#[derive(Debug)]
pub struct Unencodable;

/// The host register `number` in the width of `like`.
fn host_register(like: Register, number: u8) -> Register {
    let first = match (like.size(), number) {
        (1, 4..=7) => {
            return Register::try_from(Register::SPL as usize + usize::from(number) - 4).expect("SPL to DIL");
        }
        (1, 8..) => {
            return Register::try_from(Register::R8L as usize + usize::from(number) - 8)
                .expect("R8L to R15L");
        }
        (1, _) => Register::AL,
        (2, _) => Register::AX,
        (4, _) => Register::EAX,
        _ => Register::RAX,
    };
    Register::try_from(first as usize + usize::from(number)).expect("16 registers of each width")
}

/// A guest register that lives in the block, and the scratch register that stands for it in an instruction.
struct Moved {
    guest: usize,
    to: u8,
    /// The scratch register has its value already.
    copy: bool,
    reads: bool,
    writes: bool,
}

/// Where an operand lies in host memory: `base + index << scale + displacement`.
#[derive(Clone, Copy, Debug)]
pub struct At {
    pub base: u8,
    pub index: Option<(u8, u8)>,
    pub displacement: i32,
}

impl At {
    /// So many bytes from T0.
    pub fn from_t0(displacement: i32) -> Self {
        Self { base: T0, index: None, displacement }
    }

    fn registers(&self) -> impl Iterator<Item = u8> {
        [Some(self.base), self.index.map(|(r, _)| r)].into_iter().flatten()
    }
}

impl Emitter<'_> {
    /// Computes the linear address of the instruction's memory operand in T0. Uses T1. Destroys the flags only where
    /// the segment has a base.
    pub(super) fn address(&mut self, i: &Instruction) {
        if i.is_ip_rel_memory_operand() {
            self.asm.mov_address(T0, i.memory_displacement64());
        } else {
            self.computed_address(i, T0, i.memory_base().is_gpr32() || i.memory_index().is_gpr32());
        }
        match i.memory_segment() {
            Register::FS => self.asm.mem(&[], true, &[0x03], T0, block::segment_base(seg::FS)),
            Register::GS => self.asm.mem(&[], true, &[0x03], T0, block::segment_base(seg::GS)),
            _ => {}
        }
    }

    /// `lea dst, [base + index * scale + displacement]`, with 32-bit wrap if `narrow`.
    fn computed_address(&mut self, i: &Instruction, dst: u8, narrow: bool) {
        let part = |register| gpr_index(register).map(|g| g as u8);
        let (base, index) = self.both_loaded(part(i.memory_base()), part(i.memory_index()));
        let scale = i.memory_index_scale().trailing_zeros() as u8;
        match (base, index, i.memory_displacement64() as i32) {
            // A move costs no time.
            (Some(base), None, 0) if !narrow => self.asm.mov(dst, base),
            (base, index, distance) => {
                lea(&mut self.asm, dst, base, index.map(|r| (r, scale)), distance, !narrow);
            }
        }
        if dst == T0 {
            self.changes(T0);
        }
    }

    /// LEA: the address without its segment goes to the destination.
    pub(super) fn lea_node(&mut self, i: &Instruction) {
        let narrow_result = i.op0_register().is_gpr32();
        let guest = gpr_index(i.op0_register()).expect("LEA writes a general register") as u8;
        let dst = match home(guest) {
            Home::Host(r) => r,
            Home::Block(_) => T0,
        };
        if i.is_ip_rel_memory_operand() {
            let value = i.memory_displacement64();
            self.asm.mov_address(dst, if narrow_result { value & 0xffff_ffff } else { value });
        } else {
            let narrow_address = i.memory_base().is_gpr32() || i.memory_index().is_gpr32();
            self.computed_address(i, dst, narrow_result || narrow_address);
        }
        if let Home::Block(at) = home(guest) {
            self.asm.store(Mem::Block(at), T0);
            self.changes(T0);
            self.copied(guest, T0);
        }
    }

    /// Makes T0 address bytes that an access of the current node may use; returns their distance from it. `address` is
    /// called where that needs the access's linear address in T0. Uses T1; destroys the flags unless the access follows
    /// another of its group.
    pub(super) fn access(&mut self, place: usize, mem: MemUse, address: impl FnOnce(&mut Self)) -> i32 {
        let Some(Member { group, at, leads }) = self.place(place) else {
            address(self);
            self.probe(mem.size.into(), mem.write, Missed::Access(mem));
            return 0;
        };
        if let Some(lead) = leads {
            address(self);
            if at != 0 {
                self.asm.lea(T0, T0, -i32::from(at));
            }
            match self.round {
                Round::Second { .. } if lead.walks => self.same_page(group, lead),
                _ if lead.followed => self.probe(lead.span, lead.write, Missed::Group(lead)),
                _ => self.probe(mem.size.into(), mem.write, Missed::Access(mem)),
            }
            if lead.followed {
                self.asm.store(block::group(group), T0);
            }
        } else if self.held != Some(group) {
            self.changes(T0);
            self.asm.load(T0, block::group(group));
        }
        self.held = Some(group);
        at.into()
    }

    /// Turns the linear address in T0 into the host address of `size` bytes there. Uses T1; destroys the flags.
    pub(super) fn probe(&mut self, size: u16, write: bool, missed: Missed) {
        let branch = self.look_up(size, write);
        self.asm.mem(&[], true, &[0x03], T0, Mem::At(T1, Entry::HOST_OFFSET));
        self.slow_path(branch, missed);
    }

    /// As [`Self::probe`], for an operand of which only the current instruction makes use: the host address is T0 and T1
    /// together. That is a cycle sooner.
    pub(super) fn probe_apart(&mut self, mem: MemUse) -> At {
        let branch = self.look_up(mem.size.into(), mem.write);
        self.asm.load(T1, Mem::At(T1, Entry::HOST_OFFSET));
        self.slow_path(branch, Missed::Apart(mem));
        At { base: T0, index: Some((T1, 0)), displacement: 0 }
    }

    /// As [`Self::probe`], for a group that remembers the page on which it was.
    fn same_page(&mut self, group: u8, lead: Lead) {
        self.asm.mem(&[], true, &[0x2b], T0, block::group_page(group)); // sub T0, [page]
        let branch = self.fits_page(lead.span);
        self.asm.mem(&[], true, &[0x03], T0, block::group_host(group)); // add T0, [host]
        self.slow_path(branch, Missed::Page(group, lead));
    }

    /// The code for when [`Self::same_page`] was on another page: goes back with the new one remembered.
    pub(super) fn other_page(&mut self, group: u8, lead: Lead, slow: SlowPath) {
        self.asm.mem(&[], true, &[0x03], T0, block::group_page(group)); // add T0, [page]
        let branch = self.look_up(lead.span, lead.write);
        self.asm.store(block::group(group), T0);
        self.asm.load(T0, Mem::At(T1, Entry::tag_offset(lead.write)));
        self.asm.store(block::group_page(group), T0);
        self.asm.load(T0, Mem::At(T1, Entry::HOST_OFFSET));
        self.asm.store(block::group_host(group), T0);
        self.asm.mem(&[], true, &[0x03], T0, block::group(group));
        self.asm.jmp(slow.back);
        self.slow_paths.push(SlowPath { branch, missed: Missed::Group(lead), ..slow });
    }

    fn slow_path(&mut self, branch: usize, missed: Missed) {
        let back = self.asm.here();
        self.in_host = false;
        [T0, T1].into_iter().for_each(|scratch| self.changes(scratch));
        self.slow_paths.push(SlowPath { branch, back, missed, guest: self.guest_offset });
    }

    /// Makes T1 address the TLB's entry for the linear address in T0, and T0 the distance from its page. Gives the jump
    /// that is taken if the entry is another's, or `size` bytes leave the page.
    pub(super) fn look_up(&mut self, size: u16, write: bool) -> usize {
        // The index: bits 12 and up of the address, times the size of an entry.
        const SHIFT: u8 = 12 - size_of::<Entry>().trailing_zeros() as u8;
        const MASK: u32 = ((ENTRIES - 1) * size_of::<Entry>()) as u32;
        let asm = &mut self.asm;
        if self.rorx {
            asm.bytes(&[0xc4, 0x43, 0xfb, 0xf0, 0xc0 | (T1 & 7) << 3 | T0 & 7, SHIFT]); // rorx T1, T0, SHIFT
        } else {
            asm.mov(T1, T0);
            asm.bytes(&[0x49, 0xc1, 0xe8 | T1 & 7, SHIFT]); // shr T1, SHIFT
        }
        asm.bytes(&[0x41, 0x81, 0xe0 | T1 & 7]); // and T1d, MASK
        asm.bytes(&MASK.to_le_bytes());
        asm.mem(&[], true, &[0x03], T1, block::TLB); // add T1, [tlb]
        // sub T0, [T1 + tag]
        asm.mem(&[], true, &[0x2b], T0, Mem::At(T1, Entry::tag_offset(write)));
        self.fits_page(size)
    }

    /// Compares T0 with what lies on a page before `size` bytes; the jump is taken if it is more.
    fn fits_page(&mut self, size: u16) -> usize {
        self.asm.bytes(&[0x49, 0x81, 0xf8 | T0 & 7]); // cmp T0, 4096 - size
        self.asm.bytes(&(4096 - u32::from(size)).to_le_bytes());
        self.asm.jcc(cc::A, 0)
    }

    /// Re-encodes the instruction for the host. `mem`: where its memory operand lies, if it has one.
    pub(super) fn host_insn(&mut self, insn: &Instruction, mem: Option<At>) -> Result<(), Unencodable> {
        let mut i = *insn;
        if let Some(At { base, index, displacement }) = mem {
            i.set_memory_base(host_register(Register::RAX, base));
            i.set_memory_index(index.map_or(Register::None, |(r, _)| host_register(Register::RAX, r)));
            i.set_memory_index_scale(1 << index.map_or(0, |(_, scale)| scale));
            i.set_memory_displacement64(displacement as u64);
            i.set_memory_displ_size(u32::from(displacement != 0));
            i.set_segment_prefix(Register::None);
        }
        let high = match mem {
            Some(at) => lower_half_for(&mut i, at)?,
            None => None,
        };
        let mut taken: Vec<u8> = mem.iter().flat_map(At::registers).collect();
        let mut moved: Vec<Moved> = Vec::new();
        for op in 0..i.op_count() {
            if i.op_kind(op) != OpKind::Register {
                continue;
            }
            let register = i.op_register(op);
            let Some(guest) = gpr_index(register) else { continue };
            let number = match home(guest as u8) {
                Home::Host(r) => r,
                Home::Block(_) => {
                    let (reads, writes) = access_of(self.info, insn, op);
                    match moved.iter_mut().find(|m| m.guest == guest) {
                        Some(m) => {
                            m.reads |= reads;
                            m.writes |= writes;
                            m.to
                        }
                        None => {
                            let (to, copy) = self.scratch_for(guest as u8, &taken).ok_or(Unencodable)?;
                            taken.push(to);
                            moved.push(Moved { guest, to, copy, reads, writes });
                            to
                        }
                    }
                }
            };
            i.set_op_register(op, host_register(register, number));
        }
        for m in moved.iter().filter(|m| m.reads && !m.copy) {
            self.asm.load(m.to, block::gpr(m.guest));
        }
        self.exchange_bytes(high);
        self.encode(&i)?;
        self.exchange_bytes(high);
        for m in &moved {
            if m.writes {
                self.asm.store(block::gpr(m.guest), m.to);
            }
            self.copied(m.guest as u8, m.to);
        }
        Ok(())
    }

    /// `xchg` of the two lowest bytes of a register, of the first four. Leaves the flags alone.
    fn exchange_bytes(&mut self, register: Option<u8>) {
        if let Some(r) = register {
            self.asm.bytes(&[0x86, 0xc0 | (r + 4) << 3 | r]);
        }
    }

    /// Appends an instruction as iced encodes it.
    fn encode(&mut self, i: &Instruction) -> Result<(), Unencodable> {
        let before = self.asm.code.len();
        self.encoder.set_buffer(std::mem::take(&mut self.asm.code));
        let result = self.encoder.encode(i, 0);
        self.asm.code = self.encoder.take_buffer();
        if result.is_err() {
            self.asm.code.truncate(before);
            return Err(Unencodable);
        }
        Ok(())
    }
}

/// AH to DH cannot be named beside a register above the first eight (SDM volume 2, 2.2.1.2), such as T0: where the
/// instruction names one of them, makes it name the lower byte, with which it is to be exchanged, and gives the register.
fn lower_half_for(i: &mut Instruction, at: At) -> Result<Option<u8>, Unencodable> {
    let high = |op: &u32| {
        i.op_kind(*op) == OpKind::Register && (Register::AH..=Register::BH).contains(&i.op_register(*op))
    };
    let Some(op) = (0..i.op_count()).find(high) else { return Ok(None) };
    let number = (i.op_register(op) as usize - Register::AH as usize) as u8;
    // An address, or the accumulator that CMPXCHG does not name, needs the bytes in their places.
    if at.base == number || at.index.is_some_and(|(r, _)| r == number) || i.mnemonic() == Mnemonic::Cmpxchg {
        return Err(Unencodable);
    }
    i.set_op_register(op, host_register(Register::AL, number));
    Ok(Some(number))
}

/// Whether the register is one that lives in the vCPU block.
pub(super) fn lives_in_block(register: Register) -> bool {
    gpr_index(register).is_some_and(|guest| matches!(home(guest as u8), Home::Block(_)))
}

/// Whether a register operand of the instruction lives in the vCPU block.
pub(super) fn names_block(i: &Instruction) -> bool {
    let named = (0..i.op_count()).filter(|&op| i.op_kind(op) == OpKind::Register);
    named.map(|op| i.op_register(op)).any(lives_in_block)
}

/// Whether an operand's register is read and written. A narrow write keeps the rest, so it counts as a read too.
fn access_of(info: &mut InstructionInfoFactory, i: &Instruction, op: u32) -> (bool, bool) {
    let access = info.info_options(i, InstructionInfoOptions::NO_MEMORY_USAGE).op_access(op);
    match access {
        OpAccess::Read | OpAccess::CondRead => (true, false),
        OpAccess::Write if i.op_register(op).size() >= 4 => (false, true),
        OpAccess::None | OpAccess::NoMemAccess => (true, false),
        _ => (true, true),
    }
}

/// `lea dst, [base + index << scale + disp]`.
pub(super) fn lea(asm: &mut Asm, dst: u8, base: Option<u8>, index: Option<(u8, u8)>, disp: i32, wide: bool) {
    let (x, b) = (index.map_or(0, |(r, _)| r >> 3), base.map_or(0, |r| r >> 3));
    let rex = 0x40 | u8::from(wide) << 3 | (dst >> 3) << 2 | x << 1 | b;
    if rex != 0x40 {
        asm.bytes(&[rex]);
    }
    let reg = (dst & 7) << 3;
    let short = i8::try_from(disp).ok();
    // No base means a 32-bit displacement; RBP and R13 as base always have one.
    let (form, base_bits) = match base {
        None => (0x00, 5),
        Some(r) if disp == 0 && r & 7 != 5 => (0x00, r & 7),
        Some(r) if short.is_some() => (0x40, r & 7),
        Some(r) => (0x80, r & 7),
    };
    let sib_index = index.map_or(4 << 3, |(r, scale)| scale << 6 | (r & 7) << 3);
    asm.bytes(&[0x8d, form | reg | 4, sib_index | base_bits]);
    match (form, base, short) {
        (0x40, _, Some(d)) => asm.bytes(&[d as u8]),
        (0x80, ..) | (_, None, _) => asm.bytes(&disp.to_le_bytes()),
        _ => {}
    }
}
