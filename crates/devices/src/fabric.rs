//! Between senders and local APICs: messages, and who they are for (SDM volume 3, 10.6.2 and 10.11).

use crate::lapic::{DeliveryMode, Ipi, Lapic, Shorthand};

/// A message-signalled interrupt: a write of `data` to `address` (10.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Msi {
    /// Address of the write.
    pub address: u64,
    /// Data of the write.
    pub data: u32,
}

impl Msi {
    /// The addresses of messages start here.
    pub const ADDRESS: u64 = 0xfee0_0000;
    /// The addresses of messages differ in these bits only.
    const ADDRESS_VARIES: u64 = 0x000f_ffff;
    /// Address: where the destination is.
    pub const DESTINATION_SHIFT: u32 = 12;
    /// Address: the destination is logical.
    pub const LOGICAL: u64 = 1 << 2;
    /// Address: redirection hint.
    const REDIRECT: u64 = 1 << 3;
    /// Data: asserted, for a level-triggered interrupt.
    pub const DATA_ASSERT: u32 = 1 << 14;
    /// Data: level-triggered.
    pub const DATA_LEVEL: u32 = 1 << 15;

    /// What the message asks for; `None` if the address is not of a message. Bits 5 to 11 of the address are bits 8
    /// to 14 of the destination, as hypervisors have agreed on for more than 255 CPUs (KVM_FEATURE_MSI_EXT_DEST_ID).
    pub fn decode(&self) -> Option<Request> {
        if self.address & !Self::ADDRESS_VARIES != Self::ADDRESS {
            return None;
        }
        let low = (self.address >> Self::DESTINATION_SHIFT) as u32 & 0xff;
        let high = (self.address >> 5) as u32 & 0x7f;
        let logical = self.address & Self::LOGICAL != 0;
        let mut mode = DeliveryMode::from_bits(self.data >> 8);
        if mode == DeliveryMode::Fixed && logical && self.address & Self::REDIRECT != 0 {
            mode = DeliveryMode::LowestPriority;
        }
        if mode == DeliveryMode::StartUp {
            mode = DeliveryMode::Reserved;
        }
        let level = self.data & Self::DATA_LEVEL != 0;
        if level && self.data & Self::DATA_ASSERT == 0 {
            // De-assertion of a level is of no interest to a local APIC.
            return None;
        }
        Some(Request {
            vector: self.data as u8,
            mode,
            level,
            destination: high << 8 | low,
            logical,
            wide: high != 0,
            shorthand: Shorthand::None,
            sender: None,
        })
    }
}

/// An interrupt on its way to local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Vector.
    pub vector: u8,
    /// What it does.
    pub mode: DeliveryMode,
    /// Level-triggered.
    pub level: bool,
    /// Destination.
    pub destination: u32,
    /// The destination is logical.
    pub logical: bool,
    /// The destination is wider than 8 bits, so that 0xff is not broadcast.
    pub wide: bool,
    /// Shorthand in place of the destination.
    pub shorthand: Shorthand,
    /// Index of the CPU that sends it.
    pub sender: Option<usize>,
}

impl Request {
    /// The request that CPU `sender`'s IPI makes. IPIs are edge-triggered (10.6.1, trigger mode).
    pub fn from_ipi(ipi: &Ipi, sender: usize) -> Self {
        Self {
            vector: ipi.vector,
            mode: ipi.mode,
            level: false,
            destination: ipi.destination,
            logical: ipi.logical,
            wide: ipi.wide,
            shorthand: ipi.shorthand,
            sender: Some(sender),
        }
    }

    /// Whether the local APIC of CPU `cpu` is among the targets. An APIC that is off hears nothing.
    pub fn targets(&self, cpu: usize, lapic: &Lapic) -> bool {
        lapic.is_enabled()
            && match self.shorthand {
                Shorthand::OnlySelf => self.sender == Some(cpu),
                Shorthand::All => true,
                Shorthand::AllButSelf => self.sender != Some(cpu),
                Shorthand::None if self.is_broadcast() => true,
                Shorthand::None if self.logical => self.matches_logical(lapic),
                Shorthand::None => self.matches_physical(lapic),
            }
    }

    /// All ones, in the width of the sender's destinations (10.6.2.1 and 10.12.9).
    fn is_broadcast(&self) -> bool {
        self.destination == if self.wide { u32::MAX } else { 0xff }
    }

    fn matches_physical(&self, lapic: &Lapic) -> bool {
        if lapic.is_x2apic() { self.destination == lapic.id() } else { self.destination == lapic.id() & 0xff }
    }

    fn matches_logical(&self, lapic: &Lapic) -> bool {
        let (ldr, destination) = (lapic.ldr(), self.destination);
        if lapic.is_x2apic() {
            // Cluster in the high half, members in the low (10.12.10.1).
            return ldr >> 16 == destination >> 16 && ldr & destination & 0xffff != 0;
        }
        if destination > 0xff {
            return false;
        }
        let members = ldr >> 24 & destination;
        match lapic.dfr() >> 28 {
            // Flat (10.6.2.2).
            0xf => members != 0,
            // Cluster: the high nibble names the cluster, 15 all of them.
            0 => {
                let cluster = destination >> 4;
                (cluster == 0xf || cluster == ldr >> 28) && members & 0xf != 0
            }
            _ => false,
        }
    }

    /// The one of the targets that takes a lowest-priority interrupt: the lowest processor priority, the first of
    /// equals (10.6.2.4 leaves the order of equals to the implementation).
    pub fn lowest_priority(&self, lapics: &[Lapic]) -> Option<usize> {
        lapics
            .iter()
            .enumerate()
            .filter(|(cpu, lapic)| lapic.is_software_enabled() && self.targets(*cpu, lapic))
            .min_by_key(|(_, lapic)| lapic.processor_priority())
            .map(|(cpu, _)| cpu)
    }
}

#[cfg(test)]
mod tests;
