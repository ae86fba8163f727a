//! Numbers of the model-specific registers that Ruse knows (SDM volume 4).

/// Time-stamp counter.
pub const TSC: u32 = 0x10;
/// Local APIC base, enable and x2APIC bits.
pub const APIC_BASE: u32 = 0x1b;
/// Feature control.
pub const FEATURE_CONTROL: u32 = 0x3a;
/// Offset that software added to the TSC.
pub const TSC_ADJUST: u32 = 0x3b;
/// Speculation control.
pub const SPEC_CTRL: u32 = 0x48;
/// Prediction commands.
pub const PRED_CMD: u32 = 0x49;
/// Microcode revision.
pub const BIOS_SIGN_ID: u32 = 0x8b;
/// MTRR capabilities.
pub const MTRR_CAP: u32 = 0xfe;
/// Which vulnerabilities the CPU does not have.
pub const ARCH_CAPABILITIES: u32 = 0x10a;
/// IA32_FLUSH_CMD: writes the first-level data cache back.
pub const FLUSH_CMD: u32 = 0x10b;
/// CS of SYSENTER.
pub const SYSENTER_CS: u32 = 0x174;
/// ESP of SYSENTER.
pub const SYSENTER_ESP: u32 = 0x175;
/// EIP of SYSENTER.
pub const SYSENTER_EIP: u32 = 0x176;
/// Machine-check capabilities.
pub const MCG_CAP: u32 = 0x179;
/// Machine-check status.
pub const MCG_STATUS: u32 = 0x17a;
/// Miscellaneous enables.
pub const MISC_ENABLE: u32 = 0x1a0;
/// First variable-range MTRR; base and mask alternate.
pub const MTRR_PHYS_BASE0: u32 = 0x200;
/// Fixed-range MTRR of the first 512 KiB.
pub const MTRR_FIX64K_00000: u32 = 0x250;
/// First of the two 16 KiB fixed-range MTRRs.
pub const MTRR_FIX16K_80000: u32 = 0x258;
/// First of the eight 4 KiB fixed-range MTRRs.
pub const MTRR_FIX4K_C0000: u32 = 0x268;
/// Page attribute table.
pub const PAT: u32 = 0x277;
/// Default memory type and MTRR enable.
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
/// Deadline of the local APIC timer.
pub const TSC_DEADLINE: u32 = 0x6e0;
/// First x2APIC register.
pub const X2APIC_BASE: u32 = 0x800;
/// Last x2APIC register.
pub const X2APIC_LAST: u32 = 0x8ff;
/// Supervisor extended state mask.
pub const XSS: u32 = 0xda0;
/// Extended features.
pub const EFER: u32 = 0xc000_0080;
/// Selectors of SYSCALL and SYSRET.
pub const STAR: u32 = 0xc000_0081;
/// Target of SYSCALL in 64-bit mode.
pub const LSTAR: u32 = 0xc000_0082;
/// Target of SYSCALL in compatibility mode.
pub const CSTAR: u32 = 0xc000_0083;
/// Flags that SYSCALL clears.
pub const SFMASK: u32 = 0xc000_0084;
/// Base of FS.
pub const FS_BASE: u32 = 0xc000_0100;
/// Base of GS.
pub const GS_BASE: u32 = 0xc000_0101;
/// The base that SWAPGS exchanges with GS's.
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// What RDTSCP and RDPID return.
pub const TSC_AUX: u32 = 0xc000_0103;

/// KVM: writes the wall clock's time at the zero of the guest's clock, at its old place.
pub const KVM_WALL_CLOCK_OLD: u32 = 0x11;
/// KVM: where the guest's clock is written to, at its old place.
pub const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
/// KVM: writes the wall clock's time at the zero of the guest's clock.
pub const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
/// KVM: where the guest's clock is written to.
pub const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// KVM: asynchronous page faults.
pub const KVM_ASYNC_PF: u32 = 0x4b56_4d02;
/// KVM: stolen time.
pub const KVM_STEAL_TIME: u32 = 0x4b56_4d03;
/// KVM: ends of interrupts without an exit.
pub const KVM_EOI: u32 = 0x4b56_4d04;
/// KVM: the vector of asynchronous page faults that are ready.
pub const KVM_ASYNC_PF_VECTOR: u32 = 0x4b56_4d06;
/// KVM: the end of an asynchronous page fault was seen.
pub const KVM_ASYNC_PF_ACK: u32 = 0x4b56_4d07;
/// KVM: first register of its range.
pub const KVM_FIRST: u32 = 0x4b56_4d00;
/// KVM: last register of its range.
pub const KVM_LAST: u32 = 0x4b56_4dff;
