//! A Debian guest whose memory grows and shrinks, and one that finds files in it.

use std::fs;
use std::process::Output;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use crate::bare::{Bare, image};
use crate::linux::{expect_shell, guest, run_script};
use crate::machine::{Machine, PATIENCE, ruse, word};

const MIB: u64 = 1 << 20;

/// Runs a command about the machine.
fn about(machine: &Machine, words: &[&str]) -> Output {
    ruse(machine.runtime()).args(words).output().unwrap()
}

/// Waits until `ruse memory` says that it has so much.
#[track_caller]
fn wait_for_memory(machine: &Machine, size: &str) {
    let limit = Instant::now() + PATIENCE;
    loop {
        let text = String::from_utf8(about(machine, &["memory", "m"]).stdout).unwrap();
        if text == format!("{size} of {size} asked for, 1.2 GiB at most\n") {
            return;
        }
        assert!(Instant::now() < limit, "{text}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until the guest has so much more memory in use than at first, or as much; it is slow to count.
#[track_caller]
fn wait_for_total(machine: &mut Machine, kib: u64) {
    let total = "awk '/^MemTotal/ { print $2 }' /proc/meminfo";
    let answer = machine.ask(&format!("while [ $({total}) != {kib} ]; do sleep 0.1; done; {total}"));
    assert_eq!(answer, kib.to_string());
}

#[test]
fn a_guest_gets_more_memory_and_gives_it_back() {
    let Some(_) = guest() else { return };
    let words = ["--name", "m", "--memory", "256M,max=1280M", "--cmdline", "quiet"];
    let mut machine = Machine::on_terminal(&words);
    expect_shell(&mut machine);
    let total = machine.ask("awk '/^MemTotal/ { print $2 }' /proc/meminfo");
    let total: u64 = total.parse().unwrap();
    assert!(about(&machine, &["memory", "m", "768M"]).status.success());
    wait_for_memory(&machine, "768 MiB");
    wait_for_total(&mut machine, total + (512 << 10));
    let many = "for n in $(seq 150); do cat /bin/busybox; done";
    let fill = format!(
        "mount -o remount,size=500M /tmp; {many} > /tmp/large; {many} | cmp - /tmp/large && echo same"
    );
    assert_eq!(machine.ask(&fill), "same");
    assert!(machine.guest_memory() > 280 * MIB, "{} MiB", machine.guest_memory() / MIB);
    assert_eq!(machine.ask("rm /tmp/large; echo empty"), "empty");
    for (size, message) in [
        ("255M", "machine 'm': 255 MiB is not from 256 MiB to 1.2 GiB"),
        ("2G", "machine 'm': 2 GiB is not from"),
        ("257M", "are not a multiple of 2 MiB more than 256 MiB"),
    ] {
        let refused = about(&machine, &["memory", "m", size]);
        let messages = String::from_utf8(refused.stderr).unwrap();
        assert!(refused.status.code() == Some(2) && messages.contains(message), "{messages}");
    }
    assert_eq!(about(&machine, &["balloon", "m", "1M"]).status.code(), Some(2));
    assert!(about(&machine, &["memory", "m", "256M"]).status.success());
    wait_for_memory(&machine, "256 MiB");
    wait_for_total(&mut machine, total);
    assert!(machine.guest_memory() <= 256 * MIB, "{} MiB", machine.guest_memory() / MIB);
    machine.type_in("poweroff\n");
    machine.end().with_code(0);
}

#[test]
fn a_guest_finds_files_in_its_memory() {
    let Some(files) = guest() else { return };
    let (file, fixed) = (NamedTempFile::new().unwrap(), NamedTempFile::new().unwrap());
    let text = b"what the host has written\n";
    for file in [&file, &fixed] {
        fs::write(file.path(), [text, &vec![0; (4 << 20) - text.len()][..]].concat()).unwrap();
    }
    let script = "
        for disk in pmem0 pmem1; do
            echo -- $disk; cat /sys/block/$disk/size; head -n 1 /dev/$disk
            echo what the guest has written | dd of=/dev/$disk bs=4096 conv=sync,fsync 2>/dev/null
        done
        echo -- end";
    let read_only = format!("{},readonly", word(fixed.path()));
    let options = ["--pmem", word(file.path()), "--pmem", &read_only];
    let ended = run_script(&files.kernel, &files, &options, "", script);
    for disk in ["pmem0", "pmem1"] {
        assert_eq!(ended.section(disk), ["8192", "what the host has written"], "{disk}");
    }
    let first =
        |file: &NamedTempFile| fs::read_to_string(file.path()).unwrap().lines().next().unwrap().to_owned();
    assert_eq!(first(&file).trim_end_matches('\0'), "what the guest has written");
    assert_eq!(first(&fixed), "what the host has written");
}

#[test]
fn files_that_cannot_be_memory_are_told_of_in_a_line() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(MIB).unwrap();
    let bare = Bare::flat(image!(guest_echo, guest_echo_end));
    for (path, part) in [("/no/such/file", "No such file"), (word(file.path()), "a multiple of 2 MiB")] {
        let ended = Machine::start(&["--kernel", &bare.kernel(), "--pmem", path]).end().with_code(2);
        let line = ended.messages.trim_end();
        assert!(line.contains("--pmem: ") && line.contains(part) && !line.contains('\n'), "{line}");
    }
}
