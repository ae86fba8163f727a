//! What CPUID says under this engine: the host's CPU as KVM offers it, cut down to the features whose state Ruse knows.

use std::io;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use ruse_engine::{CpuidEntry, CpuidTable};

/// Leaf 1 ECX: XSAVE; TSC deadline, which KVM lists apart; hypervisor.
const XSAVE: u32 = 1 << 26;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;

/// Registers of leaves that are sets of features: those count that both engines can give, so that a machine may move
/// between them.
const FEATURES: [(u32, u32, &[usize]); 4] =
    [(1, 0, &[2, 3]), (7, 0, &[1, 2, 3]), (0x8000_0001, 0, &[2, 3]), (0x8000_0007, 0, &[3])];

/// Leaves that describe what a guest here does not have: performance counters, PKU and SGX state, AMX, encryption, and
/// those that the machine fills in itself.
fn is_dropped(leaf: u32) -> bool {
    matches!(leaf, 0xa | 0xb | 0xf | 0x10 | 0x12 | 0x14..=0x20 | 0x24 | 0x8000_001c | 0x8000_001f..=0x8000_0022)
}

/// All that KVM and Ruse can give a guest here.
pub fn supported(kvm: &Kvm) -> io::Result<CpuidTable> {
    let offered = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let mut table =
        CpuidTable(offered.as_slice().iter().map(entry).filter(|e| !is_dropped(e.leaf)).collect());
    let own = ruse_dbt::cpuid::supported();
    let deadline = if kvm.check_extension(Cap::TscDeadlineTimer) { TSC_DEADLINE } else { 0 };
    for entry in table.0.iter_mut().filter(|e| e.leaf == 1) {
        entry.regs[2] |= deadline | HYPERVISOR;
    }
    for (leaf, subleaf, registers) in FEATURES {
        let known = own.get(leaf, subleaf);
        let here = table.0.iter_mut().filter(|e| e.leaf == leaf && e.subleaf.unwrap_or(0) == subleaf);
        for entry in here {
            registers.iter().for_each(|&r| entry.regs[r] &= known[r]);
        }
    }
    // Extended state is what the machine knows to save; KVM's sizes would count the host's other components.
    table.0.retain(|e| e.leaf != 0xd);
    if table.get(1, 0)[2] & XSAVE != 0 {
        table.0.extend(own.0.iter().filter(|e| e.leaf == 0xd));
    }
    Ok(table)
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
