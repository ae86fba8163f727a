//! Guests without a system, for the modes that 64-bit systems leave at once. They are assembled into the test
//! (`guests/`) and run as multiboot kernels.

use std::arch::global_asm;
use std::fs;

use tempfile::TempDir;

use crate::machine::{Ended, Machine, word};

global_asm!(
    ".pushsection .rodata.guests, \"a\"",
    ".code32",
    include_str!("guests/common.S"),
    include_str!("guests/real_mode.S"),
    include_str!("guests/protected_mode.S"),
    include_str!("guests/pae.S"),
    include_str!("guests/tasks.S"),
    include_str!("guests/virtual_8086.S"),
    include_str!("guests/multiboot.S"),
    include_str!("guests/ends.S"),
    ".code64",
    ".popsection",
    options(att_syntax)
);

/// The image between two labels of a guest.
macro_rules! image {
    ($start:ident, $end:ident) => {{
        unsafe extern "C" {
            static $start: u8;
            static $end: u8;
        }
        // SAFETY: the labels are the bounds of one run of bytes that nothing writes.
        unsafe {
            let start = &raw const $start;
            std::slice::from_raw_parts(start, (&raw const $end).offset_from_unsigned(start))
        }
    }};
}
pub(crate) use image;

/// A guest in a file. The image is a multiboot kernel whose header says where to load it.
pub struct Bare {
    dir: TempDir,
}

impl Bare {
    /// Writes an image as it is.
    pub fn flat(image: &[u8]) -> Self {
        let bare = Self { dir: tempfile::tempdir().unwrap() };
        fs::write(bare.dir.path().join("kernel"), image).unwrap();
        bare
    }

    /// Writes an image as an ELF file of 32 bits, whose multiboot header says nothing of addresses.
    pub fn elf32(image: &[u8]) -> Self {
        const HEADERS: u32 = 52 + 32;
        let field = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap());
        let (magic, load, entry, size) = (field(0), field(16), field(28), image.len() as u32);
        let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0\x01\0\0\0".to_vec();
        // Entry, program headers, no sections, flags; sizes and counts.
        file.extend([entry, 52, 0, 0].map(u32::to_le_bytes).concat());
        file.extend([52u16, 32, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
        // Loadable; offset, addresses, sizes, readable, writable and executable, alignment.
        file.extend([1, HEADERS, load, load, size, size, 7, 4].map(u32::to_le_bytes).concat());
        file.extend([magic, 0, magic.wrapping_neg()].map(u32::to_le_bytes).concat());
        file.extend(&image[12..]);
        Self::flat(&file)
    }

    /// The path of the kernel.
    pub fn kernel(&self) -> String {
        word(&self.dir.path().join("kernel")).to_owned()
    }

    /// Puts a file beside the kernel and gives its path.
    pub fn file(&self, name: &str, content: &str) -> String {
        let path = self.dir.path().join(name);
        fs::write(&path, content).unwrap();
        word(&path).to_owned()
    }

    /// The words of `ruse run` for this guest.
    pub fn words<'a>(&self, kernel: &'a str, options: &[&'a str]) -> Vec<&'a str> {
        [&["--kernel", kernel, "--memory", "16M", "--debug-exit"], options].concat()
    }

    /// Runs the guest to its end.
    pub fn run(&self, options: &[&str]) -> Ended {
        let kernel = self.kernel();
        Machine::start(&self.words(&kernel, options)).end()
    }
}
