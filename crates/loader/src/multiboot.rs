//! Multiboot 1 kernels (Multiboot Specification 0.6.96): ELF images, and flat ones whose header gives the addresses.

use std::ops::Range;

use ruse_arch::state::reg;

use crate::bytes::u32_at;
use crate::elf::{self, Elf};
use crate::entry::{self, GDT_SIZE};
use crate::loader::Loader;
use crate::{KernelKind, LoadError, Loaded, e820};

/// What the header begins with (3.1.1).
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// What the kernel finds in EAX (3.2).
const LOADER_MAGIC: u32 = 0x2bad_b002;
/// Header flag: addresses are in the header (3.1.2).
const HAS_ADDRESSES: u32 = 1 << 16;
/// Header flags that a boot loader may not ignore: 0 to 15. Of these page-aligned modules, memory information and
/// the wish for a video mode are known (3.1.2).
const UNKNOWN_NEEDS: u32 = 0xffff & !0b111;
/// Bytes of the information structure up to and with its framebuffer (3.3).
const INFO_SIZE: usize = 116;
/// Most bytes of the command line.
const MAX_CMDLINE: usize = 0xffff;
/// What the kernel is told of who loaded it.
const LOADER_NAME: &str = "ruse";

/// Bits of the information structure's flags (3.3).
mod info {
    pub const MEMORY: u32 = 1 << 0;
    pub const CMDLINE: u32 = 1 << 2;
    pub const MODULES: u32 = 1 << 3;
    pub const MEMORY_MAP: u32 = 1 << 6;
    pub const LOADER_NAME: u32 = 1 << 9;
}

/// A multiboot header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    /// Where it is in the file.
    offset: u64,
    flags: u32,
    header_addr: u32,
    load_addr: u32,
    load_end: u32,
    bss_end: u32,
    entry: u32,
}

/// Finds the header: at a multiple of four in the first 8 KiB, with the right sum (3.1).
pub(crate) fn find(head: &[u8]) -> Option<Header> {
    let head = &head[..head.len().min(8192)];
    (0..head.len().saturating_sub(11)).step_by(4).find_map(|at| {
        let field = |i: usize| u32_at(head, at + 4 * i);
        let sum = field(0).wrapping_add(field(1)).wrapping_add(field(2));
        let whole = field(1) & HAS_ADDRESSES == 0 || at + 32 <= head.len();
        (field(0) == HEADER_MAGIC && sum == 0 && whole).then(|| Header {
            offset: at as u64,
            flags: field(1),
            header_addr: field(3),
            load_addr: field(4),
            load_end: field(5),
            bss_end: field(6),
            entry: field(7),
        })
    })
}

/// Loads a multiboot kernel.
pub(crate) fn load(loader: &mut Loader<'_>, header: &Header) -> Result<Loaded, LoadError> {
    if header.flags & UNKNOWN_NEEDS != 0 {
        return Err(loader.unsupported(format!(
            "its multiboot header asks for unknown features (flags {:#x})",
            header.flags & UNKNOWN_NEEDS
        )));
    }
    let image = loader.request.kernel;
    let (kernel, entry_at) = if header.flags & HAS_ADDRESSES != 0 {
        (load_flat(loader, header)?, header.entry)
    } else if elf::is_elf(&image.prefix(0, 4)?) {
        let elf = Elf::parse(image)?;
        let kernel = elf.load_segments(loader)?;
        let entry_at = u32::try_from(elf.entry()).ok().filter(|&at| elf.runs_at(at.into()));
        let entry_at = entry_at
            .ok_or_else(|| loader.bad(format!("its entry {:#x} is outside of its segments", elf.entry())))?;
        (kernel, entry_at)
    } else {
        return Err(loader.bad("it is no ELF image, and its multiboot header gives no addresses"));
    };
    if !kernel.contains(&entry_at.into()) {
        return Err(loader.bad(format!("its entry {entry_at:#x} is outside of what is loaded")));
    }
    let modules = loader.modules(u64::MAX)?;
    let info_at = write_info(loader, &modules)?;
    let gdt_at =
        loader.write_low("the descriptor table", &entry::gdt(false), GDT_SIZE.next_power_of_two())?;
    let mut state = entry::protected_mode(entry_at, gdt_at);
    state.gpr[reg::RAX] = LOADER_MAGIC.into();
    state.gpr[reg::RBX] = info_at;
    Ok(Loaded {
        entry: state,
        kind: KernelKind::Multiboot,
        version: None,
        kernel,
        modules,
        rsdp: loader.rsdp,
    })
}

/// Loads by the addresses in the header (3.1.3).
fn load_flat(loader: &mut Loader<'_>, h: &Header) -> Result<Range<u64>, LoadError> {
    let image = loader.request.kernel;
    let lead = h.header_addr.checked_sub(h.load_addr).map(u64::from);
    let offset = lead
        .and_then(|lead| h.offset.checked_sub(lead))
        .ok_or_else(|| loader.bad("its load address does not agree with where its multiboot header is"))?;
    let start = u64::from(h.load_addr);
    let file_size = match h.load_end {
        0 => image.size() - offset,
        end => u64::from(end)
            .checked_sub(start)
            .ok_or_else(|| loader.bad("it ends before it begins (load_end_addr is below load_addr)"))?,
    };
    image.check(offset, file_size, "code and data")?;
    let memory_size = match h.bss_end {
        0 => file_size,
        end => u64::from(end)
            .checked_sub(start)
            .filter(|&size| size >= file_size)
            .ok_or_else(|| loader.bad("bss_end_addr is below the end of its data"))?,
    };
    let run = start..start + memory_size;
    loader.take_kernel(run.clone())?;
    loader.copy_kernel(offset, file_size, start, memory_size)?;
    Ok(run)
}

/// Writes the information structure and what it points to (3.3).
fn write_info(loader: &mut Loader<'_>, modules: &[Range<u64>]) -> Result<u64, LoadError> {
    // By custom the kernel's own name comes first on its command line.
    let line = format!("{} {}", loader.request.kernel.name(), loader.request.cmdline);
    if line.len() > MAX_CMDLINE {
        return Err(LoadError::CmdlineTooLong {
            name: loader.request.kernel.name().to_owned(),
            len: line.len(),
            max: MAX_CMDLINE,
        });
    }
    let cmdline_at = loader.write_text("the command line", line.trim_end())?;
    let name_at = loader.write_text("the boot loader's name", LOADER_NAME)?;

    let mut table = Vec::new();
    for (run, module) in modules.iter().zip(loader.request.modules) {
        let args_at = loader.write_text("the arguments of modules", &module.args)?;
        for field in [run.start, run.end, args_at, 0] {
            table.extend((field as u32).to_le_bytes());
        }
    }
    let modules_at = loader.write_low("the list of modules", &table, 16)?;

    // Each entry is preceded by its size, which does not count itself.
    let mut map = Vec::new();
    for e in &loader.map {
        map.extend(20u32.to_le_bytes());
        map.extend(e.start.to_le_bytes());
        map.extend(e.size.to_le_bytes());
        map.extend((e.kind as u32).to_le_bytes());
    }
    let map_at = loader.write_low("the memory map", &map, 16)?;

    let mut bytes = [0; INFO_SIZE];
    let mut put = |at: usize, value: u64| bytes[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
    let mut flags = info::MEMORY | info::CMDLINE | info::MEMORY_MAP | info::LOADER_NAME;
    if !modules.is_empty() {
        flags |= info::MODULES;
        put(20, modules.len() as u64);
        put(24, modules_at);
    }
    put(0, flags.into());
    put(4, e820::LOW_MEMORY_END / 1024);
    put(8, e820::upper_kib(loader.place.end()));
    put(16, cmdline_at);
    put(44, map.len() as u64);
    put(48, map_at);
    put(64, name_at);
    loader.write_low("the multiboot information", &bytes, 16)
}
