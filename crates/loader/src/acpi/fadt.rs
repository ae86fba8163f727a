//! The fixed tables: FADT and FACS (ACPI 6.5, sections 5.2.9 and 5.2.10).

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{
    AcpiConfig, GPE0_PORT, OEM_ID, OEM_REVISION, OEM_TABLE_ID, PM_TIMER_PORT, PM1_CONTROL_PORT,
    PM1_EVENT_PORT, RESET, RESET_BY_KEYBOARD, SCI,
};

/// Bits of IAPC_BOOT_ARCH (table 5.10).
mod boot_arch {
    pub const LEGACY_DEVICES: u16 = 1 << 0;
    pub const HAS_8042: u16 = 1 << 1;
    pub const NO_VGA: u16 = 1 << 2;
    pub const NO_CMOS_RTC: u16 = 1 << 5;
}

/// Latency in microseconds that says that a processor has no C2 or C3 state.
const NO_C2: u16 = 0xfff;
const NO_C3: u16 = 0xfff;
/// CMOS index of the century.
const CENTURY: u8 = 0x32;

/// The FADT. PM1 is always in ACPI mode: there is no SMI command port to switch it.
pub(super) fn fadt(config: &AcpiConfig, facs: u32, dsdt: u32) -> Vec<u8> {
    let io = |port: u16, bytes: u8| {
        GAS::new(AddressSpace::SystemIo, bytes * 8, 0, AccessSize::Undefined, port.into())
    };
    // A power button in PM1 (its flag clear); no sleep button, no RTC wake in PM1 (their flags set).
    let mut t = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .firmware_ctrl_32(facs)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .preferred_pm_profile(PmProfile::Unspecified)
        .gpe_info(GPE0_PORT.into(), 0, 4, 0, 0);
    t.creator_id = *b"RUSE";
    t.creator_revision = 1u32.to_le_bytes();
    t.dsdt = dsdt.into();
    t.x_dsdt = u64::from(dsdt).into();
    t.sci_int = u16::from(SCI).into();
    t.pm1a_evt_blk = u32::from(PM1_EVENT_PORT).into();
    t.pm1a_cnt_blk = u32::from(PM1_CONTROL_PORT).into();
    t.pm_tmr_blk = u32::from(PM_TIMER_PORT).into();
    t.pm1_evt_len = 4;
    t.pm1_cnt_len = 2;
    t.pm_tmr_len = 4;
    t.x_pm1a_evt_blk = io(PM1_EVENT_PORT, 4);
    t.x_pm1a_cnt_blk = io(PM1_CONTROL_PORT, 2);
    t.x_pm_tmr_blk = io(PM_TIMER_PORT, 4);
    t.x_gpe0_blk = io(GPE0_PORT, 4);
    let (port, value) = if config.pci { RESET } else { RESET_BY_KEYBOARD };
    t.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    t.reset_value = value;
    t.p_lvl2_lat = NO_C2.into();
    t.p_lvl3_lat = NO_C3.into();
    t.century = if config.rtc { CENTURY } else { 0 };
    let mut arch = 0;
    for (set, bit) in [
        (!config.com.is_empty() || config.i8042, boot_arch::LEGACY_DEVICES),
        (config.i8042, boot_arch::HAS_8042),
        (!config.vga, boot_arch::NO_VGA),
        (!config.rtc, boot_arch::NO_CMOS_RTC),
    ] {
        arch |= if set { bit } else { 0 };
    }
    t.iapc_boot_arch = arch.into();
    t.hypervisor_vendor_identity = u64::from_le_bytes(*b"Ruse\0\0\0\0").into();
    let mut bytes = Vec::new();
    t.finalize().to_aml_bytes(&mut bytes);
    bytes
}

/// The FACS, version 2: no waking vector, the global lock free.
pub(super) fn facs() -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[..4].copy_from_slice(b"FACS");
    bytes[4] = 64;
    bytes[32] = 2;
    bytes
}
