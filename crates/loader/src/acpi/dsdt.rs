//! The devices that a system cannot find by itself: DSDT (ACPI 6.5, section 5.2.11.1 and chapter 6).

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
    Interrupt, Memory32Fixed, Method, Name, Or, Package, PackageBuilder, Path, ResourceTemplate, Return,
    Scope, Uuid, ZERO,
};

use super::{AcpiConfig, SLEEP_TYPE_S5, VirtioMmioPlace, table};

/// Revision 2: integers have 64 bits.
const REVISION: u8 = 2;
/// The UUID of PCI's `_OSC` (PCI Firmware Specification 3.3, section 4.5.1).
const PCI_OSC: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// What a system may control of PCI Express: native hot-plug, PME, error reporting, the capability structure; not
/// SHPC hot-plug.
const PCI_OSC_GRANT: u32 = 0b1_1101;
/// Bit of `_OSC`'s status: unknown UUID.
const OSC_UNKNOWN_UUID: u32 = 1 << 2;

type Child = Box<dyn Aml>;

/// The DSDT.
pub(super) fn dsdt(config: &AcpiConfig) -> Vec<u8> {
    let mut body = Vec::new();
    Name::new(Path::new("_S5_"), &Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &ZERO, &ZERO]))
        .to_aml_bytes(&mut body);
    let mut devices = processors(config);
    if config.pci {
        devices.push(pci_root(config));
    }
    if let Some((base, size)) = config.ecam_window() {
        devices.push(motherboard(base as u32, size as u32));
    }
    devices.extend((1u8..).zip(&config.com).map(|(n, com)| {
        let shared = config.com.iter().filter(|other| other.irq == com.irq).count() > 1;
        let resources: Vec<Child> =
            vec![ports(com.port, 8), Box::new(Interrupt::new(true, true, false, shared, com.irq.into()))];
        isa_device(&format!("COM{n}"), "PNP0501", n, resources)
    }));
    let irq = |n| Box::new(Interrupt::new(true, true, false, false, n)) as Child;
    if config.rtc {
        devices.push(isa_device("RTC_", "PNP0B00", 0, vec![ports(0x70, 2), irq(8)]));
    }
    if config.i8042 {
        devices.push(isa_device("KBD_", "PNP0303", 0, vec![ports(0x60, 1), ports(0x64, 1), irq(1)]));
    }
    devices.extend((0u8..).zip(&config.virtio).map(|(n, place)| virtio(n, place)));
    let all = devices.iter().map(|d| d as &dyn Aml).collect();
    Scope::new(Path::new("\\_SB_"), all).to_aml_bytes(&mut body);
    body.extend(&config.extra_aml);
    table(*b"DSDT", REVISION, &body)
}

/// AML that is done already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn raw(aml: &dyn Aml) -> Raw {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    Raw(bytes)
}

fn name(path: &str, value: &dyn Aml) -> Raw {
    raw(&Name::new(Path::new(path), value))
}

fn resources(list: &[Child]) -> Raw {
    name("_CRS", &ResourceTemplate::new(list.iter().map(|r| &**r).collect()))
}

fn device(path: &str, parts: &[Raw]) -> Raw {
    raw(&Device::new(Path::new(path), parts.iter().map(|p| p as &dyn Aml).collect()))
}

fn ports(first: u16, count: u8) -> Child {
    Box::new(IO::new(first, first, 1, count))
}

/// Processor devices, whose `_UID` is that in the MADT (section 8.4).
fn processors(config: &AcpiConfig) -> Vec<Raw> {
    (0..config.apic_ids.len() as u32)
        .map(|uid| device(&format!("C{uid:03X}"), &[name("_HID", &"ACPI0007"), name("_UID", &uid)]))
        .collect()
}

fn isa_device(path: &str, id: &str, uid: u8, crs: Vec<Child>) -> Raw {
    device(path, &[name("_HID", &EISAName::new(id)), name("_UID", &uid), resources(&crs)])
}

/// A virtio device behind registers in memory, by the name that its drivers know.
fn virtio(number: u8, place: &VirtioMmioPlace) -> Raw {
    let crs: Vec<Child> = vec![
        Box::new(Memory32Fixed::new(true, place.base, place.size)),
        Box::new(Interrupt::new(true, false, false, false, place.gsi)),
    ];
    device(&format!("VR{number:02X}"), &[name("_HID", &"LNRO0005"), name("_UID", &number), resources(&crs)])
}

/// Keeps systems from giving PCI configuration space to devices: Linux wants the window of the MCFG reserved by a
/// motherboard resource (PCI Firmware Specification 3.3, section 4.1.2).
fn motherboard(base: u32, size: u32) -> Raw {
    isa_device("MBRD", "PNP0C02", 0, vec![Box::new(Memory32Fixed::new(true, base, size))])
}

/// The PCI host bridge: a PCI Express one if configuration space is in memory.
fn pci_root(config: &AcpiConfig) -> Raw {
    let mut crs: Vec<Child> = vec![
        Box::new(AddressSpace::new_bus_number(0u16, 255)),
        ports(0xcf8, 8),
        Box::new(AddressSpace::new_io(0u16, 0xcf7, None)),
        Box::new(AddressSpace::new_io(0xd00u16, 0xffff, None)),
    ];
    let plain = AddressSpaceCacheable::NotCacheable;
    if config.vga {
        crs.push(Box::new(AddressSpace::new_memory(plain, true, 0xa_0000u32, 0xb_ffff, None)));
    }
    for w in &config.mmio32 {
        crs.push(Box::new(AddressSpace::new_memory(plain, true, w.start as u32, (w.end - 1) as u32, None)));
    }
    if let Some(w) = &config.mmio64 {
        crs.push(Box::new(AddressSpace::new_memory(plain, true, w.start, w.end - 1, None)));
    }
    let mut parts = if config.ecam {
        vec![name("_HID", &EISAName::new("PNP0A08")), name("_CID", &EISAName::new("PNP0A03")), pci_osc()]
    } else {
        vec![name("_HID", &EISAName::new("PNP0A03"))]
    };
    parts.extend([
        name("_UID", &ZERO),
        name("_SEG", &ZERO),
        name("_BBN", &ZERO),
        name("_PRT", &routing(config)),
        resources(&crs),
    ]);
    device("PCI0", &parts)
}

/// Where the interrupt pins of the devices on bus 0 lead (section 6.2.13).
fn routing(config: &AcpiConfig) -> PackageBuilder {
    let mut all = PackageBuilder::new();
    for slot in 0..32u8 {
        for pin in 0..4u8 {
            let address = u32::from(slot) << 16 | 0xffff;
            let gsi = config.intx.gsi(slot, pin);
            all.add_element(&Package::new(vec![&address, &pin, &ZERO, &gsi]));
        }
    }
    all
}

/// `_OSC` of the PCI host bridge (section 6.2.11): grants the features of [`PCI_OSC_GRANT`].
fn pci_osc() -> Raw {
    let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
    let fields = [
        raw(&CreateDWordField::new(&status, &Arg(3), &ZERO)),
        raw(&CreateDWordField::new(&control, &Arg(3), &8u8)),
    ];
    let known = raw(&And::new(&control, &control, &PCI_OSC_GRANT));
    let unknown = raw(&Or::new(&status, &status, &OSC_UNKNOWN_UUID));
    let uuid = Uuid::new(PCI_OSC);
    let is_pci = Equal::new(&Arg(0), &uuid);
    // A buffer of less than three words cannot be PCI's.
    let is_whole = Equal::new(&Arg(2), &3u8);
    let grant = If::new(&is_whole, vec![&fields[1], &known]);
    let check = If::new(&is_pci, vec![&grant]);
    let refuse = Else::new(vec![&unknown]);
    let answer = Return::new(&Arg(3));
    raw(&Method::new(Path::new("_OSC"), 4, true, vec![&fields[0], &check, &refuse, &answer]))
}
