//! What CPUID says (SDM volume 2, CPUID; AMD APM volume 3, appendix E).

use ruse_arch::paravirt::FEATURES_LEAF;
use serde::{Deserialize, Serialize};

/// One CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX on entry.
    pub leaf: u32,
    /// ECX on entry, where the leaf looks at it.
    pub subleaf: Option<u32>,
    /// EAX, EBX, ECX and EDX on return.
    pub regs: [u32; 4],
}

/// What CPUID says on one vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidTable(pub Vec<CpuidEntry>);

/// Registers that are sets of features, KVM's paravirtual ones too: leaf, subleaf and the register's index in [`CpuidEntry::regs`].
pub const FEATURES: [(u32, u32, usize); 15] = [
    (1, 0, 2),
    (1, 0, 3),
    (7, 0, 1),
    (7, 0, 2),
    (7, 0, 3),
    (7, 1, 0),
    (7, 1, 2),
    (7, 1, 3),
    (7, 2, 3),
    (FEATURES_LEAF, 0, 0),
    (0x8000_0001, 0, 2),
    (0x8000_0001, 0, 3),
    (0x8000_0007, 0, 3),
    (0x8000_0008, 0, 1),
    (0x8000_0021, 0, 0),
];

/// The leaf of extended state: what XSAVE saves, and where.
const EXTENDED_STATE: u32 = 0xd;

impl CpuidEntry {
    /// Whether CPUID with `leaf` and `subleaf` returns this entry.
    fn answers(&self, leaf: u32, subleaf: u32) -> bool {
        self.leaf == leaf && self.subleaf.is_none_or(|s| s == subleaf)
    }
}

impl CpuidTable {
    /// The entry that CPUID with `leaf` and `subleaf` returns, zeroes where there is none.
    pub fn get(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.0.iter().find(|e| e.answers(leaf, subleaf)).map_or([0; 4], |e| e.regs)
    }

    /// Takes away each feature that `known` does not allow; it is asked for the leaf, the subleaf and the register's
    /// index of each set of them.
    pub fn mask_features(&mut self, known: impl Fn(u32, u32, usize) -> u32) {
        for (leaf, subleaf, register) in FEATURES {
            for entry in self.0.iter_mut().filter(|e| e.answers(leaf, subleaf)) {
                entry.regs[register] &= known(leaf, subleaf, register);
            }
        }
    }

    /// This table cut down to what `other` has as well: its features, and its extended state.
    pub fn in_common_with(mut self, other: &CpuidTable) -> Self {
        self.mask_features(|leaf, subleaf, register| other.get(leaf, subleaf)[register]);
        if self.0.iter().any(|e| e.leaf == EXTENDED_STATE) {
            self.0.retain(|e| e.leaf != EXTENDED_STATE);
            self.0.extend(other.0.iter().filter(|e| e.leaf == EXTENDED_STATE));
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(entries: &[(u32, Option<u32>, [u32; 4])]) -> CpuidTable {
        CpuidTable(entries.iter().map(|&(leaf, subleaf, regs)| CpuidEntry { leaf, subleaf, regs }).collect())
    }

    #[test]
    fn an_entry_without_subleaf_answers_for_all() {
        let table = table(&[(1, None, [1, 2, 3, 4]), (4, Some(1), [5; 4])]);
        assert_eq!((table.get(1, 7), table.get(4, 1), table.get(4, 0)), ([1, 2, 3, 4], [5; 4], [0; 4]));
    }

    #[test]
    fn features_in_common_are_those_of_both_and_the_rest_is_this_one_s() {
        let (wide, narrow) = ([0x123, 8 << 8, 0b110, 0b011], [0x456, 0, 0b100, 0b010]);
        let ours = table(&[(1, None, wide), (7, Some(1), [!0; 4]), (0xd, Some(0), [0xe7, 0, 0, 0])]);
        let others =
            table(&[(1, None, narrow), (0xd, Some(0), [7, 0, 0, 0]), (0xd, Some(2), [256, 576, 0, 0])]);
        let common = ours.clone().in_common_with(&others);
        assert_eq!(common.get(1, 0), [0x123, 8 << 8, 0b100, 0b010]);
        assert_eq!(common.get(7, 1), [0, !0, 0, 0], "EBX is no set of features");
        assert_eq!((common.get(0xd, 0)[0], common.get(0xd, 2)[0]), (7, 256));
        let without = table(&[(1, None, wide)]).in_common_with(&others);
        assert_eq!(without.get(0xd, 0), [0; 4], "no XSAVE, no state");
    }
}
