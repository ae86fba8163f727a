//! Which instructions the guest's CPU has: the decoder's feature names against CPUID.

use iced_x86::{CpuidFeature, Instruction, Mnemonic};
use ruse_engine::CpuidTable;

use crate::paravirt;

/// Words of the set.
const WORDS: usize = 4;

/// Registers of a CPUID leaf, as indices.
const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// Features that have no bit, or whose instructions do no harm without it: PREFETCHW, CLDEMOTE and the markers of CET
/// lie in the space of hint NOPs.
const ALWAYS: [CpuidFeature; 16] = [
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CPUID,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    CpuidFeature::PREFETCHW,
    CpuidFeature::PREFETCHWT1,
    CpuidFeature::CLDEMOTE,
    CpuidFeature::CET_IBT,
    CpuidFeature::RDPMC,
];

/// Feature, leaf, subleaf, register, bit (SDM volume 2, CPUID; APM volume 3, appendix E).
const BITS: [(CpuidFeature, u32, u32, usize, u32); 78] = [
    (CpuidFeature::FPU, 1, 0, EDX, 0),
    (CpuidFeature::TSC, 1, 0, EDX, 4),
    (CpuidFeature::MSR, 1, 0, EDX, 5),
    (CpuidFeature::CX8, 1, 0, EDX, 8),
    (CpuidFeature::SEP, 1, 0, EDX, 11),
    (CpuidFeature::CMOV, 1, 0, EDX, 15),
    (CpuidFeature::CLFSH, 1, 0, EDX, 19),
    (CpuidFeature::MMX, 1, 0, EDX, 23),
    (CpuidFeature::FXSR, 1, 0, EDX, 24),
    (CpuidFeature::SSE, 1, 0, EDX, 25),
    (CpuidFeature::SSE2, 1, 0, EDX, 26),
    (CpuidFeature::SSE3, 1, 0, ECX, 0),
    (CpuidFeature::PCLMULQDQ, 1, 0, ECX, 1),
    (CpuidFeature::MONITOR, 1, 0, ECX, 3),
    (CpuidFeature::VMX, 1, 0, ECX, 5),
    (CpuidFeature::SMX, 1, 0, ECX, 6),
    (CpuidFeature::SSSE3, 1, 0, ECX, 9),
    (CpuidFeature::FMA, 1, 0, ECX, 12),
    (CpuidFeature::CMPXCHG16B, 1, 0, ECX, 13),
    (CpuidFeature::SSE4_1, 1, 0, ECX, 19),
    (CpuidFeature::SSE4_2, 1, 0, ECX, 20),
    (CpuidFeature::MOVBE, 1, 0, ECX, 22),
    (CpuidFeature::POPCNT, 1, 0, ECX, 23),
    (CpuidFeature::AES, 1, 0, ECX, 25),
    (CpuidFeature::XSAVE, 1, 0, ECX, 26),
    (CpuidFeature::AVX, 1, 0, ECX, 28),
    (CpuidFeature::F16C, 1, 0, ECX, 29),
    (CpuidFeature::RDRAND, 1, 0, ECX, 30),
    (CpuidFeature::FSGSBASE, 7, 0, EBX, 0),
    (CpuidFeature::SGX1, 7, 0, EBX, 2),
    (CpuidFeature::BMI1, 7, 0, EBX, 3),
    (CpuidFeature::HLE, 7, 0, EBX, 4),
    (CpuidFeature::AVX2, 7, 0, EBX, 5),
    (CpuidFeature::BMI2, 7, 0, EBX, 8),
    (CpuidFeature::INVPCID, 7, 0, EBX, 10),
    (CpuidFeature::RTM, 7, 0, EBX, 11),
    (CpuidFeature::HLE_or_RTM, 7, 0, EBX, 11),
    (CpuidFeature::MPX, 7, 0, EBX, 14),
    (CpuidFeature::RDSEED, 7, 0, EBX, 18),
    (CpuidFeature::ADX, 7, 0, EBX, 19),
    (CpuidFeature::SMAP, 7, 0, EBX, 20),
    (CpuidFeature::CLFLUSHOPT, 7, 0, EBX, 23),
    (CpuidFeature::CLWB, 7, 0, EBX, 24),
    (CpuidFeature::SHA, 7, 0, EBX, 29),
    (CpuidFeature::PKU, 7, 0, ECX, 3),
    (CpuidFeature::WAITPKG, 7, 0, ECX, 5),
    (CpuidFeature::CET_SS, 7, 0, ECX, 7),
    (CpuidFeature::GFNI, 7, 0, ECX, 8),
    (CpuidFeature::VAES, 7, 0, ECX, 9),
    (CpuidFeature::VPCLMULQDQ, 7, 0, ECX, 10),
    (CpuidFeature::RDPID, 7, 0, ECX, 22),
    (CpuidFeature::KL, 7, 0, ECX, 23),
    (CpuidFeature::MOVDIRI, 7, 0, ECX, 27),
    (CpuidFeature::MOVDIR64B, 7, 0, ECX, 28),
    (CpuidFeature::ENQCMD, 7, 0, ECX, 29),
    (CpuidFeature::UINTR, 7, 0, EDX, 5),
    (CpuidFeature::SERIALIZE, 7, 0, EDX, 14),
    (CpuidFeature::TSXLDTRK, 7, 0, EDX, 16),
    (CpuidFeature::PCONFIG, 7, 0, EDX, 18),
    (CpuidFeature::AVX_VNNI, 7, 1, EAX, 4),
    (CpuidFeature::XSAVEOPT, 0xd, 1, EAX, 0),
    (CpuidFeature::XSAVEC, 0xd, 1, EAX, 1),
    (CpuidFeature::XSAVES, 0xd, 1, EAX, 3),
    (CpuidFeature::SVM, 0x8000_0001, 0, ECX, 2),
    (CpuidFeature::LZCNT, 0x8000_0001, 0, ECX, 5),
    (CpuidFeature::SSE4A, 0x8000_0001, 0, ECX, 6),
    (CpuidFeature::XOP, 0x8000_0001, 0, ECX, 11),
    (CpuidFeature::FMA4, 0x8000_0001, 0, ECX, 16),
    (CpuidFeature::TBM, 0x8000_0001, 0, ECX, 21),
    (CpuidFeature::MONITORX, 0x8000_0001, 0, ECX, 29),
    (CpuidFeature::SYSCALL, 0x8000_0001, 0, EDX, 11),
    (CpuidFeature::RDTSCP, 0x8000_0001, 0, EDX, 27),
    (CpuidFeature::D3NOWEXT, 0x8000_0001, 0, EDX, 30),
    (CpuidFeature::D3NOW, 0x8000_0001, 0, EDX, 31),
    (CpuidFeature::CLZERO, 0x8000_0008, 0, EBX, 0),
    (CpuidFeature::INVLPGB, 0x8000_0008, 0, EBX, 3),
    (CpuidFeature::RDPRU, 0x8000_0008, 0, EBX, 4),
    (CpuidFeature::WBNOINVD, 0x8000_0008, 0, EBX, 9),
];

/// A set of the decoder's features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Features {
    words: [u64; WORDS],
    /// There is a hypervisor to call: VMCALL and VMMCALL, which else are VMX's and SVM's.
    hypercalls: bool,
}

impl Features {
    /// What the CPUID table says. What is not known here is not there.
    pub fn new(cpuid: &CpuidTable) -> Self {
        let mut set = Self { words: [0; WORDS], hypercalls: paravirt::features(cpuid).is_some() };
        for feature in ALWAYS {
            set.insert(feature);
        }
        for (feature, leaf, subleaf, register, bit) in BITS {
            if cpuid.get(leaf, subleaf)[register] >> bit & 1 != 0 {
                set.insert(feature);
            }
        }
        set
    }

    /// Whether a feature is there.
    pub fn has(&self, feature: CpuidFeature) -> bool {
        let at = feature as usize;
        self.words[at / 64 % WORDS] >> (at % 64) & 1 != 0
    }

    /// Whether everything that the instruction needs is there.
    pub fn allow(&self, i: &Instruction) -> bool {
        let hypercall = self.hypercalls && matches!(i.mnemonic(), Mnemonic::Vmcall | Mnemonic::Vmmcall);
        hypercall || i.cpuid_features().iter().all(|&f| self.has(f))
    }

    fn insert(&mut self, feature: CpuidFeature) {
        let at = feature as usize;
        self.words[at / 64 % WORDS] |= 1 << (at % 64);
    }
}
