//! The guest that times exits, as a file that every monitor loads: an ELF kernel with the note of the PVH protocol.

use std::arch::global_asm;

global_asm!(
    ".pushsection .rodata.monitors, \"a\"",
    ".code32",
    include_str!("guest.S"),
    ".code64",
    ".popsection",
    options(att_syntax)
);

/// Where the image is loaded and entered, and what it asks for with its stack (`guest.S`).
const IMAGE: u64 = 0x10_0000;
const MEMORY: u64 = 0x1_0000;
/// Exits of each kind that it times (`guest.S`).
pub const EXITS: f64 = 4096.0;

/// XEN_ELFNOTE_PHYS32_ENTRY: the address at which the kernel is entered (Xen, xen/include/public/elfnote.h).
const PHYS32_ENTRY: u32 = 18;
/// Sizes of ELF64 structures (System V ABI).
const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
const LOAD: u32 = 1;
const NOTE: u32 = 4;

/// The image as it is in memory.
fn image() -> &'static [u8] {
    unsafe extern "C" {
        static monitors_guest: u8;
        static monitors_guest_end: u8;
    }
    // SAFETY: the labels are the bounds of one run of bytes that nothing writes.
    unsafe {
        let start = &raw const monitors_guest;
        std::slice::from_raw_parts(start, (&raw const monitors_guest_end).offset_from_unsigned(start))
    }
}

/// The file.
pub fn elf() -> Vec<u8> {
    let note = note();
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let image_at = note_at + note.len() as u64;
    let mut file = header();
    file.extend(program_header(LOAD, image_at, IMAGE, image().len() as u64, MEMORY));
    file.extend(program_header(NOTE, note_at, 0, note.len() as u64, note.len() as u64));
    file.extend(note);
    file.extend(image());
    file
}

/// e_ident, type (executable), machine (x86-64), version, entry, program headers, no sections.
fn header() -> Vec<u8> {
    let mut header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    header.extend([2_u16, 62].into_iter().flat_map(u16::to_le_bytes));
    header.extend(1_u32.to_le_bytes());
    header.extend([IMAGE, HEADER, 0].into_iter().flat_map(u64::to_le_bytes));
    header.extend(0_u32.to_le_bytes());
    let sizes = [HEADER as u16, PROGRAM_HEADER as u16, 2, 0, 0, 0];
    header.extend(sizes.into_iter().flat_map(u16::to_le_bytes));
    header
}

fn program_header(kind: u32, offset: u64, address: u64, in_file: u64, in_memory: u64) -> Vec<u8> {
    const ALL_ACCESS: u32 = 7;
    const ALIGN: u64 = 4;
    let words = [kind, ALL_ACCESS].into_iter().flat_map(u32::to_le_bytes);
    let longs = [offset, address, address, in_file, in_memory, ALIGN].into_iter().flat_map(u64::to_le_bytes);
    words.chain(longs).collect()
}

fn note() -> Vec<u8> {
    const NAME: [u8; 4] = *b"Xen\0";
    let words = [NAME.len() as u32, size_of::<u64>() as u32, PHYS32_ENTRY];
    words.into_iter().flat_map(u32::to_le_bytes).chain(NAME).chain(IMAGE.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_says_where_its_parts_are() {
        let file = elf();
        let long = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
        let (load, note) = (HEADER as usize, (HEADER + PROGRAM_HEADER) as usize);
        assert_eq!(long(load + 8) + long(load + 32), file.len() as u64, "the image ends the file");
        assert_eq!(file[long(load + 8) as usize..][..4], image()[..4]);
        assert_eq!(long(note + 8) + long(note + 32), long(load + 8), "the note is before it");
        assert_eq!(long(long(note + 8) as usize + 16), IMAGE, "entry");
        assert!(image().len() < MEMORY as usize / 2, "room for the stack");
    }
}
