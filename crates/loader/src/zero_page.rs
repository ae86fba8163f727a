//! The boot parameters of Linux, the "zero page" (Documentation/arch/x86/zero-page.rst and boot.rst).

use crate::e820::MapEntry;

/// Bytes of the zero page.
pub(crate) const SIZE: usize = 4096;
/// Where the setup header begins, in the zero page as in a bzImage.
pub(crate) const HEADER: usize = 0x1f1;
/// End of the room that the zero page has for the setup header.
pub(crate) const HEADER_END: usize = 0x290;
/// Most bytes of a command line that Linux for x86 keeps (`COMMAND_LINE_SIZE` less its ending zero).
pub(crate) const MAX_CMDLINE: usize = 2047;
/// Most entries of the memory map in the zero page (`E820_MAX_ENTRIES_ZEROPAGE`).
const MAX_MAP: usize = 128;

/// Offsets of the fields of the setup header (boot.rst, "The Real-Mode Kernel Header").
pub(crate) mod offset {
    /// Sectors of the real-mode part after the first.
    pub(crate) const SETUP_SECTS: usize = 0x1f1;
    /// Size of the protected-mode part in 16-byte units.
    pub(crate) const SYSSIZE: usize = 0x1f4;
    /// AA55h.
    pub(crate) const BOOT_FLAG: usize = 0x1fe;
    /// Displacement of the jump over the header, which gives the header's end.
    pub(crate) const JUMP: usize = 0x201;
    /// "HdrS".
    pub(crate) const MAGIC: usize = 0x202;
    /// Version of the protocol.
    pub(crate) const VERSION: usize = 0x206;
    /// Where the text of the kernel's version is, less 200h.
    pub(crate) const KERNEL_VERSION: usize = 0x20e;
    /// Number of the boot loader.
    pub(crate) const TYPE_OF_LOADER: usize = 0x210;
    /// Flags of the protocol.
    pub(crate) const LOADFLAGS: usize = 0x211;
    /// Address of the initial RAM disk.
    pub(crate) const RAMDISK_IMAGE: usize = 0x218;
    /// Bytes of the initial RAM disk.
    pub(crate) const RAMDISK_SIZE: usize = 0x21c;
    /// Address of the command line.
    pub(crate) const CMD_LINE_PTR: usize = 0x228;
    /// Highest address of the initial RAM disk's last byte.
    pub(crate) const INITRD_ADDR_MAX: usize = 0x22c;
    /// Alignment of the kernel in memory.
    pub(crate) const KERNEL_ALIGNMENT: usize = 0x230;
    /// Whether the kernel may be loaded elsewhere.
    pub(crate) const RELOCATABLE: usize = 0x234;
    /// Flags of the 64-bit protocol.
    pub(crate) const XLOADFLAGS: usize = 0x236;
    /// Most bytes of the command line, without its end.
    pub(crate) const CMDLINE_SIZE: usize = 0x238;
    /// Address at which the kernel would like to be.
    pub(crate) const PREF_ADDRESS: usize = 0x258;
    /// Bytes that the kernel needs from its load address on.
    pub(crate) const INIT_SIZE: usize = 0x260;

    /// Address of the ACPI RSDP (zero page only).
    pub(crate) const ACPI_RSDP: usize = 0x70;
    /// High half of `RAMDISK_IMAGE` (zero page only).
    pub(crate) const EXT_RAMDISK_IMAGE: usize = 0xc0;
    /// High half of `RAMDISK_SIZE` (zero page only).
    pub(crate) const EXT_RAMDISK_SIZE: usize = 0xc4;
    /// High half of `CMD_LINE_PTR` (zero page only).
    pub(crate) const EXT_CMD_LINE_PTR: usize = 0xc8;
    /// KiB of memory above 1 MiB (zero page only).
    pub(crate) const ALT_MEM_K: usize = 0x1e0;
    /// Number of entries of the memory map (zero page only).
    pub(crate) const E820_ENTRIES: usize = 0x1e8;
    /// The memory map, 20 bytes per entry (zero page only).
    pub(crate) const E820_TABLE: usize = 0x2d0;
}

/// Bit of `loadflags`: the kernel loads at 1 MiB or above.
pub(crate) const LOADED_HIGH: u8 = 1 << 0;
/// Bit of `loadflags`: early messages are suppressed.
pub(crate) const QUIET: u8 = 1 << 5;
/// A boot loader without a number of its own.
const UNKNOWN_LOADER: u8 = 0xff;

/// A zero page under construction.
pub(crate) struct ZeroPage(Box<[u8; SIZE]>);

impl ZeroPage {
    /// The page for a kernel with this setup header (its bytes from [`HEADER`] on; what exceeds the room is left out).
    pub(crate) fn with_header(header: &[u8]) -> Self {
        let mut page = Self(Box::new([0; SIZE]));
        let len = header.len().min(HEADER_END - HEADER);
        page.0[HEADER..HEADER + len].copy_from_slice(&header[..len]);
        page.0[offset::TYPE_OF_LOADER] = UNKNOWN_LOADER;
        // No heap, no kept segments: those serve the 16-bit entry.
        page.0[offset::LOADFLAGS] = page.0[offset::LOADFLAGS] & QUIET | LOADED_HIGH;
        page
    }

    /// The page for a kernel without a setup header (an uncompressed vmlinux).
    pub(crate) fn new() -> Self {
        let mut page = Self::with_header(&[]);
        page.put(offset::BOOT_FLAG, &0xaa55u16.to_le_bytes());
        page.put(offset::MAGIC, b"HdrS");
        page.put(offset::VERSION, &0x20fu16.to_le_bytes());
        page.put(offset::KERNEL_ALIGNMENT, &0x20_0000u32.to_le_bytes());
        page.put(offset::CMDLINE_SIZE, &(MAX_CMDLINE as u32).to_le_bytes());
        page
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put_split(&mut self, low: usize, high: usize, value: u64) {
        self.put(low, &(value as u32).to_le_bytes());
        self.put(high, &((value >> 32) as u32).to_le_bytes());
    }

    /// Address of the command line.
    pub(crate) fn cmdline(&mut self, gpa: u64) {
        self.put_split(offset::CMD_LINE_PTR, offset::EXT_CMD_LINE_PTR, gpa);
    }

    /// Address and bytes of the initial RAM disk.
    pub(crate) fn initrd(&mut self, gpa: u64, size: u64) {
        self.put_split(offset::RAMDISK_IMAGE, offset::EXT_RAMDISK_IMAGE, gpa);
        self.put_split(offset::RAMDISK_SIZE, offset::EXT_RAMDISK_SIZE, size);
    }

    /// Address of the ACPI RSDP.
    pub(crate) fn rsdp(&mut self, gpa: u64) {
        self.put(offset::ACPI_RSDP, &gpa.to_le_bytes());
    }

    /// The memory map, and the memory above 1 MiB in KiB that old kernels read.
    pub(crate) fn memory_map(&mut self, map: &[MapEntry], upper_kib: u64) {
        let map = &map[..map.len().min(MAX_MAP)];
        for (i, entry) in map.iter().enumerate() {
            let at = offset::E820_TABLE + 20 * i;
            self.put(at, &entry.start.to_le_bytes());
            self.put(at + 8, &entry.size.to_le_bytes());
            self.put(at + 16, &(entry.kind as u32).to_le_bytes());
        }
        self.0[offset::E820_ENTRIES] = map.len() as u8;
        self.put(offset::ALT_MEM_K, &(upper_kib.min(u32::MAX.into()) as u32).to_le_bytes());
    }

    /// The bytes of the page.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0[..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::e820::MemoryKind;

    #[test]
    fn fields_are_where_linux_reads_them() {
        let mut page = ZeroPage::with_header(&[0xee; 4096]);
        page.initrd(0x1_2345_6000, 0x2_0000_0001);
        page.rsdp(0xe_0000);
        page.memory_map(&[MapEntry { start: 1, size: 2, kind: MemoryKind::Reserved }; 200], 7);
        let b = page.bytes();
        assert_eq!(b[HEADER_END], 0);
        assert_eq!(b[0x210], 0xff);
        assert_eq!(b[0x211], 0x21);
        assert_eq!(b[0x1e8], 128);
        assert_eq!(b[0x218..0x220], [0x00, 0x60, 0x45, 0x23, 1, 0, 0, 0]);
        assert_eq!(b[0xc0..0xc8], [1, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(b[0x2d0..0x2e4], [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    }
}
