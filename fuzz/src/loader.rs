//! Kernels: any file, with any machine around it, loads or is refused; what is loaded lies in RAM and in nothing else's
//! way.

use std::ops::Range;
use std::sync::LazyLock;

use arbitrary::Unstructured;
use ruse_loader::acpi::VirtioMmioPlace;
use ruse_loader::{AcpiConfig, EntryChoice, Image, LoadRequest, Loaded, Module, load, test_images};
use ruse_memory::GuestRam;

use crate::input::{byte, file, number, one_in, pick};

/// A valid kernel of each kind.
static KERNELS: LazyLock<Vec<Vec<u8>>> =
    LazyLock::new(|| test_images::all().into_iter().map(|(_, image)| image).collect());

/// Sizes of RAM: the least, and what is enough for some and for all of the kernels.
const SIZES: [u64; 8] = [4 << 10, 1 << 20, 0x10_1000, 2 << 20, 4 << 20, 8 << 20, 24 << 20, 32 << 20];

/// Runs the target.
pub(crate) fn run(data: &[u8]) {
    let u = &mut Unstructured::new(data);
    let ram = GuestRam::new(pick(u, &SIZES)).expect("a little RAM");
    let entry = pick(
        u,
        &[
            EntryChoice::Auto,
            EntryChoice::Auto,
            EntryChoice::Linux64,
            EntryChoice::Linux32,
            EntryChoice::Pvh,
            EntryChoice::Multiboot,
        ],
    );
    let cmdline = cmdline(u);
    let acpi = one_in(u, 3).then(|| acpi(u));
    let modules: Vec<_> = (0..byte(u) % 4).map(|_| module(u)).collect();
    let kernel = Image::from_bytes("kernel", file(u, &KERNELS));
    let request =
        LoadRequest { kernel: &kernel, modules: &modules, cmdline: &cmdline, acpi: acpi.as_ref(), entry };
    match load(&request, &ram) {
        Ok(loaded) => check(&loaded, &modules, &ram),
        Err(error) => assert!(!error.to_string().contains('\n'), "one line: {error}"),
    }
}

fn cmdline(u: &mut Unstructured) -> String {
    let len = pick(u, &[0, 1, 255, 2047, 2048, 4095, 0xffff, 0x1_0000, 700 << 10]);
    let fill = char::from_u32(number(u) as u32 & 0x1_ffff).unwrap_or('x');
    std::iter::repeat_n(fill, if fill.is_ascii() { len } else { len / 4 }).collect()
}

fn module(u: &mut Unstructured) -> Module {
    let len = pick(u, &[0, 1, 3, 4095, 4096, 4097, 1 << 20, 3 << 20]);
    let args = cmdline(u);
    Module { image: Image::from_bytes("initrd", vec![byte(u); len]), args }
}

fn acpi(u: &mut Unstructured) -> AcpiConfig {
    let mut config = AcpiConfig::new(u32::from(byte(u) % 70));
    config.ecam = one_in(u, 2);
    config.pci = one_in(u, 2);
    let place = VirtioMmioPlace { base: number(u) as u32, size: number(u) as u32, gsi: number(u) as u32 };
    config.virtio = vec![place; usize::from(byte(u))];
    config.vga = one_in(u, 2);
    config.i8042 = one_in(u, 2);
    if one_in(u, 2) {
        config.apic_ids.push(number(u) as u32);
    }
    if one_in(u, 2) {
        let start = number(u);
        config.mmio64 = Some(start..start.saturating_add(number(u)));
    }
    if one_in(u, 4) {
        let start = number(u);
        config.mmio32.push(start..start.saturating_add(number(u)));
    }
    config
}

fn check(loaded: &Loaded, modules: &[Module], ram: &GuestRam) {
    let mut runs: Vec<&Range<u64>> = loaded.modules.iter().filter(|run| !run.is_empty()).collect();
    runs.push(&loaded.kernel);
    runs.sort_by_key(|run| run.start);
    assert!(runs.iter().all(|run| run.end <= ram.size()), "{runs:x?} in {:#x} of RAM", ram.size());
    assert!(runs.windows(2).all(|pair| pair[0].end <= pair[1].start), "{runs:x?}");
    assert!(loaded.kernel.contains(&loaded.entry.rip), "{:#x} in {:x?}", loaded.entry.rip, loaded.kernel);
    let loaded_bytes: u64 = loaded.modules.iter().map(|run| run.end - run.start).sum();
    assert!(modules.iter().map(|module| module.image.size()).sum::<u64>() <= loaded_bytes);
}
