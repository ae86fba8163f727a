//! Linux's bzImage, entered after its 16-bit part (Documentation/arch/x86/boot.rst).

use ruse_arch::state::reg;

use crate::bytes::{array, u16_at, u32_at, u64_at};
use crate::entry::{self, GDT_SIZE, PAGE_TABLES_SIZE};
use crate::loader::Loader;
use crate::place::ONE_MIB;
use crate::zero_page::{self, LOADED_HIGH, ZeroPage, offset};
use crate::{EntryChoice, KernelKind, LoadError, Loaded, e820};

/// Oldest version of the protocol that is loaded.
const OLDEST: u16 = 0x206;
/// Bit of `xloadflags`: the kernel has a 64-bit entry at 200h.
const XLF_KERNEL_64: u16 = 1 << 0;
/// Where the 64-bit entry is in the protected-mode part.
const ENTRY_64: u64 = 0x200;
/// Longest text of a kernel's version that is believed.
const MAX_VERSION: usize = 256;
/// Most bytes of a command line whatever the kernel says: it has to fit in low memory.
const MAX_CMDLINE: u32 = 0xffff;

/// Whether the first bytes are those of a bzImage (or of its truncated header).
pub(crate) fn is_bzimage(head: &[u8]) -> bool {
    array(head, offset::MAGIC) == Some(*b"HdrS")
}

/// What the setup header says (boot.rst, "The Real-Mode Kernel Header").
struct Header {
    /// Bytes of the header from [`zero_page::HEADER`] on.
    raw: Vec<u8>,
    /// Bytes of the real-mode part.
    setup_size: u64,
    /// Bytes of the protected-mode part.
    kernel_size: u64,
    relocatable: bool,
    alignment: u64,
    pref_address: u64,
    /// Bytes of memory from the load address on that the kernel needs before it reads the memory map.
    init_size: u64,
    initrd_max: u64,
    cmdline_max: usize,
    has_entry_64: bool,
    /// Where the text of the version is, if there is one.
    version_text: u64,
}

impl Header {
    fn read(loader: &Loader<'_>) -> Result<Self, LoadError> {
        let image = loader.request.kernel;
        let sector = image.part(0, zero_page::HEADER_END, "setup header")?;
        if u16_at(&sector, offset::BOOT_FLAG) != 0xaa55 {
            return Err(loader.bad("its boot flag is not AA55h"));
        }
        let version = u16_at(&sector, offset::VERSION);
        if version < OLDEST {
            return Err(loader.unsupported(format!(
                "its boot protocol is {}.{:02}, and 2.06 (Linux 2.6.22) is the oldest supported",
                version >> 8,
                version & 0xff
            )));
        }
        if sector[offset::LOADFLAGS] & LOADED_HIGH == 0 {
            return Err(loader.unsupported("it is a zImage, which loads below 1 MiB"));
        }
        let sectors = match sector[offset::SETUP_SECTS] {
            0 => 4,
            n => u64::from(n),
        };
        let setup_size = (sectors + 1) * 512;
        image.check(0, setup_size, "real-mode part")?;
        let kernel_size = match u64::from(u32_at(&sector, offset::SYSSIZE)) * 16 {
            0 => image.size() - setup_size,
            size => size,
        };
        image.check(setup_size, kernel_size, "protected-mode part")?;
        if kernel_size <= ENTRY_64 {
            return Err(loader.bad("its protected-mode part is empty"));
        }
        let alignment = u64::from(u32_at(&sector, offset::KERNEL_ALIGNMENT));
        let relocatable = sector[offset::RELOCATABLE] != 0;
        if relocatable && !alignment.is_power_of_two() {
            return Err(loader.bad(format!("its alignment of {alignment:#x} is not a power of two")));
        }
        // Before 2.10 a kernel decompresses from 1 MiB on and does not say how much it needs.
        let (pref_address, init_size) = if version >= 0x20a {
            (u64_at(&sector, offset::PREF_ADDRESS), u64::from(u32_at(&sector, offset::INIT_SIZE)))
        } else {
            (ONE_MIB, kernel_size.saturating_mul(4))
        };
        let header_end = 0x202 + usize::from(sector[offset::JUMP]);
        Ok(Self {
            raw: sector[zero_page::HEADER..header_end.min(zero_page::HEADER_END)].to_vec(),
            setup_size,
            kernel_size,
            relocatable,
            alignment,
            pref_address,
            init_size: init_size.max(kernel_size),
            initrd_max: u64::from(u32_at(&sector, offset::INITRD_ADDR_MAX)),
            cmdline_max: match u32_at(&sector, offset::CMDLINE_SIZE) {
                0 => 255,
                n => n.min(MAX_CMDLINE) as usize,
            },
            has_entry_64: version >= 0x20c && u16_at(&sector, offset::XLOADFLAGS) & XLF_KERNEL_64 != 0,
            version_text: match u16_at(&sector, offset::KERNEL_VERSION) {
                0 => 0,
                at => u64::from(at) + 0x200,
            },
        })
    }

    /// Where the kernel goes: where it would like to be. One that is loaded below moves itself there (boot.rst,
    /// `pref_address`), so that less RAM does not help.
    fn address(&self, loader: &Loader<'_>) -> Result<u64, LoadError> {
        let preferred = if self.relocatable {
            self.pref_address.max(ONE_MIB).checked_next_multiple_of(self.alignment).unwrap_or(u64::MAX)
        } else {
            self.pref_address
        };
        if preferred < ONE_MIB {
            return Err(loader.bad(format!("it wants to be loaded at {preferred:#x}, below 1 MiB")));
        }
        loader.check_fits(preferred.saturating_add(self.init_size))?;
        Ok(preferred)
    }

    /// The text of the version, up to its ending zero.
    fn version(&self, loader: &Loader<'_>) -> Result<Option<String>, LoadError> {
        if self.version_text == 0 || self.version_text >= self.setup_size {
            return Ok(None);
        }
        let text = loader.request.kernel.prefix(self.version_text, MAX_VERSION)?;
        let text = text.split(|&b| b == 0).next().unwrap_or_default();
        Ok(Some(String::from_utf8_lossy(text).trim().to_owned()).filter(|t| !t.is_empty()))
    }
}

/// Loads a bzImage.
pub(crate) fn load(loader: &mut Loader<'_>) -> Result<Loaded, LoadError> {
    let header = Header::read(loader)?;
    let long = match loader.request.entry {
        EntryChoice::Linux32 => false,
        EntryChoice::Linux64 if !header.has_entry_64 => {
            return Err(loader.unsupported("it is a 32-bit bzImage, which has no 64-bit Linux entry"));
        }
        _ => header.has_entry_64,
    };
    let address = header.address(loader)?;
    let kernel = address..address + header.init_size;
    loader.take_kernel(kernel.clone())?;
    loader.copy_kernel(header.setup_size, header.kernel_size, address, header.kernel_size)?;

    let mut page = ZeroPage::with_header(&header.raw);
    let initrd = loader.initrd(header.initrd_max.saturating_add(1))?;
    let kind = if long { KernelKind::BzImage64 } else { KernelKind::BzImage32 };
    let entry_at = if long { address + ENTRY_64 } else { address };
    let mut loaded = start_linux(loader, &mut page, header.cmdline_max, entry_at, kind, initrd)?;
    loaded.version = header.version(loader)?;
    loaded.kernel = kernel;
    Ok(loaded)
}

/// Completes and writes the zero page, and makes the state of the 32-bit (for [`KernelKind::BzImage32`]) or 64-bit
/// boot protocol. The caller fills in what it knows of the kernel.
pub(crate) fn start_linux(
    loader: &mut Loader<'_>,
    page: &mut ZeroPage,
    cmdline_max: usize,
    entry_at: u64,
    kind: KernelKind,
    initrd: Option<std::ops::Range<u64>>,
) -> Result<Loaded, LoadError> {
    page.cmdline(loader.cmdline(cmdline_max)?);
    if let Some(initrd) = &initrd {
        page.initrd(initrd.start, initrd.end - initrd.start);
    }
    if let Some(rsdp) = loader.rsdp {
        page.rsdp(rsdp);
    }
    page.memory_map(&loader.map, e820::upper_kib(loader.place.end()));
    let page_at = loader.write_low("the boot parameters", page.bytes(), 4096)?;
    let long = kind != KernelKind::BzImage32;
    let gdt_at = loader.write_low("the descriptor table", &entry::gdt(long), GDT_SIZE.next_power_of_two())?;
    let mut state = if long {
        let tables_at = loader.low("the page tables", PAGE_TABLES_SIZE, 4096)?;
        loader.write(tables_at, &entry::identity_tables(tables_at))?;
        entry::long_mode(entry_at, gdt_at, tables_at)
    } else {
        entry::protected_mode(entry_at as u32, gdt_at)
    };
    state.gpr[reg::RSI] = page_at;
    Ok(Loaded {
        entry: state,
        kind,
        version: None,
        kernel: 0..0,
        modules: initrd.into_iter().collect(),
        rsdp: loader.rsdp,
    })
}
