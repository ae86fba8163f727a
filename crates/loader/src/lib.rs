//! Loads a kernel as firmware and boot loader would: puts the kernel, its initial RAM disk, its command line, the
//! memory map and the ACPI tables into guest RAM and gives the registers with which vCPU 0 starts.
//!
//! [`load`] is total: whatever bytes a file has, the answer is a loaded guest or a [`LoadError`] with one clear line.
//! It takes Linux's bzImage (`bzimage`), ELF kernels with a PVH note and uncompressed Linux (`elf`, `pvh`) and
//! multiboot kernels (`multiboot`).

mod bios_data;
mod bytes;
mod bzimage;
mod elf;
mod error;
mod image;
mod loader;
mod multiboot;
mod place;
mod pvh;
#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // windows and places are lists of ranges
mod tests;
mod zero_page;

pub mod acpi;
pub mod e820;
pub mod entry;
#[cfg(any(test, feature = "test-images"))]
pub mod test_images;

use std::ops::Range;

pub use acpi::{AcpiConfig, PciIntx};
pub use error::LoadError;
pub use image::{Image, Module};
use ruse_arch::VcpuState;
use ruse_memory::GuestRam;

/// Which way into the kernel to take where an image offers several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EntryChoice {
    /// The best that the image has: 64-bit for a bzImage, PVH for an ELF kernel with a note, then multiboot, then the
    /// 64-bit entry of an uncompressed Linux.
    #[default]
    Auto,
    /// The 64-bit entry of Linux: of a bzImage, or `e_entry` of an ELF image with a zero page.
    Linux64,
    /// The 32-bit entry of a bzImage.
    Linux32,
    /// The entry that a PVH note names.
    Pvh,
    /// The multiboot entry.
    Multiboot,
}

/// What to load.
#[derive(Debug)]
pub struct LoadRequest<'a> {
    /// The kernel.
    pub kernel: &'a Image,
    /// For Linux the initial RAM disk; several are joined. For multiboot and PVH the modules in order.
    pub modules: &'a [Module],
    /// The command line, without its ending zero.
    pub cmdline: &'a str,
    /// What the ACPI tables shall say, or `None` for a machine without ACPI.
    pub acpi: Option<&'a AcpiConfig>,
    /// Which way into the kernel.
    pub entry: EntryChoice,
}

/// What kind of kernel was loaded, and how it is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelKind {
    /// A bzImage by its 64-bit entry.
    BzImage64,
    /// A bzImage by its 32-bit entry.
    BzImage32,
    /// An ELF image by the entry of its PVH note.
    Pvh,
    /// An uncompressed 64-bit Linux by its ELF entry.
    Vmlinux,
    /// A multiboot kernel.
    Multiboot,
}

/// A loaded guest.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The state with which vCPU 0 starts. Other vCPUs wait for a start-up IPI with [`entry::set_mtrrs`] applied.
    pub entry: VcpuState,
    /// What was loaded.
    pub kind: KernelKind,
    /// The text that a bzImage gives as its version.
    pub version: Option<String>,
    /// Guest physical memory that the kernel takes, with what it needs before it reads the memory map.
    pub kernel: Range<u64>,
    /// Where the initial RAM disk or the modules are, one range each (one for all disks of Linux).
    pub modules: Vec<Range<u64>>,
    /// Address of the ACPI RSDP.
    pub rsdp: Option<u64>,
}

/// Loads a guest into `ram`. Memory that is not written keeps its contents; after an error RAM holds a part of the
/// guest.
///
/// # Errors
/// Every variant of [`LoadError`] but those of opening files.
pub fn load(request: &LoadRequest<'_>, ram: &GuestRam) -> Result<Loaded, LoadError> {
    loader::load(request, ram)
}
