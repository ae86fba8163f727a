//! A Debian guest that gives memory back to the host.

use std::time::{Duration, Instant};

use crate::linux::{expect_shell, guest};
use crate::machine::{Machine, PATIENCE, ruse};

const MIB: u64 = 1 << 20;

/// Waits until the program has less of the guest's RAM than this.
fn wait_below(machine: &Machine, bytes: u64) {
    let limit = Instant::now() + PATIENCE;
    while machine.guest_memory() >= bytes {
        assert!(Instant::now() < limit, "{} MiB are left", machine.guest_memory() / MIB);
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Types at the monitor prompt.
fn monitor(machine: &mut Machine, command: &str) {
    machine.type_in("\x01c");
    machine.expect("(ruse) ");
    machine.type_in(&format!("{command}\r"));
}

#[test]
fn a_guest_gives_back_what_it_does_not_use_and_what_it_is_asked_for() {
    let Some(_) = guest() else { return };
    let words = ["--memory", "512M", "--cpus", "2", "--balloon", "0", "--cmdline", "quiet"];
    let mut machine = Machine::on_terminal(&words);
    expect_shell(&mut machine);
    let sum = machine.ask("md5sum < /bin/busybox");
    assert_eq!(
        machine.ask("dd if=/dev/urandom of=/tmp/large bs=1M count=200 2>/dev/null; echo full"),
        "full"
    );
    assert!(machine.guest_memory() > 200 * MIB);
    assert_eq!(machine.ask("rm /tmp/large; echo empty"), "empty");
    wait_below(&machine, 150 * MIB);
    // The kernel's own counter of pages in the balloon: what was inflated and not deflated again.
    let inside =
        "awk '/^balloon_inflate/ { n += $2 } /^balloon_deflate/ { n -= $2 } END { print n }' /proc/vmstat";
    assert_eq!(machine.ask(inside), "0");
    monitor(&mut machine, "balloon 256M");
    machine.expect("(ruse) ");
    machine.type_in("\r");
    assert_eq!(
        machine.ask(&format!("while [ $({inside}) != 65536 ]; do sleep 0.1; done; {inside}")),
        "65536"
    );
    monitor(&mut machine, "balloon");
    machine.expect("256 MiB of 256 MiB asked for");
    machine.expect("total-memory: ");
    machine.type_in("balloon x\r");
    machine.expect("balloon: expected a size");
    machine.expect("(ruse) ");
    machine.type_in("\r");
    let outside = |words: &[&str]| ruse(machine.runtime()).args(words).output().unwrap();
    assert!(outside(&["balloon", "ruse", "0"]).status.success());
    let told = String::from_utf8(outside(&["balloon", "ruse"]).stdout).unwrap();
    assert!(told.contains(" of 0 bytes asked for") && told.contains("  free-memory: "), "{told}");
    assert_eq!(machine.ask(&format!("while [ $({inside}) != 0 ]; do sleep 0.1; done; {inside}")), "0");
    assert_eq!(machine.ask("md5sum < /bin/busybox"), sum);
    assert_eq!(machine.ask("dd if=/dev/zero of=/tmp/large bs=1M count=200 2>/dev/null; echo full"), "full");
    machine.type_in("poweroff\n");
    machine.end().with_code(0);
}
