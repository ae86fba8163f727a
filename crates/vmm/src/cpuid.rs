//! What CPUID says on each vCPU: the engine's features, cut down to a named model, with the machine's topology and
//! frequencies (SDM volume 2, CPUID).

use std::str::FromStr;

use ruse_engine::{CpuidEntry, CpuidTable};
use serde::{Deserialize, Serialize};

use crate::config::Topology;

/// Highest basic leaf that a machine tells itself: 16h, frequencies.
const LAST_BASIC: u32 = 0x16;

/// A named CPU: the features that a guest may see. Levels are those of the x86-64 psABI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuModel {
    /// All that the engine can do.
    #[default]
    #[serde(rename = "max")]
    Max,
    /// No more than x86-64-v2, up to SSE4.2, and than what both engines have.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// No more than x86-64-v3, up to AVX2, BMI and FMA, and than what both engines have.
    #[serde(rename = "x86-64-v3")]
    V3,
}

impl FromStr for CpuModel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "max" => Ok(Self::Max),
            "x86-64-v2" => Ok(Self::V2),
            "x86-64-v3" => Ok(Self::V3),
            _ => Err("expected max, x86-64-v3 or x86-64-v2".into()),
        }
    }
}

/// Bits of a register of a leaf that a level above some model has.
struct Above {
    leaf: u32,
    register: usize,
    bits: u32,
}

/// What x86-64-v3 has over v2, with what builds on it: FMA, MOVBE, XSAVE, OSXSAVE, AVX, F16C; BMI1, AVX2, BMI2; VAES,
/// VPCLMULQDQ; LZCNT.
const ABOVE_V2: [Above; 4] = [
    Above { leaf: 1, register: 2, bits: 1 << 12 | 1 << 22 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 },
    Above { leaf: 7, register: 1, bits: 1 << 3 | 1 << 5 | 1 << 8 },
    Above { leaf: 7, register: 2, bits: 1 << 9 | 1 << 10 },
    Above { leaf: 0x8000_0001, register: 2, bits: 1 << 5 },
];
/// What is over x86-64-v3 and costs a guest state or is new: AVX-512 in all its parts, and SHA.
const ABOVE_V3: [Above; 3] = [
    Above { leaf: 7, register: 1, bits: 1 << 16 | 1 << 17 | 1 << 21 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 31 },
    Above { leaf: 7, register: 2, bits: 1 << 1 | 1 << 6 | 1 << 11 | 1 << 12 | 1 << 14 },
    Above { leaf: 7, register: 3, bits: 1 << 2 | 1 << 3 | 1 << 8 | 1 << 23 },
];

/// What systems protect themselves with: commands that change no result, and that every engine takes. MD_CLEAR, STIBP,
/// L1D_FLUSH, SSBD; AMD's IBPB, IBRS, STIBP, SSBD.
const PROTECTIONS: [(u32, usize, u32); 2] =
    [(7, 3, 1 << 10 | 1 << 27 | 1 << 28 | 1 << 31), (0x8000_0008, 1, 1 << 12 | 1 << 14 | 1 << 15 | 1 << 24)];

impl CpuModel {
    /// The features of this model, out of those that the engine has.
    pub(crate) fn features(self, supported: CpuidTable) -> CpuidTable {
        match self {
            Self::Max => supported,
            Self::V3 | Self::V2 => self.cut(supported, ruse_dbt::cpuid::supported()),
        }
    }

    /// Named models have what `any` engine has, so that a machine of one can go from engine to engine, and what a system
    /// protects itself with.
    fn cut(self, supported: CpuidTable, mut any: CpuidTable) -> CpuidTable {
        for (leaf, register, bits) in PROTECTIONS {
            let entries = any.0.iter_mut().filter(|e| e.leaf == leaf && e.subleaf.unwrap_or(0) == 0);
            entries.for_each(|entry| entry.regs[register] |= bits);
        }
        let above = if self == Self::V2 { &ABOVE_V2[..] } else { &[] };
        let mut table = supported.in_common_with(&any);
        for above in ABOVE_V3.iter().chain(above) {
            for entry in table.0.iter_mut().filter(|e| e.leaf == above.leaf && e.subleaf.unwrap_or(0) == 0) {
                entry.regs[above.register] &= !above.bits;
            }
        }
        if self == Self::V2 {
            // Without XSAVE there are no components to save.
            table.0.retain(|entry| entry.leaf != 0xd);
        }
        table
    }
}

/// What CPUID says on the vCPUs of a machine.
pub(crate) struct CpuidPlan {
    base: CpuidTable,
    cpus: Topology,
    tsc_hz: u64,
    timer_hz: u64,
}

impl CpuidPlan {
    /// For a machine whose CPUs have the features of `base`. `timer_hz` is the frequency of the local APICs' timers.
    pub(crate) fn new(base: CpuidTable, cpus: Topology, tsc_hz: u64, timer_hz: u64) -> Self {
        Self { base, cpus, tsc_hz, timer_hz }
    }

    /// The table of the vCPU with this APIC ID.
    pub(crate) fn table(&self, id: u32) -> CpuidTable {
        let mut table = self.base.clone();
        self.basic(&mut table, id);
        self.caches(&mut table);
        self.topology(&mut table, id);
        self.amd_topology(&mut table, id);
        self.frequencies(&mut table);
        table
    }

    /// Bits of an APIC ID that tell threads apart, and threads and cores.
    fn shifts(&self) -> (u32, u32) {
        let thread = bits_for(self.cpus.threads);
        (thread, thread + bits_for(self.cpus.cores))
    }

    fn per_socket(&self) -> u32 {
        self.cpus.cores.saturating_mul(self.cpus.threads)
    }

    fn basic(&self, table: &mut CpuidTable, id: u32) {
        let threads = self.per_socket();
        for entry in &mut table.0 {
            match entry.leaf {
                0 => entry.regs[0] = entry.regs[0].max(LAST_BASIC),
                1 => {
                    let count = if threads > 1 { threads.min(255) } else { 0 };
                    entry.regs[1] = entry.regs[1] & 0xffff | count << 16 | id << 24;
                    entry.regs[3] = entry.regs[3] & !(1 << 28) | u32::from(threads > 1) << 28;
                }
                _ => {}
            }
        }
    }

    /// Leaf 4: who shares a cache. Those of the first two levels belong to a core, others to a socket.
    fn caches(&self, table: &mut CpuidTable) {
        let (thread, core) = self.shifts();
        for entry in table.0.iter_mut().filter(|e| e.leaf == 4 && e.regs[0] & 0x1f != 0) {
            let level = entry.regs[0] >> 5 & 7;
            let sharing = (1u32 << if level < 3 { thread } else { core }) - 1;
            let cores = (1u32 << (core - thread)) - 1;
            entry.regs[0] = entry.regs[0] & 0x3fff | (sharing & 0xfff) << 14 | (cores & 0x3f) << 26;
        }
    }

    /// Leaves 0Bh and 1Fh: extended topology.
    fn topology(&self, table: &mut CpuidTable, id: u32) {
        let (thread, core) = self.shifts();
        table.0.retain(|e| e.leaf != 0xb && e.leaf != 0x1f);
        let levels = [(thread, self.cpus.threads, 1), (core, self.per_socket(), 2)];
        for (n, (shift, count, kind)) in (0..).zip(levels) {
            let regs = [shift, count & 0xffff, kind << 8 | n, id];
            table.0.push(CpuidEntry { leaf: 0xb, subleaf: Some(n), regs });
        }
        // The end of the list still tells the x2APIC ID.
        table.0.push(CpuidEntry { leaf: 0xb, subleaf: None, regs: [0, 0, 0, id] });
    }

    /// Leaf 80000008h ECX and 8000001Eh (AMD APM volume 3, appendix E).
    fn amd_topology(&self, table: &mut CpuidTable, id: u32) {
        let (thread, core) = self.shifts();
        let is_amd = table.get(0, 0)[1..] == [0x6874_7541, 0x444d_4163, 0x6974_6e65];
        for entry in &mut table.0 {
            match entry.leaf {
                0x8000_0008 if is_amd => entry.regs[2] = (self.per_socket() - 1) & 0xff | core << 12,
                0x8000_001e if is_amd => {
                    let threads = self.cpus.threads.saturating_sub(1);
                    entry.regs = [id, id >> thread & 0xff | threads << 8, id >> core & 0xff, 0];
                }
                _ => {}
            }
        }
    }

    /// Leaves 15h and 16h: the TSC as a ratio to the local APIC timer's clock, and the frequency in MHz. A system that
    /// believes them need not measure.
    fn frequencies(&self, table: &mut CpuidTable) {
        table.0.retain(|e| e.leaf != 0x15 && e.leaf != 0x16);
        // Linux multiplies the clock in kHz by the numerator in 32 bits (arch/x86/kernel/tsc.c, native_calibrate_tsc).
        let limit = u64::from(u32::MAX) / self.timer_hz.div_ceil(1000).max(1);
        let (tsc, timer) = nearest_fraction(self.tsc_hz, self.timer_hz, limit);
        if let (Ok(tsc), Ok(timer), Ok(hz)) = (tsc.try_into(), timer.try_into(), self.timer_hz.try_into()) {
            table.0.push(CpuidEntry { leaf: 0x15, subleaf: None, regs: [timer, tsc, hz, 0] });
        }
        let mhz = (self.tsc_hz / 1_000_000).min(0xffff) as u32;
        table.0.push(CpuidEntry { leaf: 0x16, subleaf: None, regs: [mhz, mhz, 100, 0] });
    }
}

/// APIC IDs of the vCPUs are their numbers, so every part but the last has to be a power of two.
fn bits_for(count: u32) -> u32 {
    count.max(1).next_power_of_two().trailing_zeros()
}

/// The fraction nearest to `a / b` whose numerator is at most `limit`, by the continued fraction.
fn nearest_fraction(mut a: u64, mut b: u64, limit: u64) -> (u64, u64) {
    let (mut before, mut last) = ((0, 1), (1, 0));
    while b != 0 {
        let (whole, rest) = (a / b, a % b);
        let steps = (limit - before.0).checked_div(last.0).map_or(whole, |most| most.min(whole));
        let next = (steps * last.0 + before.0, steps * last.1 + before.1);
        if steps < whole {
            // Less than half of the steps lead to a worse fraction than none.
            return if steps > whole / 2 { next } else { last };
        }
        (before, last) = (last, next);
        (a, b) = (b, rest);
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuidTable {
        let entry = |leaf, regs| CpuidEntry { leaf, subleaf: None, regs };
        CpuidTable(vec![
            entry(0, [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            entry(1, [0, 0xff00_0800, !0, !0]),
            CpuidEntry { leaf: 4, subleaf: Some(0), regs: [0x121, 0, 0, 0] },
            CpuidEntry { leaf: 4, subleaf: Some(3), regs: [0x163, 0, 0, 0] },
            CpuidEntry { leaf: 7, subleaf: Some(0), regs: [0, !0, !0, !0] },
            entry(0xd, [7, 0, 0, 0]),
            entry(0x8000_0001, [0, 0, !0, !0]),
        ])
    }

    fn plan(model: CpuModel, cpus: Topology) -> CpuidPlan {
        let base = if model == CpuModel::Max { supported() } else { model.cut(supported(), supported()) };
        CpuidPlan::new(base, cpus, 2_400_000_000, 1_000_000_000)
    }

    #[test]
    fn topology_is_told() {
        let table = plan(CpuModel::Max, Topology { sockets: 2, cores: 2, threads: 2 }).table(5);
        assert_eq!(table.get(0, 0)[0], LAST_BASIC);
        assert_eq!(table.get(1, 0)[1], 5 << 24 | 4 << 16 | 0x800);
        assert_eq!(table.get(0xb, 0), [1, 2, 0x100, 5]);
        assert_eq!(table.get(0xb, 1), [2, 4, 0x201, 5]);
        assert_eq!(table.get(0xb, 2), [0, 0, 0, 5]);
        assert_eq!(table.get(4, 0)[0] >> 14, 1 << 12 | 1);
        assert_eq!(table.get(4, 3)[0] >> 14, 1 << 12 | 3);
        let single = plan(CpuModel::Max, Topology::flat(1)).table(0);
        assert_eq!(single.get(1, 0)[3] >> 28 & 1, 0, "no HTT");
    }

    #[test]
    fn models_cut_features() {
        let v2 = plan(CpuModel::V2, Topology::flat(1)).table(0);
        assert_eq!(v2.get(1, 0)[2] >> 28 & 1, 0, "AVX");
        assert_eq!(v2.get(1, 0)[2] >> 20 & 1, 1, "SSE4.2");
        assert_eq!(v2.get(7, 0)[1] >> 5 & 1, 0, "AVX2");
        assert_eq!(v2.get(0xd, 0), [0; 4]);
        let v3 = plan(CpuModel::V3, Topology::flat(1)).table(0);
        assert_eq!((v3.get(7, 0)[1] >> 5 & 1, v3.get(7, 0)[1] >> 16 & 1), (1, 0));
        let mut narrow = supported();
        narrow.0.iter_mut().filter(|e| e.leaf == 7).for_each(|e| e.regs[2] = 1 << 22);
        narrow.0.iter_mut().filter(|e| e.leaf == 7).for_each(|e| e.regs[3] = 1 << 26);
        let v3 = CpuModel::V3.cut(supported(), narrow);
        assert_eq!(
            v3.get(7, 0)[2..],
            [1 << 22, 1 << 26 | PROTECTIONS[0].2],
            "no engine's own, but the protections"
        );
        assert_eq!(CpuModel::Max.features(supported()).get(7, 0)[2], !0);
        assert_eq!("x86-64-v3".parse(), Ok(CpuModel::V3));
        assert!("486".parse::<CpuModel>().is_err());
    }

    /// What Linux computes in 32 bits from leaf 15h, in kHz.
    fn tsc_khz(tsc_hz: u64) -> u32 {
        let plan = CpuidPlan::new(supported(), Topology::flat(1), tsc_hz, 1_000_000_000);
        let [timer, tsc, hz, _] = plan.table(0).get(0x15, 0);
        (hz / 1000).checked_mul(tsc).expect("it fits") / timer
    }

    #[test]
    fn systems_learn_the_frequency_from_32_bits() {
        for exact in [800_000_000, 1_000_000_000, 2_400_000_000, 2_112_000_000, 5_300_000_000] {
            assert_eq!(u64::from(tsc_khz(exact)), exact / 1000);
        }
        for odd in [999_999_937, 2_294_608_753, 2_399_999_999, 2_593_906_123, 5_859_900_000] {
            let error = (u64::from(tsc_khz(odd)) * 1000).abs_diff(odd);
            assert!(error < odd / 500_000, "{error} Hz of {odd}");
        }
    }
}
