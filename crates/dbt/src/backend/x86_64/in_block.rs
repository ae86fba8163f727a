//! Instructions that take a guest register from the vCPU block where it lives, as a memory operand.

use iced_x86::{Code, Instruction, Mnemonic, OpCodeOperandKind, OpKind, Register};

use super::{Home, home};
use crate::tier0::operand::gpr_index;

/// Distance between the two forms of an instruction in iced's numbers: `op r/m, r` and `op r, r/m`.
const FORMS: usize = 4;

/// The instruction without memory operand, with its one register that lives in the block as a memory operand; nothing if
/// it has none or several, or if the memory form would do something else.
pub fn with_memory(insn: &Instruction) -> Option<Instruction> {
    let mut i = *insn;
    let mut op = only_block_operand(&i)?;
    let register = i.op_register(op);
    let writes = op == 0 && !matches!(i.mnemonic(), Mnemonic::Cmp | Mnemonic::Test);
    // A write of 32 bits clears the others of a register, not of memory.
    if !is_alike(i.mnemonic()) || (writes && register.size() == 4) {
        return None;
    }
    if !is_rm(i.op_code().op_kind(op)) {
        if i.mnemonic() == Mnemonic::Test {
            let other = i.op_register(1 - op);
            i.set_op_register(op, other);
            op = 1 - op;
        } else {
            i.set_code(other_form(i.code())?);
        }
    }
    let Home::Block(at) = home(gpr_index(register)? as u8) else { return None };
    i.set_op_kind(op, OpKind::Memory);
    i.set_memory_base(Register::None);
    i.set_memory_index(Register::None);
    i.set_memory_displacement64(at as u64);
    i.set_memory_displ_size(8);
    i.set_segment_prefix(Register::GS);
    Some(i)
}

/// The operand whose register lives in the block, if there is just one.
fn only_block_operand(i: &Instruction) -> Option<u32> {
    let in_block = |&op: &u32| {
        i.op_kind(op) == OpKind::Register
            && gpr_index(i.op_register(op)).is_some_and(|guest| matches!(home(guest as u8), Home::Block(_)))
    };
    let mut operands = (0..i.op_count()).filter(in_block);
    operands.next().filter(|_| operands.next().is_none())
}

/// Whether an instruction does the same with memory as with a register. A bit test does not, and an exchange would be
/// locked.
fn is_alike(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Mov
            | M::Add
            | M::Or
            | M::Adc
            | M::Sbb
            | M::And
            | M::Sub
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Shl
            | M::Shr
            | M::Sar
            | M::Rol
            | M::Ror
            | M::Imul
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Cmovo
            | M::Cmovno
            | M::Cmovb
            | M::Cmovae
            | M::Cmove
            | M::Cmovne
            | M::Cmovbe
            | M::Cmova
            | M::Cmovs
            | M::Cmovns
            | M::Cmovp
            | M::Cmovnp
            | M::Cmovl
            | M::Cmovge
            | M::Cmovle
            | M::Cmovg
    )
}

fn is_rm(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(kind, K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem)
}

/// `op r, r/m` for `op r/m, r` and the other way round, of two registers.
fn other_form(code: Code) -> Option<Code> {
    let both = |code: Code| {
        let info = code.op_code();
        (info.op_count() == 2).then(|| [info.op_kind(0), info.op_kind(1)].map(is_rm))
    };
    let other = match both(code)? {
        [true, false] => code as usize + FORMS,
        [false, true] => (code as usize).checked_sub(FORMS)?,
        _ => return None,
    };
    let other = Code::try_from(other).ok()?;
    let swapped = both(other)? == both(code)?.map(|is_rm| !is_rm);
    (swapped && other.mnemonic() == code.mnemonic()).then_some(other)
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    use super::*;

    fn text(code: &[u8]) -> Option<String> {
        let insn = Decoder::new(64, code, DecoderOptions::NONE).decode();
        let i = with_memory(&insn)?;
        let mut formatter = IntelFormatter::new();
        formatter.options_mut().set_space_after_operand_separator(false);
        let mut out = String::new();
        formatter.format(&i, &mut out);
        let Home::Block(at) = home(13) else { panic!("R13 is in the block") };
        Some(out.replace(&format!("{at:X}h"), "r13"))
    }

    #[test]
    fn a_register_in_the_block_becomes_a_memory_operand() {
        assert_eq!(text(&[0x4c, 0x01, 0xe9]).unwrap(), "add rcx,gs:[r13]");
        assert_eq!(text(&[0x49, 0x03, 0xcd]).unwrap(), "add rcx,gs:[r13]");
        assert_eq!(text(&[0x49, 0x89, 0xc5]).unwrap(), "mov gs:[r13],rax");
        assert_eq!(text(&[0x4c, 0x8b, 0xe8]).unwrap(), "mov gs:[r13],rax");
        assert_eq!(text(&[0x41, 0x39, 0xc5]).unwrap(), "cmp gs:[r13],eax");
        assert_eq!(text(&[0x44, 0x85, 0xe8]).unwrap(), "test gs:[r13],eax");
        assert_eq!(text(&[0x49, 0xc1, 0xe5, 0x20]).unwrap(), "shl qword ptr gs:[r13],20h");
        assert_eq!(text(&[0x49, 0x0f, 0xaf, 0xcd]).unwrap(), "imul rcx,gs:[r13]");
        assert_eq!(text(&[0x41, 0x0f, 0xb6, 0xcd]).unwrap(), "movzx ecx,byte ptr gs:[r13]");
        assert_eq!(text(&[0x49, 0x0f, 0x43, 0xcd]).unwrap(), "cmovae rcx,gs:[r13]");
        assert_eq!(text(&[0x41, 0x00, 0xcd]).unwrap(), "add gs:[r13],cl");
    }

    #[test]
    fn what_memory_would_do_otherwise_is_left() {
        assert_eq!(text(&[0x41, 0x01, 0xc5]), None, "add r13d, eax");
        assert_eq!(text(&[0x4d, 0x01, 0xf5]), None, "add r13, r14");
        assert_eq!(text(&[0x4d, 0x87, 0xc5]), None, "xchg r13, r8");
        assert_eq!(text(&[0x4d, 0x0f, 0xa3, 0xc5]), None, "bt r13, r8");
        assert_eq!(text(&[0x4d, 0x0f, 0xaf, 0xe8]), None, "imul r13, r8");
        assert_eq!(text(&[0x48, 0x01, 0xc8]), None, "add rax, rcx");
    }
}
