//! The few fields of the BIOS data area that systems read even where no BIOS ran.

use ruse_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::{LoadError, e820::LOW_MEMORY_END};

/// Segment of the extended BIOS data area.
const EBDA_SEGMENT: u64 = 0x40e;
/// KiB of conventional memory.
const BASE_MEMORY_KIB: u64 = 0x413;

/// Writes the address of the extended BIOS data area, which ends conventional memory.
pub(crate) fn write(ram: &GuestRam) -> Result<(), LoadError> {
    let memory = ram.memory();
    memory.write_obj((LOW_MEMORY_END >> 4) as u16, GuestAddress(EBDA_SEGMENT))?;
    memory.write_obj((LOW_MEMORY_END >> 10) as u16, GuestAddress(BASE_MEMORY_KIB))?;
    Ok(())
}
