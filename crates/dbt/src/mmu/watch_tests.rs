//! Writes that race with the beginning of a translation: the translator sees them, or is told.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use ruse_arch::{paging::Access, state::reg};
use ruse_memory::PAGE_SIZE;
use vm_memory::{Bytes, GuestAddress};

use super::{
    Mmu,
    access::{load, store},
    watch::{Note, Peer},
};
use crate::{
    cpu::{CpuBox, Who},
    tier0::testing::{DATA, Machine, PAGE_TABLE},
};

/// The vCPU that writes, and the one that translates.
const WRITER: u32 = 0;
const TRANSLATOR: u32 = 1;

/// A page that nothing has been read from yet.
const FRESH: u64 = DATA + 3 * PAGE_SIZE;
/// What is copied by MOVS.
const SOURCE: u64 = DATA + 4 * PAGE_SIZE;

/// Bytes at [`DATA`] that a write changes at most.
const LEN: usize = 64;

/// The machine of the vCPU that writes, and both vCPUs as others see them.
struct Pair {
    machine: Machine,
    writer: Arc<Peer>,
    translator: Arc<Peer>,
    _other: CpuBox,
}

impl Pair {
    fn new() -> Self {
        let machine = Machine::long();
        let code = machine.cpu.mmu.code.clone();
        let mmu = Mmu::new(machine.ram.clone(), code.clone(), TRANSLATOR);
        let other = CpuBox::new(TRANSLATOR, Default::default(), machine.cpu.clock.clone(), mmu);
        let join = |id, cpu: &CpuBox| code.join(id, cpu.arena().clone(), Box::new(|| ()));
        let (writer, translator) = (join(WRITER, &machine.cpu), join(TRANSLATOR, &other));
        Self { machine, writer, translator, _other: other }
    }

    /// What the writer does between two instructions, and that it can write to [`DATA`] directly then.
    fn gain_right(&mut self) {
        let cpu = &mut self.machine.cpu;
        for note in self.writer.take_notes() {
            assert_eq!(note, Note::Guard(DATA));
            cpu.mmu.code.take_writer(DATA, WRITER);
            cpu.mmu.drop_writers(DATA);
        }
        cpu.probe_linear(DATA, LEN, Access::Write, Who::Current).unwrap();
    }

    fn told(&self) -> bool {
        self.translator.take_notes().contains(&Note::Written(DATA))
    }
}

#[test]
fn a_store_is_noted_if_the_page_is_watched_since_it_was_looked_up() {
    let mut pair = Pair::new();
    let cpu = &mut pair.machine.cpu;
    let place = cpu.place(DATA, 8, Access::Write, Who::Current).unwrap();
    cpu.mmu.code.watch(DATA, TRANSLATOR);
    cpu.write_place(place, &[1; 8]);
    assert!(pair.told());
}

#[test]
fn accessed_bits_are_noted_if_the_page_of_the_tables_is_watched() {
    for watcher in [WRITER, TRANSLATOR] {
        let mut pair = Pair::new();
        let cpu = &mut pair.machine.cpu;
        cpu.mmu.code.watch(PAGE_TABLE, watcher);
        cpu.probe_linear(FRESH, 8, Access::Read, Who::Current).unwrap();
        let told = if watcher == WRITER { &pair.writer } else { &pair.translator };
        assert_eq!(told.take_notes(), [Note::Written(PAGE_TABLE)]);
    }
}

/// How the bytes at [`DATA`] are written: by an instruction with RDI at them, RAX as here, RCX 8, RBX all ones and RSI
/// at ones, or by a device.
#[derive(Clone, Copy)]
enum Write {
    Instruction(&'static [u8], u64),
    Device,
}

const WRITES: [(&str, Write); 9] = [
    ("mov [rdi], rbx", Write::Instruction(&[0x48, 0x89, 0x1f], 0)),
    ("inc dword [rdi]", Write::Instruction(&[0xff, 0x07], 0)),
    ("lock inc dword [rdi]", Write::Instruction(&[0xf0, 0xff, 0x07], 0)),
    ("xchg [rdi], rbx", Write::Instruction(&[0x48, 0x87, 0x1f], 0)),
    ("lock cmpxchg16b [rdi]", Write::Instruction(&[0xf0, 0x48, 0x0f, 0xc7, 0x0f], 0)),
    ("stosb", Write::Instruction(&[0xaa], !0)),
    ("rep stosq", Write::Instruction(&[0xf3, 0x48, 0xab], !0)),
    ("rep movsq", Write::Instruction(&[0xf3, 0x48, 0xa5], 0)),
    ("device", Write::Device),
];

/// The two threads meet: neither goes on before the other is here.
#[derive(Default)]
struct Meeting(AtomicU64);

impl Meeting {
    fn meet(&self, count: &mut u64) {
        *count += 2;
        self.0.fetch_add(1, Ordering::SeqCst);
        let mut looks = 0;
        while self.0.load(Ordering::SeqCst) < *count {
            looks += 1;
            if looks % 100 == 0 {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }
}

/// Writes each time that the other thread does [`watch_rounds`].
fn write_rounds(pair: &mut Pair, write: Write, rounds: u64, meeting: &Meeting) {
    let mut count = 0;
    for _ in 0..rounds {
        pair.gain_right();
        if let Write::Instruction(code, rax) = write {
            pair.machine.load(code);
            let gpr = &mut pair.machine.cpu.gpr;
            (gpr[reg::RAX], gpr[reg::RBX], gpr[reg::RCX], gpr[reg::RDX]) = (rax, !0, 8, 0);
            (gpr[reg::RSI], gpr[reg::RDI]) = (SOURCE, DATA);
        }
        meeting.meet(&mut count);
        match write {
            Write::Instruction(..) => pair.machine.step().unwrap(),
            Write::Device => {
                pair.machine.ram.memory().write_obj(u64::MAX, GuestAddress(DATA)).unwrap();
            }
        }
        // The other side compares.
        meeting.meet(&mut count);
        meeting.meet(&mut count);
    }
}

/// `RUSE_WATCH_ROUNDS` says how often each kind of write races.
#[test]
fn a_write_that_races_with_a_watch_is_seen_or_noted() {
    let rounds = std::env::var("RUSE_WATCH_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(1_000);
    for (name, write) in WRITES {
        let mut pair = Pair::new();
        pair.machine.write(SOURCE, &[0xff; LEN]);
        let (code, translator) = (pair.machine.cpu.mmu.code.clone(), pair.translator.clone());
        let page = pair.machine.ram.host_page(DATA).unwrap() as usize;
        let meeting = Meeting::default();
        let (mut seen, mut noted, mut lost) = (0, 0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| write_rounds(&mut pair, write, rounds, &meeting));
            let mut count = 0;
            for round in 0..rounds {
                let read = || {
                    let mut bytes = [0; LEN];
                    load(page as *const u8, &mut bytes);
                    bytes
                };
                store(page as *mut u8, &[0; LEN]);
                meeting.meet(&mut count);
                (0..round % 16).for_each(|_| std::hint::spin_loop());
                code.watch(DATA, TRANSLATOR);
                let bytes = read();
                meeting.meet(&mut count);
                let is_noted = translator.take_notes().contains(&Note::Written(DATA));
                let is_seen = bytes == read();
                (seen, noted) = (seen + u64::from(is_seen), noted + u64::from(is_noted));
                lost += u64::from(!is_seen && !is_noted);
                code.unwatch(DATA, TRANSLATOR);
                meeting.meet(&mut count);
            }
        });
        println!("{name}: {rounds} rounds, seen in {seen}, noted in {noted}");
        assert_eq!(lost, 0, "{name}");
    }
}
