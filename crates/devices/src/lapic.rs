//! The local APIC (SDM volume 3, chapter 10, which newer editions number 11), one for each CPU: xAPIC page, x2APIC MSRs,
//! timer.
//!
//! What an access does outside of the chip (an EOI for the I/O APIC, an IPI) is returned as an [`Outcome`].

mod ipi;
mod msr;
pub mod registers;
mod state;
#[cfg(test)]
mod tests;
mod timer;

pub use ipi::{DeliveryMode, Ipi, Shorthand};
pub use msr::MsrError;
pub use ruse_arch::LapicState;
pub use state::StateError;
pub(crate) use timer::MIN_INTERVAL_NS;
pub use timer::{TIMER_HZ, derive_expiry};

use registers as r;

/// Where the xAPIC page is after reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;
/// Size of the xAPIC page.
pub const PAGE_SIZE: u64 = 0x1000;

/// IA32_APIC_BASE: this CPU is the bootstrap processor.
pub const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
pub const BASE_X2APIC: u64 = 1 << 10;
/// IA32_APIC_BASE: the APIC is on.
pub const BASE_ENABLE: u64 = 1 << 11;

/// Vectors below this are illegal in messages (10.5.2).
const FIRST_LEGAL_VECTOR: u8 = 16;

/// What an access asks of the rest of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Outcome {
    /// An interrupt of this vector that was level-triggered has ended: tell the I/O APIC.
    pub eoi: Option<u8>,
    /// Send this.
    pub ipi: Option<Ipi>,
}

/// What a change of a LINT pin does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LintEvent {
    /// Nothing beyond the chip.
    None,
    /// A non-maskable interrupt for the CPU.
    Nmi,
    /// INIT for the CPU.
    Init,
}

/// One CPU's local APIC.
#[derive(Clone, Debug)]
pub struct Lapic {
    /// The architectural page, one register per entry. ISR, TMR and IRR live in it; PPR and the current count are
    /// computed when they are read.
    regs: [u32; r::COUNT],
    apic_base: u64,
    id: u32,
    tsc_hz: u64,
    tsc_deadline: u64,
    /// When the timer is due, whatever its mode, in nanoseconds since the machine's start.
    timer_expiry: Option<u64>,
    /// Errors since the last write to the ESR.
    esr_pending: u32,
    lint: [bool; 2],
}

impl Lapic {
    /// The local APIC of CPU `id` after power-up; CPU 0 is the bootstrap processor.
    pub fn new(id: u32, tsc_hz: u64) -> Self {
        let mut lapic = Self {
            regs: [0; r::COUNT],
            apic_base: 0,
            id,
            tsc_hz,
            tsc_deadline: 0,
            timer_expiry: None,
            esr_pending: 0,
            lint: [false; 2],
        };
        lapic.reset();
        lapic
    }

    /// Back to the state after power-up (10.4.7.1).
    pub fn reset(&mut self) {
        let bsp = if self.id == 0 { BASE_BSP } else { 0 };
        self.apic_base = DEFAULT_BASE | BASE_ENABLE | bsp;
        self.lint = [false; 2];
        self.init_reset();
    }

    /// The CPU went through INIT: all but the ID and IA32_APIC_BASE is as after power-up (10.4.7.3).
    pub fn init_reset(&mut self) {
        self.regs = [0; r::COUNT];
        self.regs[r::VERSION] = r::VERSION_VALUE;
        self.regs[r::DFR] = u32::MAX;
        self.regs[r::SVR] = r::SVR_RESET;
        self.regs[r::LVT_TIMER..=r::LVT_ERROR].fill(r::LVT_MASKED);
        self.tsc_deadline = 0;
        self.timer_expiry = None;
        self.esr_pending = 0;
        self.derive_ids();
    }

    /// Sets the registers that follow from the CPU's ID and the mode (10.4.6 and 10.12.10.2).
    fn derive_ids(&mut self) {
        if self.is_x2apic() {
            self.regs[r::ID] = self.id;
            self.regs[r::LDR] = (self.id & 0xf_fff0) << 12 | 1 << (self.id & 0xf);
        } else {
            self.regs[r::ID] = self.id << 24;
        }
    }

    /// Sets LINT0 to ExtINT and LINT1 to NMI, as firmware leaves them ("virtual wire mode", MultiProcessor
    /// Specification 3.6.2.2): for booting a kernel without firmware.
    pub fn virtual_wire(&mut self) {
        self.regs[r::SVR] |= r::SVR_ENABLE;
        self.regs[r::LVT_LINT0] = r::LVT_MODE_EXTINT;
        self.regs[r::LVT_LINT1] = r::LVT_MODE_NMI;
    }

    /// The CPU's initial APIC ID.
    pub fn id(&self) -> u32 {
        self.id
    }
    /// IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.apic_base
    }
    /// Whether the APIC is on (IA32_APIC_BASE).
    pub fn is_enabled(&self) -> bool {
        self.apic_base & BASE_ENABLE != 0
    }
    /// Whether the APIC is on and enabled by software (SVR): only then it takes fixed interrupts.
    pub fn is_software_enabled(&self) -> bool {
        self.is_enabled() && self.regs[r::SVR] & r::SVR_ENABLE != 0
    }
    /// Whether the APIC is in x2APIC mode.
    pub fn is_x2apic(&self) -> bool {
        self.apic_base & BASE_X2APIC != 0
    }
    /// Where the xAPIC page is; `None` when the APIC is off or in x2APIC mode.
    pub fn page(&self) -> Option<u64> {
        (self.is_enabled() && !self.is_x2apic()).then_some(self.apic_base & !(PAGE_SIZE - 1))
    }
    pub(crate) fn ldr(&self) -> u32 {
        self.regs[r::LDR]
    }
    pub(crate) fn dfr(&self) -> u32 {
        self.regs[r::DFR]
    }

    /// CR8: bits 4 to 7 of the task priority (10.8.6.1).
    pub fn cr8(&self) -> u8 {
        (self.regs[r::TPR] >> 4) as u8 & 0xf
    }
    /// Sets CR8.
    pub fn set_cr8(&mut self, value: u8) {
        self.regs[r::TPR] = u32::from(value & 0xf) << 4;
    }

    /// Processor priority (10.8.3.1).
    pub fn processor_priority(&self) -> u8 {
        let tpr = self.regs[r::TPR] as u8;
        let in_service = self.highest(r::ISR).unwrap_or(0);
        if tpr & 0xf0 >= in_service & 0xf0 { tpr } else { in_service & 0xf0 }
    }

    /// The interrupt that the CPU should take: the highest request, if the processor priority lets it through.
    pub fn pending_vector(&self) -> Option<u8> {
        let vector = self.highest(r::IRR)?;
        (self.is_enabled() && vector & 0xf0 > self.processor_priority() & 0xf0).then_some(vector)
    }

    /// Takes the pending interrupt in service and returns its vector (10.8.4).
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending_vector()?;
        self.clear(r::IRR, vector);
        self.set(r::ISR, vector);
        Some(vector)
    }

    /// Requests a fixed interrupt; `level` says that its source is level-triggered. Returns whether it was taken.
    pub fn accept_fixed(&mut self, vector: u8, level: bool) -> bool {
        if !self.is_software_enabled() {
            return false;
        }
        if vector < FIRST_LEGAL_VECTOR {
            self.error(r::ESR_RECEIVE_VECTOR);
            return false;
        }
        self.set(r::IRR, vector);
        if level {
            self.set(r::TMR, vector)
        } else {
            self.clear(r::TMR, vector)
        }
        true
    }

    /// Whether the 8259's output reaches the CPU: through LINT0 as ExtINT, or directly when the APIC is off (10.4.3).
    pub fn extint_enabled(&self) -> bool {
        let lint0 = self.regs[r::LVT_LINT0];
        !self.is_enabled() || lint0 & (r::LVT_MODE | r::LVT_MASKED) == r::LVT_MODE_EXTINT
    }

    /// The level of pin LINT0 (the 8259's output) or LINT1 (NMI). ExtINT is not handled here but through
    /// [`Lapic::extint_enabled`]. Every rising edge counts once, also of a pin that is set to level-triggered.
    pub fn set_lint(&mut self, pin: usize, level: bool) -> LintEvent {
        let Some(last) = self.lint.get_mut(pin) else { return LintEvent::None };
        let rising = level && !*last;
        *last = level;
        if !rising {
            return LintEvent::None;
        }
        if !self.is_enabled() {
            // With the APIC off the pins are INTR and NMI (10.4.3).
            return if pin == 1 { LintEvent::Nmi } else { LintEvent::None };
        }
        let number = r::LVT_LINT0 + pin;
        let entry = self.regs[number];
        if entry & r::LVT_MASKED != 0 {
            return LintEvent::None;
        }
        match DeliveryMode::from_bits(entry >> 8) {
            DeliveryMode::Fixed => self.fire_lvt(number),
            DeliveryMode::Nmi => return LintEvent::Nmi,
            DeliveryMode::Init => return LintEvent::Init,
            _ => {}
        }
        LintEvent::None
    }

    /// Reads bytes of the xAPIC page. Bytes that no register covers read zero; with the page not there, all ones.
    pub fn read(&mut self, offset: u64, data: &mut [u8], now: u64) {
        if self.page().is_none() {
            data.fill(0xff);
            return;
        }
        let number = usize::try_from(offset >> 4).unwrap_or(usize::MAX);
        let value = self.read_xapic(number, now).to_le_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = value.get((offset & 0xf) as usize + i).copied().unwrap_or(0);
        }
    }

    /// Writes a register of the xAPIC page. Accesses other than aligned ones of 32 bits are dropped (10.4.1).
    pub fn write(&mut self, offset: u64, data: &[u8], now: u64) -> Outcome {
        let number = usize::try_from(offset >> 4).unwrap_or(usize::MAX);
        match <[u8; 4]>::try_from(data) {
            Ok(bytes) if offset & 0xf == 0 && self.page().is_some() => {
                self.write_xapic(number, u32::from_le_bytes(bytes), now)
            }
            _ => Outcome::default(),
        }
    }

    fn read_xapic(&mut self, number: usize, now: u64) -> u32 {
        if r::is_xapic(number) {
            return self.read_register(number, now);
        }
        self.error(r::ESR_REGISTER);
        0
    }

    /// A register that exists.
    fn read_register(&self, number: usize, now: u64) -> u32 {
        match number {
            r::PPR => u32::from(self.processor_priority()),
            r::CURRENT_COUNT => self.current_count(now),
            _ => self.regs[number],
        }
    }

    fn write_xapic(&mut self, number: usize, value: u32, now: u64) -> Outcome {
        match number {
            // Read-only registers drop writes.
            r::ID | r::VERSION | r::APR | r::PPR | r::RRD | r::CURRENT_COUNT => {}
            r::LDR => self.regs[r::LDR] = value & 0xff00_0000,
            r::DFR => self.regs[r::DFR] = value | 0x0fff_ffff,
            r::ICR_HIGH => self.regs[r::ICR_HIGH] = value & 0xff00_0000,
            r::ICR => return self.set_icr(value, self.regs[r::ICR_HIGH] >> 24),
            _ if (r::ISR..r::IRR + 8).contains(&number) => {}
            _ if r::is_xapic(number) => return self.write_register(number, value, now),
            _ => self.error(r::ESR_REGISTER),
        }
        Outcome::default()
    }

    /// Writes that mean the same in both modes.
    fn write_register(&mut self, number: usize, value: u32, now: u64) -> Outcome {
        match number {
            r::TPR => self.regs[r::TPR] = value & 0xff,
            r::EOI => return self.end_of_interrupt(),
            r::SVR => self.set_spurious(value),
            r::ESR => {
                // A write shows the errors since the last one and rearms the error interrupt (10.5.3).
                self.regs[r::ESR] = self.esr_pending;
                self.esr_pending = 0;
            }
            r::INITIAL_COUNT => self.set_initial_count(value, now),
            r::DIVIDE => self.set_divide(value, now),
            // The same as a fixed IPI to self through the ICR, which it leaves alone (10.12.11).
            r::SELF_IPI => return self.send(1 << 18 | (value & 0xff), 0),
            _ => self.set_lvt(number, value),
        }
        Outcome::default()
    }

    /// Writes an LVT entry; its mask cannot be cleared while the APIC is disabled by software (10.4.7.2).
    fn set_lvt(&mut self, number: usize, value: u32) {
        let Some(bits) = r::lvt_bits(number) else { return };
        let mut value = value & bits & !r::LVT_READ_ONLY;
        if !self.is_software_enabled() {
            value |= r::LVT_MASKED;
        }
        if number == r::LVT_TIMER {
            self.set_lvt_timer(value);
        } else {
            self.regs[number] = value;
        }
    }

    fn set_spurious(&mut self, value: u32) {
        self.regs[r::SVR] = value & r::SVR_WRITABLE;
        if value & r::SVR_ENABLE == 0 {
            for entry in &mut self.regs[r::LVT_TIMER..=r::LVT_ERROR] {
                *entry |= r::LVT_MASKED;
            }
        }
    }

    /// Ends the interrupt of highest priority in service (10.8.5).
    fn end_of_interrupt(&mut self) -> Outcome {
        let Some(vector) = self.highest(r::ISR) else { return Outcome::default() };
        self.clear(r::ISR, vector);
        let broadcast = self.is_set(r::TMR, vector) && self.regs[r::SVR] & r::SVR_NO_BROADCAST == 0;
        Outcome { eoi: broadcast.then_some(vector), ipi: None }
    }

    /// A write of the ICR (10.6.1).
    fn set_icr(&mut self, low: u32, destination: u32) -> Outcome {
        self.regs[r::ICR] = low & r::ICR_WRITABLE;
        self.send(low & r::ICR_WRITABLE, destination)
    }

    /// Sends the IPI of an ICR's content.
    fn send(&mut self, low: u32, destination: u32) -> Outcome {
        let Some(ipi) = Ipi::from_icr(low, destination, self.is_x2apic()) else { return Outcome::default() };
        let has_vector = matches!(ipi.mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        if has_vector && ipi.vector < FIRST_LEGAL_VECTOR {
            self.error(r::ESR_SEND_VECTOR);
            return Outcome::default();
        }
        Outcome { eoi: None, ipi: Some(ipi) }
    }

    /// A local source fires: requests its entry's vector unless it is masked.
    fn fire_lvt(&mut self, number: usize) {
        let entry = self.regs[number];
        if entry & r::LVT_MASKED == 0 {
            self.accept_fixed(entry as u8, false);
        }
    }

    /// Notes an error, and requests the error interrupt if it is the first since the last write of the ESR (10.5.3).
    fn error(&mut self, bit: u32) {
        let first = self.esr_pending == 0;
        self.esr_pending |= bit;
        if first {
            self.fire_lvt(r::LVT_ERROR);
        }
    }

    /// The highest bit of a 256-bit register that starts at `base`.
    fn highest(&self, base: usize) -> Option<u8> {
        let (word, bits) =
            self.regs[base..base + 8].iter().enumerate().rev().find(|(_, bits)| **bits != 0)?;
        Some((word * 32) as u8 + (31 - bits.leading_zeros()) as u8)
    }
    fn is_set(&self, base: usize, vector: u8) -> bool {
        self.regs[base + usize::from(vector / 32)] >> (vector % 32) & 1 != 0
    }
    fn set(&mut self, base: usize, vector: u8) {
        self.regs[base + usize::from(vector / 32)] |= 1 << (vector % 32);
    }
    fn clear(&mut self, base: usize, vector: u8) {
        self.regs[base + usize::from(vector / 32)] &= !(1 << (vector % 32));
    }
}
