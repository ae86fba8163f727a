//! Disks as Debian's kernel uses them, and what is in their files afterwards.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::linux::{expect_shell, guest, run_script};
use crate::log;
use crate::machine::{Machine, word};

const MIB: usize = 1 << 20;

/// An image of so many MiB in a directory, with bytes that say where they are.
pub fn image(dir: &Path, name: &str, mib: usize) -> PathBuf {
    let path = dir.join(name);
    let bytes: Vec<u8> = (0..(mib * MIB / 8) as u64).flat_map(|n| (n * 0x9e37_79b9).to_le_bytes()).collect();
    fs::write(&path, bytes).unwrap();
    path
}

pub fn md5(bytes: &[u8]) -> String {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let mut child = Command::new("md5sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap()[..32].to_owned()
}

/// Copies half of the first disk to the other half in large and in small blocks; looks at the second.
const COPY: &str = r#"
echo -- first; cat /sys/block/vda/size /sys/block/vda/ro; head -c 33554432 /dev/vda | md5sum
dd if=/dev/vda of=/dev/vda bs=1M count=15 seek=16 conv=notrunc 2>/dev/null
dd if=/dev/vda of=/dev/vda bs=4k count=256 skip=3840 seek=7936 oflag=direct conv=notrunc 2>/dev/null
sync
echo -- second; cat /sys/block/vdb/ro /sys/block/vdb/serial; echo
dd if=/dev/zero of=/dev/vdb bs=4k count=1 2>&1 | grep -o 'Operation not permitted'
ls /sys/block/vda/mq | wc -w
echo -- how; cut -c 35 /sys/block/vda/device/features; grep -o 'PCI-MSI.*virtio1-req.0\|IO-APIC.*virtio1' /proc/interrupts | cut -d' ' -f1
"#;

/// `words` are of both disks, `cmdline` of the kernel.
fn copies_and_cannot_write_another(words: &str, cmdline: &str, packed: &str, interrupts: &str) {
    let Some(files) = guest() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (image(dir.path(), "first", 32), image(dir.path(), "second", 1));
    let (before, second_before) = (fs::read(&first).unwrap(), fs::read(&second).unwrap());
    let second_words = format!("{},readonly,serial=no-writes{words}", word(&second));
    let first_words = format!("{}{words}", word(&first));
    let options = ["--accel", "dbt", "--cpus", "2", "--disk", &first_words, "--disk", &second_words];
    let script = format!("{COPY}{}echo -- end\n", log::SCRIPT);
    let ended = run_script(&files.kernel, &files, &options, cmdline, &script);
    assert_eq!(ended.section("how"), [packed, interrupts]);
    assert_eq!(ended.section("first"), ["65536", "0", &format!("{}  -", md5(&before))]);
    assert_eq!(ended.section("second"), ["1", "no-writes", "Operation not permitted", "2"]);
    log::check(&ended, 2);
    let after = fs::read(&first).unwrap();
    assert_eq!(after.len(), 32 * MIB);
    assert!(after[..16 * MIB] == before[..16 * MIB], "the first half stays");
    assert!(after[16 * MIB..] == before[..16 * MIB], "the second is as the first");
    assert!(fs::read(&second).unwrap() == second_before);
}

#[test]
fn linux_copies_on_a_disk_and_cannot_write_another() {
    copies_and_cannot_write_another("", "", "1", "PCI-MSI");
}

#[test]
fn a_disk_does_with_split_rings_and_an_interrupt_pin() {
    copies_and_cannot_write_another(",ring=split", "pci=nomsi", "0", "IO-APIC");
}

#[test]
fn cloud_init_finds_its_disk_behind_all_others() {
    let Some(files) = guest() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (disk, user_data) = (image(dir.path(), "disk", 1), dir.path().join("user"));
    fs::write(&user_data, "#cloud-config\npackages: [hello]\n").unwrap();
    let options = ["--disk", word(&disk), "--user-data", word(&user_data), "--name", "one"];
    // The label of a FAT file system is at 43 of the first sector.
    let script = "echo -- disks; echo /sys/block/*; cat /sys/block/vdb/ro; head -c 54 /dev/vdb | tail -c 11 | tr -d ' '; echo
        echo -- files; tr -d '\\000' < /dev/vdb | grep -a -e '^#cloud' -e '^packages' -e '^instance'; echo -- end\n";
    let ended = run_script(&files.kernel, &files, &options, "", script);
    assert_eq!(ended.section("disks"), ["/sys/block/vda /sys/block/vdb", "1", "cidata"]);
    let files = ended.section("files");
    for line in ["packages: [hello]", "instance-id: \"one\""] {
        assert!(files.contains(&line), "{line} in {files:?}");
    }
}

/// Makes a file system with many files in it, frees what is of no use any more, and writes what is left.
const FILL: &str = r#"
echo -- fill; mke2fs /dev/vda > /dev/null 2>&1; mkdir /m; mount -t ext4 -o discard /dev/vda /m
mkdir /m/d; for n in $(seq 200); do seq $n 2000 > /m/d/$n; done
dd if=/dev/urandom of=/m/large bs=1M count=16 2>/dev/null; sync; rm /m/large; sync
cat /m/d/* | md5sum; umount /m
"#;
const READ: &str = r#"
echo -- read; mkdir /m; mount -t ext4 -o ro /dev/vda /m; ls /m/d | wc -l; cat /m/d/* | md5sum; umount /m
"#;

#[test]
fn a_file_system_is_there_at_the_next_boot() {
    let Some(files) = guest() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk", 48);
    let run = |script: &str, disk: &str| {
        let script = format!("{script}echo -- end\n");
        run_script(&files.kernel, &files, &["--accel", "dbt", "--disk", disk], "", &script)
    };
    let filled = run(FILL, word(&path));
    let read = run(READ, &format!("{},readonly", word(&path)));
    assert_eq!(read.section("read"), ["200", filled.section("fill")[0]]);
    let blocks = fs::metadata(&path).unwrap().blocks();
    assert!(
        blocks * 512 < 40 * MIB as u64,
        "what the guest discards is given back: {blocks} blocks are left"
    );
}

#[test]
fn a_file_system_is_kept_in_an_overlay() {
    use ruse_block::{Backing, CreateOptions, Format, OpenOptions, Repair};
    let Some(files) = guest() else { return };
    let dir = tempfile::tempdir().unwrap();
    let base = image(dir.path(), "base", 48);
    let before = fs::read(&base).unwrap();
    let path = dir.path().join("overlay");
    let backing = Some(Backing { path: base.clone(), format: Some(Format::Raw) });
    let options = CreateOptions { backing, ..CreateOptions::new(Format::Qcow2, 48 * MIB as u64) };
    drop(ruse_block::create(&path, &options).unwrap());
    let run = |script: &str, disk: &str| {
        let script = format!("{script}echo -- end\n");
        run_script(&files.kernel, &files, &["--accel", "dbt", "--disk", disk], "", &script)
    };
    let filled = run(FILL, word(&path));
    let read = run(READ, &format!("{},format=qcow2,readonly", word(&path)));
    assert_eq!(read.section("read"), ["200", filled.section("fill")[0]]);
    let overlay = ruse_block::open(&path, &OpenOptions::default()).unwrap();
    let report = overlay.check(Repair::Nothing).unwrap().unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert!(fs::read(&base).unwrap() == before, "what is behind the overlay stays");
}

#[test]
fn a_disk_that_grows_does_so_in_the_guest() {
    let Some(_) = guest() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk", 1);
    let mut machine = Machine::on_terminal(&["--cmdline", "quiet", "--disk", word(&path)]);
    expect_shell(&mut machine);
    assert_eq!(machine.ask("cat /sys/block/vda/size"), "2048");
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(3 * MIB as u64).unwrap();
    machine.type_in("\x01c");
    machine.expect("(ruse) ");
    machine.type_in("disks\r");
    machine.expect("3 MiB");
    machine.type_in("\r");
    assert_eq!(
        machine.ask("while grep -q 2048 /sys/block/vda/size; do :; done; cat /sys/block/vda/size"),
        "6144"
    );
    machine.type_in("poweroff\n");
    machine.end().with_code(0);
}

#[test]
fn a_guest_that_reboots_finds_its_disk_again() {
    let Some(_) = guest() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk", 1);
    let mut machine = Machine::on_terminal(&["--cmdline", "quiet", "--disk", word(&path)]);
    expect_shell(&mut machine);
    machine.type_in("echo written before | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null; reboot\n");
    expect_shell(&mut machine);
    assert_eq!(machine.ask("head -n 1 /dev/vda"), "written before");
    machine.type_in("poweroff\n");
    machine.end().with_code(0);
    assert!(fs::read(&path).unwrap().starts_with(b"written before\n"));
}

/// The driver lets go of the device while it works, and takes it again.
const REBIND: &str = r#"
cd /sys/bus/pci/drivers/virtio-pci; echo -- sums
for round in 1 2 3 4; do
    dd if=/dev/vda of=/dev/null bs=4k iflag=direct 2>/dev/null &
    dd if=/dev/zero of=/dev/vda bs=4k oflag=direct seek=1024 2>/dev/null &
    usleep 100000; echo 0000:00:08.0 > unbind; wait
    echo 0000:00:08.0 > bind; head -c 4194304 /dev/vda | md5sum
done
"#;

#[test]
fn a_driver_may_leave_and_come_back_while_its_disk_works() {
    let Some(files) = guest() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "disk", 32);
    let sum = format!("{}  -", md5(&fs::read(&path).unwrap()[..4 * MIB]));
    let script = format!("{REBIND}echo -- end\n");
    let options = ["--accel", "dbt", "--cpus", "2", "--disk", word(&path)];
    let ended = run_script(&files.kernel, &files, &options, "", &script);
    assert_eq!(ended.section("sums"), [sum.as_str(); 4]);
    assert!(
        fs::read(&path).unwrap()[4 * MIB..4 * MIB + 4096].iter().all(|&byte| byte == 0),
        "the writer wrote"
    );
}
