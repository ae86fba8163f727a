//! Kernels made by hand, as small as their formats allow.

/// Puts little-endian fields into bytes.
pub fn put(bytes: &mut [u8], at: usize, value: u64, width: usize) {
    bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
}

/// Bytes of the protected-mode part of [`bzimage`].
pub const BZIMAGE_CODE: usize = 0x400;

/// A relocatable bzImage of protocol 2.15 with a 64-bit entry; it prefers 16 MiB and needs 4 MiB there.
pub fn bzimage() -> Vec<u8> {
    let mut b = vec![0; 1024 + BZIMAGE_CODE];
    b[0x1f1] = 1;
    put(&mut b, 0x1f4, BZIMAGE_CODE as u64 / 16, 4);
    put(&mut b, 0x1fe, 0xaa55, 2);
    put(&mut b, 0x200, 0x6aeb, 2);
    b[0x202..0x206].copy_from_slice(b"HdrS");
    put(&mut b, 0x206, 0x20f, 2);
    put(&mut b, 0x20e, 0x100, 2);
    b[0x300..0x30a].copy_from_slice(b"9.9-test\0x");
    b[0x211] = 1;
    put(&mut b, 0x22c, 0x7fff_ffff, 4);
    put(&mut b, 0x230, 0x20_0000, 4);
    b[0x234] = 1;
    put(&mut b, 0x236, 1, 2);
    put(&mut b, 0x238, 2047, 4);
    put(&mut b, 0x258, 0x100_0000, 8);
    put(&mut b, 0x260, 0x40_0000, 4);
    b[1024..].fill(0xc0);
    b
}

/// An ELF64 with one segment of sixteen bytes (32 in memory) at 1 MiB, linked at `virt`, and a PVH note with `pvh`.
pub fn elf64(virt: u64, pvh: Option<u64>) -> Vec<u8> {
    let mut b = vec![0; 64 + 2 * 56];
    b[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    put(&mut b, 16, 2, 2);
    put(&mut b, 18, 62, 2);
    put(&mut b, 24, 0x10_0004, 8);
    put(&mut b, 32, 64, 8);
    put(&mut b, 54, 56, 2);
    put(&mut b, 56, if pvh.is_some() { 2 } else { 1 }, 2);
    let notes = b.len();
    if let Some(entry) = pvh {
        // Another note comes first.
        for (owner, kind, desc) in [(*b"GNU\0", 3, 0xabcd), (*b"Xen\0", 18, entry)] {
            b.extend(4u32.to_le_bytes());
            b.extend(8u32.to_le_bytes());
            b.extend(u32::to_le_bytes(kind));
            b.extend(owner);
            b.extend(u64::to_le_bytes(desc));
        }
    }
    let code = b.len();
    b.extend([0x90; 16]);
    header64(&mut b, 64, [1, code as u64, virt, 0x10_0000, 16, 32]);
    header64(&mut b, 120, [4, notes as u64, 0, 0, (code - notes) as u64, 0]);
    b
}

fn header64(b: &mut [u8], at: usize, [kind, offset, virt, phys, file, memory]: [u64; 6]) {
    put(b, at, kind, 4);
    for (i, field) in [offset, virt, phys, file, memory, 4].into_iter().enumerate() {
        put(b, at + 8 + 8 * i, field, 8);
    }
}

/// A multiboot kernel without a format: 32 bytes of header at 4, all loaded at 1 MiB, 8 KiB of zeros behind it.
pub fn multiboot_flat() -> Vec<u8> {
    let mut b = vec![0x90; 64];
    let flags = 0x1_0003u32;
    let sum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
    let fields = [0x1bad_b002, flags, sum, 0x10_0004, 0x10_0000, 0x10_0040, 0x10_2040, 0x10_0024];
    for (i, field) in fields.into_iter().enumerate() {
        put(&mut b, 4 + 4 * i, field.into(), 4);
    }
    b
}

/// An ELF32 multiboot kernel: its only segment is the file's tail with the multiboot header, at 2 MiB.
pub fn multiboot_elf32() -> Vec<u8> {
    let mut b = vec![0; 52 + 32];
    b[..7].copy_from_slice(b"\x7fELF\x01\x01\x01");
    put(&mut b, 16, 2, 2);
    put(&mut b, 18, 3, 2);
    put(&mut b, 24, 0x20_000c, 4);
    put(&mut b, 28, 52, 4);
    put(&mut b, 42, 32, 2);
    put(&mut b, 44, 1, 2);
    for (i, field) in [1, 84, 0x20_0000, 0x20_0000, 28, 64, 7, 4].into_iter().enumerate() {
        put(&mut b, 52 + 4 * i, field, 4);
    }
    for field in [0x1bad_b002u32, 0, 0u32.wrapping_sub(0x1bad_b002)] {
        b.extend(field.to_le_bytes());
    }
    b.extend([0x90; 16]);
    b
}

/// All of them.
pub fn all() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("bzimage", bzimage()),
        ("pvh", elf64(0x10_0000, Some(0x10_0008))),
        ("vmlinux", elf64(0xffff_ffff_8010_0000, None)),
        ("flat", multiboot_flat()),
        ("elf32", multiboot_elf32()),
    ]
}
