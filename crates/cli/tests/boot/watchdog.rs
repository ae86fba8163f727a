//! A Debian guest whose system goes silent. Of Debian's kernels the full one has the driver.

use ruse_guest::run_argument;

use crate::linux::full_guest;
use crate::machine::{Machine, word};

#[test]
fn a_system_that_does_not_answer_its_watchdog_is_ended() {
    let Some(files) = full_guest() else { return };
    // It has two seconds, is answered every half second for a while, and then not any more.
    let script = "
        [ -c /dev/watchdog ] && echo -- found
        watchdog -T 2 -t 500ms /dev/watchdog; sleep 5
        echo -- alive; killall -STOP watchdog; sleep 100; echo -- too late";
    let cmdline = format!("console=ttyS0 panic=-1 quiet {}", run_argument(script));
    let ended = Machine::start(&[
        "--kernel",
        word(&files.kernel),
        "--initrd",
        word(&files.initrd),
        "--cmdline",
        &cmdline,
        "--watchdog",
        "poweroff",
    ])
    .end()
    .with_code(0);
    ended.section("found");
    ended.section("alive");
    assert!(!ended.console.contains("-- too late"), "{}", ended.console);
    assert!(ended.messages.contains("watchdog was not answered in time"), "{}", ended.messages);
}
