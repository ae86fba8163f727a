//! The time-stamp counter's adjustment and the deadline of the local APIC's timer.

use std::sync::atomic::{AtomicU64, Ordering};

use ruse_arch::msr;
use ruse_engine::{Bus, MsrFault};

use super::*;
use crate::{cpu::Cpu, tier0::msr as model_specific};

/// A machine with nothing but IA32_TSC_DEADLINE, which goes by the machine's clock.
#[derive(Default)]
struct Timer(AtomicU64);

impl Bus for Timer {
    fn pio_read(&self, _: u32, _: u16, _: &mut [u8]) {}
    fn mmio_read(&self, _: u32, _: u64, _: &mut [u8]) {}
    fn apic_msr(&self, _: u32, number: u32) -> Result<u64, MsrFault> {
        if number == msr::TSC_DEADLINE { Ok(self.0.load(Ordering::SeqCst)) } else { Err(MsrFault) }
    }
    fn set_apic_msr(&self, _: u32, number: u32, value: u64) -> Result<(), MsrFault> {
        assert_eq!(number, msr::TSC_DEADLINE);
        self.0.store(value, Ordering::SeqCst);
        Ok(())
    }
}

#[test]
fn the_deadline_is_one_of_the_adjusted_counter() {
    let mut m = Machine::long();
    let timer = Timer::default();
    let clock_deadline = || timer.0.load(Ordering::SeqCst);
    m.cpu.with_bus(&timer, |cpu: &mut Cpu| {
        let write = model_specific::write;
        write(cpu, msr::TSC_ADJUST, 1_000_000).unwrap();
        write(cpu, msr::TSC_DEADLINE, 5_000_000).unwrap();
        assert_eq!(clock_deadline(), 4_000_000);
        assert_eq!(model_specific::read(cpu, msr::TSC_DEADLINE), Ok(5_000_000));
        // The counter goes back: the armed deadline is later.
        write(cpu, msr::TSC_ADJUST, 0u64.wrapping_sub(2_000_000)).unwrap();
        assert_eq!(clock_deadline(), 7_000_000);
        assert_eq!(model_specific::read(cpu, msr::TSC_DEADLINE), Ok(5_000_000));
        // The counter jumps over the deadline.
        write(cpu, msr::TSC, 1 << 60).unwrap();
        assert_eq!(clock_deadline(), 1);
        write(cpu, msr::TSC_DEADLINE, 0).unwrap();
        assert_eq!(clock_deadline(), 0);
        write(cpu, msr::TSC_ADJUST, 7).unwrap();
        assert_eq!(clock_deadline(), 0, "what is not armed stays so");
    });
}
