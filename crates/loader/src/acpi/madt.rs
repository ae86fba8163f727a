//! The interrupt model: MADT (ACPI 6.5, section 5.2.12).

use super::{AcpiConfig, IO_APIC_ADDRESS, LOCAL_APIC_ADDRESS, SCI, table};

/// Revision of the MADT in ACPI 6.5.
const REVISION: u8 = 6;
/// Flag: the machine has two 8259s.
const PCAT_COMPAT: u32 = 1;
/// Flag of a processor: it can be used.
const ENABLED: u32 = 1;
/// Flags of an override: polarity and trigger as the bus has them (table 5.26).
const CONFORMS: u16 = 0;
/// Flags of an override: active high, level-triggered.
const HIGH_LEVEL: u16 = 0b1101;
/// Pin of the local APICs on which NMIs come.
const NMI_PIN: u8 = 1;

/// The MADT.
pub(super) fn madt(config: &AcpiConfig) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(LOCAL_APIC_ADDRESS.to_le_bytes());
    body.extend(if config.pic { PCAT_COMPAT } else { 0 }.to_le_bytes());

    let mut x2apic = false;
    for (uid, id) in (0u32..).zip(&config.apic_ids) {
        match (u8::try_from(uid), u8::try_from(*id)) {
            // 255 stands for all processors.
            (Ok(uid @ 0..=254), Ok(id @ 0..=254)) => {
                body.extend([0, 8, uid, id]);
                body.extend(ENABLED.to_le_bytes());
            }
            _ => {
                x2apic = true;
                body.extend([9, 16, 0, 0]);
                for field in [*id, ENABLED, uid] {
                    body.extend(field.to_le_bytes());
                }
            }
        }
    }
    if config.io_apic {
        body.extend([1, 12, config.io_apic_id, 0]);
        body.extend(IO_APIC_ADDRESS.to_le_bytes());
        body.extend(0u32.to_le_bytes());
        // The 8254 is on pin 2, where the 8259s' cascade was.
        for (irq, gsi, flags) in [(0, 2, CONFORMS), (SCI, SCI.into(), HIGH_LEVEL)] {
            body.extend([2, 10, 0, irq]);
            body.extend(u32::to_le_bytes(gsi));
            body.extend(flags.to_le_bytes());
        }
    }
    body.extend([4, 6, 0xff]);
    body.extend(CONFORMS.to_le_bytes());
    body.push(NMI_PIN);
    if x2apic {
        body.extend([10, 12]);
        body.extend(CONFORMS.to_le_bytes());
        body.extend(u32::MAX.to_le_bytes());
        body.extend([NMI_PIN, 0, 0, 0]);
    }
    table(*b"APIC", REVISION, &body)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Types of the entries, in order.
    fn kinds(madt: &[u8]) -> Vec<u8> {
        let (mut at, mut kinds) = (44, Vec::new());
        while at < madt.len() {
            kinds.push(madt[at]);
            at += usize::from(madt[at + 1]);
        }
        assert_eq!(at, madt.len());
        kinds
    }

    #[test]
    fn entries_follow_the_apic_ids() {
        assert_eq!(kinds(&madt(&AcpiConfig::new(2))), [0, 0, 1, 2, 2, 4]);
        let wide = AcpiConfig { apic_ids: vec![0, 254, 255, 4096], ..AcpiConfig::new(1) };
        assert_eq!(kinds(&madt(&wide)), [0, 0, 9, 9, 1, 2, 2, 4, 10]);
    }
}
