//! What an engine asks of the machine around its vCPUs.

use crate::Message;

/// An access to an MSR that faults with #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrFault;

/// The machine as a vCPU sees it. Calls come from vCPU threads, several at a time; `vcpu` is the caller's id.
///
/// Accesses are 1, 2, 4 or 8 bytes wide (ports at most 4) and little-endian. Addresses where nothing is read as all
/// ones; writes to them are dropped. What an implementation leaves out is as in a machine with nothing in it.
#[allow(unused_variables)]
pub trait Bus: Send + Sync {
    /// Reads from an I/O port.
    fn pio_read(&self, vcpu: u32, port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    /// Writes to an I/O port.
    fn pio_write(&self, vcpu: u32, port: u16, data: &[u8]) {}
    /// Reads from a guest physical address that is not RAM, the local APIC's page included.
    fn mmio_read(&self, vcpu: u32, gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    /// Writes to a guest physical address that is not RAM, the local APIC's page included.
    fn mmio_write(&self, vcpu: u32, gpa: u64, data: &[u8]) {}

    /// Whether a maskable interrupt waits that the task priority lets through; to an engine with local APICs of its own,
    /// whether the 8259s have one (they are wired to vCPU 0). Cheap: asked before each entry.
    fn interrupt_pending(&self, vcpu: u32) -> bool {
        false
    }
    /// Takes the interrupt of highest priority in service and returns its vector.
    fn acknowledge_interrupt(&self, vcpu: u32) -> Option<u8> {
        None
    }
    /// CR8: bits 4 to 7 of the task priority (SDM volume 3, 10.8.6.1).
    fn cr8(&self, vcpu: u32) -> u8 {
        0
    }
    /// Sets CR8.
    fn set_cr8(&self, vcpu: u32, value: u8) {}
    /// Reads IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    fn apic_msr(&self, vcpu: u32, msr: u32) -> Result<u64, MsrFault> {
        Err(MsrFault)
    }
    /// Writes IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    fn set_apic_msr(&self, vcpu: u32, msr: u32, value: u64) -> Result<(), MsrFault> {
        Err(MsrFault)
    }
    /// The vCPU went through INIT: its local APIC resets (SDM volume 3, 10.4.7.3).
    fn apic_init(&self, vcpu: u32) {}

    /// Delivers a message to the local APICs.
    fn deliver(&self, message: Message) {}

    /// A level-triggered interrupt of this vector has ended in one of the engine's own local APICs.
    fn end_of_interrupt(&self, vector: u8) {}

    /// The x87 error line (FERR#) for CR0.NE = 0: raises IRQ 13.
    fn x87_error(&self, vcpu: u32) {}
}
