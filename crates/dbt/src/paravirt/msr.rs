//! KVM's registers. What CPUID does not offer is not there.

use std::sync::atomic::Ordering;

use ruse_arch::{
    Exception, msr,
    paravirt::{async_pf, eoi, feature, steal_time},
};

use super::{clock, features, steal};
use crate::cpu::Cpu;

const BAD: Exception = Exception::gp(0);

/// Whether a register is one of KVM's.
pub(crate) fn is_one(number: u32) -> bool {
    matches!(number, msr::KVM_WALL_CLOCK_OLD | msr::KVM_SYSTEM_TIME_OLD | msr::KVM_FIRST..=msr::KVM_LAST)
}

/// Fails for a register that CPUID does not offer.
fn check(cpu: &Cpu, number: u32) -> Result<(), Exception> {
    let needed = match number {
        msr::KVM_WALL_CLOCK_OLD | msr::KVM_SYSTEM_TIME_OLD => feature::CLOCK_OLD,
        msr::KVM_WALL_CLOCK | msr::KVM_SYSTEM_TIME => feature::CLOCK,
        msr::KVM_ASYNC_PF => feature::ASYNC_PF,
        msr::KVM_ASYNC_PF_VECTOR | msr::KVM_ASYNC_PF_ACK => feature::ASYNC_PF_INT,
        msr::KVM_STEAL_TIME => feature::STEAL_TIME,
        msr::KVM_EOI => feature::EOI,
        _ => return Err(BAD),
    };
    let has = features(&cpu.cpuid).unwrap_or(0);
    if has & needed != 0 { Ok(()) } else { Err(BAD) }
}

/// Reads one of KVM's registers.
pub(crate) fn read(cpu: &Cpu, number: u32) -> Result<u64, Exception> {
    check(cpu, number)?;
    let registers = &cpu.paravirt.registers;
    Ok(match number {
        msr::KVM_WALL_CLOCK_OLD | msr::KVM_WALL_CLOCK => cpu.paravirt.clock.wall_clock.load(Ordering::SeqCst),
        msr::KVM_SYSTEM_TIME_OLD | msr::KVM_SYSTEM_TIME => registers.system_time,
        msr::KVM_ASYNC_PF => registers.async_pf,
        msr::KVM_ASYNC_PF_VECTOR => registers.async_pf_vector,
        msr::KVM_STEAL_TIME => registers.steal_time,
        msr::KVM_EOI => registers.eoi,
        // The acknowledgement.
        _ => 0,
    })
}

/// Writes one of KVM's registers. As there, an address that is not in RAM is taken, and nothing comes of it.
pub(crate) fn write(cpu: &mut Cpu, number: u32, value: u64) -> Result<(), Exception> {
    check(cpu, number)?;
    let registers = &mut cpu.paravirt.registers;
    match number {
        msr::KVM_WALL_CLOCK_OLD | msr::KVM_WALL_CLOCK => {
            cpu.paravirt.clock.wall_clock.store(value, Ordering::SeqCst);
            clock::write_wall_clock(cpu, value);
        }
        msr::KVM_SYSTEM_TIME_OLD | msr::KVM_SYSTEM_TIME => {
            registers.system_time = value;
            clock::write(cpu);
        }
        msr::KVM_ASYNC_PF if value & (async_pf::RESERVED | async_pf::AS_EXIT) == 0 => {
            registers.async_pf = value;
        }
        msr::KVM_ASYNC_PF_VECTOR if value >> 8 == 0 => registers.async_pf_vector = value,
        // No fault has another one waiting for it.
        msr::KVM_ASYNC_PF_ACK => {}
        msr::KVM_STEAL_TIME if value & steal_time::RESERVED == 0 => {
            registers.steal_time = value;
            steal::enter(cpu, false);
        }
        msr::KVM_EOI if value & eoi::RESERVED == 0 => registers.eoi = value,
        _ => return Err(BAD),
    }
    Ok(())
}
