//! ACPI tables (ACPI Specification 6.5, chapter 5): RSDP, XSDT, FADT, FACS, MADT, MCFG and DSDT.
//!
//! What the tables promise, the devices must keep: the registers at the ports below, a power-management control
//! register whose SCI_EN always reads as one (there is no SMI command port), S5 entered by SLP_TYP 5.

mod config;
mod dsdt;
mod fadt;
mod madt;

use std::ops::Range;

use acpi_tables::Aml;
pub use config::{
    AcpiConfig, ComPort, ECAM_BASE, IO_APIC_ADDRESS, LOCAL_APIC_ADDRESS, PciIntx, VirtioMmioPlace,
};
use ruse_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::LoadError;

/// Port of the PM1a event block, 4 bytes: status, enable (ACPI 6.5, section 4.8.3.1).
pub const PM1_EVENT_PORT: u16 = 0x600;
/// Port of the PM1a control block, 2 bytes (section 4.8.3.2).
pub const PM1_CONTROL_PORT: u16 = 0x604;
/// Port of the power-management timer, 4 bytes, counting 24 bits at 3.579545 MHz (section 4.8.3.3).
pub const PM_TIMER_PORT: u16 = 0x608;
/// Port of the GPE0 block, 4 bytes: two of status, two of enable (section 4.8.4.1).
pub const GPE0_PORT: u16 = 0x620;
/// Port of the reset register (section 4.8.3.6), and what resets the machine when written to it.
pub const RESET: (u16, u8) = (0xcf9, 6);
/// The same of a machine without PCI: the keyboard controller's command port, and the command that pulses its reset line.
pub const RESET_BY_KEYBOARD: (u16, u8) = (0x64, 0xfe);
/// Interrupt of power management events: active high, level-triggered.
pub const SCI: u8 = 9;
/// SLP_TYP of soft-off.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Where the tables are: the BIOS area that systems search for the RSDP (section 5.2.5.1).
pub const TABLES: Range<u64> = 0xe_0000..0x10_0000;

const OEM_ID: [u8; 6] = *b"RUSE  ";
const OEM_TABLE_ID: [u8; 8] = *b"RUSEVM  ";
const OEM_REVISION: u32 = 1;
/// Bytes of the RSDP of revision 2.
const RSDP_SIZE: u64 = 36;
/// Alignment of the tables; the FACS needs it (section 5.2.10).
const ALIGN: u64 = 64;

/// The tables as bytes for [`TABLES`], beginning with the RSDP.
///
/// # Errors
/// [`LoadError::Acpi`] if the configuration is impossible or the tables do not fit.
pub fn tables(config: &AcpiConfig) -> Result<Vec<u8>, LoadError> {
    config.check()?;
    let mut area = Area(vec![0; RSDP_SIZE as usize]);
    let facs_at = area.add(&fadt::facs());
    let dsdt_at = area.add(&dsdt::dsdt(config));
    let mut listed = vec![area.add(&fadt::fadt(config, facs_at as u32, dsdt_at as u32))];
    listed.push(area.add(&madt::madt(config)));
    if let Some((base, _)) = config.ecam_window() {
        listed.push(area.add(&mcfg(base)));
    }
    let entries: Vec<u8> = listed.iter().flat_map(|at: &u64| at.to_le_bytes()).collect();
    let xsdt_at = area.add(&table(*b"XSDT", 1, &entries));
    let mut rsdp = Vec::new();
    acpi_tables::rsdp::Rsdp::new(OEM_ID, xsdt_at).to_aml_bytes(&mut rsdp);
    area.0[..RSDP_SIZE as usize].copy_from_slice(&rsdp);
    let (size, room) = (area.0.len() as u64, TABLES.end - TABLES.start);
    if size > room {
        return Err(LoadError::Acpi(format!("the tables have {size} bytes, and there is room for {room}")));
    }
    Ok(area.0)
}

/// Writes the tables into RAM. The result is the address of the RSDP.
///
/// # Errors
/// Those of [`tables`]; [`LoadError::Memory`] if RAM does not reach up to 1 MiB.
pub fn write(config: &AcpiConfig, ram: &GuestRam) -> Result<u64, LoadError> {
    ram.memory().write_slice(&tables(config)?, GuestAddress(TABLES.start))?;
    Ok(TABLES.start)
}

/// The memory that the tables go to.
struct Area(Vec<u8>);

impl Area {
    /// Adds a table and gives its address.
    fn add(&mut self, bytes: &[u8]) -> u64 {
        let at = (self.0.len() as u64).next_multiple_of(ALIGN);
        self.0.resize(at as usize, 0);
        self.0.extend_from_slice(bytes);
        TABLES.start + at
    }
}

/// A table with the common header (section 5.2.6) and its checksum.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(36 + body.len());
    bytes.extend(signature);
    bytes.extend((36 + body.len() as u32).to_le_bytes());
    bytes.extend([revision, 0]);
    bytes.extend(OEM_ID);
    bytes.extend(OEM_TABLE_ID);
    bytes.extend(OEM_REVISION.to_le_bytes());
    bytes.extend(*b"RUSE");
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(body);
    bytes[9] = bytes.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b));
    bytes
}

/// Where PCI configuration space is (PCI Firmware Specification 3.3, section 4.1.2): segment 0, all 256 buses.
fn mcfg(base: u64) -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend(base.to_le_bytes());
    body.extend([0, 0, 0, 255, 0, 0, 0, 0]);
    table(*b"MCFG", 1, &body)
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // windows and places are lists of ranges
mod tests {
    use std::process::Command;

    use super::*;
    use crate::bytes::{u16_at, u32_at, u64_at};

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
    }

    /// Every table that the XSDT lists and what the FADT points to, found as a system finds them.
    fn found(all: &[u8]) -> Vec<&[u8]> {
        let at = |gpa: u64| {
            let from = (gpa - TABLES.start) as usize;
            &all[from..from + u32_at(all, from + 4) as usize]
        };
        assert_eq!(&all[..8], b"RSD PTR ");
        assert_eq!((all[15], sum(&all[..20]), sum(&all[..36])), (2, 0, 0));
        let xsdt = at(u64_at(all, 24));
        let mut tables: Vec<_> = xsdt[36..].chunks(8).map(|e| at(u64_at(e, 0))).collect();
        let fadt = tables[0];
        assert_eq!(&fadt[..4], b"FACP");
        assert_eq!(u64::from(u32_at(fadt, 40)), u64_at(fadt, 140));
        let facs = u64::from(u32_at(fadt, 36));
        assert_eq!(facs % 64, 0);
        assert_eq!((&at(facs)[..4], at(facs).len()), (&b"FACS"[..], 64));
        tables.push(at(u64_at(fadt, 140)));
        tables.push(xsdt);
        tables
    }

    const PLACE: VirtioMmioPlace = VirtioMmioPlace { base: 0xfeb0_1000, size: 0x200, gsi: 24 };

    fn configs() -> Vec<AcpiConfig> {
        let plain = AcpiConfig::new(1);
        let bare = AcpiConfig {
            ecam: false,
            com: vec![],
            rtc: false,
            i8042: false,
            pic: false,
            io_apic: false,
            pci: false,
            virtio: vec![PLACE, VirtioMmioPlace { gsi: 25, ..PLACE }],
            ..AcpiConfig::new(2)
        };
        let large = AcpiConfig {
            apic_ids: (0..300).chain([5000]).collect(),
            mmio64: Some(0x2_0000_0000..0x10_0000_0000),
            intx: PciIntx::Irqs10And11,
            i8042: true,
            vga: true,
            ..AcpiConfig::new(1)
        };
        vec![plain, bare, large]
    }

    #[test]
    fn tables_are_whole() {
        for config in configs() {
            let all = tables(&config).unwrap();
            let found = found(&all);
            assert!(found.iter().all(|t| sum(t) == 0));
            let names: Vec<_> = found.iter().map(|t| &t[..4]).collect();
            assert_eq!(names.contains(&&b"MCFG"[..]), config.ecam_window().is_some());
            assert!(names.contains(&&b"DSDT"[..]) && names.contains(&&b"APIC"[..]));
        }
    }

    #[test]
    fn fixed_registers_are_where_the_devices_are() {
        let all = tables(&AcpiConfig::new(1)).unwrap();
        let fadt = found(&all)[0];
        assert_eq!(fadt.len(), 276);
        assert_eq!((fadt[8], fadt[131]), (6, 5));
        assert_eq!(u16_at(fadt, 46), 9);
        for (short, len, extended, port, bytes) in [
            (56, 88, 148, 0x600, 4u8),
            (64, 89, 172, 0x604, 2),
            (76, 91, 208, 0x608, 4),
            (80, 92, 220, 0x620, 4),
        ] {
            assert_eq!((u32_at(fadt, short), fadt[len]), (port, bytes));
            assert_eq!((fadt[extended], fadt[extended + 1]), (1, bytes * 8));
            assert_eq!(u64_at(fadt, extended + 4), u64::from(port));
        }
        assert_eq!((u64_at(fadt, 120), fadt[128]), (0xcf9, 6));
        let all = tables(&AcpiConfig { pci: false, ..AcpiConfig::new(1) }).unwrap();
        let fadt = found(&all)[0];
        assert_eq!((u64_at(fadt, 120), fadt[128]), (0x64, 0xfe), "the other port is PCI's");
    }

    #[test]
    fn virtio_devices_have_their_registers_and_an_interrupt() {
        let config = AcpiConfig { pci: false, virtio: vec![PLACE], ..AcpiConfig::new(1) };
        let all = tables(&config).unwrap();
        let holds = |bytes: &[u8]| all.windows(bytes.len()).any(|part| part == bytes);
        assert!(holds(b"VR00") && holds(b"\x0dLNRO0005\0") && !holds(b"PCI0"));
        // Memory32Fixed, writable; Extended Interrupt: consumer, level-triggered, active high, exclusive.
        assert!(holds(&[0x86, 9, 0, 1, 0, 0x10, 0xb0, 0xfe, 0, 2, 0, 0, 0x89, 6, 0, 1, 1, 24, 0, 0, 0]));
    }

    #[test]
    fn impossible_machines_are_refused() {
        for config in [
            AcpiConfig { apic_ids: vec![], ..AcpiConfig::new(1) },
            AcpiConfig { apic_ids: vec![1, 1], ..AcpiConfig::new(1) },
            AcpiConfig { apic_ids: (0..5000).collect(), ..AcpiConfig::new(1) },
            AcpiConfig { mmio32: vec![0..0x1_0000_0000], ..AcpiConfig::new(1) },
            AcpiConfig { mmio32: vec![7..7], ..AcpiConfig::new(1) },
            AcpiConfig { mmio64: Some(5..5), ..AcpiConfig::new(1) },
            AcpiConfig { virtio: vec![PLACE; 129], ..AcpiConfig::new(1) },
            AcpiConfig { com: vec![ComPort { port: 0xffff, irq: 4 }], ..AcpiConfig::new(1) },
        ] {
            assert!(matches!(tables(&config), Err(LoadError::Acpi(_))), "{config:?}");
        }
    }

    /// ACPICA's compiler takes the tables apart and together again, if it is installed.
    #[test]
    fn acpica_understands_the_tables() {
        if Command::new("iasl").arg("-v").output().is_err() {
            eprintln!("no iasl: not checked");
            return;
        }
        let dir = std::env::temp_dir().join(format!("ruse-acpi-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        for (n, config) in configs().iter().enumerate() {
            let all = tables(config).unwrap();
            for bytes in found(&all) {
                let name = String::from_utf8_lossy(&bytes[..4]).to_lowercase();
                let file = dir.join(format!("{name}{n}.aml"));
                std::fs::write(&file, bytes).unwrap();
                let apart = Command::new("iasl").arg("-d").arg(&file).output().unwrap();
                let text = String::from_utf8_lossy(&apart.stderr).into_owned();
                assert!(apart.status.success() && !text.contains("rror"), "{name}: {text}");
                if name == "dsdt" {
                    let again =
                        Command::new("iasl").arg("-we").arg(file.with_extension("dsl")).output().unwrap();
                    let text = String::from_utf8_lossy(&again.stdout).into_owned()
                        + &String::from_utf8_lossy(&again.stderr);
                    assert!(again.status.success(), "{name}: {text}");
                }
            }
        }
        std::fs::remove_dir_all(dir).unwrap();
    }
}
