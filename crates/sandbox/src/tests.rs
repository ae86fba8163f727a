use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use super::*;

const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x7fff_0000_0000;

/// A sandbox with `code` at [`CODE`] and a page that it may write to at [`DATA`].
fn with_code(code: &[u8]) -> Sandbox {
    with_memory(code, &[])
}

/// As [`with_code`], with `data` in the second page.
fn with_memory(code: &[u8], data: &[u8]) -> Sandbox {
    let mut ram = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
    ram.set_len(4 * PAGE).unwrap();
    ram.seek(SeekFrom::Start(PAGE)).unwrap();
    ram.write_all(code).unwrap();
    ram.seek(SeekFrom::Start(2 * PAGE)).unwrap();
    ram.write_all(data).unwrap();
    let mut sandbox = Sandbox::new(ram.as_fd()).unwrap();
    sandbox.map(CODE, PAGE, PAGE, Rights { write: false, execute: true }).unwrap();
    sandbox.map(DATA, PAGE, 2 * PAGE, Rights { write: true, execute: false }).unwrap();
    sandbox.set_registers(&Registers { rip: CODE, rflags: 0x202, rsp: DATA + PAGE, ..Registers::default() });
    sandbox
}

#[test]
fn registers_go_in_and_come_out_at_a_system_call() {
    // mov rax, rbx; add r15, rsi; syscall
    let mut sandbox = with_code(&[0x48, 0x89, 0xd8, 0x49, 0x01, 0xf7, 0x0f, 0x05]);
    let start = Registers { rbx: 7, rsi: 5, r15: 1 << 40, ..sandbox.registers() };
    let start = Registers { rflags: start.rflags | NESTED_AND_ID, ..start };
    sandbox.set_registers(&start);
    sandbox.set_bases(0x1234_5000, 0x7654_3000);
    assert_eq!(sandbox.run().unwrap(), Trap::SystemCall);
    let end = sandbox.registers();
    assert_eq!((end.rax, end.rbx, end.r15, end.rip), (7, 7, (1 << 40) + 5, CODE + 8));
    assert_eq!((end.rcx, end.r11 & 0xcff), (CODE + 8, end.rflags & 0xcff));
    assert_eq!(sandbox.bases(), (0x1234_5000, 0x7654_3000));
    assert_eq!(end.rflags & NESTED_AND_ID, NESTED_AND_ID);
    // They do not stay for whoever comes next.
    sandbox.set_registers(&Registers { rip: CODE, rflags: 0x202, ..end });
    assert_eq!(sandbox.run().unwrap(), Trap::SystemCall);
    assert_eq!(sandbox.registers().rflags & NESTED_AND_ID, 0);
}

/// The trap that `code` ends in, and where.
fn trap(code: &[u8]) -> (Trap, u64) {
    let mut sandbox = with_code(code);
    let trap = sandbox.run().unwrap();
    (trap, sandbox.registers().rip.wrapping_sub(CODE))
}

#[test]
fn exceptions_come_with_their_vectors() {
    // xor ecx, ecx; div ecx
    assert_eq!(trap(&[0x31, 0xc9, 0xf7, 0xf1]), (Trap::Exception(0), 2));
    assert_eq!(trap(&[0xcc]), (Trap::Exception(3), 1));
    assert_eq!(trap(&[0x0f, 0x0b]), (Trap::Exception(6), 0));
    // hlt
    assert_eq!(trap(&[0x90, 0xf4]), (Trap::Exception(13), 1));
    // rdtsc; rdtscp
    assert_eq!(trap(&[0x0f, 0x31]), (Trap::Exception(13), 0));
    assert_eq!(trap(&[0x90, 0x0f, 0x01, 0xf9]), (Trap::Exception(13), 1));
    // int 80h
    assert_eq!(trap(&[0xcd, 0x80]), (Trap::OldSystemCall, 2));
}

#[test]
fn no_number_is_a_system_call_that_runs() {
    // 335 and 336 are uprobe's, which filters do not see; the others are usual ones, and none.
    for number in [0, 15, 39, 60, 231, 334, 335, 336, 467, 0x7275, 0x4000_0027, u64::from(u32::MAX)] {
        let mut sandbox = with_code(&[0x0f, 0x05]);
        sandbox.set_registers(&Registers { rax: number, ..sandbox.registers() });
        assert_eq!(sandbox.run().unwrap(), Trap::SystemCall, "{number}");
        assert_eq!((sandbox.registers().rax, sandbox.registers().rip), (number, CODE + 2));
    }
}

/// The host stops processes for job control, debuggers, and to freeze groups of them.
fn while_the_host_stops_it<R>(sandbox: &mut Sandbox, body: impl FnOnce(&mut Sandbox) -> R) -> R {
    let process = Pid::from_child(&sandbox.child.0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for signal in [Signal::STOP, Signal::CONT] {
                    rustix::process::kill_process(process, signal).unwrap();
                }
            }
        });
        let result = body(sandbox);
        done.store(true, Ordering::Relaxed);
        result
    })
}

#[test]
fn a_process_that_the_host_stops_and_continues_traps_once_for_each_reason() {
    // inc rbx; mov eax, ebx; syscall; jmp back
    let mut sandbox = with_code(&[0x48, 0xff, 0xc3, 0x89, 0xd8, 0x0f, 0x05, 0xeb, 0xf7]);
    let found: Vec<_> = while_the_host_stops_it(&mut sandbox, |sandbox| {
        let turns = (1..=20_000).map(|n| {
            let trap = sandbox.run().map_err(|error| error.to_string());
            let registers = sandbox.registers();
            sandbox.set_registers(&Registers { rax: u64::MAX, ..registers });
            if n % 3 == 0 {
                // The stub answers.
                sandbox.map(DATA, PAGE, 2 * PAGE, Rights::default()).unwrap();
            }
            (trap, registers.rax, registers.rbx, n)
        });
        let wrong = |&(ref trap, rax, rbx, n): &_| (trap, rax, rbx) != (&Ok(Trap::SystemCall), n, n);
        turns.filter(wrong).take(3).collect()
    });
    assert_eq!(found, []);
}

#[test]
fn a_process_that_the_host_stops_and_continues_sees_all_changes_of_its_mappings() {
    // mov eax, [rdi]; syscall; jmp back
    let code = [0x8b, 0x07, 0x0f, 0x05, 0xeb, 0xfa];
    let pages = [2u8, 3].map(|number| [number; PAGE as usize]);
    let mut sandbox = with_memory(&code, pages.as_flattened());
    sandbox.set_registers(&Registers { rdi: DATA, ..sandbox.registers() });
    let found: Vec<_> = while_the_host_stops_it(&mut sandbox, |sandbox| {
        let turns = (1..=1_000).map(|n| {
            let page = 2 + n % 2;
            for other in (0..20).rev() {
                sandbox.map(DATA + other * PAGE, PAGE, page * PAGE, Rights::default()).unwrap();
            }
            let trap = sandbox.run().map_err(|error| error.to_string());
            (trap, sandbox.registers().rax / 0x0101_0101, page, n)
        });
        turns.filter(|(trap, seen, page, _)| (trap, seen) != (&Ok(Trap::SystemCall), page)).take(3).collect()
    });
    assert_eq!(found, []);
}

#[test]
fn page_faults_say_where_and_why() {
    // mov [rax], eax with RAX = 0
    let fault = |address, error| (Trap::PageFault { address, error }, 0);
    assert_eq!(trap(&[0x89, 0x00]), fault(0, 6));
    // mov eax, [rip - 6]; a write to the code itself
    assert_eq!(trap(&[0x89, 0x05, 0xfa, 0xff, 0xff, 0xff]), fault(CODE, 7));
    // jmp rax
    assert!(matches!(trap(&[0xff, 0xe0]), (Trap::PageFault { address: 0, error: 0x14 }, _)));
}

#[test]
fn mappings_come_and_go() {
    // mov rax, [rsp - 8]; mov [rsp - 16], rax; syscall; jmp back
    let code = [0x48, 0x8b, 0x44, 0x24, 0xf8, 0x48, 0x89, 0x44, 0x24, 0xf0, 0x0f, 0x05, 0xeb, 0xf2];
    let mut sandbox = with_code(&code);
    assert_eq!(sandbox.run().unwrap(), Trap::SystemCall);
    sandbox.map(DATA, PAGE, 2 * PAGE, Rights::default()).unwrap();
    assert_eq!(sandbox.run().unwrap(), Trap::PageFault { address: DATA + PAGE - 16, error: 7 });
    sandbox.unmap(DATA, PAGE).unwrap();
    assert_eq!(sandbox.run().unwrap(), Trap::PageFault { address: DATA + PAGE - 16, error: 6 });
    sandbox.map(DATA, PAGE, 2 * PAGE, Rights { write: true, execute: false }).unwrap();
    assert_eq!(sandbox.run().unwrap(), Trap::SystemCall);
    sandbox.clear();
    assert_eq!(sandbox.run().unwrap(), Trap::PageFault { address: CODE + 12, error: 0x14 });
    // More than fits into an order.
    for _ in 0..250 {
        sandbox.map(DATA, PAGE, 2 * PAGE, Rights { write: true, execute: false }).unwrap();
    }
    sandbox.map(CODE, PAGE, PAGE, Rights { write: false, execute: true }).unwrap();
    assert_eq!(sandbox.run().unwrap(), Trap::SystemCall);
    for (address, size) in
        [(0, PAGE), (DATA, 0), (DATA + 1, PAGE), (USER_END, PAGE), (sandbox.stub.base, PAGE)]
    {
        assert!(sandbox.map(address, size, 0, Rights::default()).is_err(), "{address:#x}");
    }
}

#[test]
fn who_is_refused_a_mapping_has_not_gone_on() {
    // add rax, 1; syscall; jmp back
    let mut sandbox = with_code(&[0x48, 0x83, 0xc0, 0x01, 0x0f, 0x05, 0xeb, 0xf8]);
    assert_eq!(sandbox.run().unwrap(), Trap::SystemCall);
    // Linux knows no file offsets that are not whole pages.
    sandbox.map(DATA + PAGE, PAGE, 5, Rights::default()).unwrap();
    assert!(matches!(sandbox.run(), Err(SandboxError::Refused)));
    assert_eq!(sandbox.registers().rax, 1);
}

#[test]
fn a_copy_stands_in_for_a_page_of_code() {
    // nop; syscall
    let mut sandbox = with_code(&[0x90, 0x0f, 0x05]);
    let mut copy = [0; PAGE as usize];
    copy[1] = 0xf4;
    sandbox.map_copy(CODE, &copy).unwrap();
    copy[..2].copy_from_slice(&[0x90, 0x90]);
    sandbox.map_copy(CODE, &copy).unwrap();
    copy[2] = 0xcc;
    sandbox.map_copy(CODE + PAGE, &copy).unwrap();
    assert_eq!(sandbox.run().unwrap(), Trap::PageFault { address: 0, error: 6 });
    sandbox.set_registers(&Registers { rip: CODE + PAGE, ..sandbox.registers() });
    assert_eq!(sandbox.run().unwrap(), Trap::Exception(3));
    for page in 0..MOST_COPIES - 2 {
        sandbox.map_copy(CODE + (2 + page) * PAGE, &copy).unwrap();
    }
    assert!(sandbox.map_copy(DATA, &copy).is_err());
}

#[test]
fn vector_and_x87_registers_go_in_and_come_out() {
    // fld1; faddp; vaddps ymm2, ymm1, ymm1; syscall
    let mut sandbox = with_code(&[0xd9, 0xe8, 0xde, 0xc1, 0xc5, 0xf4, 0x58, 0xd1, 0x0f, 0x05]);
    let (mut fxsave, mut high) = ([0; 512], [[0; 2]; 16]);
    sandbox.load_fpu(&mut fxsave, &mut high);
    assert_eq!(fxsave[..2], [0x7f, 0x03]);
    let one = 1f32.to_bits();
    fxsave[176..180].copy_from_slice(&one.to_le_bytes());
    high[1] = [u64::from(one), u64::from(one) << 32];
    // ST0 = 1.0, the top of the stack is 7.
    fxsave[2..4].copy_from_slice(&(7u16 << 11).to_le_bytes());
    fxsave[4] = 0x80;
    fxsave[32..42].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
    sandbox.store_fpu(&fxsave, &high);
    assert_eq!(sandbox.run().unwrap(), Trap::SystemCall);
    sandbox.load_fpu(&mut fxsave, &mut high);
    let two = u64::from(2f32.to_bits());
    assert_eq!(u32::from_le_bytes(fxsave[192..196].try_into().unwrap()), two as u32);
    assert_eq!(high[2], [two, two << 32]);
    assert_eq!(fxsave[32..42], [0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0x40]);
}

#[test]
fn a_kick_ends_a_loop() {
    // jmp to itself
    let mut sandbox = with_code(&[0xeb, 0xfe]);
    let kicker = sandbox.kicker();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        kicker.kick();
    });
    assert_eq!(sandbox.run().unwrap(), Trap::Kicked);
    thread.join().unwrap();
    assert_eq!(sandbox.registers().rip, CODE);
}

/// User code that knows where the stub is.
mod hostile {
    use super::*;

    fn at_stub(to: impl Fn(Stub) -> u64, set: impl Fn(&mut Registers)) -> Result<Trap, SandboxError> {
        // jmp rbp
        let mut sandbox = with_code(&[0xff, 0xe5]);
        let mut registers = sandbox.registers();
        set(&mut registers);
        registers.rbp = to(sandbox.stub);
        sandbox.set_registers(&registers);
        sandbox.run()
    }

    #[test]
    fn system_calls_of_the_stub_are_traps_for_user_code() {
        // The loop that makes ordered calls begins with `mov eax, [r14 + number]`: find each SYSCALL.
        let program = Stub { base: 0 }.program();
        let calls: Vec<u64> = (PAGE..program.len() as u64 - 1)
            .filter(|&i| program[i as usize..][..2] == [0x0f, 0x05])
            .collect();
        assert!(calls.len() > 5);
        let number = |n: libc::c_long| {
            for &at in &calls {
                let end = at_stub(|stub| stub.base + at - PAGE, |r| r.rax = n as u64);
                assert!(matches!(end, Ok(Trap::SystemCall)), "{n} at {at:#x}: {end:?}");
            }
        };
        number(libc::SYS_getpid);
        number(libc::SYS_mmap);
        number(libc::SYS_clone);
        number(libc::SYS_exit_group);
    }

    #[test]
    fn a_pretended_stop_does_not_go_unnoticed() {
        // The frame is nowhere: the monitor does not believe it.
        let end = at_stub(|stub| stub.stop() - 2, |r| (r.rax, r.rdi) = (u64::from(stub::STOP), 0x1000));
        assert!(matches!(end, Err(SandboxError::Ended)), "{end:?}");
    }

    #[test]
    fn orders_cannot_be_written() {
        // mov [rbp], eax
        let mut sandbox = with_code(&[0x89, 0x45, 0x00]);
        let at = sandbox.stub.orders();
        sandbox.set_registers(&Registers { rbp: at, ..sandbox.registers() });
        assert_eq!(sandbox.run().unwrap(), Trap::PageFault { address: at, error: 7 });
    }

    #[test]
    fn who_blocks_the_kick_ends() {
        // A frame of its own to go back from, with all signals blocked (`struct rt_sigframe`).
        let mut frame = vec![0u8; 512];
        let mut word = |at: usize, value: u64| frame[at..at + 8].copy_from_slice(&value.to_le_bytes());
        word(48 + 128, CODE + 7);
        word(48 + 136, 0x202);
        word(48 + 144, 0x002b_0000_0000_0033);
        word(48 + 256, u64::MAX);
        // mov eax, 15; jmp rdx; jmp to itself
        let mut sandbox = with_memory(&[0xb8, 15, 0, 0, 0, 0xff, 0xe2, 0xeb, 0xfe], &frame);
        let sigreturn = sandbox.stub.sigreturn() - 2;
        sandbox.set_registers(&Registers { rsp: DATA + 8, rdx: sigreturn, ..sandbox.registers() });
        let kicker = sandbox.kicker();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            kicker.kick();
        });
        let started = Instant::now();
        assert!(matches!(sandbox.run(), Err(SandboxError::Ended)));
        assert!(started.elapsed() > Duration::from_millis(20));
        thread.join().unwrap();
    }
}

#[test]
fn a_handler_that_waits_for_a_cpu_is_not_taken_for_a_blocker() {
    let mut deaf = Deaf::default();
    // Found in the handler again and again, but it has hardly run.
    assert!((0..100).all(|_| !deaf.is_for_good(true, 7)));
    assert!(!deaf.is_for_good(true, 7 + DEAF - 1));
    assert!(!deaf.is_for_good(false, 7 + DEAF), "it was elsewhere in between");
    assert!(!deaf.is_for_good(true, 7 + DEAF) && !deaf.is_for_good(true, 6 + 2 * DEAF));
    assert!(deaf.is_for_good(true, 7 + 2 * DEAF));
}
