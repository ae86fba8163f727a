//! What CPUID says under this engine: the host's CPU as KVM offers it, cut down to the features whose state Ruse knows.

use std::io;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use ruse_arch::paravirt::{FEATURES_LEAF, feature};
use ruse_engine::{CpuidEntry, CpuidTable};

/// Leaf 1 ECX: XSAVE; TSC deadline, which KVM lists apart; hypervisor.
const XSAVE: u32 = 1 << 26;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;

/// Features that a guest gets beside those that the translator knows. What is left out has state that is not saved (CET,
/// MPX, PKU, SGX, AMX, WAITPKG, nested virtualization, performance counters), or tier 0 could not finish an
/// instruction under it (five-level paging, protection keys).
const ALSO: [(u32, u32, usize, u32); 11] = [
    // AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL; CLWB.
    (7, 0, 1, 1 << 16 | 1 << 17 | 1 << 21 | 1 << 24 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 30 | 1 << 31),
    // VBMI, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ; CLDEMOTE, MOVDIRI, MOVDIR64B.
    (
        7,
        0,
        2,
        1 << 1
            | 1 << 6
            | 1 << 8
            | 1 << 9
            | 1 << 10
            | 1 << 11
            | 1 << 12
            | 1 << 14
            | 1 << 25
            | 1 << 27
            | 1 << 28,
    ),
    // 4VNNIW, 4FMAPS, VP2INTERSECT, MD_CLEAR, SERIALIZE, AVX512-FP16; STIBP, L1D_FLUSH, SSBD.
    (7, 0, 3, 1 << 2 | 1 << 3 | 1 << 8 | 1 << 10 | 1 << 14 | 1 << 23 | 1 << 27 | 1 << 28 | 1 << 31),
    // AVX-VNNI, AVX512-BF16, fast REP MOVSB, STOSB, CMPSB and SCASB, AVX-IFMA.
    (7, 1, 0, 1 << 4 | 1 << 5 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 23),
    // AVX-VNNI-INT8, AVX-NE-CONVERT, PREFETCHI.
    (7, 1, 3, 1 << 4 | 1 << 5 | 1 << 14),
    // Controls of speculation, of which IA32_SPEC_CTRL has the bits; MCDT_NO.
    (7, 2, 3, 0x3f),
    (FEATURES_LEAF, 0, 0, feature::KNOWN),
    // AMD: CMP legacy, alternative to MOV CR8, extended topology.
    (0x8000_0001, 0, 2, 1 << 1 | 1 << 4 | 1 << 22),
    // AMD: what leaf 1 says too, MMX extensions, fast FXSAVE.
    (0x8000_0001, 0, 3, 0x0183_f3ff | 1 << 22 | 1 << 25),
    // AMD: CLZERO, XSAVEERPTR, WBNOINVD, IBPB, IBRS, STIBP, their preferences, SSBD, SSB_NO, PSFD, BTC_NO.
    (
        0x8000_0008,
        0,
        1,
        1 | 1 << 2 | 1 << 9 | 1 << 12 | 0x1f << 14 | 1 << 19 | 1 << 24 | 1 << 26 | 1 << 28 | 1 << 29,
    ),
    // AMD: no nested data breakpoints, LFENCE serializes, a null selector clears the base.
    (0x8000_0021, 0, 0, 1 | 1 << 2 | 1 << 6),
];

/// Components of extended state that are saved: x87, SSE, AVX, and the three of AVX-512.
const COMPONENTS: u32 = 0xe7;
/// Bytes of the area without further components (SDM volume 1, 13.4).
const LEGACY_AND_HEADER: u32 = 576;
/// XSAVEOPT, XSAVEC and XGETBV with index 1: not XSAVES, whose components of the supervisor are not saved.
const XSAVE_FORMS: u32 = 7;

/// Leaves that describe what a guest here does not have: performance counters, SGX, AMX, encryption, and those that the
/// machine fills in itself.
fn is_dropped(leaf: u32) -> bool {
    matches!(
        leaf,
        0xa | 0xb | 0xf | 0x10 | 0x12 | 0x14
            ..=0x20 | 0x24 | 0x8000_001c | 0x8000_001f | 0x8000_0020 | 0x8000_0022
    )
}

/// All that KVM and Ruse can give a guest here.
pub fn supported(kvm: &Kvm) -> io::Result<CpuidTable> {
    let offered = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let mut table =
        CpuidTable(offered.as_slice().iter().map(entry).filter(|e| !is_dropped(e.leaf)).collect());
    let deadline = if kvm.check_extension(Cap::TscDeadlineTimer) { TSC_DEADLINE } else { 0 };
    for entry in table.0.iter_mut().filter(|e| e.leaf == 1) {
        entry.regs[2] |= deadline | HYPERVISOR;
    }
    let own = ruse_dbt::cpuid::supported();
    table.mask_features(|leaf, subleaf, register| known(&own, leaf, subleaf, register));
    extended_state(&mut table);
    Ok(table)
}

/// The features of a register that Ruse knows: the translator's, and what is told of here.
fn known(own: &CpuidTable, leaf: u32, subleaf: u32, register: usize) -> u32 {
    let also = ALSO.iter().find(|a| (a.0, a.1, a.2) == (leaf, subleaf, register)).map_or(0, |a| a.3);
    own.get(leaf, subleaf)[register] | also
}

/// Cuts leaf 0Dh down to the components that are saved. KVM itself says how much of them is switched on.
fn extended_state(table: &mut CpuidTable) {
    if table.get(1, 0)[2] & XSAVE == 0 {
        table.0.retain(|e| e.leaf != 0xd);
        return;
    }
    let is_kept = |n: u32| n < 2 || COMPONENTS.checked_shr(n).unwrap_or(0) & 1 != 0;
    table.0.retain(|e| e.leaf != 0xd || is_kept(e.subleaf.unwrap_or(0)));
    let ends = table.0.iter().filter(|e| e.leaf == 0xd && e.subleaf > Some(1)).map(|e| e.regs[0] + e.regs[1]);
    let size = ends.max().unwrap_or(0).max(LEGACY_AND_HEADER);
    for entry in table.0.iter_mut().filter(|e| e.leaf == 0xd) {
        match entry.subleaf {
            Some(0) => entry.regs = [entry.regs[0] & COMPONENTS, size, size, 0],
            Some(1) => entry.regs = [entry.regs[0] & XSAVE_FORMS, size, 0, 0],
            _ => {}
        }
    }
}

fn entry(e: &kvm_cpuid_entry2) -> CpuidEntry {
    let indexed = e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
    CpuidEntry { leaf: e.function, subleaf: indexed.then_some(e.index), regs: [e.eax, e.ebx, e.ecx, e.edx] }
}

/// A table as KVM takes it: entries with a subleaf first, for one without catches the rest of its leaf.
pub fn for_kvm(table: &CpuidTable) -> io::Result<CpuId> {
    let mut entries: Vec<_> = table
        .0
        .iter()
        .map(|e| kvm_cpuid_entry2 {
            function: e.leaf,
            index: e.subleaf.unwrap_or(0),
            flags: if e.subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: e.regs[0],
            ebx: e.regs[1],
            ecx: e.regs[2],
            edx: e.regs[3],
            ..Default::default()
        })
        .collect();
    entries.sort_by_key(|e| (e.function, e.flags == 0, e.index));
    CpuId::from_entries(&entries).map_err(|_| io::ErrorKind::OutOfMemory.into())
}
