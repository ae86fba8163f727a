//! Lifts 64-bit x86 code.

use std::ops::Range;

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, InstructionInfoOptions,
    Mnemonic, OpAccess, OpKind, Register, RflagsBits,
};

use ruse_arch::state::seg;

use crate::{
    ir::{ACCESS_SIZES, Base, MemUse, Node, Op, Region, Repeat, Value},
    tier0::operand::{gpr_index, segment_index},
};

/// The six arithmetic flags in iced's notation.
pub const ARITH: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Most instructions of a region.
const MAX_NODES: usize = 64;
/// How many instructions are looked at to see whether flags are read at the target of an exit.
const LOOKAHEAD: usize = 10;

/// What translated code may rely on; blocks made for one value are not used under another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CodeMode {
    /// CPL 0.
    pub kernel: bool,
    /// x87 and MMX instructions do not fault.
    pub x87: bool,
    /// SSE instructions do not fault.
    pub sse: bool,
    /// AVX instructions do not fault.
    pub avx: bool,
    /// RDTSC does not fault, and reads the host's counter plus an offset.
    pub tsc: bool,
    /// The instructions for the bases of FS and GS do not fault.
    pub bases: bool,
    /// Each access is served by itself: for code whose groups of accesses fail.
    pub plain: bool,
}

impl CodeMode {
    /// As a number, for keys.
    pub fn bits(self) -> u32 {
        u32::from(self.kernel)
            | u32::from(self.x87) << 1
            | u32::from(self.sse) << 2
            | u32::from(self.avx) << 3
            | u32::from(self.tsc) << 4
            | u32::from(self.bases) << 5
            | u32::from(self.plain) << 6
    }
}

/// A piece of a page of code.
#[derive(Clone, Copy)]
pub struct Piece<'a> {
    /// Linear address of the first byte.
    pub start: u64,
    /// The bytes.
    pub bytes: &'a [u8],
}

impl<'a> Piece<'a> {
    /// The bytes from a linear address on, if it lies in the piece.
    fn from(&self, at: u64) -> Option<&'a [u8]> {
        usize::try_from(at.wrapping_sub(self.start)).ok().and_then(|offset| self.bytes.get(offset..))
    }
}

/// Decodes and lifts from one page of code.
pub struct Lifter {
    info: InstructionInfoFactory,
    /// Whether the guest has the features of an instruction.
    allowed: Box<dyn Fn(&Instruction) -> bool + Send>,
    steps: bool,
}

impl Lifter {
    /// A lifter that leaves instructions for which `allowed` says no to tier 0. `steps`: regions may go on behind
    /// instructions that tier 0 executes.
    pub fn new(allowed: Box<dyn Fn(&Instruction) -> bool + Send>, steps: bool) -> Self {
        Self { info: InstructionInfoFactory::new(), allowed, steps }
    }

    /// Lifts the region that begins at linear address `start` in a piece of a page. What lies before is looked at where the
    /// region leads back. `None` if not even one instruction lies wholly in the piece.
    pub fn lift(&mut self, start: u64, piece: Piece, mode: CodeMode) -> Option<Region> {
        self.lift_some(start, piece, mode, MAX_NODES)
    }

    /// Lifts the one instruction at `start`; the piece may come from two pages.
    pub fn lift_one(&mut self, start: u64, piece: Piece, mode: CodeMode) -> Option<Region> {
        self.lift_some(start, piece, mode, 1)
    }

    fn lift_some(&mut self, start: u64, piece: Piece, mode: CodeMode, most: usize) -> Option<Region> {
        let mut decoder = Decoder::with_ip(64, piece.from(start)?, start, DecoderOptions::NONE);
        let mut nodes: Vec<Node> = Vec::with_capacity(16);
        let mut end = start;
        let mut seen = start..start;
        while nodes.len() < most && decoder.can_decode() {
            let insn = decoder.decode();
            if insn.is_invalid() && decoder.last_error() == iced_x86::DecoderError::NoMoreBytes {
                break;
            }
            let mut node = self.node(insn, mode);
            node.live_at_exit = exit_liveness(&node, piece, &mut seen);
            end = insn.next_ip();
            let op = node.op;
            nodes.push(node);
            if op.ends_region() {
                break;
            }
        }
        if nodes.is_empty() {
            return None;
        }
        leave_last_sti_to_tier0(&mut nodes);
        let live_at_end = flags_read_at(end, piece, &mut seen);
        seen.end = seen.end.max(end);
        let mut region = Region { start, end, nodes, live_at_end, seen };
        region.compute_liveness();
        Some(region)
    }

    fn node(&mut self, insn: Instruction, mode: CodeMode) -> Node {
        let op = self.op(&insn, mode);
        let x87 = is_x87(&insn) && matches!(op, Op::Host(_));
        let vector = is_vector(&insn) && matches!(op, Op::Host(_));
        let (reads, kills, writes) = match op {
            Op::Interpret | Op::PushFlags | Op::Step | Op::Repeat(_) => (ARITH, 0, false),
            Op::Nop => (0, 0, false),
            _ => {
                let modified = insn.rflags_modified() & ARITH;
                (insn.rflags_read() & ARITH, if may_keep_flags(&insn) { 0 } else { modified }, modified != 0)
            }
        };
        Node { op, insn, reads, kills, writes, live_out: 0, live_at_exit: 0, x87, vector }
    }

    fn op(&mut self, i: &Instruction, mode: CodeMode) -> Op {
        if i.is_invalid() {
            return Op::Interpret;
        }
        match i.flow_control() {
            FlowControl::Next => {}
            FlowControl::ConditionalBranch if i.is_jcc_short_or_near() && near(i, 0) => {
                return Op::Branch { condition: i.condition_code(), target: i.near_branch_target() };
            }
            FlowControl::UnconditionalBranch if near(i, 0) => {
                return Op::Jump { target: i.near_branch_target() };
            }
            FlowControl::Call if near(i, 0) && i.code() == Code::Call_rel32_64 => {
                return Op::Call { target: i.near_branch_target() };
            }
            FlowControl::IndirectBranch if i.code() == Code::Jmp_rm64 => {
                return value(i).map_or(Op::Interpret, Op::JumpTo);
            }
            FlowControl::IndirectCall if i.code() == Code::Call_rm64 => {
                return value(i).map_or(Op::Interpret, Op::CallTo);
            }
            FlowControl::Return if matches!(i.code(), Code::Retnq) => return Op::Return(0),
            FlowControl::Return if matches!(i.code(), Code::Retnq_imm16) => {
                return Op::Return(i.immediate16());
            }
            _ => return Op::Interpret,
        }
        if !(self.allowed)(i) {
            return Op::Interpret;
        }
        if let Some(op) = special(i, mode) {
            return op;
        }
        if must_interpret(i) || !unit_available(i, mode) {
            return match repeat(i) {
                _ if !self.steps || !may_step(i) => Op::Interpret,
                Some(repeat) => Op::Repeat(repeat),
                None => Op::Step,
            };
        }
        let Some(memory) = (0..i.op_count()).find(|&op| i.op_kind(op) == OpKind::Memory) else {
            return Op::Host(None);
        };
        let info = self.info.info_options(i, InstructionInfoOptions::NO_MEMORY_USAGE);
        let write = match info.op_access(memory) {
            OpAccess::Read | OpAccess::CondRead => false,
            OpAccess::Write | OpAccess::ReadWrite | OpAccess::ReadCondWrite | OpAccess::CondWrite => true,
            _ => return Op::Nop,
        };
        match u8::try_from(i.memory_size().size()) {
            Ok(size) if ACCESS_SIZES.contains(&size) => Op::Host(Some(MemUse { write, size })),
            _ => Op::Interpret,
        }
    }
}

/// STI blocks interrupts for one more instruction, which has to be in the same region: interrupts are taken between
/// regions.
fn leave_last_sti_to_tier0(nodes: &mut [Node]) {
    if let Some(sti) = nodes.last_mut().filter(|node| node.op == Op::EnableInterrupts) {
        (sti.op, sti.reads, sti.live_at_exit) = (Op::Interpret, ARITH, ARITH);
    }
}

fn near(i: &Instruction, op: u32) -> bool {
    i.op_kind(op) == OpKind::NearBranch64
}

fn value(i: &Instruction) -> Option<Value> {
    match i.op0_kind() {
        OpKind::Register => gpr_index(i.op0_register()).map(|r| Value::Reg(r as u8)),
        OpKind::Memory => Some(Value::Mem),
        _ => None,
    }
}

/// Instructions with operations of their own.
fn special(i: &Instruction, mode: CodeMode) -> Option<Op> {
    Some(match i.code() {
        Code::Push_r64 => Op::Push(value(i)?),
        Code::Push_rm64 => Op::Push(value(i)?),
        Code::Pushq_imm8 | Code::Pushq_imm32 => Op::Push(Value::Imm(i.immediate(0))),
        Code::Pop_r64 => Op::Pop(gpr_index(i.op0_register())? as u8),
        Code::Pop_rm64 if i.op0_kind() == OpKind::Register => Op::Pop(gpr_index(i.op0_register())? as u8),
        Code::Leaveq => Op::Leave,
        Code::Pushfq => Op::PushFlags,
        Code::Cli if mode.kernel => Op::DisableInterrupts,
        Code::Sti if mode.kernel => Op::EnableInterrupts,
        Code::Stac if mode.kernel => Op::UserAccess(true),
        Code::Clac if mode.kernel => Op::UserAccess(false),
        Code::Cld => Op::ClearDirection,
        Code::Rdtsc if mode.tsc => Op::TimeStamp { aux: false },
        Code::Rdtscp if mode.tsc => Op::TimeStamp { aux: true },
        Code::Swapgs if mode.kernel => Op::SwapGs,
        Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg | Code::Mov_rm16_Sreg
            if i.op0_kind() == OpKind::Register =>
        {
            Op::ReadSelector {
                segment: segment_index(i.op1_register()) as u8,
                to: gpr_index(i.op0_register())? as u8,
                size: i.op0_register().size() as u8,
            }
        }
        Code::Bt_rm32_r32
        | Code::Bts_rm32_r32
        | Code::Btr_rm32_r32
        | Code::Btc_rm32_r32
        | Code::Bt_rm64_r64
        | Code::Bts_rm64_r64
        | Code::Btr_rm64_r64
        | Code::Btc_rm64_r64 => bit_string(i)?,
        Code::Rdfsbase_r32 | Code::Rdfsbase_r64 if mode.bases => Op::ReadBase(base(i, seg::FS)?),
        Code::Rdgsbase_r32 | Code::Rdgsbase_r64 if mode.bases => Op::ReadBase(base(i, seg::GS)?),
        Code::Wrfsbase_r32 | Code::Wrfsbase_r64 if mode.bases => Op::WriteBase(base(i, seg::FS)?),
        Code::Wrgsbase_r32 | Code::Wrgsbase_r64 if mode.bases => Op::WriteBase(base(i, seg::GS)?),
        Code::Mov_r64_cr if mode.kernel => read_control(i)?,
        Code::Lea_r64_m | Code::Lea_r32_m => Op::Address,
        Code::Lea_r16_m => Op::Interpret,
        Code::Endbr64 | Code::Nopd | Code::Nopw | Code::Nopq => Op::Nop,
        Code::Nop_rm16 | Code::Nop_rm32 | Code::Nop_rm64 => Op::Nop,
        _ => return None,
    })
}

/// A bit test of memory by a register, with 64-bit addresses.
fn bit_string(i: &Instruction) -> Option<Op> {
    let narrow =
        i.memory_base().is_gpr32() || i.memory_index().is_gpr32() || i.memory_base() == Register::EIP;
    let plain = is_bit_string(i) && !narrow && !i.has_xacquire_prefix() && !i.has_xrelease_prefix();
    plain.then(|| {
        Op::BitString(MemUse { write: i.mnemonic() != Mnemonic::Bt, size: i.op1_register().size() as u8 })
    })
}

fn base(i: &Instruction, segment: usize) -> Option<Base> {
    let register = i.op0_register();
    Some(Base { segment: segment as u8, register: gpr_index(register)? as u8, wide: register.is_gpr64() })
}

fn read_control(i: &Instruction) -> Option<Op> {
    let control = match i.op1_register() {
        Register::CR0 => 0,
        Register::CR2 => 2,
        Register::CR3 => 3,
        Register::CR4 => 4,
        _ => return None,
    };
    Some(Op::ReadControl { control, to: gpr_index(i.op0_register())? as u8 })
}

/// A bit test whose register operand reaches beyond the memory operand.
fn is_bit_string(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && i.op0_kind() == OpKind::Memory
        && i.op1_kind() == OpKind::Register
}

/// Of the instructions that tier 0 executes, those that change nothing that the rest of a region relies on: neither the
/// mode, nor paging, nor whether interrupts are taken.
fn may_step(i: &Instruction) -> bool {
    use Mnemonic as M;
    i.is_string_instruction()
        || is_bit_string(i)
        || i.is_save_restore_instruction()
        || matches!(
            i.mnemonic(),
            M::In
                | M::Out
                | M::Cld
                | M::Std
                | M::Cpuid
                | M::Rdtsc
                | M::Rdtscp
                | M::Rdpid
                | M::Rdrand
                | M::Rdseed
                | M::Rdfsbase
                | M::Rdgsbase
                | M::Wrfsbase
                | M::Wrgsbase
                | M::Xgetbv
        )
}

/// REP MOVS and REP STOS with 64-bit addresses in the flat segments.
fn repeat(i: &Instruction) -> Option<Repeat> {
    let (copies, size) = match i.code() {
        Code::Movsb_m8_m8 => (true, 1),
        Code::Movsw_m16_m16 => (true, 2),
        Code::Movsd_m32_m32 => (true, 4),
        Code::Movsq_m64_m64 => (true, 8),
        Code::Stosb_m8_AL => (false, 1),
        Code::Stosw_m16_AX => (false, 2),
        Code::Stosd_m32_EAX => (false, 4),
        Code::Stosq_m64_RAX => (false, 8),
        _ => return None,
    };
    let plain = i.op0_kind() == OpKind::MemoryESRDI
        && (!copies || i.op1_kind() == OpKind::MemorySegRSI)
        && !matches!(i.segment_prefix(), Register::FS | Register::GS);
    (i.has_rep_prefix() && plain).then_some(Repeat { copies, size })
}

/// Instructions that must not run on the host as they are, or that the backend has no way to rewrite.
fn must_interpret(i: &Instruction) -> bool {
    use Mnemonic as M;
    if i.is_privileged()
        || i.is_stack_instruction()
        || i.is_string_instruction()
        || i.is_save_restore_instruction()
    {
        return true;
    }
    let odd_operand = (0..i.op_count()).any(|op| match i.op_kind(op) {
        OpKind::Register => {
            let r = i.op_register(op);
            r.is_segment_register()
                || r.is_cr()
                || r.is_dr()
                || r.is_tr()
                || r.is_k()
                || r.is_zmm()
                || r.is_bnd()
                || r.is_tmm()
        }
        OpKind::Memory
        | OpKind::Immediate8
        | OpKind::Immediate8_2nd
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => false,
        _ => true,
    });
    if odd_operand || i.is_vsib() || i.has_xacquire_prefix() || i.has_xrelease_prefix() {
        return true;
    }
    let moffs = matches!(
        i.code(),
        Code::Mov_AL_moffs8
            | Code::Mov_AX_moffs16
            | Code::Mov_EAX_moffs32
            | Code::Mov_RAX_moffs64
            | Code::Mov_moffs8_AL
            | Code::Mov_moffs16_AX
            | Code::Mov_moffs32_EAX
            | Code::Mov_moffs64_RAX
    );
    is_bit_string(i)
        || moffs
        || matches!(
            i.mnemonic(),
            M::Cpuid
                | M::Rdtsc
                | M::Rdtscp
                | M::Rdpmc
                | M::Rdpid
                | M::Rdrand
                | M::Rdseed
                | M::Xgetbv
                | M::Rdfsbase
                | M::Rdgsbase
                | M::Wrfsbase
                | M::Wrgsbase
                | M::Sgdt
                | M::Sidt
                | M::Sldt
                | M::Str
                | M::Smsw
                | M::Lar
                | M::Lsl
                | M::Verr
                | M::Verw
                | M::Stac
                | M::Clac
                | M::Xlatb
                | M::Maskmovdqu
                | M::Maskmovq
                | M::Vmaskmovdqu
                | M::Vmaskmovps
                | M::Vmaskmovpd
                | M::Vpmaskmovd
                | M::Vpmaskmovq
                | M::Wait
                | M::Fnstenv
                | M::Fstenv
                | M::Fldenv
                | M::Fnsave
                | M::Fsave
                | M::Frstor
                | M::Fninit
                | M::Finit
                | M::Lds
                | M::Les
                | M::Lfs
                | M::Lgs
                | M::Lss
                | M::Std
                | M::Cld
                | M::Umonitor
                | M::Umwait
                | M::Tpause
                | M::Serialize
                | M::Monitor
                | M::Mwait
                | M::Vmcall
                | M::Vmmcall
                | M::Int1
                | M::Clzero
                | M::Rdpru
                | M::Enqcmd
                | M::Ptwrite
                | M::Xabort
                | M::Xbegin
                | M::Xend
                | M::Xtest
        )
}

/// Whether the instruction may run in this mode without #NM or #UD.
fn unit_available(i: &Instruction, mode: CodeMode) -> bool {
    use iced_x86::EncodingKind;
    if !matches!(i.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
        return false;
    }
    let vector = is_vector(i);
    (!is_x87(i) || mode.x87)
        && (!vector || mode.sse)
        && (!vector || i.encoding() == EncodingKind::Legacy || mode.avx)
}

/// Whether the instruction uses vector registers or MXCSR.
fn is_vector(i: &Instruction) -> bool {
    use iced_x86::{CpuidFeature as F, EncodingKind};
    match i.encoding() {
        EncodingKind::VEX => !i.cpuid_features().iter().all(|f| matches!(f, F::BMI1 | F::BMI2)),
        _ => {
            (0..i.op_count()).any(|op| i.op_kind(op) == OpKind::Register && i.op_register(op).is_xmm())
                || matches!(i.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr)
                || converts_from_memory(i.mnemonic())
        }
    }
}

/// Conversions that depend on MXCSR and, from memory, name no vector register.
fn converts_from_memory(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Cvtsd2si
            | M::Cvtss2si
            | M::Cvttsd2si
            | M::Cvttss2si
            | M::Cvtps2pi
            | M::Cvttps2pi
            | M::Cvtpd2pi
            | M::Cvttpd2pi
    )
}

/// Whether the instruction uses x87 or MMX state.
fn is_x87(i: &Instruction) -> bool {
    use iced_x86::CpuidFeature as F;
    i.cpuid_features().iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387 | F::MMX))
        || (0..i.op_count()).any(|op| {
            i.op_kind(op) == OpKind::Register && (i.op_register(op).is_mm() || i.op_register(op).is_st())
        })
}

/// Whether the instruction leaves the flags alone in some cases (a shift by zero).
fn may_keep_flags(i: &Instruction) -> bool {
    use Mnemonic as M;
    let shift = matches!(
        i.mnemonic(),
        M::Shl | M::Shr | M::Sar | M::Sal | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    if !shift {
        return false;
    }
    let count = i.op_count() - 1;
    match i.op_kind(count) {
        OpKind::Immediate8 => {
            i.immediate8() & if i.op0_register().is_gpr64() { 63 } else { 31 } == 0
                || i.op_kind(0) == OpKind::Memory
        }
        OpKind::Register => i.op_register(count) == Register::CL,
        _ => false,
    }
}

/// Flags that may be read at the target of a node's exit.
fn exit_liveness(node: &Node, piece: Piece, seen: &mut Range<u64>) -> u32 {
    match node.op {
        Op::Branch { target, .. } | Op::Jump { target } | Op::Call { target } => {
            flags_read_at(target, piece, seen)
        }
        Op::JumpTo(_) | Op::CallTo(_) | Op::Return(_) | Op::Interpret => ARITH,
        _ => 0,
    }
}

/// Flags that code at linear address `at` may read before it writes them; all of them where that cannot be seen. What is
/// looked at becomes part of `seen`.
fn flags_read_at(at: u64, piece: Piece, seen: &mut Range<u64>) -> u32 {
    let Some(bytes) = piece.from(at) else { return ARITH };
    let mut decoder = Decoder::with_ip(64, bytes, at, DecoderOptions::NONE);
    let read = flags_read_by(&mut decoder);
    *seen = seen.start.min(at)..seen.end.max(decoder.ip());
    read
}

fn flags_read_by(decoder: &mut Decoder) -> u32 {
    let (mut read, mut open) = (0, ARITH);
    for _ in 0..LOOKAHEAD {
        let i = decoder.decode();
        if i.is_invalid()
            || i.flow_control() != FlowControl::Next
            || i.is_privileged()
            || i.is_stack_instruction()
        {
            if matches!(i.code(), Code::Push_r64 | Code::Pop_r64) {
                continue;
            }
            return read | open;
        }
        read |= i.rflags_read() & open;
        if !may_keep_flags(&i) && !i.is_string_instruction() {
            open &= !i.rflags_modified();
        }
        if open & !read == 0 {
            break;
        }
    }
    read | open
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: CodeMode =
        CodeMode { kernel: true, x87: true, sse: true, avx: true, tsc: true, bases: true, plain: false };

    fn lift(code: &[u8]) -> Region {
        Lifter::new(Box::new(|_| true), true)
            .lift(0x1000, Piece { start: 0x1000, bytes: code }, KERNEL)
            .unwrap()
    }

    #[test]
    fn flags_that_are_overwritten_are_dead() {
        // cmp eax, ebx; mov ecx, [rdx]; add eax, ebx; ret
        let region = lift(&[0x39, 0xd8, 0x8b, 0x0a, 0x01, 0xd8, 0xc3]);
        assert_eq!(region.nodes[0].live_out, 0);
        assert_eq!(region.nodes[2].live_out, ARITH);
    }

    #[test]
    fn flags_are_dead_where_a_branch_leads_back_to_what_overwrites_them() {
        // add eax, ebx; nop; cmp eax, ecx; jne back
        let bytes = &[0x01, 0xd8, 0x90, 0x39, 0xc8, 0x75, 0xf9];
        let piece = Piece { start: 0x1000, bytes };
        let region = Lifter::new(Box::new(|_| true), true).lift(0x1003, piece, KERNEL).unwrap();
        assert_eq!(region.nodes[1].live_at_exit, 0);
    }

    #[test]
    fn a_loop_knows_whether_its_beginning_reads_flags() {
        let movs = [0x89, 0xd8].repeat(11);
        let live = |first: &[u8], last: &[u8]| {
            let mut code = [first, &movs, last].concat();
            let back = -(code.len() as i8 + 2);
            code.extend([0x75, back as u8, 0xc3]);
            let region = lift(&code);
            region.nodes[region.nodes.len() - 2].live_at_exit
        };
        // sub ecx, 1; dec ecx, which leaves CF for what comes behind the loop; adc eax, ebx
        assert_eq!(live(&[], &[0x83, 0xe9, 0x01]), 0);
        assert_eq!(live(&[], &[0xff, 0xc9]), RflagsBits::CF);
        assert_eq!(live(&[0x11, 0xd8], &[0x83, 0xe9, 0x01]), RflagsBits::CF);
    }

    #[test]
    fn a_shift_by_cl_keeps_older_flags_alive() {
        // cmp eax, ebx; shl eax, cl; ret
        let region = lift(&[0x39, 0xd8, 0xd3, 0xe0, 0xc3]);
        assert_eq!(region.nodes[0].live_out, ARITH);
    }

    #[test]
    fn dangerous_instructions_are_left_to_tier_0() {
        let codes: [(&[u8], Op); 7] = [
            (&[0x0f, 0xa2], Op::Step),            // cpuid
            (&[0x0f, 0x01, 0xc1], Op::Interpret), // vmcall
            (&[0x0f, 0xc7, 0xf0], Op::Step),      // rdrand eax
            (&[0x0f, 0x05], Op::Interpret),       // syscall
            (&[0xf3, 0xa6], Op::Step),            // rep cmpsb
            (&[0x8e, 0xe8], Op::Interpret),       // mov gs, eax
            (&[0x0f, 0x22, 0xd8], Op::Interpret), // mov cr3, rax
        ];
        for (code, op) in codes {
            assert_eq!(lift(code).nodes[0].op, op, "{code:x?}");
        }
    }

    #[test]
    fn repeated_moves_are_known_by_their_elements() {
        let op = |code| lift(code).nodes[0].op;
        assert_eq!(op(&[0xf3, 0xa4]), Op::Repeat(Repeat { copies: true, size: 1 }));
        assert_eq!(op(&[0xf3, 0x48, 0xab]), Op::Repeat(Repeat { copies: false, size: 8 }));
        // movsb; rep movsb gs:[rsi]; rep movsb by ESI and EDI
        for code in [&[0xa4][..], &[0x65, 0xf3, 0xa4], &[0x67, 0xf3, 0xa4]] {
            assert_eq!(op(code), Op::Step, "{code:x?}");
        }
    }

    #[test]
    fn a_conversion_from_memory_needs_the_guests_mxcsr() {
        // cvttss2si rax, [rax]; cvtpd2pi mm0, [rax]; cvttsd2si eax, [rax]
        let codes: [&[u8]; 3] =
            [&[0xf3, 0x48, 0x0f, 0x2c, 0], &[0x66, 0x0f, 0x2d, 0], &[0xf2, 0x0f, 0x2c, 0]];
        for code in codes {
            assert!(lift(code).nodes[0].vector, "{code:x?}");
        }
    }

    #[test]
    fn an_instruction_that_leaves_the_page_is_not_lifted() {
        let piece = Piece { start: 0x1ffe, bytes: &[0x48, 0x8b] };
        assert!(Lifter::new(Box::new(|_| true), true).lift(0x1ffe, piece, KERNEL).is_none());
    }
}
