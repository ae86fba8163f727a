//! What of a machine the ACPI tables describe.

use std::collections::HashSet;
use std::ops::Range;

use ruse_memory::LOW_RAM_END;

use crate::LoadError;

/// Where PCI configuration space of all 256 buses is, 1 MiB for each.
pub const ECAM_BASE: u64 = 0xe000_0000;
/// Bytes of PCI configuration space.
pub const ECAM_SIZE: u64 = 256 << 20;
/// Where the I/O APIC is.
pub const IO_APIC_ADDRESS: u32 = 0xfec0_0000;
/// Where the local APICs are.
pub const LOCAL_APIC_ADDRESS: u32 = 0xfee0_0000;
/// Most processors: their names have three hexadecimal digits.
const MAX_CPUS: usize = 4096;
/// Most virtio devices: their names have two hexadecimal digits.
const MAX_VIRTIO: usize = 128;

/// A serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ComPort {
    /// First of eight I/O ports.
    pub port: u16,
    /// ISA interrupt, edge-triggered.
    pub irq: u8,
}

impl ComPort {
    /// The usual places of COM1 to COM4.
    pub const STANDARD: [Self; 4] = [
        Self { port: 0x3f8, irq: 4 },
        Self { port: 0x2f8, irq: 3 },
        Self { port: 0x3e8, irq: 4 },
        Self { port: 0x2e8, irq: 3 },
    ];
}

/// Where the interrupt pins of PCI devices lead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PciIntx {
    /// To the eight pins 16 to 23 of the I/O APIC. For machines whose systems use the I/O APIC.
    #[default]
    Gsi16To23,
    /// To the ISA interrupts 10 and 11, which the 8259s have too.
    Irqs10And11,
}

impl PciIntx {
    /// The global system interrupt of a device (0 to 31) on bus 0 and its pin (0 is INTA#, 3 is INTD#).
    pub const fn gsi(self, device: u8, pin: u8) -> u32 {
        let line = device as u32 + pin as u32;
        match self {
            Self::Gsi16To23 => 16 + line % 8,
            Self::Irqs10And11 => 10 + line % 2,
        }
    }
}

/// A virtio device behind registers in memory (virtio 1.2, 4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmioPlace {
    /// Where its registers are.
    pub base: u32,
    /// Bytes of its registers.
    pub size: u32,
    /// The global system interrupt that it alone asserts, active high and level-triggered.
    pub gsi: u32,
}

/// What the tables say that the machine has.
#[derive(Clone, Debug)]
pub struct AcpiConfig {
    /// Local APIC ids of the processors, in the order of their numbers.
    pub apic_ids: Vec<u32>,
    /// There are two 8259s.
    pub pic: bool,
    /// There is an I/O APIC with 24 pins at [`IO_APIC_ADDRESS`].
    pub io_apic: bool,
    /// Id of the I/O APIC.
    pub io_apic_id: u8,
    /// There is a PCI bus, reached by ports CF8h and CFCh, among which is the reset register. Without it the keyboard
    /// controller's command port resets.
    pub pci: bool,
    /// PCI configuration space is also at [`ECAM_BASE`].
    pub ecam: bool,
    /// Where the interrupt pins of PCI devices lead.
    pub intx: PciIntx,
    /// Windows for PCI memory below 4 GiB.
    pub mmio32: Vec<Range<u64>>,
    /// Window for PCI memory above RAM.
    pub mmio64: Option<Range<u64>>,
    /// Virtio devices that are not on a bus, in the order in which systems are to number them.
    pub virtio: Vec<VirtioMmioPlace>,
    /// Serial ports; the first one is COM1.
    pub com: Vec<ComPort>,
    /// There is a CMOS clock at ports 70h and 71h with interrupt 8.
    pub rtc: bool,
    /// There is a keyboard controller at ports 60h and 64h with interrupt 1.
    pub i8042: bool,
    /// There is a VGA with its window at A_0000h.
    pub vga: bool,
    /// AML that is put at the end of the DSDT, for devices that only others know.
    pub extra_aml: Vec<u8>,
}

impl AcpiConfig {
    /// A PC with `cpus` processors of rising APIC ids from 0: interrupt chips, PCI with ECAM, COM1, the CMOS clock; no
    /// keyboard controller, no VGA.
    pub fn new(cpus: u32) -> Self {
        Self {
            apic_ids: (0..cpus).collect(),
            pic: true,
            io_apic: true,
            io_apic_id: 0,
            pci: true,
            ecam: true,
            intx: PciIntx::default(),
            mmio32: vec![LOW_RAM_END..ECAM_BASE, ECAM_BASE + ECAM_SIZE..IO_APIC_ADDRESS.into()],
            mmio64: None,
            virtio: Vec::new(),
            com: vec![ComPort::STANDARD[0]],
            rtc: true,
            i8042: false,
            vga: false,
            extra_aml: Vec::new(),
        }
    }

    /// Start and bytes of PCI configuration space in memory, if the machine has it.
    pub fn ecam_window(&self) -> Option<(u64, u64)> {
        (self.pci && self.ecam).then_some((ECAM_BASE, ECAM_SIZE))
    }

    /// Refuses what the tables cannot say.
    pub(super) fn check(&self) -> Result<(), LoadError> {
        let no = |what: String| Err(LoadError::Acpi(what));
        if self.apic_ids.is_empty() || self.apic_ids.len() > MAX_CPUS {
            return no(format!("{} processors; 1 to {MAX_CPUS} are possible", self.apic_ids.len()));
        }
        if self.apic_ids.iter().collect::<HashSet<_>>().len() != self.apic_ids.len() {
            return no("two processors have the same APIC id".to_owned());
        }
        if let Some(window) =
            self.mmio32.iter().find(|w| w.is_empty() || w.start < LOW_RAM_END || w.end >= 1 << 32)
        {
            return no(format!(
                "the PCI window {:#x} to {:#x} is not between RAM and 4 GiB",
                window.start, window.end
            ));
        }
        if let Some(window) = self.mmio64.as_ref().filter(|w| w.is_empty() || w.start < 1 << 32) {
            return no(format!("the PCI window {:#x} to {:#x} is not above 4 GiB", window.start, window.end));
        }
        if self.virtio.len() > MAX_VIRTIO {
            return no(format!("{} virtio devices; {MAX_VIRTIO} are possible", self.virtio.len()));
        }
        if self.com.len() > 9 {
            return no(format!("{} serial ports; 9 are possible", self.com.len()));
        }
        match self.com.iter().find(|com| com.port > 0xfff8 || com.irq > 15) {
            Some(com) => no(format!("a serial port at {:#x} with interrupt {}", com.port, com.irq)),
            None => Ok(()),
        }
    }
}
