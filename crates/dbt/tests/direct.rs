//! User code that runs directly on the host's CPU finds what a guest's CPU would give it.

#[allow(dead_code)]
#[path = "differential/guest.rs"]
mod guest;

use std::{
    sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use guest::{CODE_PAGES, CODE_TABLE, DATA_TABLE, NullBus, data_page, machine};
use iced_x86::code_asm::*;
use ruse_arch::{
    Exception,
    flags::cr4,
    paging::{fault, pte},
    state::reg,
};
use ruse_cases::case::{CODE, WINDOW};
use ruse_dbt::{DbtOptions, DirectMode, cpu::CpuBox, direct::Policy, mmu::Mmu, runtime::vcpu::DbtVcpu};
use ruse_engine::{Halt, Vcpu};
use ruse_memory::GuestRam;

/// A guest that runs its user code directly.
struct Guest {
    vcpu: DbtVcpu,
    ram: GuestRam,
}

impl Guest {
    /// One with this program. `None` where user code cannot run directly, which is said.
    fn new(program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Option<Self> {
        let (cpu, ram) = machine();
        let guest = Self { vcpu: direct(cpu)?, ram };
        let mut assembler = CodeAssembler::new(64).unwrap();
        program(&mut assembler).unwrap();
        for (at, byte) in (CODE_PAGES..).zip(assembler.assemble(CODE).unwrap()) {
            guest.byte(at).store(byte, Ordering::SeqCst);
        }
        Some(guest)
    }

    /// Runs until an exception.
    fn run(&mut self) -> Exception {
        self.vcpu.run_until_fault(&NullBus)
    }

    /// As [`Guest::run`], from the beginning.
    fn restart(&mut self) -> Exception {
        self.vcpu.cpu_mut().rip = CODE;
        self.run()
    }

    fn gpr(&self, register: usize) -> u64 {
        self.vcpu.cpu().gpr[register]
    }

    fn counter(&self, name: &str) -> u64 {
        self.vcpu.counters().get(name)
    }

    fn byte(&self, gpa: u64) -> &AtomicU8 {
        let host = self.ram.host_page(gpa).unwrap().wrapping_add(gpa as usize % 4096);
        // SAFETY: RAM of the guest's, which lives as long as `self`.
        unsafe { AtomicU8::from_ptr(host) }
    }

    fn word(&self, gpa: u64) -> &AtomicU64 {
        // SAFETY: as above; callers give aligned addresses.
        unsafe { AtomicU64::from_ptr(self.byte(gpa).as_ptr().cast()) }
    }

    /// Page-table entry of a page of data.
    fn entry(&self, page: u64) -> &AtomicU64 {
        self.word(DATA_TABLE + 8 * page)
    }

    /// User code cannot write to the first page of code.
    fn protect_code(&self) {
        self.word(CODE_TABLE).fetch_and(!pte::W, Ordering::SeqCst);
    }

    /// INVLPG.
    fn flush(&mut self, va: u64) {
        self.vcpu.cpu_mut().mmu.flush_page(va);
    }
}

/// A vCPU that runs user code directly, and that this is possible.
fn direct(mut cpu: CpuBox) -> Option<DbtVcpu> {
    if let Err(error) = ruse_sandbox::Sandbox::probe() {
        eprintln!("SKIPPED: {error}");
        return None;
    }
    cpu.paging.cr4 |= cr4::FSGSBASE;
    let options = DbtOptions { direct: DirectMode::Always, audit: true, ..DbtOptions::default() };
    Some(DbtVcpu::new(cpu, options).unwrap())
}

/// Ends the direct execution of a vCPU.
fn translate(vcpu: &mut DbtVcpu) {
    vcpu.cpu_mut().direct = Policy::new(DirectMode::Off, 1);
}

#[test]
fn faults_are_those_of_the_guests_tables() {
    let Some(mut guest) = Guest::new(|a| {
        a.mov(rax, WINDOW)?;
        a.mov(dword_ptr(rax), 7)?;
        a.mov(ecx, dword_ptr(rax + 0x2000))
    }) else {
        return;
    };
    guest.entry(0).fetch_and(!pte::W, Ordering::SeqCst);
    assert_eq!(guest.run(), Exception::pf(WINDOW, fault::P | fault::W | fault::U));
    assert_eq!(guest.vcpu.cpu().rip, CODE + 10);
    guest.entry(0).fetch_or(pte::W, Ordering::SeqCst);
    assert_eq!(guest.run(), Exception::pf(WINDOW + 0x2000, fault::U));
    let marks = pte::A | pte::D;
    assert_eq!(guest.entry(0).load(Ordering::SeqCst) & marks, marks);
    assert_eq!(guest.entry(1).load(Ordering::SeqCst) & marks, 0);
    assert!(guest.counter("direct.faults") >= 3);
}

#[test]
fn flushed_mappings_are_looked_up_again() {
    let Some(mut guest) = Guest::new(|a| {
        a.mov(rax, WINDOW)?;
        a.mov(ecx, dword_ptr(rax))?;
        a.mov(dword_ptr(rax), 9)?;
        a.ud2()
    }) else {
        return;
    };
    guest.word(data_page(0)).store(1, Ordering::SeqCst);
    guest.word(data_page(1)).store(2, Ordering::SeqCst);
    assert_eq!((guest.restart(), guest.gpr(reg::RCX)), (Exception::UD, 1));
    // Another page, without a right to write.
    let user = pte::P | pte::U;
    guest.entry(0).store(data_page(1) | user, Ordering::SeqCst);
    guest.flush(WINDOW + 5);
    assert_eq!(guest.restart(), Exception::pf(WINDOW, fault::P | fault::W | fault::U));
    assert_eq!(guest.gpr(reg::RCX), 2);
    // And back, with everything flushed.
    guest.entry(0).store(data_page(0) | user | pte::W, Ordering::SeqCst);
    guest.vcpu.cpu_mut().mmu.flush_current(true);
    assert_eq!((guest.restart(), guest.gpr(reg::RCX)), (Exception::UD, 9));
    // No page at all.
    guest.entry(0).store(0, Ordering::SeqCst);
    guest.vcpu.cpu_mut().mmu.flush_all();
    assert_eq!(guest.restart(), Exception::pf(WINDOW, fault::U));
}

#[test]
fn pages_are_marked_again_after_a_flush() {
    let Some(mut guest) = Guest::new(|a| {
        a.mov(rax, WINDOW)?;
        a.mov(dword_ptr(rax), 9)?;
        a.ud2()
    }) else {
        return;
    };
    for _ in 0..3 {
        assert_eq!(guest.restart(), Exception::UD);
        assert_ne!(guest.entry(0).load(Ordering::SeqCst) & pte::D, 0);
        guest.entry(0).fetch_and(!(pte::A | pte::D), Ordering::SeqCst);
        guest.flush(WINDOW);
    }
}

#[test]
fn what_tells_of_the_cpu_tells_of_the_guests() {
    let Some(mut guest) = Guest::new(|a| {
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.mov(r8d, eax)?;
        a.mov(r9d, ebx)?;
        a.xor(ecx, ecx)?;
        a.xgetbv()?;
        a.mov(r10d, eax)?;
        a.rdtscp()?;
        a.mov(r11d, ecx)?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.mov(r12, rax)?;
        a.rdpid(r13)?;
        a.ud2()
    }) else {
        return;
    };
    guest.protect_code();
    let cpu = guest.vcpu.cpu_mut();
    cpu.tsc_aux = 0x77;
    cpu.tsc_offset = (1u64 << 60).wrapping_sub(cpu.clock.counter());
    let leaf = cpu.cpuid.get(0, 0);
    assert_eq!(guest.run(), Exception::UD);
    assert_eq!((guest.gpr(8), guest.gpr(9)), (leaf[0].into(), leaf[1].into()));
    assert_eq!((guest.gpr(10), guest.gpr(11), guest.gpr(13)), (7, 0x77, 0x77));
    assert_eq!(guest.gpr(12) >> 60, 1, "the time is the guest's");
    assert!(guest.counter("direct.exceptions") >= 5);
    assert_eq!(guest.counter("dispatches"), 0, "nothing is translated");
}

#[test]
fn instructions_that_were_replaced_are_known_in_other_address_spaces() {
    // Nothing leads from the second part to CPUID, nor is anything translated that does.
    let Some(mut guest) = Guest::new(|a| {
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.ud2()?;
        a.mov(r8d, 7)?;
        a.ud2()
    }) else {
        return;
    };
    const SECOND: u64 = 6;
    guest.protect_code();
    assert_eq!(guest.run(), Exception::UD);
    let maps = guest.counter("direct.runs");
    // The same mappings from another page.
    let (old, new) = (guest.vcpu.cpu().root(), 0x7000);
    (0..512).for_each(|n| {
        guest.word(new + 8 * n).store(guest.word(old + 8 * n).load(Ordering::SeqCst), Ordering::SeqCst)
    });
    guest.vcpu.cpu_mut().paging.cr3 = new;
    guest.vcpu.cpu_mut().rip = CODE + SECOND;
    assert_eq!((guest.run(), guest.gpr(8)), (Exception::UD, 7));
    assert!(guest.counter("direct.runs") > maps);
    assert_eq!(
        (guest.counter("dispatches"), guest.counter("direct.spaces")),
        (0, 2),
        "nothing is translated"
    );
}

#[test]
fn code_that_is_written_directly_is_translated_anew_and_the_other_way_round() {
    // The second instruction writes the operand of the first.
    let program = |a: &mut CodeAssembler| {
        a.mov(ecx, 1)?;
        a.inc(dword_ptr(CODE + 1))?;
        a.ud2()
    };
    let Some(mut guest) = Guest::new(program) else { return };
    let always = || Policy::new(DirectMode::Always, 1);
    for version in 1..20 {
        guest.vcpu.cpu_mut().direct = always();
        if version % 3 == 0 {
            translate(&mut guest.vcpu);
        }
        assert_eq!((guest.restart(), guest.gpr(reg::RCX)), (Exception::UD, version));
    }
    assert!(guest.counter("dispatches") > 0 && guest.counter("direct.runs") > 0);
}

#[test]
fn a_page_with_replaced_instructions_can_be_written() {
    // Leaf 0 or 1, as the operand says that the end of the program changes.
    let Some(mut guest) = Guest::new(|a| {
        a.mov(eax, 0)?;
        a.cpuid()?;
        a.inc(dword_ptr(WINDOW + 1))?;
        a.ud2()
    }) else {
        return;
    };
    guest.protect_code();
    guest.entry(0).store(CODE_PAGES | pte::P | pte::W | pte::U | pte::NX, Ordering::SeqCst);
    for leaf in 0..4 {
        let right = guest.vcpu.cpu().cpuid.get(leaf, 0);
        assert_eq!((guest.restart(), guest.gpr(reg::RAX)), (Exception::UD, right[0].into()));
    }
    // A device writes: INC EBX in place of CPUID.
    for (at, byte) in (CODE_PAGES + 5..).zip([0xff, 0xc3]) {
        guest.byte(at).store(byte, Ordering::SeqCst);
    }
    guest.vcpu.cpu().mmu.code.written(CODE_PAGES, None);
    guest.vcpu.cpu_mut().gpr[reg::RBX] = 41;
    assert_eq!((guest.restart(), guest.gpr(reg::RBX)), (Exception::UD, 42));
}

#[test]
fn code_that_is_written_after_its_page_has_run_is_looked_through() {
    // CPUID and RET take the place of a RET on another page, which runs before and after.
    const OTHER: u64 = CODE + 0x1000;
    let Some(mut guest) = Guest::new(|a| {
        a.mov(rsp, WINDOW + 0x100)?;
        a.mov(rbx, OTHER)?;
        a.call(rbx)?;
        a.mov(dword_ptr(rbx), 0x00c3_a20f)?;
        a.xor(eax, eax)?;
        a.call(rbx)?;
        a.mov(ecx, dword_ptr(OTHER))?;
        a.ud2()
    }) else {
        return;
    };
    guest.byte(CODE_PAGES + 0x1000).store(0xc3, Ordering::SeqCst);
    let right = guest.vcpu.cpu().cpuid.get(0, 0);
    assert_eq!((guest.run(), guest.gpr(reg::RAX)), (Exception::UD, right[0].into()));
    assert_eq!(guest.gpr(reg::RCX), 0x00c3_a20f, "what was written is read");
    assert!(guest.counter("direct.runs") > 2 && guest.counter("direct.detours") <= 1);
}

#[test]
fn a_program_that_can_write_its_code_reads_it_as_it_is() {
    let Some(mut guest) = Guest::new(|a| {
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.mov(r8d, dword_ptr(CODE + 2))?;
        a.ud2()
    }) else {
        return;
    };
    for protect in [false, true, false] {
        if protect {
            guest.protect_code();
        } else {
            guest.word(CODE_TABLE).fetch_or(pte::W, Ordering::SeqCst);
        }
        guest.flush(CODE);
        let right = guest.vcpu.cpu().cpuid.get(0, 0);
        assert_eq!((guest.restart(), guest.gpr(reg::RAX)), (Exception::UD, right[0].into()));
        let read = guest.gpr(8) as u16;
        assert!(read == 0xa20f || protect && read == 0xa2f4, "{read:#x}");
    }
}

#[test]
fn an_instruction_may_end_on_a_page_that_cannot_run_directly() {
    // Both pages have bytes like those of CPUID that nothing leads to; the instruction between them has the first byte of the
    // second in its operand.
    let Some(mut guest) = Guest::new(|a| {
        a.jmp(CODE + 0xffe)?;
        a.db(&[0x0f, 0xa2])
    }) else {
        return;
    };
    // MOV ECX, 1234h; INC ECX; UD2; CPUID.
    let code = [0xb9, 0x34, 0x12, 0, 0, 0xff, 0xc1, 0x0f, 0x0b, 0x0f, 0xa2];
    for (at, byte) in (CODE_PAGES + 0xffe..).zip(code) {
        guest.byte(at).store(byte, Ordering::SeqCst);
    }
    for _ in 0..10 {
        assert_eq!((guest.restart(), guest.gpr(reg::RCX)), (Exception::UD, 0x1235));
    }
    assert!(guest.counter("direct.faults") < 100);
}

#[test]
fn interrupt_instructions_lead_where_they_should() {
    let cases: [&[u8]; 6] = [&[0xcc], &[0xcd, 0x03], &[0xf1], &[0xcd, 0x80], &[0xcd, 0x04], &[0xcd, 0x2d]];
    for code in cases {
        let Some(mut guest) = Guest::new(|a| a.db(code)) else { return };
        let directly = (guest.run(), guest.vcpu.cpu().rip);
        translate(&mut guest.vcpu);
        assert_eq!((guest.restart(), guest.vcpu.cpu().rip), directly, "{code:02x?}");
    }
}

#[test]
fn a_jump_to_32_bit_code_is_noticed() {
    // JMP far [rip]: offset, selector 23h.
    let Some(mut guest) = Guest::new(|a| {
        a.db(&[0xff, 0x2d, 0, 0, 0, 0])?;
        a.dd(&[CODE as u32 + 0x100])?;
        a.dw(&[0x23])
    }) else {
        return;
    };
    // INC EAX (which is a prefix in 64-bit code); HLT.
    for (at, byte) in (CODE_PAGES + 0x100..).zip([0x40, 0x40, 0xf4]) {
        guest.byte(at).store(byte, Ordering::SeqCst);
    }
    guest.vcpu.cpu_mut().gpr[reg::RAX] = 5;
    assert_eq!(guest.run(), Exception::gp(0));
    let cpu = guest.vcpu.cpu();
    assert_eq!((cpu.gpr[reg::RAX], cpu.rip), (7, CODE + 0x102));
    assert!(cpu.mode.code32 && cpu.mode.cpl == 3);
}

#[test]
fn the_dirty_log_sees_direct_writes() {
    let Some(mut guest) = Guest::new(|a| {
        a.mov(rax, WINDOW)?;
        a.inc(dword_ptr(rax))?;
        a.ud2()
    }) else {
        return;
    };
    assert_eq!(guest.restart(), Exception::UD);
    let code = guest.vcpu.cpu().mmu.code.clone();
    let (tracker, offset) = guest.ram.tracker(data_page(0)).map(|(t, o)| (t.clone(), o)).unwrap();
    tracker.take_dirty(offset);
    code.log_writes(true);
    for _ in 0..3 {
        ruse_engine::WriteLog::rearm(&*code).unwrap();
        assert!(!tracker.take_dirty(offset));
        assert_eq!(guest.restart(), Exception::UD);
        assert!(tracker.take_dirty(offset), "a write is not in the log");
    }
}

#[test]
fn a_kick_ends_user_code() {
    let Some(mut guest) = Guest::new(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(rax)?;
        a.jmp(again)
    }) else {
        return;
    };
    let mut ran = false;
    for _ in 0..5 {
        let handle = guest.vcpu.handle();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            handle.kick();
        });
        let (started, before) = (Instant::now(), guest.gpr(reg::RAX));
        assert_eq!(guest.vcpu.run(&NullBus).unwrap(), Halt::Kicked);
        assert!(started.elapsed() < Duration::from_secs(5));
        thread.join().unwrap();
        ran |= guest.gpr(reg::RAX) > before;
    }
    // On a busy host, user code may have no time before some of the kicks.
    assert!(ran);
}

/// One vCPU writes code directly all the time; the other translates and executes it, and gets no version older than what had
/// been published before.
/// Runs the guest until another vCPU, which translates, has executed code that it writes all the time. The program announces
/// in the first page of data which version it has written; `read` has the address of the code, which ends with UD2 and has its
/// version in ECX.
fn read_code_that_is_written(guest: &mut Guest, read: u64) {
    let mmu = Mmu::new(guest.ram.clone(), guest.vcpu.cpu().mmu.code.clone(), 1);
    let first = guest.vcpu.cpu();
    let mut second = CpuBox::new(1, first.cpuid.clone(), first.clock.clone(), mmu);
    second.load_state(&first.save_state());
    let mut second = DbtVcpu::new(second, DbtOptions::default()).unwrap();
    let handle = guest.vcpu.handle();
    std::thread::scope(|scope| {
        let writer = &mut guest.vcpu;
        scope.spawn(move || assert_eq!(writer.run(&NullBus).unwrap(), Halt::Kicked));
        let word = |gpa| {
            let host = second.cpu().mmu.host_page(gpa).unwrap();
            // SAFETY: RAM of the guest's, which lives as long as the vCPUs.
            unsafe { AtomicU32::from_ptr(host.cast()) }
        };
        let version = word(data_page(0));
        while version.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        let mut read = || {
            let before = version.load(Ordering::SeqCst);
            second.cpu_mut().rip = read;
            // What entering again after a wait is: a serializing instruction.
            let end = second.run_until_fault(&NullBus);
            (end, second.cpu().gpr[reg::RCX] as u32, before)
        };
        let found: Vec<_> = (0..300).map(|_| read()).collect();
        handle.kick();
        for (end, found, before) in &found {
            assert_eq!(*end, Exception::UD);
            assert!(found.wrapping_sub(*before) as i32 >= 0, "version {found} after {before}");
        }
        assert!(found[299].1 > 0);
    });
    assert!(guest.counter("direct.runs") > 0);
}

#[test]
fn code_that_another_cpu_writes_directly_is_seen() {
    let Some(mut guest) = Guest::new(|a| {
        let mut next = a.create_label();
        a.mov(r8, CODE + 0x1001)?;
        a.mov(r9, WINDOW)?;
        a.set_label(&mut next)?;
        a.inc(eax)?;
        a.mov(dword_ptr(r8), eax)?;
        a.mov(dword_ptr(r9), eax)?;
        a.jmp(next)
    }) else {
        return;
    };
    // Page 1 of the code: MOV ECX, version; UD2.
    for (at, byte) in (CODE_PAGES + 0x1000..).zip([0xb9, 0, 0, 0, 0, 0x0f, 0x0b]) {
        guest.byte(at).store(byte, Ordering::SeqCst);
    }
    read_code_that_is_written(&mut guest, CODE + 0x1000);
}

/// Several times: what may go wrong is a matter of the moment.
#[test]
fn code_that_is_written_at_another_address_is_seen() {
    (0..5).for_each(|_| write_at_another_address());
}

fn write_at_another_address() {
    // The next pages of data are one of code: the first to be written, the other to be executed.
    const WRITTEN: u64 = WINDOW + 0x1000;
    const EXECUTED: u64 = WINDOW + 0x2000;
    let Some(mut guest) = Guest::new(|a| {
        let mut next = a.create_label();
        a.mov(r8, WRITTEN + 1)?;
        a.mov(r9, WINDOW)?;
        a.mov(r10, EXECUTED)?;
        a.mov(rsp, WINDOW + 0x800)?;
        a.call(r10)?;
        a.set_label(&mut next)?;
        a.inc(eax)?;
        a.mov(dword_ptr(r8), eax)?;
        a.mov(dword_ptr(r9), eax)?;
        a.jmp(next)
    }) else {
        return;
    };
    let user = pte::P | pte::U;
    guest.entry(1).store((CODE_PAGES + 0x1000) | user | pte::W | pte::NX, Ordering::SeqCst);
    guest.entry(2).store((CODE_PAGES + 0x1000) | user, Ordering::SeqCst);
    // Page 1 of the code: MOV ECX, version; RET. Page 0 has a call of it
    // with UD2 behind.
    let (code, call) = ([0xb9, 0, 0, 0, 0, 0xc3], [0xe8, 0xfb, 0x07, 0, 0, 0x0f, 0x0b]);
    let there = (CODE_PAGES + 0x1000..).zip(code).chain((CODE_PAGES + 0x800..).zip(call));
    there.for_each(|(at, byte)| guest.byte(at).store(byte, Ordering::SeqCst));
    guest.vcpu.cpu_mut().gpr[reg::RSP] = WINDOW + 0x900;
    read_code_that_is_written(&mut guest, CODE + 0x800);
}
