//! Numbers and bits of the local APIC's registers (SDM volume 3, table 10-1 and table 10-6).
//!
//! A register is named by its number: its offset in the xAPIC page divided by 16, which is also its x2APIC MSR less
//! 0x800.

/// How many registers the architectural page has.
pub const COUNT: usize = 0x40;

/// Local APIC ID.
pub const ID: usize = 0x02;
/// Version and number of local vector table entries.
pub const VERSION: usize = 0x03;
/// Task priority.
pub const TPR: usize = 0x08;
/// Arbitration priority (not on this generation: reads zero).
pub const APR: usize = 0x09;
/// Processor priority.
pub const PPR: usize = 0x0a;
/// End of interrupt.
pub const EOI: usize = 0x0b;
/// Remote read (not on this generation: reads zero).
pub const RRD: usize = 0x0c;
/// Logical destination.
pub const LDR: usize = 0x0d;
/// Destination format (xAPIC only).
pub const DFR: usize = 0x0e;
/// Spurious-interrupt vector, with the software enable.
pub const SVR: usize = 0x0f;
/// First of eight in-service registers.
pub const ISR: usize = 0x10;
/// First of eight trigger mode registers.
pub const TMR: usize = 0x18;
/// First of eight interrupt request registers.
pub const IRR: usize = 0x20;
/// Error status.
pub const ESR: usize = 0x28;
/// Interrupt command, low half (the whole in x2APIC mode).
pub const ICR: usize = 0x30;
/// Interrupt command, high half (xAPIC only).
pub const ICR_HIGH: usize = 0x31;
/// Local vector table: timer.
pub const LVT_TIMER: usize = 0x32;
/// Local vector table: thermal sensor.
pub const LVT_THERMAL: usize = 0x33;
/// Local vector table: performance counters.
pub const LVT_PERF: usize = 0x34;
/// Local vector table: LINT0 pin.
pub const LVT_LINT0: usize = 0x35;
/// Local vector table: LINT1 pin.
pub const LVT_LINT1: usize = 0x36;
/// Local vector table: error.
pub const LVT_ERROR: usize = 0x37;
/// Timer: initial count.
pub const INITIAL_COUNT: usize = 0x38;
/// Timer: current count.
pub const CURRENT_COUNT: usize = 0x39;
/// Timer: divide configuration.
pub const DIVIDE: usize = 0x3e;
/// Self IPI (x2APIC only).
pub const SELF_IPI: usize = 0x3f;

/// What the version register says: an integrated APIC (0x14) with six entries in the local vector table that can
/// suppress the broadcast of EOIs.
pub const VERSION_VALUE: u32 = 0x14 | (5 << 16) | (1 << 24);

/// SVR: software enable (10.9).
pub const SVR_ENABLE: u32 = 1 << 8;
/// SVR: EOIs of level-triggered interrupts are not broadcast (10.8.5).
pub const SVR_NO_BROADCAST: u32 = 1 << 12;
/// SVR: the bits that can be written.
pub const SVR_WRITABLE: u32 = 0xff | SVR_ENABLE | SVR_NO_BROADCAST;
/// SVR after reset.
pub const SVR_RESET: u32 = 0xff;

/// LVT: masked.
pub const LVT_MASKED: u32 = 1 << 16;
/// LVT: delivery mode field.
pub const LVT_MODE: u32 = 7 << 8;
/// LVT: delivery mode NMI.
pub const LVT_MODE_NMI: u32 = 4 << 8;
/// LVT: delivery mode ExtINT.
pub const LVT_MODE_EXTINT: u32 = 7 << 8;
/// LVT: delivery status and remote IRR, which software cannot set.
pub const LVT_READ_ONLY: u32 = 1 << 12 | 1 << 14;

/// ESR: send of an illegal vector (10.5.3).
pub const ESR_SEND_VECTOR: u32 = 1 << 5;
/// ESR: receipt of an illegal vector.
pub const ESR_RECEIVE_VECTOR: u32 = 1 << 6;
/// ESR: access to a reserved register.
pub const ESR_REGISTER: u32 = 1 << 7;

/// ICR: the bits of the low half that can be written (10.6.1).
pub const ICR_WRITABLE: u32 = 0x000c_cfff;
/// Divide configuration: the bits that can be written (10.5.4).
pub const DIVIDE_WRITABLE: u32 = 0b1011;

/// The bits of an LVT entry that exist (10.5.1, figure 10-8), `None` for a register that is no LVT entry.
pub fn lvt_bits(number: usize) -> Option<u32> {
    match number {
        LVT_TIMER => Some(0x0007_10ff),
        LVT_THERMAL | LVT_PERF => Some(0x0001_17ff),
        LVT_LINT0 | LVT_LINT1 => Some(0x0001_f7ff),
        LVT_ERROR => Some(0x0001_10ff),
        _ => None,
    }
}

/// Whether a register of this number can be read in xAPIC mode.
pub fn is_xapic(number: usize) -> bool {
    matches!(number,
        ID | VERSION | TPR..=SVR | ESR | ICR..=CURRENT_COUNT | DIVIDE)
        || (ISR..IRR + 8).contains(&number)
}
