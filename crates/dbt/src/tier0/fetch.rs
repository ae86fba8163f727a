//! Fetching and decoding: the bytes at CS:RIP with the faults of reading them, and a cache of what they decode to.

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderError, DecoderOptions, EncodingKind, Instruction, Mnemonic,
};
use ruse_arch::{
    Exception,
    paging::{Access, is_canonical},
    state::seg,
};

use super::{Handler, Insn, features::Features, handler};
use crate::{
    cpu::{Cpu, Who},
    mmu::access::{Place, load},
};

/// Entries of the cache; a power of two.
const ENTRIES: usize = 2048;
/// The longest instruction (SDM volume 2, 2.3.11).
const LONGEST: usize = 15;
const PAGE: u64 = 4096;

#[derive(Clone, Copy)]
struct Entry {
    /// Bytes of the instruction, zero behind it.
    bytes: u128,
    /// Which of the 16 bytes count.
    mask: u128,
    /// What else decoding depends on; 0 in an empty entry.
    key: u32,
    handler: Handler,
    insn: Insn,
}

/// Decoded instructions by RIP. An entry counts only while memory still holds its bytes, so that code may change in
/// any way without notice; RIP is part of the key because branch targets and RIP-relative addresses are decoded.
#[derive(Default)]
pub struct DecodeCache {
    /// Made with the first instruction.
    entries: Box<[Entry]>,
    features: Option<Features>,
}

impl DecodeCache {
    fn has(&self, rip: u64, key: u32, bytes: u128) -> bool {
        self.entries.get(slot(rip)).is_some_and(|entry| {
            entry.insn.rip == rip && entry.key == key && (entry.bytes ^ bytes) & entry.mask == 0
        })
    }

    fn insert(&mut self, entry: Entry) {
        if self.entries.is_empty() {
            self.entries = vec![Entry { key: 0, ..entry }; ENTRIES].into();
        }
        self.entries[slot(entry.insn.rip)] = entry;
    }
}

fn slot(rip: u64) -> usize {
    (rip ^ rip >> 11) as usize % ENTRIES
}

fn bitness(cpu: &Cpu) -> u32 {
    match (cpu.mode.code64, cpu.mode.code32) {
        (true, _) => 64,
        (_, true) => 32,
        _ => 16,
    }
}

/// What decoding depends on beside the bytes and their address; not 0.
fn key(cpu: &Cpu) -> u32 {
    bitness(cpu) | u32::from(cpu.mode.real || cpu.mode.vm86)
}

/// Linear address of CS:RIP and how many bytes the segment still has there.
fn code_address(cpu: &Cpu) -> Result<(u64, usize), Exception> {
    if cpu.mode.code64 {
        return if is_canonical(cpu.rip) { Ok((cpu.rip, LONGEST)) } else { Err(Exception::gp(0)) };
    }
    let cs = &cpu.seg[seg::CS];
    let left = u64::from(cs.limit).checked_sub(cpu.rip).ok_or(Exception::gp(0))?;
    Ok((cs.base.wrapping_add(cpu.rip) & 0xffff_ffff, (left + 1).min(LONGEST as u64) as usize))
}

/// Fetches the instruction at CS:RIP and gives it to `f` with its handler. The cache is away from the CPU meanwhile,
/// so that nothing needs to be copied.
#[inline]
pub(super) fn with_instruction<R>(
    cpu: &mut Cpu,
    f: impl FnOnce(&mut Cpu, &Insn, Handler) -> R,
) -> Result<R, Exception> {
    fetch(cpu)?;
    let at = slot(cpu.rip);
    let entries = std::mem::take(&mut cpu.decoded.entries);
    let result = f(cpu, &entries[at].insn, entries[at].handler);
    cpu.decoded.entries = entries;
    Ok(result)
}

/// Makes the cache's entry for RIP hold the instruction there.
#[inline]
fn fetch(cpu: &mut Cpu) -> Result<(), Exception> {
    let (la, limit) = code_address(cpu)?;
    let left = (PAGE - la % PAGE) as usize;
    let place = cpu.place(la, 1, Access::Fetch, Who::Current)?;
    if left > LONGEST
        && limit == LONGEST
        && let Place::Ram(host) = place
    {
        let mut raw = [0; 16];
        load(host, &mut raw);
        let bytes = u128::from_le_bytes(raw);
        if cpu.decoded.has(cpu.rip, key(cpu), bytes) {
            return Ok(());
        }
    }
    fetch_slow(cpu, la, limit, place)
}

/// Reads as many bytes as there are, the second page only if the instruction reaches it, and decodes.
fn fetch_slow(cpu: &mut Cpu, la: u64, limit: usize, place: Place) -> Result<(), Exception> {
    let mut bytes = [0; LONGEST];
    let left = (PAGE - la % PAGE) as usize;
    let first = left.min(limit);
    cpu.read_place(place, &mut bytes[..first]);
    let mut have = first;
    let mut found = decode(cpu, &bytes[..have]);
    if found == Err(DecoderError::NoMoreBytes) && have < limit {
        let second = cpu.place(cpu.wrap(la.wrapping_add(left as u64)), 1, Access::Fetch, Who::Current)?;
        cpu.read_place(second, &mut bytes[have..limit]);
        have = limit;
        found = decode(cpu, &bytes[..have]);
    }
    match found {
        Ok(i) => enter(cpu, i, bytes),
        // The segment ends within the instruction.
        Err(DecoderError::NoMoreBytes) => Err(Exception::gp(0)),
        // Too long if its 15th byte does not end it (SDM volume 2, 2.3.11).
        Err(_) if have == LONGEST && decode(cpu, &bytes[..have - 1]) == Err(DecoderError::NoMoreBytes) => {
            Err(Exception::gp(0))
        }
        Err(_) => Err(Exception::UD),
    }
}

fn decode(cpu: &Cpu, bytes: &[u8]) -> Result<Instruction, DecoderError> {
    let mut decoder = Decoder::with_ip(bitness(cpu), bytes, cpu.rip, DecoderOptions::NONE);
    let i = decoder.decode();
    match decoder.last_error() {
        DecoderError::None => Ok(i),
        error => Err(error),
    }
}

/// Puts a decoded instruction into the cache.
fn enter(cpu: &mut Cpu, i: Instruction, mut bytes: [u8; LONGEST]) -> Result<(), Exception> {
    let features = *cpu.decoded.features.get_or_insert_with(|| Features::new(&cpu.cpuid));
    let i = without_feature(i, &features);
    // VEX and its like need protected mode (SDM volume 2, 2.4).
    let legacy = matches!(i.code().encoding(), EncodingKind::Legacy | EncodingKind::D3NOW);
    if !features.allow(&i) || (!legacy && (cpu.mode.real || cpu.mode.vm86)) {
        return Err(Exception::UD);
    }
    bytes[i.len()..].fill(0);
    let next = cpu.rip.wrapping_add(i.len() as u64);
    let next = if cpu.mode.code64 { next } else { next & 0xffff_ffff };
    let insn = Insn { i, bytes, rip: cpu.rip, next };
    let mut raw = [0; 16];
    raw[..LONGEST].copy_from_slice(&bytes);
    let entry = Entry {
        bytes: u128::from_le_bytes(raw),
        mask: (1 << (8 * i.len())) - 1,
        key: key(cpu),
        handler: handler(&i),
        insn,
    };
    cpu.decoded.insert(entry);
    Ok(())
}

/// What an instruction means to a CPU that lacks its feature but not the opcode below: the REP prefix of LZCNT and
/// TZCNT is ignored then, and shadow-stack reads are hint NOPs.
fn without_feature(mut i: Instruction, features: &Features) -> Instruction {
    let code = match i.code() {
        Code::Lzcnt_r16_rm16 => Code::Bsr_r16_rm16,
        Code::Lzcnt_r32_rm32 => Code::Bsr_r32_rm32,
        Code::Lzcnt_r64_rm64 => Code::Bsr_r64_rm64,
        Code::Tzcnt_r16_rm16 => Code::Bsf_r16_rm16,
        Code::Tzcnt_r32_rm32 => Code::Bsf_r32_rm32,
        Code::Tzcnt_r64_rm64 => Code::Bsf_r64_rm64,
        Code::Rdsspd_r32 => Code::Nop_rm32,
        Code::Rdsspq_r64 => Code::Nop_rm64,
        Code::Wbnoinvd => Code::Wbinvd,
        _ => return i,
    };
    let feature = match i.mnemonic() {
        Mnemonic::Lzcnt => CpuidFeature::LZCNT,
        Mnemonic::Tzcnt => CpuidFeature::BMI1,
        Mnemonic::Wbnoinvd => CpuidFeature::WBNOINVD,
        _ => CpuidFeature::CET_SS,
    };
    if !features.has(feature) {
        i.set_code(code);
    }
    i
}
