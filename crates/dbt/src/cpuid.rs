//! What CPUID says under this engine (SDM volume 2, CPUID).
//!
//! Instructions on data run on the host's registers, so that they are offered only where the host has them; what the
//! engine itself carries out (paging, modes, system registers) is offered always. Topology, frequencies and named
//! models are the machine's to fill in.

use ruse_arch::{
    flags::cr4,
    paging::PHYS_BITS,
    paravirt::{self as kvm, FEATURES_LEAF, SIGNATURE_LEAF},
};
use ruse_engine::{CpuidEntry, CpuidTable};

use crate::{cpu::Cpu, paravirt};

/// Family 6, model 8Fh, stepping 8: a recent server CPU, for which systems know no errata that matter here.
const SIGNATURE: u32 = 0x0008_06f8;
/// Highest basic and extended leaf.
const LAST_BASIC: u32 = 0x16;
const LAST_EXTENDED: u32 = 0x8000_0008;

/// Leaf 1 ECX that the host must have: SSE3, PCLMULQDQ, SSSE3, FMA, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, AES,
/// XSAVE, AVX, F16C.
const ECX1_HOST: u32 = 1
    | 1 << 1
    | 1 << 9
    | 1 << 12
    | 1 << 13
    | 1 << 19
    | 1 << 20
    | 1 << 22
    | 1 << 23
    | 1 << 25
    | 1 << 26
    | 1 << 28
    | 1 << 29;
/// Leaf 1 ECX of the engine: PCID, x2APIC, TSC deadline, RDRAND, hypervisor.
const ECX1_OWN: u32 = 1 << 17 | 1 << 21 | 1 << 24 | 1 << 30 | 1 << 31;
/// Leaf 1 EDX: FPU, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE-36, CLFSH, MMX, FXSR,
/// SSE, SSE2, self-snoop. Not VME: virtual interrupts of old systems have no users in 64-bit ones.
const EDX1: u32 = 0x0f8b_fbfd;

/// Leaf 7 EBX that the host must have: BMI1, AVX2, FDP only on exceptions, BMI2, ERMS, FCS and FDS deprecated, ADX,
/// CLFLUSHOPT, SHA.
const EBX7_HOST: u32 = 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 23 | 1 << 29;
/// Leaf 7 EBX of the engine: FSGSBASE, TSC_ADJUST, SMEP, INVPCID, RDSEED, SMAP.
const EBX7_OWN: u32 = 1 | 1 << 1 | 1 << 7 | 1 << 10 | 1 << 18 | 1 << 20;
/// Leaf 7 ECX: UMIP, RDPID.
const ECX7: u32 = 1 << 2 | 1 << 22;
/// Leaf 7 EDX of the host: fast short REP MOVSB.
const EDX7_HOST: u32 = 1 << 4;
/// Leaf 7 EDX of the engine: IBRS with IBPB, and IA32_ARCH_CAPABILITIES. Systems take enhanced IBRS for all that is
/// needed against branch target injection, and leave their indirect branches as they are.
const EDX7_OWN: u32 = 1 << 26 | 1 << 29;
/// Leaf 7, subleaf 2, EDX of the engine: BHI_DIS_S. Systems that cannot have it clear the branch history by a loop of
/// calls at each system call.
const EDX7_2_OWN: u32 = 1 << 4;

/// Leaf 80000001h: LAHF (host), LZCNT (host), PREFETCHW; SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
const ECX_EXT_HOST: u32 = 1 | 1 << 5;
const ECX_EXT_OWN: u32 = 1 << 8;
const EDX_EXT: u32 = 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29;

const NAME: &[u8; 48] = b"Ruse virtual CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// What the host's CPUID says.
fn host(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

fn has_leaf(leaf: u32) -> bool {
    host(leaf & 0x8000_0000, 0)[0] >= leaf
}

/// The host's leaf, zeroes where it has none.
fn host_or_zero(leaf: u32, subleaf: u32) -> [u32; 4] {
    if has_leaf(leaf) { host(leaf, subleaf) } else { [0; 4] }
}

/// All that this engine can give a guest, as one vCPU with APIC id 0 would see it.
pub fn supported() -> CpuidTable {
    let mut table = CpuidTable::default();
    let mut plain = |leaf, regs| table.0.push(CpuidEntry { leaf, subleaf: None, regs });
    plain(0, [LAST_BASIC, word(b"Genu"), word(b"ntel"), word(b"ineI")]);
    let host1 = host(1, 0);
    let ecx1 = host1[2] & ECX1_HOST | ECX1_OWN;
    plain(1, [SIGNATURE, 8 << 8 | 1 << 16, ecx1, EDX1]);
    // Leaf 4 describes the caches.
    plain(2, [0x00fe_ff01, 0, 0, 0]);
    // The timer of the local APIC runs always.
    plain(6, [1 << 2, 0, 0, 0]);
    let [ebx, ecx, edx] = kvm::SIGNATURE;
    plain(SIGNATURE_LEAF, [FEATURES_LEAF, ebx, ecx, edx]);
    plain(FEATURES_LEAF, [paravirt::offered(), 0, 0, 0]);
    let host_ext = host_or_zero(0x8000_0001, 0);
    plain(0x8000_0000, [LAST_EXTENDED, 0, 0, 0]);
    plain(0x8000_0001, [0, 0, host_ext[2] & ECX_EXT_HOST | ECX_EXT_OWN, EDX_EXT]);
    for (n, part) in NAME.chunks_exact(16).enumerate() {
        plain(0x8000_0002 + n as u32, std::array::from_fn(|i| word(&part[4 * i..4 * i + 4])));
    }
    // 2 MiB of second-level cache, 16 ways, lines of 64 bytes.
    plain(0x8000_0006, [0, 0, 2048 << 16 | 8 << 12 | 64, 0]);
    plain(0x8000_0007, [0, 0, 0, host_or_zero(0x8000_0007, 0)[3] & 1 << 8]);
    plain(0x8000_0008, [48 << 8 | PHYS_BITS, 0, 0, 0]);
    caches(&mut table);
    features7(&mut table);
    extended_state(&mut table, ecx1);
    table
}

fn word(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

/// Leaf 4: first-level data 48 KiB and code 32 KiB, second 2 MiB, third 32 MiB.
fn caches(table: &mut CpuidTable) {
    let levels = [(1, 1, 12, 64), (2, 1, 8, 64), (3, 2, 16, 2048), (3, 3, 16, 32768)];
    for (n, (kind, level, ways, sets)) in (0..).zip(levels) {
        let regs = [kind | level << 5 | 1 << 8, (ways - 1) << 22 | 63, sets - 1, 0];
        table.0.push(CpuidEntry { leaf: 4, subleaf: Some(n), regs });
    }
}

fn features7(table: &mut CpuidTable) {
    let found = host_or_zero(7, 0);
    let mut ebx = found[1] & EBX7_HOST | EBX7_OWN;
    if host(1, 0)[2] >> 28 & 1 == 0 {
        ebx &= !(1 << 5);
    }
    let regs = [2, ebx, ECX7, found[3] & EDX7_HOST | EDX7_OWN];
    table.0.push(CpuidEntry { leaf: 7, subleaf: Some(0), regs });
    table.0.push(CpuidEntry { leaf: 7, subleaf: Some(2), regs: [0, 0, 0, EDX7_2_OWN] });
}

/// Leaf Dh: x87, SSE and, where the host has it, AVX; XSAVEOPT, XSAVEC and XGETBV with index 1, but not XSAVES.
fn extended_state(table: &mut CpuidTable, ecx1: u32) {
    if ecx1 >> 26 & 1 == 0 {
        return;
    }
    let avx = ecx1 >> 28 & 1 != 0;
    let (components, size) = if avx { (7, 832) } else { (3, 576) };
    let optional = host_or_zero(0xd, 1)[0] & 7;
    let mut entry = |n, regs| table.0.push(CpuidEntry { leaf: 0xd, subleaf: Some(n), regs });
    entry(0, [components, size, size, 0]);
    entry(1, [optional, size, 0, 0]);
    if avx {
        entry(2, [256, 576, 0, 0]);
    }
}

/// Executes CPUID: the vCPU's table with what depends on its state.
pub(crate) fn query(cpu: &Cpu, leaf: u32, subleaf: u32) -> [u32; 4] {
    let last = match leaf {
        SIGNATURE_LEAF..=0x4fff_ffff => cpu.cpuid.get(SIGNATURE_LEAF, 0)[0],
        _ => cpu.cpuid.get(leaf & 0x8000_0000, 0)[0],
    };
    // Intel's CPUs answer beyond their last leaf with the last basic one.
    let leaf = if leaf <= last { leaf } else { cpu.cpuid.get(0, 0)[0] };
    let mut regs = cpu.cpuid.get(leaf, subleaf);
    match (leaf, subleaf) {
        (1, _) => {
            let on = cpu.paging.cr4 & cr4::OSXSAVE != 0;
            regs[2] = regs[2] & !(1 << 27) | u32::from(on) << 27;
        }
        // The sizes of the standard and the compacted area for the components enabled now.
        (0xd, 0 | 1) if regs != [0; 4] => regs[1] = if cpu.xcr0 & 4 != 0 { 832 } else { 576 },
        _ => {}
    }
    regs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tier0::testing::Machine;

    #[test]
    fn the_table_is_consistent() {
        let table = supported();
        let [_, ebx, ecx, edx] = table.get(0, 0);
        let vendor = [ebx, edx, ecx].map(u32::to_le_bytes).concat();
        assert_eq!(vendor, b"GenuineIntel");
        assert_eq!(table.get(0x8000_0008, 0)[0] & 0xff, PHYS_BITS);
        // AVX comes only with the room to save it.
        let avx = table.get(1, 0)[2] >> 28 & 1 != 0;
        assert_eq!(avx, table.get(0xd, 0)[0] & 4 != 0);
    }

    #[test]
    fn the_state_shows() {
        let mut m = Machine::long();
        assert_eq!(query(&m.cpu, 0xd, 0)[1], 832);
        m.cpu.xcr0 = 3;
        assert_eq!(query(&m.cpu, 0xd, 1)[1], 576);
        assert_ne!(query(&m.cpu, 1, 0)[2] & 1 << 27, 0);
        m.cpu.paging.cr4 &= !cr4::OSXSAVE;
        assert_eq!(query(&m.cpu, 1, 0)[2] & 1 << 27, 0);
    }

    #[test]
    fn leaves_beyond_the_last_are_answered_as_the_last() {
        let m = Machine::long();
        assert_eq!(query(&m.cpu, 0x7fff_ffff, 0), query(&m.cpu, 0xd, 0));
        assert_eq!(query(&m.cpu, 0x8fff_ffff, 0), query(&m.cpu, 0xd, 0));
    }
}
