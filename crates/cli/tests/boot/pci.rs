//! PCI devices and slots as Debian's kernel finds them.

use crate::linux::{guest, run_script};
use crate::log;

/// A root port has its window, its message-signalled interrupt and its slot; nothing in the log is wrong.
#[test]
fn linux_uses_empty_slots() {
    let Some(files) = guest() else { return };
    let script = format!(
        "echo -- slots; ls -1 /sys/bus/pci/slots; cat /sys/bus/pci/slots/*/adapter
        echo -- interrupts; grep -o 'PCI-MSI.*pciehp' /proc/interrupts{}echo -- end\n",
        log::SCRIPT
    );
    let ended = run_script(&files.kernel, &files, &["--slots", "2"], "", &script);
    assert_eq!(ended.section("slots"), ["1", "2", "0", "0"]);
    assert_eq!(ended.section("interrupts").len(), 2, "{}", ended.console);
    log::check(&ended, 1);
}
