//! Random cases.

use std::ops::RangeInclusive;

use iced_x86::{
    Code, CpuidFeature, Encoder, EncodingKind, FlowControl, Instruction, Mnemonic, OpCodeOperandKind as Kind,
};
use ruse_random::Random;

use crate::{
    case::{CODE, CODE_BYTES, Case, MOST, State},
    flow::{flags, undefined_after},
    operands::{instruction, near_data, place},
};

/// Each instruction of a plain sequence begins at a multiple of this.
const SLOT: usize = 16;
/// What lies behind the code.
const UD2: [u8; 2] = [0x0f, 0x0b];

/// Features whose instructions are tried.
const FEATURES: [CpuidFeature; 32] = [
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::ADX,
    CpuidFeature::AES,
    CpuidFeature::AVX,
    CpuidFeature::AVX2,
    CpuidFeature::BMI1,
    CpuidFeature::BMI2,
    CpuidFeature::CMOV,
    CpuidFeature::CMPXCHG16B,
    CpuidFeature::CX8,
    CpuidFeature::F16C,
    CpuidFeature::FMA,
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::LZCNT,
    CpuidFeature::MMX,
    CpuidFeature::MOVBE,
    CpuidFeature::PCLMULQDQ,
    CpuidFeature::POPCNT,
    CpuidFeature::SHA,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
    CpuidFeature::SSSE3,
];

/// Instructions whose result depends on more than the case, or that a user program must not use.
fn is_left_out(code: Code) -> bool {
    use Mnemonic as M;
    matches!(
        code.mnemonic(),
        M::Cpuid
            | M::Rdtsc
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lsl
            | M::Lar
            | M::Verr
            | M::Verw
            | M::Lss
            | M::Lfs
            | M::Lgs
            | M::Syscall
            | M::Hlt
            | M::Cli
            | M::Sti
            | M::Popf
            | M::Popfq
            | M::Pushf
            | M::In
            | M::Insb
            | M::Insw
            | M::Insd
            | M::Out
            | M::Outsb
            | M::Outsw
            | M::Outsd
            | M::Fnstenv
            | M::Fnsave
            | M::Int3
            | M::Int1
            | M::Int
    ) || matches!(code, Code::Bswap_r16 | Code::Ud0_r16_rm16 | Code::Ud0_r32_rm32 | Code::Ud0_r64_rm64)
}

fn is_tried(code: Code) -> bool {
    let info = code.op_code();
    let flow = matches!(
        code.flow_control(),
        FlowControl::Next
            | FlowControl::ConditionalBranch
            | FlowControl::UnconditionalBranch
            | FlowControl::Call
            | FlowControl::Exception
    );
    info.is_instruction()
        && info.mode64()
        && info.intel_decoder64()
        && info.cpl3()
        && !info.is_privileged()
        && !info.fwait()
        && !info.is_reserved_nop()
        && info.decoder_option() == 0
        && flow
        && matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        && code.cpuid_features().iter().all(|f| FEATURES.contains(f))
        && !is_left_out(code)
        && !info.op_kinds().iter().any(|k| {
            matches!(
                k,
                Kind::seg_reg
                    | Kind::fs
                    | Kind::gs
                    | Kind::es
                    | Kind::cs
                    | Kind::ss
                    | Kind::ds
                    | Kind::br16_1
                    | Kind::br32_1
                    | Kind::br16_2
                    | Kind::br32_4
                    | Kind::farbr2_2
                    | Kind::farbr4_2
            )
        })
}

/// Makes cases.
pub struct Generator {
    /// The forms that are tried.
    pub codes: Vec<Code>,
}

impl Default for Generator {
    fn default() -> Self {
        Self { codes: Code::values().filter(|&c| is_tried(c)).collect() }
    }
}

impl Generator {
    /// A case of one instruction of form `n`.
    pub fn single(&self, n: usize, round: u64) -> Case {
        let seed = (n as u64) << 20 | round;
        let mut random = Random::new(seed);
        let mut case = blank(seed, 1, &mut random);
        for _ in 0..40 {
            if self.put(&mut case, 0, self.codes[n], &mut random) {
                break;
            }
        }
        case
    }

    /// A sequence.
    pub fn random(&self, seed: u64, length: RangeInclusive<u64>) -> Case {
        let mut random = Random::new(seed);
        let count = length.start() + random.below(length.end() - length.start() + 1);
        let mut case = blank(seed, count as usize, &mut random);
        // A few forms that belong together make more of a sequence than any forms do.
        let near = random.below(self.codes.len() as u64) as usize;
        let together = random.chance(50);
        for slot in 0..case.count {
            for _ in 0..20 {
                let n = match together {
                    true => (near + random.below(60) as usize) % self.codes.len(),
                    false => random.below(self.codes.len() as u64) as usize,
                };
                if self.put(&mut case, slot, self.codes[n], &mut random) {
                    break;
                }
            }
        }
        case
    }

    /// Tries to put an instruction into a slot.
    fn put(&self, case: &mut Case, slot: usize, code: Code, random: &mut Random) -> bool {
        let to = (slot + 1 + random.below(4) as usize).min(case.count);
        let target = CODE + (to * SLOT) as u64;
        let gpr = case.state.gpr;
        let mut memory = |i: &mut Instruction, n, random: &mut Random| near_data(i, n, &gpr, random);
        let Some(i) = instruction(code, &mut memory, target, random) else { return false };
        let undefined = case.undefined[slot];
        if flags(i.rflags_read()) & undefined != 0 {
            return false;
        }
        let mut encoder = Encoder::new(64);
        let Ok(len) = encoder.encode(&i, CODE + (slot * SLOT) as u64) else { return false };
        if len > 15 {
            return false;
        }
        let part = &mut case.code[slot * SLOT..][..SLOT];
        part[..len].copy_from_slice(&encoder.take_buffer());
        pad(&mut part[len..]);
        let after = undefined_after(&i, undefined);
        case.undefined[slot + 1] |= after;
        if i.is_jcc_short_or_near() || i.is_jmp_short_or_near() || i.is_call_near() || is_loop(&i) {
            case.undefined[to] |= after;
        }
        true
    }
}

fn is_loop(i: &Instruction) -> bool {
    i.is_loop() || i.is_loopcc() || i.is_jcx_short()
}

/// Fills with NOPs of any length.
pub fn pad(part: &mut [u8]) {
    if let Some((last, prefixes)) = part.split_last_mut() {
        prefixes.fill(0x66);
        *last = 0x90;
    }
}

/// A case with inputs and no instructions yet.
pub fn blank(seed: u64, count: usize, random: &mut Random) -> Case {
    let mut case = Case {
        seed,
        state: state(random),
        code: [0; CODE_BYTES],
        starts: std::array::from_fn(|n| (n * SLOT) as u16),
        count,
        undefined: [0; MOST + 1],
    };
    for slot in case.code[..count * SLOT].chunks_exact_mut(SLOT) {
        pad(slot);
    }
    case.code[count * SLOT..][..2].copy_from_slice(&UD2);
    case
}

/// Registers, with pointers to the data where string and stack instructions look for them.
pub fn state(random: &mut Random) -> State {
    let mut state = State::ZERO;
    for value in &mut state.gpr {
        *value = general(random);
    }
    if random.chance(80) {
        state.gpr[1] = random.below(20);
    }
    for pointer in [4, 6, 7] {
        if random.chance(85) {
            state.gpr[pointer] = place(random, 8);
        }
    }
    // Interrupts enabled, as every user program has them.
    state.flags = 0x202 | random.word() & 0x8d5 | if random.chance(20) { 0x400 } else { 0 };
    floating(&mut state.fpu, random);
    state
}

fn general(random: &mut Random) -> u64 {
    match random.below(10) {
        0 => random.pick(&[0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff]),
        1 => random.pick(&[1 << 63, u64::MAX, i64::MAX as u64, 1 << 47, 0xffff_8000_0000_0000]),
        2 => random.below(100),
        3 => random.word(),
        4 => random.word() >> random.below(64),
        _ => place(random, 8),
    }
}

/// Bits that look like numbers of some type.
fn number(random: &mut Random) -> u64 {
    let double = [0.0, -0.0, 1.0, -1.5, 1e300, 1e-310, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, f64::MAX];
    let single = [0.0, -0.0, 1.0, -2.5, 1e38, 1e-40, f32::INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE];
    let pair = |a: f32, b: f32| u64::from(a.to_bits()) << 32 | u64::from(b.to_bits());
    match random.below(8) {
        0 => random.pick(&double).to_bits(),
        1 => pair(random.pick(&single), random.pick(&single)),
        2 => f64::from(random.word() as i32 >> random.below(24)).to_bits(),
        3 => pair(random.word() as i16 as f32, random.word() as i8 as f32),
        4 => random.below(4000) | random.below(4000) << 32,
        5 => random.pick(&[0, u64::MAX, 0x8080_8080_8080_8080, 0x8000_0000_0000_0000]),
        6 => 0x7ff0_0000_0000_0001,
        _ => random.word(),
    }
}

fn floating(fpu: &mut [u8; 832], random: &mut Random) {
    let ordinary = random.chance(60);
    let fcw: u16 = if ordinary {
        0x37f
    } else {
        0x40 | (random.word() as u16 & 0xf3f) | (u16::from(random.chance(60)) * 0x3f)
    };
    let mut fsw = random.word() as u16 & 0x7f00;
    if random.chance(30) {
        fsw |= random.word() as u16 & 0x3f & if random.chance(10) { 0x3f } else { fcw };
    }
    if fsw & !fcw & 0x3f != 0 {
        fsw |= 0x8080;
    }
    fpu[0..2].copy_from_slice(&fcw.to_le_bytes());
    fpu[2..4].copy_from_slice(&fsw.to_le_bytes());
    let any = random.word() as u8;
    fpu[4] = random.pick(&[0, 0xff, 0x0f, 0xf0, any]);
    let unmasked = random.word() as u32 & if random.chance(30) { 0xffff } else { 0xe07f };
    let mxcsr: u32 =
        if random.chance(60) { 0x1f80 } else { unmasked | if unmasked & 0x1f80 == 0 { 0x1f80 } else { 0 } };
    fpu[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    fpu[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
    for n in 0..8 {
        let (mantissa, exponent) = match random.below(6) {
            0 => (0, random.pick(&[0, 0x8000])),
            1 => (random.word() | 1 << 63, random.pick(&[0x7fff, 0xffff, 0, 1, 0x7ffe])),
            2 => (1 << 63, 0x7fff),
            3 => (random.word(), random.word() as u16),
            _ => (random.word() << random.below(60) | 1 << 63, 0x3fff - 20 + random.below(60) as u16),
        };
        fpu[32 + 16 * n..][..8].copy_from_slice(&mantissa.to_le_bytes());
        fpu[40 + 16 * n..][..2].copy_from_slice(&exponent.to_le_bytes());
    }
    for part in fpu[160..416].chunks_exact_mut(8) {
        part.copy_from_slice(&number(random).to_le_bytes());
    }
    for part in fpu[576..832].chunks_exact_mut(8) {
        part.copy_from_slice(&number(random).to_le_bytes());
    }
    fpu[512] = 7;
}
