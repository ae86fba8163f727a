//! PCI devices and slots as Debian's kernel finds them.

use std::fs;
use std::time::{Duration, Instant};

use crate::disk::md5;
use crate::linux::{expect_shell, guest, run_script};
use crate::log;
use crate::machine::{Machine, PATIENCE, ruse, word};

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

/// Runs a command about a machine; its exit code and what it printed.
fn command(machine: &Machine, words: &[&str]) -> (Option<i32>, String) {
    let output = ruse(machine.runtime()).args(words).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap().trim_end().to_owned())
}

/// Waits until a command of the guest's prints this.
#[track_caller]
fn wait_for(machine: &mut Machine, command: &str, expected: &str) {
    let limit = Instant::now() + PATIENCE;
    while machine.ask(command) != expected {
        assert!(Instant::now() < limit, "{command}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn devices_come_and_go_while_linux_runs() {
    let Some(_) = guest() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let bytes: Vec<u8> = (0..1 << 17).flat_map(|n: u64| (n * 0x9e37_79b9).to_le_bytes()).collect();
    fs::write(&path, &bytes).unwrap();
    let mut machine = Machine::on_terminal(&["--name", "m", "--cmdline", "quiet", "--slots", "2"]);
    expect_shell(&mut machine);

    let carrier = "ip link set eth0 up; cat /sys/class/net/eth0/carrier";
    wait_for(&mut machine, carrier, "1");
    assert_eq!(command(&machine, &["link", "m", "down"]), (Some(0), String::new()));
    wait_for(&mut machine, carrier, "0");
    assert_eq!(command(&machine, &["link", "m", "up", "--device", "net0"]), (Some(0), String::new()));
    wait_for(&mut machine, carrier, "1");
    let (code, message) = command(&machine, &["link", "m", "up", "--device", "net7"]);
    assert_eq!(
        (code, message.as_str()),
        (Some(2), "ruse: machine 'm': 'net7' is no network device that it serves itself")
    );

    let attach = ["attach", "m", "--disk", word(&path)];
    // There is no udev that would load the driver.
    machine.ask("cd /lib/modules; for m in $(cat order-disks); do insmod $m 2> /dev/null; done; cd /");
    assert_eq!(command(&machine, &attach), (Some(0), "slot1".into()));
    wait_for(&mut machine, "ls /sys/block | grep vd", "vda");
    let (read, sum) = ("head -c 1048576 /dev/vda | md5sum", format!("{} -", md5(&bytes)));
    assert_eq!(machine.ask(read), sum);
    assert_eq!(machine.ask("d=$(readlink -f /sys/block/vda/device/..); cat $d/reset_method"), "bus");
    machine.ask("cd /sys/bus/pci/drivers/virtio-pci; echo ${d##*/} > unbind");
    assert_eq!(
        machine.ask("echo 1 > $d/reset && echo ${d##*/} > bind; ls /sys/block | grep vd; cd /"),
        "vda"
    );
    assert_eq!(machine.ask(read), sum, "after a reset of the bus");
    let (code, message) = command(&machine, &attach);
    assert!(code == Some(2) && message.contains("in use") && message.lines().count() == 1, "{message}");
    assert_eq!(command(&machine, &["attach", "m", "--net", "user"]), (Some(0), "slot2".into()));
    wait_for(&mut machine, "ls /sys/class/net | grep eth1", "eth1");
    let (code, message) = command(&machine, &["attach", "m", "--net", "user"]);
    assert!(code == Some(2) && message.contains("no slot is free"), "{message}");
    let (_, info) = command(&machine, &["info", "m"]);
    assert!(info.contains("slot1: ") && info.contains("slot2: user, 02:"), "{info}");

    assert_eq!(command(&machine, &["detach", "m", "slot1"]), (Some(0), String::new()));
    assert_eq!(machine.ask("ls /sys/block | grep -c vd"), "0");
    assert_eq!(command(&machine, &attach), (Some(0), "slot1".into()), "the file is free again");
    let (code, message) = command(&machine, &["detach", "m", "slot1", "--timeout", "1"]);
    assert!(code == Some(1) && message.contains("has not let go of slot1 within 1 s"), "{message}");
    assert_eq!(command(&machine, &["detach", "m", "slot1", "--force"]), (Some(0), String::new()));
    let (code, message) = command(&machine, &["detach", "m", "slot1"]);
    assert!(code == Some(2) && message.contains("'slot1' is no device that was attached"), "{message}");
    // Linux has ended the driver of what was torn out, or it would not see the next one.
    let disk = format!("{},serial=next", word(&path));
    assert_eq!(command(&machine, &["attach", "m", "--disk", &disk]), (Some(0), "slot1".into()));
    wait_for(&mut machine, "cat /sys/block/vd*/serial", "next");
    machine.type_in("poweroff\n");
    machine.end().with_code(0);
}
