//! The machine without PCI as Debian's kernel finds it.

use std::fs;

use crate::disk::{image, md5};
use crate::linux::{guest, run_script};
use crate::log;
use crate::machine::word;
use crate::net::{WAIT, file, web_server};

/// Reboots once, copies half of a disk to the other, fetches a file, writes into a port, and looks at the bus.
fn script(web: u16) -> String {
    format!(
        r#"
if [ ! -e /sys/block/vdb ]; then echo no disk; exit 1; fi
if [ "$(head -c 5 /dev/vdb)" != again ]; then printf again > /dev/vdb; sync; echo reboots; reboot -f; fi
echo -- disk; dd if=/dev/vda of=/dev/vda bs=1M count=4 seek=4 conv=notrunc 2>/dev/null; sync
dd if=/dev/vda bs=4k count=1024 iflag=direct 2>/dev/null | md5sum; cut -c 30,35 /sys/block/vda/device/features
{WAIT}
echo -- net; ip addr show eth0 | grep -o 'inet [0-9.]*'; ping -c 1 10.0.2.2 | grep -o '1 packets received'
wget -q -O - http://10.0.2.2:{web}/ | md5sum
for port in /dev/vport*; do seq 1 20000 > $port; done
echo -- bus; ls /sys/bus/pci/devices | wc -l; cat /sys/bus/virtio/devices/*/device | tr '\n' ' '; echo
grep -o '[0-9]*-fasteoi *virtio[0-9]' /proc/interrupts | tr -s ' '
mount -t virtiofs tag /mnt; cat /mnt/file{}echo -- end
"#,
        log::SCRIPT
    )
}

#[test]
fn linux_uses_devices_without_pci_and_reboots() {
    let Some(files) = guest() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (image(dir.path(), "first", 8), image(dir.path(), "second", 1));
    let (port, shared) = (dir.path().join("port"), dir.path().join("shared"));
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("file"), "shared\n").unwrap();
    let before = fs::read(&first).unwrap();
    let words = [
        ["--machine", "microvm"],
        ["--cpus", "2"],
        ["--disk", word(&first)],
        ["--disk", word(&second)],
        ["--net", "user,loopback"],
        ["--console", &format!("file={},name=log", word(&port))],
        ["--share", &format!("{}:tag", word(&shared))],
    ];
    let ended = run_script(&files.kernel, &files, &words.concat(), "", &script(web_server()));
    assert_eq!(ended.console.matches("reboots").count(), 1, "{}", ended.console);
    let half = before.len() / 2;
    assert_eq!(ended.section("disk"), [&format!("{}  -", md5(&before[..half])), "11"]);
    let fetched = format!("{}  -", md5(&file()));
    assert_eq!(ended.section("net"), ["inet 10.0.2.15", "1 packets received", &fetched]);
    let bus = ended.section("bus");
    // The order of the slots. Nothing drives the entropy device here.
    assert_eq!(bus[..2], ["0", "0x0004 0x0001 0x0002 0x0002 0x001a 0x0003 "]);
    let pins = [(26, 1), (32, 2), (33, 3), (44, 4), (49, 5)];
    assert_eq!(bus[2..7], pins.map(|(pin, device)| format!("{pin}-fasteoi virtio{device}")));
    assert_eq!(bus[7..], ["shared"]);
    log::check(&ended, 2);
    let after = fs::read(&first).unwrap();
    assert!(after[..half] == before[..half] && after[half..] == before[..half], "a half, twice");
    let expected: String = (1..=20000).map(|n| format!("{n}\n")).collect();
    assert!(fs::read_to_string(&port).unwrap() == expected);
}
