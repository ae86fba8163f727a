//! Model-specific registers.

use std::{
    collections::BTreeSet,
    io,
    sync::{Mutex, PoisonError},
};

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use ruse_arch::{VcpuState, msr};

/// The element of a state that an MSR is.
fn element(state: &mut VcpuState, index: u32) -> Option<&mut u64> {
    let fixed = |n: u32| Some(n as usize);
    let fixed = match index {
        msr::MTRR_FIX64K_00000 => fixed(0),
        n @ msr::MTRR_FIX16K_80000..=0x259 => fixed(1 + n - msr::MTRR_FIX16K_80000),
        n @ msr::MTRR_FIX4K_C0000..=0x26f => fixed(3 + n - msr::MTRR_FIX4K_C0000),
        _ => None,
    };
    if let Some(n) = fixed {
        return state.mtrr_fixed.get_mut(n);
    }
    if let n @ msr::MTRR_PHYS_BASE0..=0x20f = index {
        let (base, mask) = &mut state.mtrr_variable[(n - msr::MTRR_PHYS_BASE0) as usize / 2];
        return Some(if n % 2 == 0 { base } else { mask });
    }
    Some(match index {
        msr::STAR => &mut state.star,
        msr::LSTAR => &mut state.lstar,
        msr::CSTAR => &mut state.cstar,
        msr::SFMASK => &mut state.sfmask,
        msr::KERNEL_GS_BASE => &mut state.kernel_gs_base,
        msr::SYSENTER_CS => &mut state.sysenter_cs,
        msr::SYSENTER_ESP => &mut state.sysenter_esp,
        msr::SYSENTER_EIP => &mut state.sysenter_eip,
        msr::PAT => &mut state.pat,
        msr::TSC_AUX => &mut state.tsc_aux,
        msr::TSC_ADJUST => &mut state.tsc_adjust,
        msr::MISC_ENABLE => &mut state.misc_enable,
        msr::SPEC_CTRL => &mut state.spec_ctrl,
        msr::MTRR_DEF_TYPE => &mut state.mtrr_def_type,
        msr::TSC => &mut state.tsc,
        msr::KVM_SYSTEM_TIME => &mut state.paravirt.system_time,
        msr::KVM_ASYNC_PF => &mut state.paravirt.async_pf,
        msr::KVM_ASYNC_PF_VECTOR => &mut state.paravirt.async_pf_vector,
        msr::KVM_STEAL_TIME => &mut state.paravirt.steal_time,
        msr::KVM_EOI => &mut state.paravirt.eoi,
        _ => return None,
    })
}

/// MSRs of a state. KVM's list leaves the MTRRs out.
fn indices(known: &[u32]) -> impl Iterator<Item = u32> {
    const LISTED: [u32; 19] = [
        msr::STAR,
        msr::LSTAR,
        msr::CSTAR,
        msr::SFMASK,
        msr::KERNEL_GS_BASE,
        msr::SYSENTER_CS,
        msr::SYSENTER_ESP,
        msr::SYSENTER_EIP,
        msr::PAT,
        msr::TSC_AUX,
        msr::TSC_ADJUST,
        msr::MISC_ENABLE,
        msr::SPEC_CTRL,
        msr::TSC,
        msr::KVM_SYSTEM_TIME,
        // Before what they serve is switched on.
        msr::KVM_ASYNC_PF_VECTOR,
        msr::KVM_ASYNC_PF,
        msr::KVM_STEAL_TIME,
        msr::KVM_EOI,
    ];
    let mtrrs = [msr::MTRR_DEF_TYPE, msr::MTRR_FIX64K_00000, 0x258, 0x259]
        .into_iter()
        .chain(msr::MTRR_FIX4K_C0000..=0x26f)
        .chain(msr::MTRR_PHYS_BASE0..=0x20f);
    LISTED.into_iter().filter(|index| known.contains(index)).chain(mtrrs)
}

pub fn save(vcpu: &VcpuFd, known: &[u32], state: &mut VcpuState) -> io::Result<()> {
    for (index, data) in read(vcpu, indices(known).collect())? {
        if let Some(element) = element(state, index) {
            *element = data;
        }
    }
    Ok(())
}

pub fn load(vcpu: &VcpuFd, known: &[u32], state: &VcpuState) -> io::Result<()> {
    let mut state = state.clone();
    // The counter is set through its offset ([`crate::vcpu`]): a value would be old when it arrives.
    let entries = indices(known).filter(|&index| index != msr::TSC).filter_map(|index| {
        let data = *element(&mut state, index)?;
        Some(kvm_msr_entry { index, data, ..Default::default() })
    });
    write(vcpu, entries.collect())
}

/// Says what KVM refuses, of each MSR once.
fn report(index: u32, what: &str) {
    static REPORTED: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());
    if REPORTED.lock().unwrap_or_else(PoisonError::into_inner).insert(index) {
        tracing::info!(msr = %format_args!("{index:#x}"), "{what}; it is left out");
    }
}

/// Reads MSRs. Those that KVM refuses are left out.
pub fn read(vcpu: &VcpuFd, mut indices: Vec<u32>) -> io::Result<Vec<(u32, u64)>> {
    let mut found = Vec::with_capacity(indices.len());
    while !indices.is_empty() {
        let entries: Vec<_> =
            indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let count = vcpu.get_msrs(&mut msrs)?;
        found.extend(msrs.as_slice()[..count].iter().map(|e| (e.index, e.data)));
        if let Some(index) = indices.get(count) {
            report(*index, "KVM does not read this MSR");
        }
        indices.drain(..(count + 1).min(indices.len()));
    }
    Ok(found)
}

/// Writes MSRs. Those that KVM refuses are skipped.
pub fn write(vcpu: &VcpuFd, mut entries: Vec<kvm_msr_entry>) -> io::Result<()> {
    while !entries.is_empty() {
        let msrs = Msrs::from_entries(&entries).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let count = vcpu.set_msrs(&msrs)?;
        if let Some(entry) = entries.get(count) {
            report(entry.index, &format!("KVM does not take {:#x} for this MSR", entry.data));
        }
        entries.drain(..(count + 1).min(entries.len()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_msr_has_an_element_of_its_own() {
        let known = [msr::STAR, msr::TSC, msr::PAT, msr::SPEC_CTRL, msr::KVM_SYSTEM_TIME, msr::KVM_EOI];
        let mut state = VcpuState::default();
        let all: Vec<_> = indices(&known).collect();
        assert_eq!(all.len(), known.len() + 1 + 11 + 16);
        for &index in &all {
            *element(&mut state, index).unwrap() = u64::from(index) << 8;
        }
        for index in all {
            assert_eq!(*element(&mut state, index).unwrap(), u64::from(index) << 8);
        }
    }
}
