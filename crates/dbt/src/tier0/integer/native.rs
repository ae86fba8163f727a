//! Register instructions against the host's CPU: random encodings with random operands must leave the same registers
//! and the same flags, undefined ones apart.

use std::collections::BTreeMap;

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Register};
use ruse_arch::flags::rflags;
use ruse_random::Random;

use super::super::testing::{CODE, Machine};
use crate::tier0::operand::gpr_index;

/// General registers and flags, as the stub takes and leaves them.
type State = [u64; 17];

/// A page of memory that can be written and executed.
struct Stub(*mut u8);

impl Stub {
    fn new() -> Self {
        // SAFETY: a fresh anonymous mapping.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED);
        Self(page.cast())
    }

    /// Runs one instruction that uses neither RSP nor R15 nor memory.
    fn run(&mut self, instruction: &[u8], state: &mut State) {
        let mut code = Vec::new();
        // push rbx, rbp, r12 to r15; mov r15, rdi; push [r15 + 128]; popfq
        code.extend(*b"\x53\x55\x41\x54\x41\x55\x41\x56\x41\x57\x49\x89\xff\x41\xff\xb7\x80\0\0\0\x9d");
        let mov = |code: &mut Vec<u8>, opcode: u8, r: u8| {
            code.extend([0x49 | (r >> 3) << 2, opcode, 0x47 | (r & 7) << 3, r * 8]);
        };
        let registers = || (0..15u8).filter(|&r| r != 4);
        registers().for_each(|r| mov(&mut code, 0x8b, r));
        code.extend(instruction);
        registers().for_each(|r| mov(&mut code, 0x89, r));
        // pushfq; pop [r15 + 128]; cld; pop r15 to r12, rbp, rbx; ret
        code.extend(*b"\x9c\x41\x8f\x87\x80\0\0\0\xfc\x41\x5f\x41\x5e\x41\x5d\x41\x5c\x5d\x5b\xc3");
        // SAFETY: the code fits the page, keeps the ABI, and touches nothing but `state` and its own stack.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.0, code.len());
            let call: extern "C" fn(*mut u64) = std::mem::transmute(self.0);
            call(state.as_mut_ptr());
        }
    }
}

/// Values at which carries and signs change are frequent.
fn value(random: &mut Random) -> u64 {
    const EDGES: [u64; 8] =
        [0, 1, u64::MAX, 1 << 63, 0x8000_0000, 0x7fff_ffff, 0x8000_8000_8000_8080, 0x7f7f];
    match random.below(4) {
        0 => random.pick(&EDGES),
        1 => random.below(70),
        _ => random.word(),
    }
}

/// Bytes that may be an instruction on registers.
fn encoding(random: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    let byte = |random: &mut Random| random.word() as u8;
    let one_in = |random: &mut Random, n| random.below(n) == 0;
    if one_in(random, 8) {
        let inverted = byte(random);
        code.extend([0xc4, inverted & 0xe0 | (2 + inverted % 2), byte(random) & 0xfb, 0xf0 | byte(random)]);
    } else {
        if one_in(random, 3) {
            code.push(random.pick(&[0x66, 0x66, 0xf2, 0xf3]));
        }
        if one_in(random, 8) {
            code.push(random.pick(&[0x66, 0xf2, 0xf3]));
        }
        if one_in(random, 2) {
            code.push(0x40 | byte(random) & 15);
        }
        match random.below(6) {
            0..=2 => code.push(byte(random)),
            3..=4 => code.extend([0x0f, byte(random)]),
            _ => code.extend([0x0f, 0x38, 0xf0 | byte(random)]),
        }
    }
    code.push(0xc0 | byte(random));
    code.extend(random.word().to_le_bytes());
    code
}

/// Whether this file can run it, and the host has it.
fn is_fit(i: &Instruction, info: &mut InstructionInfoFactory) -> bool {
    let host = |f: &CpuidFeature| match f {
        CpuidFeature::BMI1 => std::is_x86_feature_detected!("bmi1"),
        CpuidFeature::BMI2 => std::is_x86_feature_detected!("bmi2"),
        CpuidFeature::ADX => std::is_x86_feature_detected!("adx"),
        CpuidFeature::LZCNT => std::is_x86_feature_detected!("lzcnt"),
        CpuidFeature::SSE4_2 => std::is_x86_feature_detected!("sse4.2"),
        _ => true,
    };
    let groups = [
        super::alu::handler,
        super::shift::handler,
        super::muldiv::handler,
        super::bits::handler,
        super::bmi::handler,
        super::mov::handler,
        super::exchange::handler,
        super::misc::handler,
    ];
    let used = info.info(i);
    !i.is_invalid()
        && groups.into_iter().any(|g| g(i).is_some())
        && used.used_memory().is_empty()
        && !i.is_ip_rel_memory_operand()
        && used.used_registers().iter().all(|r| {
            gpr_index(r.register().full_register()).is_some_and(|n| n != 4 && n != 15)
                && r.register() != Register::None
        })
        && i.cpuid_features().iter().all(host)
        && !matches!(i.mnemonic(), iced_x86::Mnemonic::Serialize | iced_x86::Mnemonic::Cldemote)
        // BSWAP of 16 bits is undefined.
        && !(i.mnemonic() == iced_x86::Mnemonic::Bswap && i.op0_register().size() == 2)
}

/// Runs `count` instructions; `undefined` hears of differences in undefined flags.
fn compare(count: u64, seed: u64, mut undefined: impl FnMut(&Instruction, u64, u64)) {
    let mut random = Random::new(seed);
    let mut stub = Stub::new();
    let mut machine = Machine::long();
    let mut info = InstructionInfoFactory::new();
    let mut done = 0;
    while done < count {
        let bytes = encoding(&mut random);
        let i = Decoder::with_ip(64, &bytes, CODE, DecoderOptions::NONE).decode();
        if !is_fit(&i, &mut info) {
            continue;
        }
        let bytes = &bytes[..i.len()];
        machine.load(bytes);
        let mut state: State = std::array::from_fn(|_| value(&mut random));
        state[16] = rflags::FIXED | rflags::IF | random.word() & rflags::ARITH;
        let rsp = machine.cpu.gpr[4];
        machine.cpu.gpr.copy_from_slice(&state[..16]);
        machine.cpu.gpr[4] = rsp;
        machine.cpu.rflags = state[16];
        let start = state;
        done += 1;
        // Only a division faults, and it would end this process.
        if machine.step().is_err() {
            continue;
        }
        stub.run(bytes, &mut state);
        let text = || format!("{i:?} {bytes:x?} from {start:x?}");
        for r in (0..15).filter(|&r| r != 4) {
            assert_eq!(machine.cpu.gpr[r], state[r], "register {r}: {}", text());
        }
        let free = iced_flags(i.rflags_undefined());
        let both = (machine.cpu.rflags ^ state[16]) & (rflags::ARITH | rflags::DF);
        assert_eq!(both & !free, 0, "flags {:x} and {:x}: {}", machine.cpu.rflags, state[16], text());
        if both & free != 0 {
            undefined(&i, machine.cpu.rflags, state[16]);
        }
    }
}

/// The decoder's names of flags as bits of RFLAGS.
fn iced_flags(bits: u32) -> u64 {
    use iced_x86::RflagsBits;
    [
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::OF, rflags::OF),
    ]
    .into_iter()
    .filter(|f| bits & f.0 != 0)
    .fold(0, |all, f| all | f.1)
}

#[test]
fn register_instructions_do_what_the_host_does() {
    compare(100_000, 1, |_, _, _| {});
}

/// Shows where undefined flags differ from this host's; differences are no errors.
#[test]
#[ignore = "a report"]
fn report_undefined_flags() {
    let mut seen: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    compare(1_000_000, 2, |i, ours, host| {
        let entry = seen.entry(format!("{:?}", i.mnemonic())).or_default();
        entry.0 += 1;
        entry.1 |= ours ^ host;
    });
    for (mnemonic, (count, flags)) in seen {
        println!("{mnemonic}: {count} times, flags {flags:#x}");
    }
}
