//! Whole loads: of small images made by hand, of damaged ones, and of real ones where there are any.

use crate::test_images::{BZIMAGE_CODE, bzimage, elf64, multiboot_elf32, multiboot_flat, put};
use ruse_arch::flags::{cr0, efer};
use ruse_arch::state::reg;
use ruse_memory::GuestRam;
use ruse_random::Random;
use vm_memory::{Bytes, GuestAddress};

use crate::bytes::{u32_at, u64_at};
use crate::{
    AcpiConfig, EntryChoice, Image, KernelKind, LoadError, LoadRequest, Loaded, Module, load, test_images,
};

const MIB: u64 = 1 << 20;

fn ram(mib: u64) -> GuestRam {
    GuestRam::new(mib * MIB).unwrap()
}

fn module(bytes: &[u8], args: &str) -> Module {
    Module { image: Image::from_bytes(args, bytes.to_vec()), args: args.to_owned() }
}

fn run(bytes: Vec<u8>, entry: EntryChoice, modules: &[Module], ram: &GuestRam) -> Result<Loaded, LoadError> {
    let kernel = Image::from_bytes("kernel", bytes);
    let acpi = AcpiConfig::new(2);
    load(&LoadRequest { kernel: &kernel, modules, cmdline: "console=ttyS0", acpi: Some(&acpi), entry }, ram)
}

fn read(ram: &GuestRam, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.memory().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
    bytes
}

fn text(ram: &GuestRam, gpa: u64) -> String {
    let bytes = read(ram, gpa, 256);
    String::from_utf8(bytes.split(|b| *b == 0).next().unwrap().to_vec()).unwrap()
}

#[test]
fn bzimage_starts_in_long_mode() {
    let ram = ram(64);
    let initrd = [module(b"12345", "a"), module(b"678", "b")];
    let loaded = run(bzimage(), EntryChoice::Auto, &initrd, &ram).unwrap();
    assert_eq!(loaded.kind, KernelKind::BzImage64);
    assert_eq!(loaded.version.as_deref(), Some("9.9-test"));
    assert_eq!(loaded.kernel, 0x100_0000..0x140_0000);
    let state = &loaded.entry;
    assert_eq!(state.rip, 0x100_0200);
    assert_eq!((state.cr0 & cr0::PG, state.efer & efer::LMA), (cr0::PG, efer::LMA));
    assert_eq!(read(&ram, 0x100_0000, BZIMAGE_CODE), vec![0xc0; BZIMAGE_CODE]);

    let page = read(&ram, state.gpr[reg::RSI], 4096);
    assert_eq!(text(&ram, u32_at(&page, 0x228).into()), "console=ttyS0");
    assert_eq!(u32_at(&page, 0x238), 2047);
    assert_eq!(u64_at(&page, 0x70), 0xe_0000);
    assert_eq!(read(&ram, 0xe_0000, 8), b"RSD PTR ");
    let (start, size) = (u32_at(&page, 0x218), u32_at(&page, 0x21c));
    assert_eq!((u64::from(start), size), (64 * MIB - 4096, 11));
    assert_eq!(read(&ram, start.into(), 11), b"12345\x00\x00\x00678");
    assert_eq!(loaded.modules, [64 * MIB - 4096..64 * MIB - 4096 + 11]);
    assert_eq!(page[0x1e8], 4);
}

#[test]
fn bzimage_has_a_32_bit_entry() {
    let ram = ram(64);
    let loaded = run(bzimage(), EntryChoice::Linux32, &[], &ram).unwrap();
    assert_eq!((loaded.kind, loaded.entry.rip), (KernelKind::BzImage32, 0x100_0000));
    assert_eq!(loaded.entry.cr0 & (cr0::PE | cr0::PG), cr0::PE);
    let mut old = bzimage();
    put(&mut old, 0x236, 0, 2);
    assert_eq!(run(old.clone(), EntryChoice::Auto, &[], &ram).unwrap().kind, KernelKind::BzImage32);
    assert!(matches!(run(old, EntryChoice::Linux64, &[], &ram), Err(LoadError::Unsupported { .. })));
    assert!(matches!(run(bzimage(), EntryChoice::Pvh, &[], &ram), Err(LoadError::Unsupported { .. })));
}

#[test]
fn bzimage_needs_ram_where_it_runs() {
    let mut fixed = bzimage();
    fixed[0x234] = 0;
    for kernel in [bzimage(), fixed] {
        let loaded = run(kernel.clone(), EntryChoice::Auto, &[], &ram(20)).unwrap();
        assert_eq!(loaded.kernel, 0x100_0000..0x140_0000);
        let e = run(kernel, EntryChoice::Auto, &[], &ram(8)).unwrap_err();
        assert_eq!(e.to_string(), "the VM has 8 MiB of RAM, but 'kernel' needs at least 20 MiB");
    }
}

#[test]
fn initrd_obeys_the_limit() {
    let ram = ram(64);
    let mut kernel = bzimage();
    put(&mut kernel, 0x22c, 0x1ff_ffff, 4);
    let loaded = run(kernel.clone(), EntryChoice::Auto, &[module(&[7; 4096], "i")], &ram).unwrap();
    assert_eq!(loaded.modules, [0x1ff_f000..0x200_0000]);
    let e = run(kernel, EntryChoice::Auto, &[module(&[7; 16 << 20], "big")], &ram).unwrap_err();
    assert_eq!(
        e.to_string(),
        "the initrd 'big' of 16 MiB does not fit in RAM: 15 MiB are free where the kernel can use it"
    );
}

#[test]
fn long_command_lines_are_refused() {
    let kernel = Image::from_bytes("k", bzimage());
    let ram = ram(64);
    let with = |cmdline: &str| {
        load(
            &LoadRequest { kernel: &kernel, modules: &[], cmdline, acpi: None, entry: EntryChoice::Auto },
            &ram,
        )
    };
    assert!(with(&"x".repeat(2047)).is_ok());
    let e = with(&"x".repeat(2048)).unwrap_err();
    assert_eq!(e.to_string(), "the command line has 2048 bytes, but 'k' takes at most 2047");
    assert!(matches!(with("a\0b"), Err(LoadError::CmdlineZero)));
}

#[test]
fn pvh_describes_the_machine() {
    let ram = ram(8);
    let kernel = elf64(0x10_0000, Some(0x10_0008));
    let loaded = run(kernel, EntryChoice::Auto, &[module(b"abc", "m x=1")], &ram).unwrap();
    assert_eq!((loaded.kind, loaded.entry.rip), (KernelKind::Pvh, 0x10_0008));
    assert_eq!(loaded.entry.cr0 & (cr0::PE | cr0::PG), cr0::PE);
    let info = read(&ram, loaded.entry.gpr[reg::RBX], 56);
    assert_eq!((u32_at(&info, 0), u32_at(&info, 4), u32_at(&info, 12)), (0x336e_c578, 1, 1));
    assert_eq!(text(&ram, u64_at(&info, 24)), "console=ttyS0");
    assert_eq!(u64_at(&info, 32), 0xe_0000);
    let module = read(&ram, u64_at(&info, 16), 32);
    assert_eq!(read(&ram, u64_at(&module, 0), 3), b"abc");
    assert_eq!((u64_at(&module, 8), text(&ram, u64_at(&module, 16))), (3, "m x=1".to_owned()));
    let map = read(&ram, u64_at(&info, 40), 24 * u32_at(&info, 48) as usize);
    let last = &map[map.len() - 24..];
    assert_eq!((u64_at(last, 0), u64_at(last, 8), u32_at(last, 16)), (0xe000_0000, 256 * MIB, 2));
}

#[test]
fn vmlinux_starts_with_a_zero_page() {
    let ram = ram(8);
    let linux = elf64(0xffff_ffff_8010_0000, None);
    let loaded = run(linux, EntryChoice::Auto, &[], &ram).unwrap();
    assert_eq!((loaded.kind, loaded.entry.rip), (KernelKind::Vmlinux, 0x10_0004));
    let page = read(&ram, loaded.entry.gpr[reg::RSI], 4096);
    assert_eq!(&page[0x202..0x206], b"HdrS");
    let both = elf64(0xffff_ffff_8010_0000, Some(0x10_0000));
    assert_eq!(run(both.clone(), EntryChoice::Auto, &[], &ram).unwrap().kind, KernelKind::Pvh);
    assert_eq!(run(both, EntryChoice::Linux64, &[], &ram).unwrap().kind, KernelKind::Vmlinux);
    // Another program of the host.
    let e = run(elf64(0x10_0000, None), EntryChoice::Auto, &[], &ram).unwrap_err();
    assert!(e.to_string().contains("a 64-bit ELF executable without a PVH note"), "{e}");
}

#[test]
fn multiboot_describes_the_machine() {
    let ram = ram(8);
    let modules = [module(b"one", "first a,b"), module(b"second", "second")];
    for (kernel, entry, end) in
        [(multiboot_flat(), 0x10_0024, 0x10_2040), (multiboot_elf32(), 0x20_000c, 0x20_0040)]
    {
        let loaded = run(kernel, EntryChoice::Auto, &modules, &ram).unwrap();
        assert_eq!((loaded.kind, loaded.entry.rip, loaded.kernel.end), (KernelKind::Multiboot, entry, end));
        assert_eq!(loaded.entry.gpr[reg::RAX], 0x2bad_b002);
        let info = read(&ram, loaded.entry.gpr[reg::RBX], 116);
        assert_eq!(u32_at(&info, 0), 0x24d);
        assert_eq!((u32_at(&info, 4), u32_at(&info, 8)), (639, 7 * 1024));
        assert_eq!(text(&ram, u32_at(&info, 16).into()), "kernel console=ttyS0");
        assert_eq!(u32_at(&info, 20), 2);
        let list = read(&ram, u32_at(&info, 24).into(), 32);
        for (entry, (bytes, args)) in
            list.chunks(16).zip([(&b"one"[..], "first a,b"), (&b"second"[..], "second")])
        {
            let (start, end) = (u32_at(entry, 0), u32_at(entry, 4));
            assert_eq!(start % 4096, 0);
            assert_eq!(read(&ram, start.into(), (end - start) as usize), bytes);
            assert_eq!(text(&ram, u32_at(entry, 8).into()), args);
        }
        assert_eq!(text(&ram, u32_at(&info, 64).into()), "ruse");
        let map = read(&ram, u32_at(&info, 48).into(), u32_at(&info, 44) as usize);
        assert_eq!((map.len(), u32_at(&map, 0), u64_at(&map, 12)), (4 * 24, 20, 0x9_fc00));
    }
}

#[test]
fn memory_after_the_data_is_cleared() {
    let ram = ram(8);
    ram.memory().write_slice(&[0xff; 0x3000], GuestAddress(0x10_0000)).unwrap();
    run(multiboot_flat(), EntryChoice::Auto, &[], &ram).unwrap();
    assert_eq!(read(&ram, 0x10_0040, 0x2000), vec![0; 0x2000]);
    assert_eq!(read(&ram, 0x10_2040, 2), [0xff; 2]);
}

#[test]
fn every_truncation_is_an_error() {
    let ram = ram(64);
    for (name, image) in test_images::all() {
        for len in 0..image.len() {
            let result = run(image[..len].to_vec(), EntryChoice::Auto, &[], &ram);
            assert!(result.is_err(), "{name} cut to {len} bytes");
        }
        run(image, EntryChoice::Auto, &[], &ram).unwrap();
    }
    let mut cut = bzimage();
    cut.truncate(cut.len() - 7);
    let e = run(cut, EntryChoice::Auto, &[], &ram).unwrap_err();
    assert_eq!(e.to_string(), "'kernel' is truncated: 7 bytes of its protected-mode part are missing");
}

#[test]
fn hostile_headers_are_errors_or_load() {
    let ram = ram(32);
    for (_, image) in test_images::all() {
        let ends = [0..image.len().min(512), 0x1f1..image.len().min(0x290)];
        for at in ends.into_iter().flatten() {
            for width in [1, 2, 4, 8] {
                for value in [0, 1, 0x7fff_ffff_ffff_ffff, u64::MAX, u64::MAX - 15, 0x8000_0000, 0x10_0000] {
                    let mut bad = image.clone();
                    if at + width <= bad.len() {
                        put(&mut bad, at, value, width);
                        let _ = run(bad, EntryChoice::Auto, &[], &ram);
                    }
                }
            }
        }
    }
}

#[test]
fn random_damage_does_no_harm() {
    let ram = ram(32);
    let mut random = Random::new(0);
    for (_, image) in test_images::all() {
        for _ in 0..2000 {
            let mut bad = image.clone();
            for _ in 0..=random.below(6) {
                let at = random.below(bad.len() as u64) as usize;
                bad[at] = random.word() as u8;
            }
            for entry in [EntryChoice::Auto, EntryChoice::Linux64, EntryChoice::Multiboot] {
                let _ = run(bad.clone(), entry, &[], &ram);
            }
        }
    }
}

#[test]
fn what_is_not_a_kernel_is_named() {
    let ram = ram(8);
    for (bytes, what) in [
        (&b""[..], "an empty file"),
        (b"\x1f\x8b\x08", "gzip-compressed data"),
        (b"hello world\n", "text"),
        (b"\0\x01\x02\x03\0\0", "unknown data"),
        (b"070701", "a cpio archive"),
    ] {
        let e = run(bytes.to_vec(), EntryChoice::Auto, &[], &ram).unwrap_err().to_string();
        assert!(e.starts_with(&format!("'kernel' is not a kernel: it looks like {what}")), "{e}");
    }
}

#[test]
fn segments_may_not_meet_firmware_or_each_other() {
    let ram = ram(8);
    for (phys, size) in [(0xf_0000u64, 32u64), (0, 32), (0x9_fbf0, 32)] {
        let mut kernel = elf64(0x10_0000, Some(phys));
        put(&mut kernel, 64 + 24, phys, 8);
        put(&mut kernel, 64 + 40, size, 8);
        let e = run(kernel, EntryChoice::Auto, &[], &ram).unwrap_err();
        assert!(matches!(e, LoadError::BadHeader { .. }), "{e}");
    }
}

#[test]
fn tiny_ram_is_refused() {
    let tiny = GuestRam::new(4096).unwrap();
    let e = run(bzimage(), EntryChoice::Auto, &[], &tiny).unwrap_err();
    assert!(matches!(e, LoadError::RamTooSmall { .. }));
}

/// A real kernel, if `RUSE_TEST_KERNEL` names one.
#[test]
fn a_real_kernel_loads() {
    let Some(path) = std::env::var_os("RUSE_TEST_KERNEL") else { return };
    let kernel = Image::open(path).unwrap();
    let acpi = AcpiConfig::new(1);
    let ram = ram(256);
    let request = LoadRequest {
        kernel: &kernel,
        modules: &[],
        cmdline: "console=ttyS0",
        acpi: Some(&acpi),
        entry: EntryChoice::Auto,
    };
    let loaded = load(&request, &ram).unwrap();
    println!("{:?} {:?} {:x?} {:x}", loaded.kind, loaded.version, loaded.kernel, loaded.entry.rip);
}
