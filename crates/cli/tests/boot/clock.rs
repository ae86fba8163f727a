//! What Linux makes of its clocks.

use std::thread;
use std::time::{Duration, Instant};

use crate::linux::{expect_shell, guest};
use crate::machine::Machine;

/// The guest's time, between two moments of the host's.
struct Reading {
    guest: f64,
    earliest: Instant,
    latest: Instant,
}

impl Reading {
    fn take(machine: &mut Machine) -> Self {
        let earliest = Instant::now();
        let guest = machine.ask("cut -d ' ' -f 1 /proc/uptime").parse().unwrap();
        Self { guest, earliest, latest: Instant::now() }
    }

    /// Fails unless so much of the guest's time has passed since `before` as of the host's, but for 1 %.
    #[track_caller]
    fn follows(&self, before: &Self) {
        let guest = self.guest - before.guest;
        let least = (self.earliest - before.latest).as_secs_f64();
        let most = (self.latest - before.earliest).as_secs_f64();
        println!("{guest:.2} s of the guest in {least:.3} to {most:.3} s");
        // /proc/uptime has two digits.
        assert!((least * 0.99 - 0.01..=most * 1.01 + 0.01).contains(&guest));
    }
}

#[test]
fn the_paravirtual_clock_keeps_time_and_no_watchdog_minds_a_pause() {
    const PAUSE: Duration = Duration::from_secs(6);
    let Some(_) = guest() else { return };
    let mut machine = Machine::on_terminal(&["--cpus", "2", "--cmdline", "quiet clocksource=kvm-clock"]);
    expect_shell(&mut machine);
    let source = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource";
    assert_eq!(machine.ask(source), "kvm-clock");
    // The watchdog barks after twice as many seconds without a switch of tasks, at CPUs that are not idle.
    let busy = "echo 2 > /proc/sys/kernel/watchdog_thresh; yes > /dev/null & yes > /dev/null &";
    machine.type_in(&format!("{busy}\n"));
    let first = Reading::take(&mut machine);
    thread::sleep(Duration::from_secs(2));
    let second = Reading::take(&mut machine);
    second.follows(&first);
    machine.type_in("\x01c");
    machine.expect("(ruse) ");
    machine.type_in("pause\r");
    machine.expect("paused");
    thread::sleep(PAUSE);
    machine.type_in("resume\r");
    Reading::take(&mut machine).follows(&second);
    assert_eq!(machine.ask("sleep 2; killall yes; dmesg | grep -c -i -e lockup -e stall -e unstable"), "0");
    machine.type_in("poweroff\n");
    machine.end().with_code(0);
}
