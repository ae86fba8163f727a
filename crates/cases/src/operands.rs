//! Operands for an instruction form.

use iced_x86::{Code, Instruction, OpCodeOperandKind as Kind, OpKind, Register};
use ruse_random::Random;

use crate::case::{WINDOW, WINDOW_BYTES};

/// A register of a family by number.
pub fn nth(family: Register, n: u64) -> Register {
    Register::try_from(family as usize + n as usize).expect("a register")
}

/// Makes the numbered operand of an instruction one in memory.
pub type Memory<'a> = &'a mut dyn FnMut(&mut Instruction, u32, &mut Random);

/// The instruction form with random operands; branches go to `target`. `None` if the form has an operand that is not
/// tried.
pub fn instruction(code: Code, memory: Memory, target: u64, random: &mut Random) -> Option<Instruction> {
    let mut i = Instruction::default();
    i.set_code(code);
    let kinds = code.op_code().op_kinds();
    let mut immediates = 0;
    for (n, &kind) in kinds.iter().enumerate() {
        let n = n as u32;
        if let Some(r) = register(kind, random) {
            i.set_op_kind(n, OpKind::Register);
            i.set_op_register(n, r);
            continue;
        }
        match kind {
            Kind::mem | Kind::r8_or_mem | Kind::r16_or_mem | Kind::r32_or_mem | Kind::r64_or_mem => {}
            Kind::mm_or_mem | Kind::xmm_or_mem | Kind::ymm_or_mem => {}
            Kind::mem_vsib32x | Kind::mem_vsib64x => {
                memory(&mut i, n, random);
                vsib(&mut i, Register::XMM0, random);
                continue;
            }
            Kind::mem_vsib32y | Kind::mem_vsib64y => {
                memory(&mut i, n, random);
                vsib(&mut i, Register::YMM0, random);
                continue;
            }
            Kind::mem_offs => {
                i.set_op_kind(n, OpKind::Memory);
                i.set_memory_displacement64(place(random, 8));
                i.set_memory_displ_size(8);
                continue;
            }
            Kind::seg_rSI => i.set_op_kind(n, OpKind::MemorySegRSI),
            Kind::es_rDI => i.set_op_kind(n, OpKind::MemoryESRDI),
            Kind::seg_rDI => i.set_op_kind(n, OpKind::MemorySegRDI),
            Kind::seg_rBX_al => {
                i.set_op_kind(n, OpKind::Memory);
                i.set_memory_base(Register::RBX);
                i.set_memory_index(Register::AL);
            }
            Kind::br64_1 | Kind::br64_4 => {
                i.set_op_kind(n, OpKind::NearBranch64);
                i.set_near_branch64(target);
            }
            _ => {
                immediate(&mut i, n, kind, immediates, random)?;
                immediates += 1;
            }
        }
        if matches!(
            kind,
            Kind::mem
                | Kind::r8_or_mem
                | Kind::r16_or_mem
                | Kind::r32_or_mem
                | Kind::r64_or_mem
                | Kind::mm_or_mem
                | Kind::xmm_or_mem
                | Kind::ymm_or_mem
        ) {
            memory(&mut i, n, random);
        }
    }
    prefixes(&mut i, random);
    Some(i)
}

fn prefixes(i: &mut Instruction, random: &mut Random) {
    let info = i.code().op_code();
    let in_memory = i.op_count() > 0 && i.op0_kind() == OpKind::Memory;
    if info.can_use_lock_prefix() && in_memory && random.chance(30) {
        i.set_has_lock_prefix(true);
    }
    if info.can_use_rep_prefix() && random.chance(60) {
        i.set_has_rep_prefix(true);
    } else if info.can_use_repne_prefix() && i.is_string_instruction() && random.chance(30) {
        i.set_has_repne_prefix(true);
    }
}

fn register(kind: Kind, random: &mut Random) -> Option<Register> {
    let memory_too = random.chance(55);
    let n = random.below(16);
    Some(match kind {
        Kind::r8_or_mem | Kind::r16_or_mem | Kind::r32_or_mem | Kind::r64_or_mem if memory_too => {
            return None;
        }
        Kind::mm_or_mem | Kind::xmm_or_mem | Kind::ymm_or_mem if memory_too => return None,
        Kind::r8_or_mem | Kind::r8_reg | Kind::r8_opcode => nth(Register::AL, random.below(20)),
        Kind::r16_or_mem | Kind::r16_reg | Kind::r16_rm | Kind::r16_opcode => nth(Register::AX, n),
        Kind::r32_or_mem | Kind::r32_reg | Kind::r32_rm | Kind::r32_opcode | Kind::r32_vvvv => {
            nth(Register::EAX, n)
        }
        Kind::r64_or_mem | Kind::r64_reg | Kind::r64_rm | Kind::r64_opcode | Kind::r64_vvvv => {
            nth(Register::RAX, n)
        }
        Kind::mm_or_mem | Kind::mm_reg | Kind::mm_rm => nth(Register::MM0, n % 8),
        Kind::xmm_or_mem | Kind::xmm_reg | Kind::xmm_rm | Kind::xmm_vvvv | Kind::xmm_is4 => {
            nth(Register::XMM0, n)
        }
        Kind::ymm_or_mem | Kind::ymm_reg | Kind::ymm_rm | Kind::ymm_vvvv | Kind::ymm_is4 => {
            nth(Register::YMM0, n)
        }
        Kind::al => Register::AL,
        Kind::cl => Register::CL,
        Kind::ax => Register::AX,
        Kind::dx => Register::DX,
        Kind::eax => Register::EAX,
        Kind::rax => Register::RAX,
        Kind::st0 => Register::ST0,
        Kind::sti_opcode => nth(Register::ST0, n % 8),
        _ => return None,
    })
}

fn immediate(i: &mut Instruction, n: u32, kind: Kind, earlier: u32, random: &mut Random) -> Option<()> {
    let value = if random.chance(50) { random.word() } else { random.below(70) };
    let (op, value) = match kind {
        Kind::imm8 if earlier > 0 => {
            i.set_op_kind(n, OpKind::Immediate8_2nd);
            i.set_immediate8_2nd(value as u8 & 3);
            return Some(());
        }
        Kind::imm8 => (OpKind::Immediate8, value & 0xff),
        Kind::imm8_const_1 => (OpKind::Immediate8, 1),
        Kind::imm8sex16 => (OpKind::Immediate8to16, value as i8 as u64),
        Kind::imm8sex32 => (OpKind::Immediate8to32, value as i8 as u64),
        Kind::imm8sex64 => (OpKind::Immediate8to64, value as i8 as u64),
        Kind::imm16 => (OpKind::Immediate16, value & 0xffff),
        Kind::imm32 => (OpKind::Immediate32, value & 0xffff_ffff),
        Kind::imm32sex64 => (OpKind::Immediate32to64, value as i32 as u64),
        Kind::imm64 => (OpKind::Immediate64, value),
        _ => return None,
    };
    i.set_op_kind(n, op);
    match op {
        OpKind::Immediate8 => i.set_immediate8(value as u8),
        OpKind::Immediate16 => i.set_immediate16(value as u16),
        OpKind::Immediate32 => i.set_immediate32(value as u32),
        OpKind::Immediate64 => i.set_immediate64(value),
        OpKind::Immediate8to16 => i.set_immediate8to16(value as i16),
        OpKind::Immediate8to32 => i.set_immediate8to32(value as i32),
        OpKind::Immediate8to64 => i.set_immediate8to64(value as i64),
        _ => i.set_immediate32to64(value as i64),
    }
    Some(())
}

/// An address for an access: mostly inside the data, some at its ends and over the end of a page.
pub fn place(random: &mut Random, align: u64) -> u64 {
    let len = WINDOW_BYTES as u64;
    match random.below(20) {
        0 => WINDOW + len - random.below(40),
        1 => WINDOW + 4096 - random.below(40),
        2 => WINDOW.wrapping_sub(8) + random.below(16),
        3..=7 => WINDOW + 64 + random.below(len - 256),
        _ => (WINDOW + 64 + random.below(len - 256)) & !(align - 1),
    }
}

/// A memory operand somewhere at the data, with whatever the registers hold at the start as base and index.
pub fn near_data(i: &mut Instruction, n: u32, gpr: &[u64; 16], random: &mut Random) {
    i.set_op_kind(n, OpKind::Memory);
    let target = place(random, 32);
    let narrow = random.chance(10);
    let family = if narrow { Register::EAX } else { Register::RAX };
    for _ in 0..8 {
        let base = random.below(16);
        let index = random.chance(40).then(|| random.below(16)).filter(|&x| x != 4);
        let scale = 1u64 << random.below(4);
        let known = gpr[base as usize].wrapping_add(index.map_or(0, |x| gpr[x as usize].wrapping_mul(scale)));
        let displacement = target.wrapping_sub(known);
        let fits = displacement as i64 == i64::from(displacement as i32);
        if !fits && !narrow {
            continue;
        }
        i.set_memory_base(nth(family, base));
        if let Some(x) = index {
            i.set_memory_index(nth(family, x));
            i.set_memory_index_scale(scale as u32);
        }
        let displacement = if narrow { displacement & 0xffff_ffff } else { displacement };
        i.set_memory_displacement64(displacement);
        i.set_memory_displ_size(if displacement == 0 && base % 8 != 5 {
            0
        } else {
            if narrow { 4 } else { 8 }
        });
        return;
    }
    i.set_memory_displacement64(target);
    i.set_memory_displ_size(8);
}

/// Makes the index a vector register.
fn vsib(i: &mut Instruction, family: Register, random: &mut Random) {
    if i.memory_base() == Register::None {
        i.set_memory_displ_size(8);
    }
    i.set_memory_index(nth(family, random.below(16)));
    i.set_memory_index_scale(1 << random.below(4));
}
