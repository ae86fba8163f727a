//! ELF kernels: program headers, notes, and the 64-bit entry of an uncompressed Linux (System V ABI, chapters 4
//! and 5).

use std::ops::Range;

use crate::bytes::{array, u16_at, u32_at, u64_at};
use crate::loader::Loader;
use crate::place::ONE_MIB;
use crate::zero_page::{self, ZeroPage};
use crate::{Image, KernelKind, LoadError, Loaded, bzimage};

/// Program header of loadable bytes.
const PT_LOAD: u32 = 1;
/// Program header of notes.
const PT_NOTE: u32 = 4;
/// Machines: i386 and x86-64.
const MACHINES: [u16; 2] = [3, 62];
/// Most program headers that a kernel may have.
const MAX_HEADERS: u16 = 1024;
/// Most bytes of a note segment that are searched.
const MAX_NOTES: u64 = 1 << 20;
/// Type of the note with the PVH entry (xen/include/public/elfnote.h, `XEN_ELFNOTE_PHYS32_ENTRY`).
const PHYS32_ENTRY: u32 = 18;
/// Linux for x86-64 is linked from here on (`__START_KERNEL_map`).
const LINUX_BASE: u64 = 0xffff_ffff_8000_0000;

/// Whether the first bytes are those of an ELF file.
pub(crate) fn is_elf(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF")
}

/// Says in words what an ELF file that is not a kernel is.
pub(crate) fn describe(head: &[u8]) -> String {
    let bits = match head.get(4) {
        Some(1) => "32-bit",
        Some(2) => "64-bit",
        _ => return "a damaged ELF file".to_owned(),
    };
    if head.get(5) == Some(&2) {
        return format!("a big-endian {bits} ELF file");
    }
    let kind = match u16_at(head, 16) {
        1 => "object file",
        2 => "executable without a PVH note or a multiboot header",
        3 => "shared object or position-independent executable",
        4 => "core dump",
        _ => "file of unknown type",
    };
    match u16_at(head, 18) {
        3 | 62 => format!("a {bits} ELF {kind}"),
        183 => format!("a {bits} ELF {kind} for arm64"),
        243 => format!("a {bits} ELF {kind} for RISC-V"),
        other => format!("a {bits} ELF {kind} for machine {other}"),
    }
}

/// A run of the file and its place in memory.
#[derive(Clone, Debug)]
struct Segment {
    kind: u32,
    offset: u64,
    virt: u64,
    phys: u64,
    file_size: u64,
    memory_size: u64,
    align: u64,
}

/// The parts of an ELF file that a loader needs.
pub(crate) struct Elf {
    wide: bool,
    entry: u64,
    segments: Vec<Segment>,
}

impl Elf {
    /// Reads the headers of a little-endian x86 file of either class.
    pub(crate) fn parse(image: &Image) -> Result<Self, LoadError> {
        let bad = |what: &str| LoadError::BadHeader { name: image.name().to_owned(), what: what.to_owned() };
        let ident = image.part(0, 20, "ELF header")?;
        let wide = match (ident[4], ident[5], ident[6]) {
            (1, 1, 1) => false,
            (2, 1, 1) => true,
            _ => {
                return Err(LoadError::NotAKernel { name: image.name().to_owned(), found: describe(&ident) });
            }
        };
        if !MACHINES.contains(&u16_at(&ident, 18)) {
            return Err(LoadError::NotAKernel { name: image.name().to_owned(), found: describe(&ident) });
        }
        let head = image.part(0, if wide { 64 } else { 52 }, "ELF header")?;
        let (entry, table, size_at) = if wide {
            (u64_at(&head, 24), u64_at(&head, 32), 54)
        } else {
            (u32_at(&head, 24).into(), u32_at(&head, 28).into(), 42)
        };
        let (each, count) = (u16_at(&head, size_at), u16_at(&head, size_at + 2));
        if count == 0 {
            return Ok(Self { wide, entry, segments: Vec::new() });
        }
        if count > MAX_HEADERS {
            return Err(bad(&format!("it has {count} program headers, more than {MAX_HEADERS}")));
        }
        if each < if wide { 56 } else { 32 } {
            return Err(bad(&format!("its program headers have {each} bytes each, too few")));
        }
        let bytes = image.part(table, usize::from(each) * usize::from(count), "program headers")?;
        let segments = bytes.chunks_exact(usize::from(each)).map(|h| Segment::parse(h, wide)).collect();
        Ok(Self { wide, entry, segments })
    }

    fn loadable(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|s| s.kind == PT_LOAD && s.memory_size > 0)
    }

    /// The address in the note `XEN_ELFNOTE_PHYS32_ENTRY`, if the file has one.
    pub(crate) fn pvh_entry(&self, image: &Image) -> Result<Option<u32>, LoadError> {
        for notes in self.segments.iter().filter(|s| s.kind == PT_NOTE) {
            image.check(notes.offset, notes.file_size, "notes")?;
            let bytes = image.prefix(notes.offset, notes.file_size.min(MAX_NOTES) as usize)?;
            let align = if notes.align == 8 { 8 } else { 4 };
            let Some(desc) = find_note(&bytes, align, b"Xen\0", PHYS32_ENTRY) else { continue };
            // The note holds a pointer of the class of the file, or four bytes.
            let entry = match desc.len() {
                4 => Some(u32_at(desc, 0)),
                8 => u32::try_from(u64_at(desc, 0)).ok(),
                _ => None,
            };
            return entry.map(Some).ok_or_else(|| LoadError::BadHeader {
                name: image.name().to_owned(),
                what: "its PVH note does not hold a 32-bit address".to_owned(),
            });
        }
        Ok(None)
    }

    /// Whether this is Linux for x86-64: linked into the top 2 GiB, entered at a physical address.
    pub(crate) fn looks_like_linux(&self) -> bool {
        self.wide && self.loadable().any(|s| s.virt >= LINUX_BASE) && self.runs_at(self.entry)
    }

    /// Whether a physical address lies in a segment.
    pub(crate) fn runs_at(&self, phys: u64) -> bool {
        self.loadable().any(|s| phys.wrapping_sub(s.phys) < s.memory_size)
    }

    /// The entry of the file's header.
    pub(crate) fn entry(&self) -> u64 {
        self.entry
    }

    /// Loads the segments at their physical addresses. The result spans all of them.
    pub(crate) fn load_segments(&self, loader: &mut Loader<'_>) -> Result<Range<u64>, LoadError> {
        let image = loader.request.kernel;
        let (mut start, mut end) = (u64::MAX, 0);
        for s in self.loadable() {
            if s.file_size > s.memory_size {
                return Err(loader.bad("a segment has more bytes in the file than in memory"));
            }
            image.check(s.offset, s.file_size, "code and data")?;
            let run = s.phys..s.phys.saturating_add(s.memory_size);
            (start, end) = (start.min(run.start), end.max(run.end));
        }
        if start >= end {
            return Err(loader.bad("it has nothing to load"));
        }
        // The highest address first, so that an error tells how much RAM would do.
        loader.check_fits(end)?;
        for s in self.loadable() {
            loader.take_kernel(s.phys..s.phys + s.memory_size)?;
        }
        for s in self.loadable() {
            loader.copy_kernel(s.offset, s.file_size, s.phys, s.memory_size)?;
        }
        Ok(start..end)
    }
}

impl Segment {
    /// A program header; `h` has its size at least.
    fn parse(h: &[u8], wide: bool) -> Self {
        let n = |at| u64::from(u32_at(h, at));
        if wide {
            Self {
                kind: u32_at(h, 0),
                offset: u64_at(h, 8),
                virt: u64_at(h, 16),
                phys: u64_at(h, 24),
                file_size: u64_at(h, 32),
                memory_size: u64_at(h, 40),
                align: u64_at(h, 48),
            }
        } else {
            Self {
                kind: u32_at(h, 0),
                offset: n(4),
                virt: n(8),
                phys: n(12),
                file_size: n(16),
                memory_size: n(20),
                align: n(28),
            }
        }
    }
}

/// The contents of the first note with this owner and type.
fn find_note<'a>(notes: &'a [u8], align: usize, owner: &[u8], kind: u32) -> Option<&'a [u8]> {
    let mut at = 0usize;
    while let Some(head) = array::<12>(notes, at) {
        let (name_len, desc_len) = (u32_at(&head, 0) as usize, u32_at(&head, 4) as usize);
        let name_at = at + 12;
        let desc_at = name_at.checked_add(name_len)?.checked_next_multiple_of(align)?;
        let desc_end = desc_at.checked_add(desc_len)?;
        let name = notes.get(name_at..name_at.checked_add(name_len)?)?;
        let desc = notes.get(desc_at..desc_end)?;
        if name == owner && u32_at(&head, 8) == kind {
            return Some(desc);
        }
        at = desc_end.checked_next_multiple_of(align)?;
    }
    None
}

/// Loads an uncompressed Linux and enters it at `e_entry` by the 64-bit boot protocol, with a zero page of our own.
pub(crate) fn load_linux(loader: &mut Loader<'_>, elf: &Elf) -> Result<Loaded, LoadError> {
    if !elf.wide {
        return Err(loader.unsupported("it is a 32-bit ELF image, which has no 64-bit Linux entry"));
    }
    let kernel = elf.load_segments(loader)?;
    if !elf.runs_at(elf.entry) {
        return Err(loader.bad(format!("its entry {:#x} is outside of its segments", elf.entry)));
    }
    if kernel.start < ONE_MIB {
        return Err(loader.bad(format!("it wants to be loaded at {:#x}, below 1 MiB", kernel.start)));
    }
    let initrd = loader.initrd(u64::MAX)?;
    let mut page = ZeroPage::new();
    let mut loaded = bzimage::start_linux(
        loader,
        &mut page,
        zero_page::MAX_CMDLINE,
        elf.entry,
        KernelKind::Vmlinux,
        initrd,
    )?;
    loaded.kernel = kernel;
    Ok(loaded)
}
