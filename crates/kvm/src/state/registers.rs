//! General, segment, control and debug registers.

use std::io;

use kvm_bindings::{
    KVM_SREGS2_FLAGS_PDPTRS_VALID, kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use ruse_arch::{
    DescriptorTable, Segment, VcpuState,
    flags::{cr0, cr4, efer},
};

use crate::ioctl;

pub fn save(vcpu: &VcpuFd, sregs2: bool, state: &mut VcpuState) -> io::Result<()> {
    let r = vcpu.get_regs()?;
    state.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ];
    (state.rip, state.rflags) = (r.rip, r.rflags);
    let s = vcpu.get_sregs()?;
    state.seg = [s.es, s.cs, s.ss, s.ds, s.fs, s.gs].map(|segment| from_kvm(&segment));
    (state.ldtr, state.tr) = (from_kvm(&s.ldt), from_kvm(&s.tr));
    (state.gdtr, state.idtr) = (table_from_kvm(&s.gdt), table_from_kvm(&s.idt));
    (state.cr0, state.cr2, state.cr3, state.cr4) = (s.cr0, s.cr2, s.cr3, s.cr4);
    state.efer = s.efer;
    if sregs2 && has_pdptes(state) {
        state.pdpte = ioctl::sregs2(vcpu)?.pdptrs;
    }
    let d = vcpu.get_debug_regs()?;
    (state.dr, state.dr6, state.dr7) = (d.db, d.dr6, d.dr7);
    Ok(())
}

pub fn load(vcpu: &VcpuFd, sregs2: bool, state: &VcpuState) -> io::Result<()> {
    // What KVM adds (the local APIC's base, interrupts on their way) stays as it is.
    let old = vcpu.get_sregs()?;
    let [es, cs, ss, ds, fs, gs] = state.seg.map(|segment| to_kvm(&segment));
    let sregs = kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: to_kvm(&state.tr),
        ldt: to_kvm(&state.ldtr),
        gdt: table_to_kvm(&state.gdtr),
        idt: table_to_kvm(&state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: old.cr8,
        efer: state.efer,
        apic_base: state.lapic.as_ref().map_or(old.apic_base, |lapic| lapic.apic_base),
        interrupt_bitmap: [0; 4],
    };
    vcpu.set_sregs(&sregs)?;
    if sregs2 && has_pdptes(state) {
        let mut with_pdptes = ioctl::sregs2(vcpu)?;
        with_pdptes.flags |= u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID);
        with_pdptes.pdptrs = state.pdpte;
        ioctl::set_sregs2(vcpu, &with_pdptes)?;
    }
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gpr;
    vcpu.set_regs(&kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: state.rip,
        rflags: state.rflags,
    })?;
    vcpu.set_debug_regs(&kvm_debugregs {
        db: state.dr,
        dr6: state.dr6,
        dr7: state.dr7,
        ..Default::default()
    })?;
    Ok(())
}

/// PAE paging outside of long mode keeps four pointers in the CPU (SDM volume 3, 4.4.1).
fn has_pdptes(state: &VcpuState) -> bool {
    state.cr0 & cr0::PG != 0 && state.cr4 & cr4::PAE != 0 && state.efer & efer::LMA == 0
}

fn from_kvm(s: &kvm_segment) -> Segment {
    let attr = u16::from(s.type_) & 15
        | u16::from(s.s) << 4
        | u16::from(s.dpl) << 5
        | u16::from(s.present) << 7
        | u16::from(s.avl) << 12
        | u16::from(s.l) << 13
        | u16::from(s.db) << 14
        | u16::from(s.g) << 15;
    let attr = if s.unusable != 0 { unusable(s) } else { attr };
    Segment { base: s.base, limit: s.limit, attr, selector: s.selector }
}

/// A segment that cannot be used has no rights; only its privilege level means something still (that of SS is the CPU's).
fn unusable(s: &kvm_segment) -> u16 {
    u16::from(s.dpl) << 5
}

/// A segment register in KVM's form.
pub fn to_kvm(s: &Segment) -> kvm_segment {
    let bit = |n: u16| (s.attr >> n & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attr & 15) as u8,
        s: bit(4),
        dpl: s.dpl(),
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: 1 - bit(7),
        ..Default::default()
    }
}

fn table_from_kvm(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: t.base, limit: t.limit }
}

fn table_to_kvm(t: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_go_both_ways() {
        for attr in [0xa0fb, 0xc0f3, 0x8b, 0x82, 0x93, 0x0060, 0] {
            let segment = Segment { base: 0x1000, limit: 0xfffff, attr, selector: 0x18 };
            assert_eq!(from_kvm(&to_kvm(&segment)), segment, "{attr:#x}");
        }
    }
}
