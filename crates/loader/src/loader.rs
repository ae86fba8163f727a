//! What all protocols share: finding out the kind of kernel, and placing things in RAM.

use std::ops::Range;

use ruse_memory::{GuestRam, LOW_RAM_END};
use vm_memory::{Bytes, GuestAddress};

use crate::e820::{self, MapEntry};
use crate::place::Placer;
use crate::{
    EntryChoice, Image, LoadError, LoadRequest, Loaded, acpi, bios_data, bzimage, elf, multiboot, pvh,
};

/// Bytes that are enough to tell the kind of a kernel: multiboot's header is in the first 8 KiB.
const HEAD: usize = 8192;

/// A load under way.
pub(crate) struct Loader<'a> {
    /// What to load.
    pub(crate) request: &'a LoadRequest<'a>,
    /// Where to.
    pub(crate) ram: &'a GuestRam,
    /// The memory map.
    pub(crate) map: Vec<MapEntry>,
    /// Address of the RSDP.
    pub(crate) rsdp: Option<u64>,
    /// What is taken of RAM.
    pub(crate) place: Placer,
}

/// See [`crate::load`].
pub(crate) fn load(request: &LoadRequest<'_>, ram: &GuestRam) -> Result<Loaded, LoadError> {
    let kernel = request.kernel;
    let head = kernel.prefix(0, HEAD)?;
    if ram.size() < e820::SMALLEST_RAM {
        return Err(LoadError::RamTooSmall {
            name: kernel.name().to_owned(),
            needed: e820::SMALLEST_RAM,
            available: ram.size(),
        });
    }
    if request.cmdline.contains('\0') {
        return Err(LoadError::CmdlineZero);
    }
    bios_data::write(ram)?;
    let rsdp = request.acpi.map(|config| acpi::write(config, ram)).transpose()?;
    let ecam = request.acpi.and_then(|config| config.ecam_window());
    let mut loader = Loader { request, ram, map: e820::memory_map(ram, ecam), rsdp, place: Placer::new(ram) };
    let loaded = loader.kernel(&head)?;
    tracing::debug!(name = kernel.name(), kind = ?loaded.kind, kernel = ?loaded.kernel, "guest loaded");
    Ok(loaded)
}

impl<'a> Loader<'a> {
    /// Tells the kind of the kernel from its first bytes and loads it.
    fn kernel(&mut self, head: &[u8]) -> Result<Loaded, LoadError> {
        let choice = self.request.entry;
        let image = self.request.kernel;
        if bzimage::is_bzimage(head) {
            let offered = matches!(choice, EntryChoice::Auto | EntryChoice::Linux32 | EntryChoice::Linux64);
            return if offered { bzimage::load(self) } else { Err(self.no_such_entry("Linux bzImage")) };
        }
        let multiboot = multiboot::find(head);
        if elf::is_elf(head) {
            if choice == EntryChoice::Multiboot && multiboot.is_none() {
                return Err(self.no_such_entry("ELF image without a multiboot header"));
            }
            let elf = elf::Elf::parse(image)?;
            let entry = elf.pvh_entry(image)?;
            return match (choice, entry, multiboot) {
                (EntryChoice::Auto | EntryChoice::Pvh, Some(entry), _) => pvh::load(self, &elf, entry),
                (EntryChoice::Auto | EntryChoice::Multiboot, _, Some(header)) => {
                    multiboot::load(self, &header)
                }
                (EntryChoice::Linux64, ..) => elf::load_linux(self, &elf),
                (EntryChoice::Auto, ..) if elf.looks_like_linux() => elf::load_linux(self, &elf),
                (EntryChoice::Pvh, ..) => Err(self.no_such_entry("ELF image without a PVH note")),
                (EntryChoice::Linux32, ..) => Err(self.no_such_entry("ELF image")),
                _ => Err(not_a_kernel(image, head)),
            };
        }
        match (choice, multiboot) {
            (EntryChoice::Auto | EntryChoice::Multiboot, Some(header)) => multiboot::load(self, &header),
            (_, Some(_)) => Err(self.no_such_entry("multiboot kernel")),
            (_, None) => Err(not_a_kernel(image, head)),
        }
    }

    fn no_such_entry(&self, kind: &str) -> LoadError {
        let what = match self.request.entry {
            EntryChoice::Auto => "usable",
            EntryChoice::Linux64 => "64-bit Linux",
            EntryChoice::Linux32 => "32-bit Linux",
            EntryChoice::Pvh => "PVH",
            EntryChoice::Multiboot => "multiboot",
        };
        self.unsupported(format!("it is a {kind}, which has no {what} entry"))
    }

    /// [`LoadError::BadHeader`] of the kernel.
    pub(crate) fn bad(&self, what: impl Into<String>) -> LoadError {
        LoadError::BadHeader { name: self.request.kernel.name().to_owned(), what: what.into() }
    }

    /// [`LoadError::Unsupported`] of the kernel.
    pub(crate) fn unsupported(&self, what: impl Into<String>) -> LoadError {
        LoadError::Unsupported { name: self.request.kernel.name().to_owned(), what: what.into() }
    }

    /// Checks that the kernel, whose highest part ends at `end`, fits in the RAM below 4 GiB.
    pub(crate) fn check_fits(&self, end: u64) -> Result<(), LoadError> {
        if end > LOW_RAM_END {
            return Err(self.bad(format!(
                "it wants memory up to {end:#x}; RAM from address 0 ends at {LOW_RAM_END:#x}"
            )));
        }
        let available = self.place.end();
        if end > available {
            let name = self.request.kernel.name().to_owned();
            return Err(LoadError::RamTooSmall { name, needed: end, available });
        }
        Ok(())
    }

    /// Takes memory for a part of the kernel, which says itself where that is.
    pub(crate) fn take_kernel(&mut self, run: Range<u64>) -> Result<(), LoadError> {
        self.check_fits(run.end)?;
        self.place.take(run.clone()).map_err(|taken| {
            self.bad(format!(
                "it wants to be at {:#x} to {:#x}, but {:#x} to {:#x} is taken",
                run.start, run.end, taken.start, taken.end
            ))
        })
    }

    /// Copies a part of the kernel to `gpa` and clears the memory after it up to `memory_size` bytes. The run must
    /// have been taken.
    pub(crate) fn copy_kernel(
        &self,
        offset: u64,
        file_size: u64,
        gpa: u64,
        memory_size: u64,
    ) -> Result<(), LoadError> {
        self.request.kernel.copy_to(offset, file_size, self.ram, gpa, "code and data")?;
        let zeros = [0; 0x1_0000];
        let (mut at, end) = (gpa + file_size, gpa + memory_size);
        while at < end {
            let step = (end - at).min(zeros.len() as u64);
            self.write(at, &zeros[..step as usize])?;
            at += step;
        }
        Ok(())
    }

    /// Writes bytes to RAM.
    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), LoadError> {
        Ok(self.ram.memory().write_slice(bytes, GuestAddress(gpa))?)
    }

    /// Finds room in the first 640 KiB.
    pub(crate) fn low(&mut self, what: &'static str, size: u64, align: u64) -> Result<u64, LoadError> {
        let name = self.request.kernel.name();
        self.place.low(size, align).ok_or_else(|| LoadError::NoRoom { name: name.to_owned(), what, size })
    }

    /// Finds room in the first 640 KiB and writes there.
    pub(crate) fn write_low(
        &mut self,
        what: &'static str,
        bytes: &[u8],
        align: u64,
    ) -> Result<u64, LoadError> {
        let gpa = self.low(what, bytes.len() as u64, align)?;
        self.write(gpa, bytes)?;
        Ok(gpa)
    }

    /// Writes a text with its ending zero.
    pub(crate) fn write_text(&mut self, what: &'static str, text: &str) -> Result<u64, LoadError> {
        let bytes: Vec<u8> = text.bytes().chain([0]).collect();
        self.write_low(what, &bytes, 16)
    }

    /// Writes the command line of the request, checked against the kernel's limit in bytes.
    pub(crate) fn cmdline(&mut self, max: usize) -> Result<u64, LoadError> {
        let len = self.request.cmdline.len();
        if len > max {
            let name = self.request.kernel.name().to_owned();
            return Err(LoadError::CmdlineTooLong { name, len, max });
        }
        let text = self.request.cmdline;
        self.write_text("the command line", text)
    }

    /// Loads the modules one by one as high as possible, for kernels that take several.
    pub(crate) fn modules(&mut self, limit: u64) -> Result<Vec<Range<u64>>, LoadError> {
        let mut runs = Vec::new();
        for module in self.request.modules {
            let image = &module.image;
            let size = image.size();
            let start = self
                .place
                .high(size, limit)
                .map_err(|space| initrd_does_not_fit(image.name(), size, space))?;
            image.copy_to(0, size, self.ram, start, "contents")?;
            runs.push(start..start + size);
        }
        Ok(runs)
    }

    /// Loads the modules as one initial RAM disk, as high as possible below `limit`. Parts are aligned to four bytes
    /// as Linux wants it (Documentation/driver-api/early-userspace/buffer-format.rst).
    pub(crate) fn initrd(&mut self, limit: u64) -> Result<Option<Range<u64>>, LoadError> {
        let Some(first) = self.request.modules.first() else { return Ok(None) };
        let mut size = 0u64;
        let mut starts = Vec::new();
        for module in self.request.modules {
            starts.push(size);
            size = size.saturating_add(module.image.size());
            if starts.len() < self.request.modules.len() {
                size = size.checked_next_multiple_of(4).unwrap_or(size);
            }
        }
        let start = self
            .place
            .high(size, limit)
            .map_err(|space| initrd_does_not_fit(first.image.name(), size, space))?;
        for (module, offset) in self.request.modules.iter().zip(starts) {
            let (image, at) = (&module.image, start + offset);
            image.copy_to(0, image.size(), self.ram, at, "contents")?;
            let end = at + image.size();
            let pad = (end.next_multiple_of(4) - end).min(start + size - end);
            self.write(end, &[0; 3][..pad as usize])?;
        }
        Ok((size > 0).then_some(start..start + size))
    }
}

fn initrd_does_not_fit(name: &str, size: u64, space: u64) -> LoadError {
    LoadError::InitrdDoesNotFit { name: name.to_owned(), size, space }
}

/// Says what the file looks like instead.
fn not_a_kernel(image: &Image, head: &[u8]) -> LoadError {
    const KNOWN: [(usize, &[u8], &str); 14] = [
        (0, b"\x1f\x8b", "gzip-compressed data"),
        (0, b"\xfd7zXZ\0", "xz-compressed data"),
        (0, b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
        (0, b"BZh", "bzip2-compressed data"),
        (0, b"\x04\x22\x4d\x18", "lz4-compressed data"),
        (0, b"070701", "a cpio archive (an initrd?)"),
        (0, b"QFI\xfb", "a qcow2 disk image"),
        (0, b"#!", "a script"),
        (0x38, b"ARM\x64", "an arm64 kernel"),
        (0x38, b"\x05\x02\x23\x01", "a RISC-V kernel"),
        (0, b"PK\x03\x04", "a zip archive"),
        (257, b"ustar", "a tar archive"),
        (0, b"MZ", "a PE executable"),
        (510, b"\x55\xaa", "a disk image with a boot sector"),
    ];
    let found = if head.is_empty() {
        "an empty file".to_owned()
    } else if elf::is_elf(head) {
        elf::describe(head)
    } else if let Some((.., what)) =
        KNOWN.iter().find(|(at, magic, _)| head.get(*at..).is_some_and(|tail| tail.starts_with(magic)))
    {
        (*what).to_owned()
    } else if head.iter().all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace()) {
        "text".to_owned()
    } else {
        "unknown data".to_owned()
    };
    LoadError::NotAKernel { name: image.name().to_owned(), found }
}
