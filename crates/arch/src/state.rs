//! The whole architectural state of a vCPU as one plain struct, the same for every engine.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    DescriptorTable, Exception, LapicState, Paravirt, Segment,
    flags::{cr0, rflags},
};

/// What a vCPU is doing (SDM volume 3, 8.4 and 10.4.7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MpState {
    /// Executes instructions.
    #[default]
    Running,
    /// Waits in HLT for an interrupt.
    Halted,
    /// Waits for a start-up IPI.
    WaitForSipi,
    /// Stopped by a triple fault; only a reset helps.
    Shutdown,
}

/// x87, SSE and AVX state. The x87 registers are in stack order (ST0 first), as FXSAVE stores them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FpuState {
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word.
    pub fsw: u16,
    /// Abridged tag word: bit n is set where physical register n is not empty.
    pub ftw: u8,
    /// Last x87 opcode.
    pub fop: u16,
    /// Last x87 instruction pointer.
    pub fip: u64,
    /// Last x87 data pointer.
    pub fdp: u64,
    /// ST0 to ST7, ten bytes each.
    pub st: [[u8; 10]; 8],
    /// SSE control and status.
    pub mxcsr: u32,
    /// YMM0 to YMM15, low half first.
    pub ymm: [[u64; 4]; 16],
    /// Further components of XSAVE that are in use, by number, as the standard format has them (SDM volume 1, 13.4):
    /// those of AVX-512.
    pub extended: BTreeMap<u8, Vec<u8>>,
}

impl Default for FpuState {
    /// The state after a reset (SDM volume 3, table 9-1).
    fn default() -> Self {
        Self {
            fcw: 0x40,
            fsw: 0,
            ftw: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            st: [[0; 10]; 8],
            mxcsr: 0x1f80,
            ymm: [[0; 4]; 16],
            extended: BTreeMap::new(),
        }
    }
}

impl FpuState {
    /// The FXSAVE64 image of all but the upper halves of the YMM registers (SDM volume 1, 10.5.1).
    pub fn to_fxsave(&self) -> [u8; 512] {
        let mut image = [0; 512];
        image[0..2].copy_from_slice(&self.fcw.to_le_bytes());
        image[2..4].copy_from_slice(&self.fsw.to_le_bytes());
        image[4] = self.ftw;
        image[6..8].copy_from_slice(&self.fop.to_le_bytes());
        image[8..16].copy_from_slice(&self.fip.to_le_bytes());
        image[16..24].copy_from_slice(&self.fdp.to_le_bytes());
        image[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        image[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
        for (i, st) in self.st.iter().enumerate() {
            image[32 + 16 * i..][..10].copy_from_slice(st);
        }
        for (i, ymm) in self.ymm.iter().enumerate() {
            image[160 + 16 * i..][..8].copy_from_slice(&ymm[0].to_le_bytes());
            image[168 + 16 * i..][..8].copy_from_slice(&ymm[1].to_le_bytes());
        }
        image
    }

    /// The state of an FXSAVE64 image and the upper halves of the YMM registers, without further components.
    pub fn from_fxsave(image: &[u8; 512], ymm_high: &[[u64; 2]; 16]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        let u64_at = |at: usize| u64::from_le_bytes(image[at..at + 8].try_into().expect("eight bytes"));
        Self {
            fcw: u16_at(0),
            fsw: u16_at(2),
            ftw: image[4],
            fop: u16_at(6),
            fip: u64_at(8),
            fdp: u64_at(16),
            mxcsr: u64_at(24) as u32,
            st: std::array::from_fn(|i| image[32 + 16 * i..][..10].try_into().expect("ten bytes")),
            ymm: std::array::from_fn(|i| {
                let high = ymm_high[i];
                [u64_at(160 + 16 * i), u64_at(168 + 16 * i), high[0], high[1]]
            }),
            extended: BTreeMap::new(),
        }
    }
}

/// Indices of the general registers in [`VcpuState::gpr`], as instructions encode them.
pub mod reg {
    /// Accumulator.
    pub const RAX: usize = 0;
    /// Counter.
    pub const RCX: usize = 1;
    /// Data.
    pub const RDX: usize = 2;
    /// Base.
    pub const RBX: usize = 3;
    /// Stack pointer.
    pub const RSP: usize = 4;
    /// Base pointer.
    pub const RBP: usize = 5;
    /// Source index.
    pub const RSI: usize = 6;
    /// Destination index.
    pub const RDI: usize = 7;
}

/// Indices of the segment registers in [`VcpuState::seg`], as instructions encode them.
pub mod seg {
    /// Extra.
    pub const ES: usize = 0;
    /// Code.
    pub const CS: usize = 1;
    /// Stack.
    pub const SS: usize = 2;
    /// Data.
    pub const DS: usize = 3;
    /// Extra.
    pub const FS: usize = 4;
    /// Extra.
    pub const GS: usize = 5;
}

/// The architectural state of one vCPU. `Default` is the state after power-up (SDM volume 3, table 9-1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// General registers in encoding order (see [`reg`]).
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS (see [`seg`]).
    pub seg: [Segment; 6],
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table.
    pub idtr: DescriptorTable,
    /// Control register 0.
    pub cr0: u64,
    /// Page-fault address.
    pub cr2: u64,
    /// Page-table base.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Extended control register 0: enabled XSAVE components.
    pub xcr0: u64,
    /// Debug registers 0 to 3.
    pub dr: [u64; 4],
    /// Debug status.
    pub dr6: u64,
    /// Debug control.
    pub dr7: u64,
    /// Page-directory-pointer entries that PAE paging loaded with CR3.
    pub pdpte: [u64; 4],
    /// x87, SSE and AVX.
    pub fpu: FpuState,
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub sfmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// IA32_SPEC_CTRL.
    pub spec_ctrl: u64,
    /// IA32_MTRR_DEF_TYPE.
    pub mtrr_def_type: u64,
    /// Fixed-range MTRRs: 64K_00000, 16K_80000, 16K_A0000, 4K_C0000 to 4K_F8000.
    pub mtrr_fixed: [u64; 11],
    /// Variable-range MTRRs: base and mask.
    pub mtrr_variable: [(u64, u64); 8],
    /// The guest's time-stamp counter at the moment of saving; 0 leaves a vCPU's as it is.
    pub tsc: u64,
    /// KVM's paravirtual interfaces.
    pub paravirt: Paravirt,
    /// What the vCPU is doing.
    pub mp_state: MpState,
    /// Interrupts are blocked for one instruction after STI or a load of SS.
    pub interrupt_shadow: bool,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// A non-maskable interrupt waits for delivery.
    pub nmi_pending: bool,
    /// An exception that was raised but not yet delivered.
    pub exception: Option<Exception>,
    /// A maskable interrupt that was acknowledged but not yet delivered.
    pub interrupt: Option<u8>,
    /// The local APIC, where it belongs to the engine; else the machine has it.
    pub lapic: Option<LapicState>,
}

impl Default for VcpuState {
    fn default() -> Self {
        let data = Segment { base: 0, limit: 0xffff, attr: 0x93, selector: 0 };
        let mut seg = [data; 6];
        seg[seg::CS] = Segment { base: 0xffff_0000, limit: 0xffff, attr: 0x9b, selector: 0xf000 };
        let mut gpr = [0; 16];
        gpr[reg::RDX] = 0x600;
        Self {
            gpr,
            rip: 0xfff0,
            rflags: rflags::FIXED,
            seg,
            ldtr: Segment { base: 0, limit: 0xffff, attr: 0x82, selector: 0 },
            tr: Segment { base: 0, limit: 0xffff, attr: 0x8b, selector: 0 },
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            cr0: cr0::CD | cr0::NW | cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            xcr0: 1,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            pdpte: [0; 4],
            fpu: FpuState::default(),
            efer: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            pat: 0x0007_0406_0007_0406,
            tsc_aux: 0,
            tsc_adjust: 0,
            misc_enable: 1,
            spec_ctrl: 0,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [(0, 0); 8],
            tsc: 0,
            paravirt: Paravirt::default(),
            mp_state: MpState::Running,
            interrupt_shadow: false,
            nmi_blocked: false,
            nmi_pending: false,
            exception: None,
            interrupt: None,
            lapic: None,
        }
    }
}
