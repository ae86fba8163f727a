//! The PVH entry: 32-bit protected mode with a description of the VM in EBX (Xen, docs/misc/pvh.pandoc and
//! xen/include/public/arch-x86/hvm/start_info.h).

use ruse_arch::state::reg;

use crate::elf::Elf;
use crate::entry::{self, GDT_SIZE};
use crate::loader::Loader;
use crate::{KernelKind, LoadError, Loaded, zero_page};

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// Version of the structure that has the memory map.
const VERSION: u32 = 1;
/// Bytes of `struct hvm_start_info`.
const START_INFO_SIZE: u64 = 56;
/// Most bytes of the command line of a kernel that is not Linux.
const MAX_CMDLINE: usize = 0xffff;

/// Loads an ELF kernel to be entered at `entry_at`, which its PVH note named.
pub(crate) fn load(loader: &mut Loader<'_>, elf: &Elf, entry_at: u32) -> Result<Loaded, LoadError> {
    let kernel = elf.load_segments(loader)?;
    if !elf.runs_at(entry_at.into()) {
        return Err(loader.bad(format!("its PVH entry {entry_at:#x} is outside of its segments")));
    }
    let (modules, list) = if elf.looks_like_linux() {
        // Linux takes the first module as its initial RAM disk.
        let initrd: Vec<_> = loader.initrd(u64::MAX)?.into_iter().collect();
        let list = initrd.iter().map(|run| (run.clone(), 0)).collect();
        (initrd, list)
    } else {
        let runs = loader.modules(u64::MAX)?;
        let mut list = Vec::new();
        for (run, module) in runs.iter().zip(loader.request.modules) {
            list.push((run.clone(), loader.write_text("the arguments of modules", &module.args)?));
        }
        (runs, list)
    };
    let max = if elf.looks_like_linux() { zero_page::MAX_CMDLINE } else { MAX_CMDLINE };
    let cmdline_at = loader.cmdline(max)?;

    let mut table = Vec::new();
    for (run, args_at) in &list {
        for field in [run.start, run.end - run.start, *args_at, 0] {
            table.extend(field.to_le_bytes());
        }
    }
    let modules_at = if table.is_empty() { 0 } else { loader.write_low("the list of modules", &table, 8)? };

    let mut map = Vec::new();
    for e in &loader.map {
        map.extend(e.start.to_le_bytes());
        map.extend(e.size.to_le_bytes());
        map.extend((e.kind as u32).to_le_bytes());
        map.extend([0; 4]);
    }
    let map_len = loader.map.len() as u32;
    let map_at = loader.write_low("the memory map", &map, 8)?;

    let mut info = Vec::with_capacity(START_INFO_SIZE as usize);
    for field in [MAGIC, VERSION, 0, list.len() as u32] {
        info.extend(field.to_le_bytes());
    }
    for field in [modules_at, cmdline_at, loader.rsdp.unwrap_or(0), map_at] {
        info.extend(field.to_le_bytes());
    }
    info.extend(map_len.to_le_bytes());
    info.extend([0; 4]);
    let info_at = loader.write_low("the start information", &info, 8)?;
    let gdt_at =
        loader.write_low("the descriptor table", &entry::gdt(false), GDT_SIZE.next_power_of_two())?;

    let mut state = entry::protected_mode(entry_at, gdt_at);
    state.gpr[reg::RBX] = info_at;
    Ok(Loaded { entry: state, kind: KernelKind::Pvh, version: None, kernel, modules, rsdp: loader.rsdp })
}
