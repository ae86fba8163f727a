//! The local APIC's model-specific registers: IA32_APIC_BASE, IA32_TSC_DEADLINE and x2APIC (SDM volume 3, 10.12).

use ruse_arch::{msr, paging::PHYS_BITS};

use super::{BASE_BSP, BASE_ENABLE, BASE_X2APIC, Lapic, Outcome, PAGE_SIZE, registers as r};

/// An access to an MSR that faults with #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("#GP: the local APIC has no such register, or not in this mode, or a reserved bit is set")]
pub struct MsrError;

/// The bits of IA32_APIC_BASE that hold the page's address.
const BASE_ADDRESS: u64 = ((1 << PHYS_BITS) - 1) & !(PAGE_SIZE - 1);

impl Lapic {
    /// Whether this MSR is one of the local APIC's.
    pub fn has_msr(number: u32) -> bool {
        matches!(number, msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_BASE..=msr::X2APIC_LAST)
    }

    /// Reads an MSR.
    pub fn read_msr(&self, number: u32, now: u64) -> Result<u64, MsrError> {
        match number {
            msr::APIC_BASE => Ok(self.apic_base),
            msr::TSC_DEADLINE => Ok(self.tsc_deadline(now)),
            msr::X2APIC_BASE..=msr::X2APIC_LAST if self.is_x2apic() => {
                self.read_x2apic((number - msr::X2APIC_BASE) as usize, now)
            }
            _ => Err(MsrError),
        }
    }

    /// Writes an MSR.
    pub fn write_msr(&mut self, number: u32, value: u64, now: u64) -> Result<Outcome, MsrError> {
        match number {
            msr::APIC_BASE => self.set_apic_base(value)?,
            msr::TSC_DEADLINE => self.set_tsc_deadline(value, now),
            msr::X2APIC_BASE..=msr::X2APIC_LAST if self.is_x2apic() => {
                return self.write_x2apic((number - msr::X2APIC_BASE) as usize, value, now);
            }
            _ => return Err(MsrError),
        }
        Ok(Outcome::default())
    }

    /// Registers that x2APIC mode has and lets be read (table 10-6).
    fn read_x2apic(&self, number: usize, now: u64) -> Result<u64, MsrError> {
        match number {
            r::ICR => Ok(u64::from(self.regs[r::ICR_HIGH]) << 32 | u64::from(self.regs[r::ICR])),
            r::APR | r::RRD | r::EOI | r::DFR | r::ICR_HIGH => Err(MsrError),
            _ if r::is_xapic(number) => Ok(u64::from(self.read_register(number, now))),
            _ => Err(MsrError),
        }
    }

    /// Writes of reserved bits and of read-only registers fault (10.12.1.2 and 10.12.1.3).
    fn write_x2apic(&mut self, number: usize, value: u64, now: u64) -> Result<Outcome, MsrError> {
        if number == r::ICR {
            if value as u32 & !r::ICR_WRITABLE != 0 {
                return Err(MsrError);
            }
            let destination = (value >> 32) as u32;
            self.regs[r::ICR_HIGH] = destination;
            return Ok(self.set_icr(value as u32, destination));
        }
        let defined = match number {
            r::TPR | r::SELF_IPI => 0xff,
            r::EOI | r::ESR => 0,
            r::SVR => r::SVR_WRITABLE,
            r::INITIAL_COUNT => u32::MAX,
            r::DIVIDE => r::DIVIDE_WRITABLE,
            _ => r::lvt_bits(number).ok_or(MsrError)?,
        };
        match u32::try_from(value) {
            Ok(low) if low & !defined == 0 => Ok(self.write_register(number, low, now)),
            _ => Err(MsrError),
        }
    }

    /// IA32_APIC_BASE with the transitions that figure 10-27 allows.
    fn set_apic_base(&mut self, value: u64) -> Result<(), MsrError> {
        if !is_valid_base(value) {
            return Err(MsrError);
        }
        let (was_on, was_x2) = (self.is_enabled(), self.is_x2apic());
        let (on, x2) = (value & BASE_ENABLE != 0, value & BASE_X2APIC != 0);
        let leaves_x2_half = was_x2 && on && !x2;
        let skips_xapic = !was_on && x2;
        if leaves_x2_half || skips_xapic {
            return Err(MsrError);
        }
        self.apic_base = value;
        if was_on && !on {
            // All state is lost with the APIC off (10.4.3).
            self.init_reset();
        } else if x2 && !was_x2 {
            self.regs[r::ICR_HIGH] = 0;
            self.derive_ids();
        }
        Ok(())
    }
}

/// Whether the value sets no reserved bit and names a mode that exists.
pub(super) fn is_valid_base(value: u64) -> bool {
    value & !(BASE_BSP | BASE_X2APIC | BASE_ENABLE | BASE_ADDRESS) == 0
        && value & (BASE_X2APIC | BASE_ENABLE) != BASE_X2APIC
}
