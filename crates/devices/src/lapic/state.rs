//! The local APIC's state in architectural terms: the register page and what it does not show.

use ruse_arch::LapicState;

use super::{FIRST_LEGAL_VECTOR, Lapic, msr::is_valid_base, registers as r};

/// A saved state that the chip cannot be in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The number of registers is wrong.
    #[error("a local APIC has {expected} registers, the saved state has {found}")]
    Registers {
        /// How many there should be.
        expected: usize,
        /// How many there are.
        found: usize,
    },
    /// IA32_APIC_BASE is a value that hardware would refuse.
    #[error("{0:#x} is no value of IA32_APIC_BASE")]
    Base(u64),
    /// The state has another number of CPUs than the machine.
    #[error("the machine has {expected} local APICs, the saved state has {found}")]
    Cpus {
        /// CPUs of the machine.
        expected: usize,
        /// CPUs of the state.
        found: usize,
    },
}

impl Lapic {
    /// The state at time `now`.
    pub fn state(&self, now: u64) -> LapicState {
        let mut regs = self.regs.to_vec();
        regs[r::PPR] = u32::from(self.processor_priority());
        regs[r::CURRENT_COUNT] = self.current_count(now);
        LapicState {
            regs,
            apic_base: self.apic_base,
            tsc_deadline: self.tsc_deadline,
            timer_expiry: self.timer_expiry,
            esr_pending: self.esr_pending,
            lint: self.lint,
        }
    }

    /// Takes a saved state. The ID and version stay this machine's. On an error nothing is changed.
    pub fn restore(&mut self, state: &LapicState) -> Result<(), StateError> {
        let regs = <[u32; r::COUNT]>::try_from(state.regs.as_slice())
            .map_err(|_| StateError::Registers { expected: r::COUNT, found: state.regs.len() })?;
        if !is_valid_base(state.apic_base) {
            return Err(StateError::Base(state.apic_base));
        }
        self.regs = regs;
        self.apic_base = state.apic_base;
        self.tsc_deadline = state.tsc_deadline;
        self.timer_expiry = state.timer_expiry;
        self.esr_pending = state.esr_pending;
        self.lint = state.lint;
        self.sanitize();
        Ok(())
    }

    /// Reduces restored registers to what software could have brought about.
    fn sanitize(&mut self) {
        self.regs[r::VERSION] = r::VERSION_VALUE;
        self.regs[r::TPR] &= 0xff;
        self.regs[r::SVR] &= r::SVR_WRITABLE;
        self.regs[r::ICR] &= r::ICR_WRITABLE;
        self.regs[r::DIVIDE] &= r::DIVIDE_WRITABLE;
        for number in r::LVT_TIMER..=r::LVT_ERROR {
            self.regs[number] &= r::lvt_bits(number).unwrap_or(0);
        }
        for base in [r::ISR, r::TMR, r::IRR] {
            self.regs[base] &= u32::MAX << FIRST_LEGAL_VECTOR;
        }
        self.derive_ids();
    }
}
