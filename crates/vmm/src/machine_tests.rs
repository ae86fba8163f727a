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
