//! Where translated code may be used.

use ruse_arch::flags::{cr0, cr4, rflags};

use crate::{cpu::Cpu, frontend::x86_64::CodeMode};

impl Cpu {
    /// What translated code may rely on now; `None` if only tier 0 will do. `checked`: every instruction is executed by
    /// both.
    pub(super) fn code_mode(&self, checked: bool) -> Option<CodeMode> {
        // Without breakpoints RF means nothing.
        let stepping = self.rflags & rflags::TF != 0 || self.dr7 & 0xff != 0;
        let aligned = self.rflags & rflags::AC != 0 && self.paging.cr0 & cr0::AM != 0 && self.mode.cpl == 3;
        let plain = self.mode.code64 && matches!(self.mode.cpl, 0 | 3) && !stepping && !aligned;
        if !plain || self.interrupt_shadow {
            return None;
        }
        // DF is kept clear in the host's flags, and string instructions are tier 0's.
        let x87 = self.paging.cr0 & (cr0::EM | cr0::TS) == 0;
        let sse = x87 && self.paging.cr4 & cr4::OSFXSR != 0;
        let avx = sse && self.paging.cr4 & cr4::OSXSAVE != 0 && self.xcr0 & 6 == 6;
        let kernel = self.mode.cpl == 0;
        // The check would read the clock twice.
        let plain_tsc = !checked && !self.clock.is_slow();
        let tsc = plain_tsc && (kernel || self.paging.cr4 & cr4::TSD == 0);
        let bases = self.paging.cr4 & cr4::FSGSBASE != 0;
        Some(CodeMode { kernel, x87, sse, avx, tsc, bases, plain: false })
    }
}
