//! Instruction forms by kind, for programs that mix them.

use iced_x86::{Code, CpuidFeature, FlowControl, Instruction, Mnemonic, OpCodeOperandKind as Kind};

/// Instruction forms by kind.
#[derive(Default)]
pub struct Pools {
    /// Integer instructions that programs are mostly made of.
    pub common: Vec<Code>,
    /// All integer instructions.
    pub integer: Vec<Code>,
    /// Instructions of the common ones that leave the flags alone.
    pub moves: Vec<Code>,
    /// SSE and AVX.
    pub vector: Vec<Code>,
    /// x87 and MMX.
    pub x87: Vec<Code>,
    /// String instructions.
    pub string: Vec<Code>,
    /// Pushes and pops.
    pub stack: Vec<Code>,
    /// Conditional jumps and loops.
    pub conditional: Vec<Code>,
}

impl Pools {
    /// Sorts the forms.
    pub fn new(codes: &[Code]) -> Self {
        let mut pools = Self::default();
        for &code in codes {
            let mut i = Instruction::default();
            i.set_code(code);
            let kinds = code.op_code().op_kinds();
            let is_x87 = code.cpuid_features().iter().any(is_x87);
            if i.flow_control() == FlowControl::ConditionalBranch {
                pools.conditional.push(code);
            } else if i.flow_control() != FlowControl::Next
                || kinds.iter().any(is_gathered)
                || is_masked(code)
            {
                continue;
            } else if i.is_string_instruction() {
                pools.string.push(code);
            } else if i.is_stack_instruction() {
                if matches!(i.mnemonic(), Mnemonic::Push | Mnemonic::Pop) {
                    pools.stack.push(code);
                }
            } else if is_x87 || kinds.iter().any(is_mmx) {
                pools.x87.push(code);
            } else if kinds.iter().any(is_vector) || code.cpuid_features().iter().any(is_sse) {
                pools.vector.push(code);
            } else {
                pools.integer.push(code);
                if is_common(i.mnemonic()) {
                    pools.common.push(code);
                    if is_move(i.mnemonic()) {
                        pools.moves.push(code);
                    }
                }
            }
        }
        pools
    }
}

fn is_x87(feature: &CpuidFeature) -> bool {
    matches!(feature, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387)
}

fn is_sse(feature: &CpuidFeature) -> bool {
    matches!(feature, CpuidFeature::SSE | CpuidFeature::SSE2 | CpuidFeature::AVX)
}

fn is_mmx(kind: &Kind) -> bool {
    matches!(kind, Kind::mm_reg | Kind::mm_rm | Kind::mm_or_mem)
}

fn is_vector(kind: &Kind) -> bool {
    matches!(
        kind,
        Kind::xmm_reg | Kind::xmm_rm | Kind::xmm_or_mem | Kind::ymm_reg | Kind::ymm_rm | Kind::ymm_or_mem
    )
}

/// Whether it may fault for bytes that its mask leaves out.
fn is_masked(code: Code) -> bool {
    matches!(code.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu)
}

fn is_gathered(kind: &Kind) -> bool {
    matches!(kind, Kind::mem_vsib32x | Kind::mem_vsib32y | Kind::mem_vsib64x | Kind::mem_vsib64y)
}

fn is_move(m: Mnemonic) -> bool {
    use Mnemonic as M;
    let name = format!("{m:?}");
    name.starts_with("Cmov")
        || name.starts_with("Set")
        || matches!(
            m,
            M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Lea | M::Xchg | M::Bswap | M::Not | M::Mulx
        )
}

fn is_common(m: Mnemonic) -> bool {
    use Mnemonic as M;
    is_move(m)
        || matches!(
            m,
            M::Add
                | M::Sub
                | M::Adc
                | M::Sbb
                | M::And
                | M::Or
                | M::Xor
                | M::Cmp
                | M::Test
                | M::Neg
                | M::Inc
                | M::Dec
                | M::Shl
                | M::Shr
                | M::Sar
                | M::Rol
                | M::Ror
                | M::Rcl
                | M::Rcr
                | M::Shld
                | M::Shrd
                | M::Imul
                | M::Mul
                | M::Bt
                | M::Bts
                | M::Btr
                | M::Btc
                | M::Bsf
                | M::Bsr
                | M::Xadd
                | M::Cmpxchg
                | M::Cdqe
                | M::Cqo
                | M::Cwde
                | M::Popcnt
                | M::Lzcnt
                | M::Tzcnt
                | M::Nop
                | M::Stc
                | M::Clc
                | M::Cmc
                | M::Lahf
                | M::Sahf
                | M::Andn
                | M::Adcx
                | M::Adox
        )
}
