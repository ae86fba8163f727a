use std::{
    io::Write,
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ruse_arch::{
    Exception, msr as number,
    paravirt::{ClockPage, clock_flag, hypercall, hypercall::error, steal_time},
    state::reg,
};
use ruse_engine::{Bus, CpuidEntry, Halt};

use super::*;
use crate::{
    cpu::request,
    mmu::watch::Note,
    tier0::testing::{DATA, Machine},
};

const RAM_END: u64 = 16 << 20;
const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];
const BAD: Result<(), Exception> = Err(Exception::gp(0));

/// Remembers messages.
#[derive(Default)]
struct Messages(Mutex<Vec<Message>>);

impl Bus for Messages {
    fn deliver(&self, message: Message) {
        self.0.lock().unwrap().push(message);
    }
}

impl Messages {
    fn take(&self) -> Vec<(u64, u32)> {
        self.0.lock().unwrap().drain(..).map(|m| (m.address, m.data)).collect()
    }
}

fn leaves(features: u32) -> [CpuidEntry; 2] {
    let [ebx, ecx, edx] = SIGNATURE;
    let entry = |leaf, regs| CpuidEntry { leaf, subleaf: None, regs };
    [entry(SIGNATURE_LEAF, [FEATURES_LEAF, ebx, ecx, edx]), entry(FEATURES_LEAF, [features, 0, 0, 0])]
}

fn machine(features: u32) -> Machine {
    let mut machine = Machine::long();
    machine.cpu.cpuid.0.extend(leaves(features));
    machine
}

/// A machine whose guest has a clock at `area`.
fn with_clock(area: u64) -> Machine {
    let mut m = machine(feature::KNOWN);
    msr::write(&mut m.cpu, number::KVM_SYSTEM_TIME, area | ENABLED).unwrap();
    m
}

/// Executes WRMSR.
fn wrmsr(m: &mut Machine, number: u32, value: u64) -> Result<(), Exception> {
    (m.cpu.gpr[reg::RCX], m.cpu.gpr[reg::RAX], m.cpu.gpr[reg::RDX]) = (number.into(), value, value >> 32);
    m.run(&[0x0f, 0x30])
}

fn version(m: &Machine, area: u64) -> u32 {
    u32::from_le_bytes(m.read(area))
}

fn page(m: &Machine, area: u64) -> ClockPage {
    ClockPage::from_bytes(&m.read(area + ClockPage::BODY))
}

/// Nanoseconds that the guest reads.
fn guest_time(m: &Machine, area: u64) -> u64 {
    page(m, area).at(m.cpu.tsc())
}

fn enter(m: &mut Machine) -> Vec<(u64, u32)> {
    let bus = Messages::default();
    m.cpu.with_bus(&bus, super::enter);
    bus.take()
}

#[test]
fn the_clock_is_the_machines() {
    let mut m = machine(feature::KNOWN);
    for register in [number::KVM_SYSTEM_TIME, number::KVM_SYSTEM_TIME_OLD] {
        m.write(DATA, &[0; ClockPage::LEN]);
        msr::write(&mut m.cpu, register, DATA | ENABLED).unwrap();
        assert_eq!(msr::read(&m.cpu, register), Ok(DATA | 1));
        let (before, guest, after) = (m.cpu.clock.now_ns(), guest_time(&m, DATA), m.cpu.clock.now_ns());
        assert!((before..=after + 1).contains(&guest), "{before} {guest} {after}");
        assert_eq!((version(&m, DATA), page(&m, DATA).flags), (2, clock_flag::STABLE));
    }
}

#[test]
fn the_version_goes_on_and_is_even() {
    let mut m = with_clock(DATA);
    for (old, new) in [(2, 4), (7, 10), (u32::MAX, 2)] {
        m.write(DATA, &u32::to_le_bytes(old));
        clock::write(&mut m.cpu);
        assert_eq!(version(&m, DATA), new);
    }
}

#[test]
fn the_clock_does_not_follow_the_guests_changes_of_its_counter() {
    let mut m = with_clock(DATA);
    for adjust in [1 << 40, 0, 0u64.wrapping_sub(1 << 50)] {
        let before = guest_time(&m, DATA);
        wrmsr(&mut m, number::TSC_ADJUST, adjust).unwrap();
        let passed = guest_time(&m, DATA) - before;
        assert!(passed < 1_000_000_000, "{passed}");
    }
}

#[test]
fn the_wall_clocks_time_is_that_of_zero() {
    let mut m = with_clock(DATA);
    let area = DATA + 0x100;
    for register in [number::KVM_WALL_CLOCK, number::KVM_WALL_CLOCK_OLD] {
        m.write(area, &[0; 12]);
        msr::write(&mut m.cpu, register, area).unwrap();
        assert_eq!((version(&m, area), msr::read(&m.cpu, register)), (2, Ok(area)));
        let (seconds, nanoseconds) = (version(&m, area + 4), version(&m, area + 8));
        let zero = Duration::new(seconds.into(), nanoseconds);
        let now = zero + Duration::from_nanos(guest_time(&m, DATA));
        let host = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        assert!(host.abs_diff(now) < Duration::from_millis(500), "{host:?} {now:?}");
    }
}

#[test]
fn the_guest_is_told_that_it_was_held_until_it_has_seen_that() {
    let mut m = with_clock(DATA);
    enter(&mut m);
    clock::held(&mut m.cpu);
    enter(&mut m);
    assert_eq!(page(&m, DATA).flags, clock_flag::STABLE | clock_flag::STOPPED);
    clock::write(&mut m.cpu);
    assert_eq!(page(&m, DATA).flags, clock_flag::STABLE | clock_flag::STOPPED);
    m.write(DATA + ClockPage::FLAGS, &[clock_flag::STABLE]);
    clock::write(&mut m.cpu);
    assert_eq!(page(&m, DATA).flags, clock_flag::STABLE);
}

#[test]
fn a_clock_from_elsewhere_goes_on_on_all_vcpus() {
    let mut m = machine(feature::KNOWN);
    // It is an hour ahead at this value of the counter.
    let mut state = m.cpu.save_state();
    let elsewhere =
        ClockPage { tsc: 5000, nanoseconds: 3600 << 30, ..ClockPage::with_frequency(3_000_000_000) };
    m.write(DATA + ClockPage::BODY, &elsewhere.to_bytes());
    state.tsc = 5000 + 3_000_000_000;
    state.paravirt.system_time = DATA | ENABLED;
    m.cpu.load_state(&state);
    assert_eq!(page(&m, DATA), elsewhere, "memory is the guest's until the vCPU runs");
    enter(&mut m);
    let expected = (3600 << 30) + 1_000_000_000;
    let found = guest_time(&m, DATA);
    assert!((expected..expected + 500_000_000).contains(&found), "{found} {expected}");
    // Another vCPU of the VM has the same clock.
    let mut other = machine(feature::KNOWN);
    other.cpu.paravirt.share(m.cpu.paravirt.clock.clone());
    other.cpu.clock = m.cpu.clock.clone();
    other.cpu.tsc_offset = m.cpu.clock.tsc_offset();
    msr::write(&mut other.cpu, number::KVM_SYSTEM_TIME, DATA | ENABLED).unwrap();
    let (first, second) = (guest_time(&m, DATA), guest_time(&other, DATA));
    assert!(second >= first && second - first < 500_000_000, "{first} {second}");
}

#[test]
fn a_clock_that_is_behind_goes_forward() {
    let mut m = machine(feature::KNOWN);
    let mut state = m.cpu.save_state();
    m.write(DATA + ClockPage::BODY, &ClockPage::with_frequency(1_000_000_000).to_bytes());
    (state.tsc, state.paravirt.system_time) = (1, DATA | ENABLED);
    std::thread::sleep(Duration::from_millis(2));
    m.cpu.load_state(&state);
    enter(&mut m);
    assert!(guest_time(&m, DATA) >= 2_000_000);
    assert!(guest_time(&m, DATA) <= m.cpu.clock.now_ns());
}

#[test]
fn a_reset_ends_all() {
    let mut m = with_clock(DATA);
    msr::write(&mut m.cpu, number::KVM_STEAL_TIME, (DATA + 0x400) | ENABLED).unwrap();
    m.cpu.load_state(&VcpuState::default());
    m.write(DATA, &[0; 0x1000]);
    assert_eq!(enter(&mut m), []);
    clock::write(&mut m.cpu);
    clock::held(&mut m.cpu);
    enter(&mut m);
    steal::tell(&mut m.cpu);
    assert_eq!(m.read::<0x1000>(DATA), [0; 0x1000]);
    assert_eq!(m.cpu.save_state().paravirt, Paravirt::default());
}

#[test]
fn registers_are_in_the_state() {
    let mut m = machine(feature::KNOWN);
    let mut state = m.cpu.save_state();
    let all = Paravirt { system_time: 1, async_pf: 0x41, async_pf_vector: 0xec, steal_time: 0x81, eoi: 5 };
    state.paravirt = all;
    m.cpu.load_state(&state);
    assert_eq!(m.cpu.save_state().paravirt, all);
}

#[test]
fn what_cpuid_does_not_offer_is_not_there() {
    let registers = [
        (number::KVM_WALL_CLOCK_OLD, feature::CLOCK_OLD),
        (number::KVM_SYSTEM_TIME_OLD, feature::CLOCK_OLD),
        (number::KVM_WALL_CLOCK, feature::CLOCK),
        (number::KVM_SYSTEM_TIME, feature::CLOCK),
        (number::KVM_ASYNC_PF, feature::ASYNC_PF),
        (number::KVM_STEAL_TIME, feature::STEAL_TIME),
        (number::KVM_EOI, feature::EOI),
        (number::KVM_ASYNC_PF_VECTOR, feature::ASYNC_PF_INT),
        (number::KVM_ASYNC_PF_ACK, feature::ASYNC_PF_INT),
    ];
    for (register, needed) in registers {
        let mut m = machine(feature::KNOWN & !needed);
        assert_eq!(msr::write(&mut m.cpu, register, 0), BAD, "{register:#x}");
        assert_eq!(msr::read(&m.cpu, register).map(drop), BAD, "{register:#x}");
        let mut m = machine(needed);
        assert_eq!(msr::write(&mut m.cpu, register, 0), Ok(()), "{register:#x}");
        assert_eq!(msr::read(&m.cpu, register), Ok(0), "{register:#x}");
    }
    // Without the signature the leaf is somebody else's; and there are numbers that nobody has.
    let mut m = Machine::long();
    m.cpu.cpuid.0.push(leaves(feature::KNOWN)[1]);
    assert_eq!(msr::write(&mut m.cpu, number::KVM_SYSTEM_TIME, 0), BAD);
    assert_eq!(msr::write(&mut machine(feature::KNOWN).cpu, number::KVM_LAST, 0), BAD);
}

#[test]
fn reserved_bits_are_refused() {
    let mut m = machine(feature::KNOWN);
    for (register, bits) in [
        (number::KVM_STEAL_TIME, &[2u64, 4, 8, 16, 32][..]),
        (number::KVM_ASYNC_PF, &[4, 16, 32]),
        (number::KVM_ASYNC_PF_VECTOR, &[0x100, 1 << 63]),
        (number::KVM_EOI, &[2]),
    ] {
        for bit in bits {
            assert_eq!(wrmsr(&mut m, register, DATA | bit | 1), BAD, "{register:#x} {bit:#x}");
        }
        assert_eq!(msr::read(&m.cpu, register), Ok(0), "{register:#x}");
    }
}

#[test]
fn addresses_that_are_not_ram_do_no_harm() {
    for area in [RAM_END, RAM_END - 4, RAM_END - 16, 1 << 52, !0x3f, u64::MAX - 1] {
        let mut m = machine(feature::KNOWN);
        m.write(RAM_END - 64, &[0x5a; 64]);
        msr::write(&mut m.cpu, number::KVM_SYSTEM_TIME, area | ENABLED).unwrap();
        msr::write(&mut m.cpu, number::KVM_WALL_CLOCK, area.max(RAM_END - 4)).unwrap();
        let aligned = (area & !0x3f).max(RAM_END);
        msr::write(&mut m.cpu, number::KVM_STEAL_TIME, aligned | ENABLED).unwrap();
        msr::write(&mut m.cpu, number::KVM_ASYNC_PF, aligned | ENABLED | async_pf::BY_INTERRUPT).unwrap();
        let state = m.cpu.save_state();
        m.cpu.load_state(&state);
        clock::held(&mut m.cpu);
        assert_eq!(enter(&mut m), []);
        m.cpu.paravirt.steal = waited_for(1 << 40);
        steal::tell(&mut m.cpu);
        assert_eq!(m.read::<64>(RAM_END - 64), [0x5a; 64], "{area:#x}");
    }
}

#[test]
fn a_clock_may_lie_anywhere_in_ram() {
    for area in [DATA + 2, DATA + 0xff2, DATA + 0xffe, RAM_END - 32] {
        let m = with_clock(area);
        assert_eq!(version(&m, area), 2);
        assert!(guest_time(&m, area) <= m.cpu.clock.now_ns() + 1);
    }
}

#[test]
fn writes_to_pages_with_code_are_noticed() {
    let mut m = machine(feature::KNOWN);
    let arena = m.cpu.arena().clone();
    let peer = m.cpu.mmu.code.join(0, arena, Box::new(|| {}));
    // The last four bytes are on the next page.
    let (area, pages) = (DATA + 0xfe4, [DATA, DATA + 0x1000]);
    pages.iter().for_each(|&page| m.cpu.mmu.code.watch(page, 0));
    msr::write(&mut m.cpu, number::KVM_SYSTEM_TIME, area | ENABLED).unwrap();
    let notes = peer.take_notes();
    for page in pages {
        assert!(notes.contains(&Note::Written(page)), "{notes:?}");
    }
    assert_ne!(m.cpu.shared().take(request::MEMORY), 0);
}

/// Stolen time of a thread that has waited so long.
fn waited_for(nanoseconds: u64) -> Steal {
    let mut file = tempfile::tempfile().unwrap();
    writeln!(file, "17 {nanoseconds} 4").unwrap();
    Steal { source: Some(file), ..Steal::default() }
}

#[test]
fn stolen_time_adds_up_and_is_told_at_intervals() {
    let mut m = machine(feature::KNOWN);
    m.write_u64(DATA + steal_time::NANOSECONDS, 1000);
    msr::write(&mut m.cpu, number::KVM_STEAL_TIME, DATA | ENABLED).unwrap();
    m.cpu.paravirt.steal = Steal { told: 2_000_000, ..waited_for(5_000_000) };
    steal::tell(&mut m.cpu);
    assert_eq!(m.read_u64(DATA + steal_time::NANOSECONDS), 3_001_000);
    assert_eq!(version(&m, DATA + steal_time::VERSION), 2);
    m.cpu.paravirt.steal = Steal { told: 5_000_000, next: u64::MAX, ..waited_for(6_000_000) };
    steal::tell(&mut m.cpu);
    assert_eq!(m.read_u64(DATA + steal_time::NANOSECONDS), 3_001_000, "too early");
    m.cpu.paravirt.steal.next = 0;
    steal::tell(&mut m.cpu);
    assert_eq!(m.read_u64(DATA + steal_time::NANOSECONDS), 4_001_000);
    assert_eq!(version(&m, DATA + steal_time::VERSION), 4);
}

#[test]
fn a_thread_that_others_keep_from_running_is_stolen_from() {
    if !steal::is_known() {
        println!("skipped: this host does not say how long threads wait");
        return;
    }
    let mut m = machine(feature::KNOWN);
    msr::write(&mut m.cpu, number::KVM_STEAL_TIME, DATA | ENABLED).unwrap();
    let stop = Arc::new(AtomicU64::new(0));
    let cpus = std::thread::available_parallelism().map_or(4, usize::from);
    let others: Vec<_> = (0..2 * cpus)
        .map(|_| {
            let stop = stop.clone();
            std::thread::spawn(move || while stop.load(Ordering::Relaxed) == 0 {})
        })
        .collect();
    let started = std::time::Instant::now();
    while m.read_u64(DATA) == 0 && started.elapsed() < Duration::from_secs(20) {
        steal::tell(&mut m.cpu);
    }
    stop.store(1, Ordering::Relaxed);
    others.into_iter().for_each(|thread| thread.join().unwrap());
    assert_ne!(m.read_u64(DATA), 0);
}

#[test]
fn a_vcpu_that_was_preempted_elsewhere_runs_here() {
    let mut m = machine(feature::KNOWN);
    let mut state = m.cpu.save_state();
    state.paravirt.steal_time = DATA | ENABLED;
    m.write(DATA + steal_time::PREEMPTED, &[3]);
    m.cpu.load_state(&state);
    enter(&mut m);
    assert_eq!(m.read(DATA + steal_time::PREEMPTED), [0]);
}

#[test]
fn page_faults_that_were_asynchronous_elsewhere_have_ended() {
    let mut m = machine(feature::KNOWN);
    let mut state = m.cpu.save_state();
    state.paravirt.async_pf_vector = 0xec;
    for (register, told) in [(1, false), (8, false), (9, true)] {
        m.write(DATA, &[0; 8]);
        state.paravirt.async_pf = DATA | register;
        m.cpu.load_state(&state);
        let expected = if told { vec![(0xfee0_0000, 0xec)] } else { vec![] };
        assert_eq!(enter(&mut m), expected);
        assert_eq!(m.read_u64(DATA), if told { 0xffff_ffff_0000_0000 } else { 0 });
        assert_eq!(enter(&mut m), [], "told once");
    }
}

/// Makes a hypercall; the answer in RAX and the messages sent.
fn call(m: &mut Machine, code: [u8; 3], number: u64, arguments: [u64; 4]) -> (i64, Vec<(u64, u32)>) {
    m.load(&code);
    m.cpu.gpr[reg::RAX] = number;
    for (register, value) in [reg::RBX, reg::RCX, reg::RDX, reg::RSI].into_iter().zip(arguments) {
        m.cpu.gpr[register] = value;
    }
    let before = m.cpu.gpr;
    let bus = Messages::default();
    m.cpu.with_bus(&bus, crate::tier0::step).unwrap();
    assert_eq!((&m.cpu.gpr[1..], m.cpu.rip), (&before[1..], crate::tier0::testing::CODE + 3));
    (m.cpu.gpr[reg::RAX] as i64, bus.take())
}

#[test]
fn unknown_hypercalls_are_answered_with_errors() {
    let mut m = machine(feature::KNOWN);
    for code in [VMCALL, VMMCALL] {
        for number in [0, 2, 12, 1 << 32 | 5, u64::MAX] {
            assert_eq!(call(&mut m, code, number, [0; 4]), (-1000, vec![]));
        }
        assert_eq!(call(&mut m, code, hypercall::POLL_IRQ, [0; 4]), (0, vec![]));
        assert_eq!(call(&mut m, code, hypercall::SCHED_YIELD, [1, 0, 0, 0]), (0, vec![]));
    }
    let mut m = machine(0);
    for number in [hypercall::KICK_CPU, hypercall::SEND_IPI, hypercall::SCHED_YIELD] {
        assert_eq!(call(&mut m, VMCALL, number, [1, 0, 0, 0]).0, -error::NOSYS);
    }
}

#[test]
fn programs_may_not_call() {
    let mut m = machine(feature::KNOWN);
    m.cpu.seg[ruse_arch::state::seg::SS].attr |= 3 << 5;
    m.cpu.update_mode();
    for number in [hypercall::POLL_IRQ, hypercall::SEND_IPI, 77] {
        assert_eq!(call(&mut m, VMCALL, number, [1, 0, 0, 0]), (-error::PERM, vec![]));
    }
}

#[test]
fn without_a_hypervisor_there_is_no_such_instruction() {
    for code in [VMCALL, VMMCALL] {
        assert_eq!(Machine::long().run(&code), Err(Exception::UD));
    }
}

#[test]
fn outside_64_bit_mode_registers_have_32_bits() {
    let mut m = Machine::flat32();
    m.cpu.cpuid.0.extend(leaves(feature::KNOWN));
    assert_eq!(call(&mut m, VMCALL, 1 << 40 | 77, [0; 4]).0, i64::from(-1000i32 as u32));
    let peers: Vec<_> = [1, 33].map(|id| join(&m, id)).into();
    let (count, sent) = call(&mut m, VMCALL, hypercall::SEND_IPI, [1 << 32 | 1, 1, 1, 0x40]);
    assert_eq!((count, sent), (2, vec![(0xfee0_1000, 0x40), (0xfee2_1000, 0x40)]));
    drop(peers);
}

/// Another vCPU of the machine.
fn join(m: &Machine, id: u32) -> crate::cpu::CpuBox {
    let mmu = crate::mmu::Mmu::new(m.ram.clone(), m.cpu.mmu.code.clone(), id);
    let cpu = crate::cpu::CpuBox::new(id, CpuidTable::default(), m.cpu.clock.clone(), mmu);
    m.cpu.mmu.code.join(id, cpu.arena().clone(), Box::new(|| {}));
    cpu
}

#[test]
fn interrupts_are_sent_to_those_who_are_there() {
    let mut m = machine(feature::KNOWN);
    let _peers = [1, 3, 63].map(|id| join(&m, id));
    let mut send =
        |low, high, first, command| call(&mut m, VMCALL, hypercall::SEND_IPI, [low, high, first, command]);
    assert_eq!(send(0b1110, 0, 0, 0x40fd), (2, vec![(0xfee0_1000, 0x40fd), (0xfee0_3000, 0x40fd)]));
    // From the 60th on; NMI.
    assert_eq!(send(0b1000, 0, 60, 0x400), (1, vec![(0xfee3_f000, 0x400)]));
    assert_eq!(send(u64::MAX, u64::MAX, 64, 0xfd), (0, vec![]));
    assert_eq!(send(u64::MAX, u64::MAX, u64::MAX, 0xfd), (0, vec![]));
    assert_eq!(send(0, 1, u64::MAX - 60, 0xfd).0, 0);
    for bits in [1 << 11, 1 << 18, 1 << 19] {
        assert_eq!(send(2, 0, 0, 0xfd | bits), (-error::INVAL, vec![]));
    }
}

#[test]
fn clocks_are_paired() {
    let mut m = machine(feature::KNOWN);
    let before = m.cpu.tsc();
    assert_eq!(call(&mut m, VMCALL, hypercall::CLOCK_PAIRING, [DATA, 0, 0, 0]).0, 0);
    let wall = Duration::new(m.read_u64(DATA), m.read_u64(DATA + 8) as u32);
    let host = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    assert!(host - wall < Duration::from_secs(10));
    assert!((before..=m.cpu.tsc()).contains(&m.read_u64(DATA + 16)));
    let mut pair = |area, kind| call(&mut m, VMCALL, hypercall::CLOCK_PAIRING, [area, kind, 0, 0]).0;
    assert_eq!(pair(DATA, 1), -error::OPNOTSUPP);
    for area in [RAM_END, RAM_END - 8, u64::MAX] {
        assert_eq!(pair(area, 0), -error::FAULT);
    }
}

#[test]
fn a_kick_ends_another_vcpus_hlt() {
    use ruse_engine::{Clock, Engine};
    let engine = crate::DbtEngine::new(crate::DbtOptions::default());
    let ram = GuestRam::new(1 << 20).unwrap();
    let vm = engine.create_vm(ram.clone(), Arc::new(Clock::start())).unwrap();
    let mut table = engine.supported_cpuid();
    table.0.retain(|e| e.leaf >> 28 != 4);
    table.0.extend(leaves(feature::KNOWN));
    let mut vcpus = [0, 1].map(|id| vm.create_vcpu(id, table.clone()).unwrap());
    // In real mode, with interrupts off. 0: mov eax, 5; xor bx, bx; mov cx, 1; vmcall; hlt. 1: hlt; out 10h, al; hlt.
    let programs: [&[u8]; 2] =
        [&[0x66, 0xb8, 5, 0, 0, 0, 0x31, 0xdb, 0xb9, 1, 0, 0x0f, 1, 0xc1, 0xf4], &[0xf4, 0xe6, 0x10, 0xf4]];
    /// Ends both vCPUs when the port is written to.
    struct Port(Vec<Arc<dyn ruse_engine::VcpuHandle>>);
    impl Bus for Port {
        fn pio_write(&self, vcpu: u32, _: u16, _: &[u8]) {
            assert_eq!(vcpu, 1);
            self.0.iter().for_each(|handle| handle.kick());
        }
    }
    let bus = Port(vcpus.iter().map(|vcpu| vcpu.handle()).collect());
    for (at, (vcpu, program)) in [0x1000u64, 0x2000].into_iter().zip(vcpus.iter_mut().zip(programs)) {
        ram.memory().write_slice(program, GuestAddress(at)).unwrap();
        let mut state = VcpuState { rip: at, ..VcpuState::default() };
        (state.seg[1].base, state.seg[1].selector) = (0, 0);
        vcpu.set_state(&state).unwrap();
    }
    std::thread::scope(|scope| {
        for vcpu in &mut vcpus {
            let bus = &bus;
            scope.spawn(move || assert_eq!(vcpu.run(bus).unwrap(), Halt::Kicked));
        }
    });
}
