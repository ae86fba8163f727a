use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use ruse_engine::{Bus, Halt};

use super::*;
use crate::console::ConsoleOutput;
use crate::fake::{FakeEngine, Flow, tiny_machine};
use crate::platform::lock;

/// Output that a test looks at.
#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl ConsoleOutput for Screen {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend(&bytes[..1]);
        Ok(1)
    }
}

impl Screen {
    fn text(&self) -> String {
        String::from_utf8(lock(&self.0).clone()).unwrap()
    }
    fn console(&self) -> Console {
        Console { input: None, output: Some(Box::new(self.clone())) }
    }
}

fn start(
    cpus: u32,
    console: Console,
    program: impl Fn(u32, u32, u32, &dyn Bus) -> Flow + Send + Sync + 'static,
) -> RunningMachine {
    let (mut config, _file) = tiny_machine();
    config.cpus = crate::Topology::flat(cpus);
    config.debug_exit = true;
    Machine::load(config).unwrap().start(&FakeEngine::new(program), console).unwrap()
}

fn print(bus: &dyn Bus, text: &str) {
    text.bytes().for_each(|byte| bus.pio_write(0, 0x3f8, &[byte]));
}
fn power_off(bus: &dyn Bus) -> Flow {
    bus.pio_write(0, 0x604, &[0x00, 0x34]);
    Flow::Sleep
}
fn steps() -> (Sender<u32>, Receiver<u32>) {
    channel()
}

const LONG: Duration = Duration::from_secs(10);

#[test]
fn power_off_ends_it_with_all_output() {
    let screen = Screen::default();
    let machine = start(2, screen.console(), |_, _, _, bus| {
        print(bus, &"hello ".repeat(600));
        power_off(bus)
    });
    assert!(matches!(machine.wait(), Outcome::PowerOff));
    assert_eq!(screen.text(), "hello ".repeat(600));
}

#[test]
fn debug_exit_gives_a_code() {
    let machine = start(1, Console::default(), |_, _, _, bus| {
        bus.pio_write(0, 0xf4, &[0x10]);
        Flow::Sleep
    });
    assert!(matches!(machine.wait(), Outcome::DebugExit(0x21)));
}

#[test]
fn a_triple_fault_shows_the_state() {
    let machine = start(2, Console::default(), |_, _, _, _| Flow::Leave(Halt::TripleFault));
    let Outcome::TripleFault { vcpu: 0, dump } = machine.wait() else { panic!() };
    assert_eq!(dump.code[..2], [0xf4, 0xf4]);
}

#[test]
fn a_reset_starts_the_guest_again() {
    let screen = Screen::default();
    let machine = start(3, screen.console(), |_, starts, _, bus| {
        print(bus, &format!("start {starts}\n"));
        if starts == 3 {
            return power_off(bus);
        }
        bus.pio_write(0, 0x64, &[0xfe]);
        Flow::Sleep
    });
    assert!(matches!(machine.wait(), Outcome::PowerOff));
    assert_eq!(screen.text(), "start 1\nstart 2\nstart 3\n");
}

#[test]
fn a_panic_does_not_reboot() {
    let machine = start(1, Console::default(), |_, _, _, bus| {
        print(bus, "[ 1.0] Kernel panic - not syncing: Attempted to kill init!\r\n");
        bus.pio_write(0, 0xcf9, &[6]);
        Flow::Sleep
    });
    let Outcome::GuestPanic { message, vcpu: 0, dump: Some(_) } = machine.wait() else { panic!() };
    assert_eq!(message, "Kernel panic - not syncing: Attempted to kill init!");
}

#[test]
fn a_paused_machine_stands_still() {
    let (tx, rx) = steps();
    let machine = start(1, Console::default(), move |_, _, step, _| {
        let _ = tx.send(step);
        std::thread::sleep(Duration::from_micros(100));
        Flow::Go
    });
    let control = machine.control();
    // The second step begins when the first one has been counted.
    while rx.recv_timeout(LONG).unwrap() == 0 {}
    assert!(control.pause());
    let info = control.info();
    assert_eq!(info.phase, Phase::Paused);
    assert!(info.vcpus[0].held && info.counters.get("steps") > 0);
    while rx.try_recv().is_ok() {}
    assert!(rx.recv_timeout(Duration::from_millis(50)).is_err());
    assert!(control.resume());
    rx.recv_timeout(LONG).unwrap();
    assert!(!control.info().vcpus[0].held);
    control.stop();
    assert!(matches!(machine.wait(), Outcome::Stopped));
    assert!(!control.pause() && !control.resume());
}

#[test]
fn a_sleeping_machine_can_be_reset_and_stopped() {
    let (tx, rx) = steps();
    let machine = start(4, Console::default(), move |_, starts, _, _| {
        let _ = tx.send(starts);
        Flow::Sleep
    });
    let control = machine.control();
    assert_eq!(rx.recv_timeout(LONG), Ok(1));
    control.pause();
    control.reset();
    assert!(rx.recv_timeout(Duration::from_millis(50)).is_err(), "it stays paused");
    control.resume();
    assert_eq!(rx.recv_timeout(LONG), Ok(2));
    control.stop();
    assert!(matches!(machine.wait(), Outcome::Stopped));
}

#[test]
fn a_timer_wakes_a_sleeping_guest() {
    let machine = start(1, Console::default(), |_, _, step, bus| match step {
        0 => {
            bus.mmio_write(0, 0xfee0_00f0, &0x1ffu32.to_le_bytes());
            bus.mmio_write(0, 0xfee0_0320, &0x40u32.to_le_bytes());
            bus.mmio_write(0, 0xfee0_03e0, &0xbu32.to_le_bytes());
            bus.mmio_write(0, 0xfee0_0380, &20_000_000u32.to_le_bytes());
            Flow::Sleep
        }
        _ if bus.acknowledge_interrupt(0) == Some(0x40) => power_off(bus),
        _ => Flow::Sleep,
    });
    let before = std::time::Instant::now();
    assert!(matches!(machine.wait(), Outcome::PowerOff));
    let took = before.elapsed();
    assert!(took >= Duration::from_millis(15) && took < Duration::from_secs(5), "{took:?}");
}

#[test]
fn input_reaches_the_guest_as_it_makes_room() {
    struct Pipe(io::PipeReader);
    impl crate::ConsoleInput for Pipe {
        fn fd(&self) -> BorrowedFd<'_> {
            std::os::fd::AsFd::as_fd(&self.0)
        }
        fn read(&mut self, to_guest: &mut Vec<u8>) -> io::Result<bool> {
            let mut bytes = [0; 100];
            let n = io::Read::read(&mut self.0, &mut bytes)?;
            to_guest.extend(&bytes[..n]);
            Ok(n > 0)
        }
    }
    let (reader, mut writer) = io::pipe().unwrap();
    let screen = Screen::default();
    let console = Console { input: Some(Box::new(Pipe(reader))), ..screen.console() };
    let machine = start(1, console, |_, _, _, bus| {
        let mut byte = [0];
        bus.pio_read(0, 0x3fd, &mut byte);
        if byte[0] & 1 != 0 {
            bus.pio_read(0, 0x3f8, &mut byte);
            bus.pio_write(0, 0x3f8, &byte);
            if byte[0] == b'.' {
                return power_off(bus);
            }
        }
        Flow::Go
    });
    let text = format!("{}.", "0123456789".repeat(500));
    io::Write::write_all(&mut writer, text.as_bytes()).unwrap();
    assert!(matches!(machine.wait(), Outcome::PowerOff));
    assert_eq!(screen.text(), text);
}

#[test]
fn a_bug_in_a_vcpu_ends_the_machine() {
    let machine = start(2, Console::default(), |_, _, _, _| panic!("this test's bug"));
    let Outcome::Failed { what, vcpu: Some(0) } = machine.wait() else { panic!() };
    assert!(what.contains("this test's bug"), "{what}");
}

#[test]
fn a_dropped_machine_ends() {
    let machine = start(1, Console::default(), |_, _, _, _| Flow::Sleep);
    let control = machine.control();
    drop(machine);
    assert_eq!(control.phase(), Phase::Ended);
}

#[test]
fn an_engine_has_its_limit() {
    let (mut config, _file) = tiny_machine();
    config.cpus = crate::Topology::flat(5);
    let engine = FakeEngine::new(|_, _, _, _| Flow::Sleep);
    let error = Machine::load(config).unwrap().start(&engine, Console::default()).err().unwrap();
    assert!(error.is_bad_input(), "{error}");
}

#[test]
fn without_pci_all_devices_are_where_the_tables_say() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| {
        let path = dir.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(2 << 20).unwrap();
        path.display().to_string()
    };
    let (mut config, _file) = tiny_machine();
    config.kind = MachineKind::Microvm;
    config.disks = vec![file("a").parse().unwrap(), file("b").parse().unwrap()];
    config.seed = crate::config::SeedConfig::of(Some(file("user").into()), None, None);
    config.nets = vec![crate::NetConfig::user(); 2];
    config.consoles = vec!["null".parse().unwrap(), "null,name=port".parse().unwrap()];
    config.vsock = Some(format!("3,path={}", dir.path().join("vsock").display()).parse().unwrap());
    config.balloon = Some(0);
    config.max_memory = Some(32 << 20);
    config.pmems = vec![file("pmem").parse().unwrap()];
    config.shares = vec![format!("{}:tag", dir.path().display()).parse().unwrap()];
    let machine = Machine::load(config).unwrap();
    let described: Vec<_> = machine.boot.acpi.virtio.iter().map(|place| u64::from(place.base)).collect();
    let (found, finds) = channel();
    let engine = FakeEngine::new(move |_, _, _, bus| {
        for base in (0xf000_0000..0xfec0_0000u64).step_by(0x1000) {
            let mut words = [[0; 4]; 3];
            words.iter_mut().zip([0, 4, 8]).for_each(|(word, offset)| bus.mmio_read(0, base + offset, word));
            if words != [[0xff; 4]; 3] {
                found.send((base, words.map(u32::from_le_bytes))).unwrap();
            }
        }
        power_off(bus)
    });
    assert!(matches!(machine.start(&engine, Console::default()).unwrap().wait(), Outcome::PowerOff));
    drop(engine);
    let (bases, words): (Vec<_>, Vec<_>) = finds.iter().unzip();
    assert_eq!(bases, described);
    assert!(words.iter().all(|words| words[..2] == [0x7472_6976, 2]));
    let kinds: Vec<_> = words.iter().map(|words| words[2]).collect();
    assert_eq!(kinds, [4, 1, 1, 3, 19, 5, 2, 2, 2, 26, 3, 24, 27]);
}

/// Starts a machine with a watchdog.
fn start_watched(
    action: crate::WatchdogAction,
    console: Console,
    program: impl Fn(u32, u32, u32, &dyn Bus) -> Flow + Send + Sync + 'static,
) -> RunningMachine {
    let (mut config, _file) = tiny_machine();
    config.watchdog = Some(action);
    Machine::load(config).unwrap().start(&FakeEngine::new(program), console).unwrap()
}

/// Selects a register of the watchdog's configuration space.
fn select_watchdog(bus: &dyn Bus, register: u32) {
    bus.pio_write(0, 0xcf8, &(0x8000_0000 | 7 << 11 | 3 << 8 | register).to_le_bytes());
}

/// Enables the watchdog's registers and says where they are.
fn find_watchdog(bus: &dyn Bus) -> u64 {
    select_watchdog(bus, 4);
    bus.pio_write(0, 0xcfc, &[2, 0]);
    select_watchdog(bus, 0x10);
    let mut range = [0; 4];
    bus.pio_read(0, 0xcfc, &mut range);
    u32::from_le_bytes(range).into()
}

/// Starts the watchdog with two stages of some 20 ms.
fn start_watchdog(bus: &dyn Bus) {
    let range = find_watchdog(bus);
    for offset in [0, 4] {
        bus.mmio_write(0, range + 0xc, &[0x80, 0]);
        bus.mmio_write(0, range + 0xc, &[0x86, 0]);
        bus.mmio_write(0, range + offset, &20u32.to_le_bytes());
    }
    select_watchdog(bus, 0x68);
    bus.pio_write(0, 0xcfc, &[2]);
}

#[test]
fn a_silent_system_is_reset_and_the_next_one_hears_of_it() {
    let screen = Screen::default();
    let running = start_watched(crate::WatchdogAction::Reset, screen.console(), |_, starts, step, bus| {
        match (starts, step) {
            (1, 0) => start_watchdog(bus),
            (1, _) => return Flow::Sleep,
            _ => {
                let mut reload = [0; 2];
                bus.mmio_read(0, find_watchdog(bus) + 0xc, &mut reload);
                print(bus, &format!("{reload:?}"));
                return power_off(bus);
            }
        }
        Flow::Go
    });
    assert!(matches!(running.wait(), Outcome::PowerOff));
    assert_eq!(screen.text(), "[0, 2]");
}

#[test]
fn a_silent_system_is_held_until_it_is_let_go_on() {
    let running = start_watched(crate::WatchdogAction::Pause, Console::default(), |_, _, step, bus| {
        if step == 0 {
            start_watchdog(bus);
        }
        Flow::Sleep
    });
    let control = running.control();
    let limit = Instant::now() + LONG;
    while control.phase() != Phase::Paused {
        assert!(Instant::now() < limit, "it is not held");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(control.resume());
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(control.phase(), Phase::Running, "the watchdog has done its work");
    control.stop();
    assert!(matches!(running.wait(), Outcome::Stopped));
}
