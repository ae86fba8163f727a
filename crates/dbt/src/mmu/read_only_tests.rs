//! Page tables and descriptors in memory that vCPUs can only read.

use std::sync::{Arc, Mutex};

use ruse_engine::{Bus, Clock};
use ruse_memory::{GuestRam, Layout, PAGE_SIZE};

use super::{Mmu, access, watch::CodeMap};
use crate::{
    cpu::{CpuBox, Who},
    cpuid,
    tier0::{
        self,
        testing::{CODE, DATA, Machine},
    },
};

/// The memory: root, directory pointers, directory, descriptors.
const ROM: u64 = 0x200_0000;
const GDT: u64 = ROM + 3 * PAGE_SIZE;

/// Remembers writes.
#[derive(Default)]
struct Writes(Mutex<Vec<(u64, Vec<u8>)>>);

impl Bus for Writes {
    fn mmio_write(&self, _: u32, gpa: u64, data: &[u8]) {
        self.0.lock().unwrap().push((gpa, data.to_vec()));
    }
}

#[test]
fn tables_in_read_only_memory_are_used_and_stay_as_they_are() {
    let layout = Layout::of_ram(16 << 20).unwrap().with_read_only(ROM, 4 * PAGE_SIZE).unwrap();
    let ram = GuestRam::with_layout(&layout).unwrap();
    let host = |gpa: u64| ram.host_page(gpa).unwrap().wrapping_add((gpa % PAGE_SIZE) as usize);
    // No entry is marked as accessed or dirty, nor is the data segment of selector 16.
    let words = [
        (ROM, (ROM + PAGE_SIZE) | 7),
        (ROM + PAGE_SIZE, (ROM + 2 * PAGE_SIZE) | 7),
        (ROM + 2 * PAGE_SIZE, 0x87),
        (ROM + 2 * PAGE_SIZE + 16 * 8, ROM | 0x87),
        (GDT + 16, 0x00cf_9200_0000_ffff),
    ];
    words.iter().for_each(|(gpa, word)| access::store(host(*gpa), &u64::to_le_bytes(*word)));
    // mov ds, eax; mov [rbx], rbx
    access::store(host(CODE), &[0x8e, 0xd8, 0x48, 0x89, 0x1b]);
    let mut state = Machine::long().cpu.save_state();
    (state.cr3, state.gdtr.base) = (ROM, GDT);
    (state.gpr[0], state.gpr[3]) = (16, DATA);
    let mmu = Mmu::new(ram.clone(), CodeMap::new(ram.clone()), 0);
    let clock = Arc::new(Clock::with_frequency(2_000_000_000));
    let mut cpu = CpuBox::new(0, cpuid::supported(), clock, mmu);
    cpu.load_state(&state);
    let bus = Writes::default();
    cpu.with_bus(&bus, |cpu| {
        tier0::step(cpu).unwrap();
        tier0::step(cpu).unwrap();
        // As a segment's accessed bit is set, whoever may write it.
        cpu.update_byte(GDT + 16, 0, 1, Who::System).unwrap();
    });
    let read = |gpa| {
        let mut word = [0; 8];
        access::load(host(gpa), &mut word);
        u64::from_le_bytes(word)
    };
    assert_eq!(read(DATA), DATA);
    words.iter().for_each(|(gpa, word)| assert_eq!(read(*gpa), *word, "{gpa:#x}"));
    assert_eq!(*bus.0.lock().unwrap(), [(GDT + 21, vec![0x93]), (GDT + 16, vec![0xfe])]);
}
