//! Bad input ends with exit code 2 and one line that names what is wrong. None of this needs an engine.

use std::path::Path;
use std::process::{Command, Output};

fn ruse(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ruse")).args(words).output().expect("the program runs")
}

/// Runs `ruse run` with these words, which must be refused with a line that has all of `parts`.
fn refused(words: &[&str], parts: &[&str]) {
    let output = ruse(&[&["run"], words].concat());
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{words:?}: {message}");
    assert!(message.starts_with("ruse: ") && message.ends_with('\n'), "{words:?}: {message}");
    assert_eq!(message.lines().count(), 1, "{words:?}: {message}");
    for part in parts {
        assert!(message.contains(part), "{words:?}: {part:?} in {message}");
    }
    assert!(output.stdout.is_empty(), "{words:?}");
}

fn path(dir: &tempfile::TempDir, name: &str, bytes: &[u8]) -> String {
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A multiboot kernel of a header and `size` bytes, of which `given` are in the file.
fn kernel(size: u32, given: usize) -> Vec<u8> {
    const BASE: u32 = 0x10_0000;
    let (magic, flags) = (0x1bad_b002u32, 1u32 << 16);
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let header = [magic, flags, checksum, BASE, BASE, BASE + size, BASE + size, BASE + 32];
    let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.resize(given, 0xf4);
    bytes
}

#[test]
fn kernels() {
    let dir = tempfile::tempdir().unwrap();
    refused(&["--kernel", "/no/such/kernel"], &["/no/such/kernel", "no such file"]);
    refused(&["--kernel", dir.path().to_str().unwrap()], &["cannot read"]);
    refused(&["--kernel", &path(&dir, "text", b"hello, this is a text\n")], &["not a kernel", "text"]);
    refused(&["--kernel", &path(&dir, "empty", b"")], &["not a kernel"]);
    refused(&["--kernel", &path(&dir, "cut", &kernel(0x1000, 64))], &["cut", "truncated"]);
}

#[test]
fn disks() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = path(&dir, "kernel", &kernel(64, 64));
    let disk = |words: &str, parts: &[&str]| refused(&["--kernel", &kernel, "--disk", words], parts);
    disk("/no/such/disk", &["--disk", "/no/such/disk", "No such file"]);
    disk(dir.path().to_str().unwrap(), &["--disk", "Is a directory"]);
    disk("/dev/null,readonly", &["--disk", "/dev/null", "neither a file nor a block device"]);
    disk(&path(&dir, "small", &[0; 511]), &["--disk", "small", "512 bytes"]);
    let used = path(&dir, "used", &[0; 4096]);
    let _user = ruse_block::RawDisk::open(Path::new(&used), true).unwrap();
    disk(&used, &["--disk", "used", "in use by another machine"]);
    refused(&["--kernel", &kernel, "--disk", &format!("{used},readonly"), "--disk", &used], &["in use"]);
}

#[test]
fn devices_that_others_serve() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = path(&dir, "kernel", &kernel(64, 64));
    let other = |words: &[&str], parts: &[&str]| refused(&[&["--kernel", &kernel], words].concat(), parts);
    for (option, words) in
        [("--disk", "vhost-user=/no/s"), ("--net", "vhost-user=/no/s"), ("--share", "vhost-user=/no/s:t")]
    {
        other(&[option, words], &[option, "nobody serves a device at '/no/s'", "No such file"]);
    }
    let listener = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    let socket = format!("vhost-user={}/s", dir.path().display());
    other(&["--disk", &socket], &["--disk", "the vhost-user backend at", "it has closed the connection"]);
    other(&["--disk", "vhost-user=/s,readonly"], &["--disk", "readonly", "queues=N and ring=split only"]);
    other(&["--share", "vhost-user=/s:t,ro"], &["--share", "'ro'", "whoever serves"]);
    other(&["--net", "tap=x,queues=2,vhost=on"], &["--net", "vhost=on", "one pair"]);
    other(&["--vsock", "3,vhostx"], &["--vsock", "vhostx", "path=PATH or vhost"]);
    if !Path::new("/dev/vhost-vsock").exists() {
        other(&["--vsock", "3,vhost"], &["--vsock", "/dev/vhost-vsock", "No such file"]);
    }
}

#[test]
fn sockets_consoles_and_the_balloon() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = path(&dir, "kernel", &kernel(64, 64));
    let other = |words: &[&str], parts: &[&str]| refused(&[&["--kernel", &kernel], words].concat(), parts);
    let file = path(&dir, "file", b"");
    other(&["--vsock", "2"], &["--vsock", "expected an address from 3"]);
    other(&["--vsock", "3,port=5"], &["--vsock", "port=5", "path=PATH"]);
    other(&["--vsock", &format!("3,path={file}")], &["--vsock", &file, "in use"]);
    other(&["--vsock", "3,path=/no/such/folder/s"], &["--vsock", "/no/such/folder/s", "No such file"]);
    other(&["--console", "tty"], &["--console", "expected stdio"]);
    other(&["--console", "file=/no/such/file"], &["--console", "/no/such/file"]);
    other(&["--console", &format!("socket={file}")], &["--console", &file, "in use"]);
    let pipe = dir.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let words = format!("file={}", pipe.display());
    other(&["--console", &words], &["--console", "pipe", "nobody reads this pipe"]);
    other(&["--console", "null", "--console", "null"], &["--console", "at most one without a name"]);
    let port = "null,name=a";
    other(&["--console", port, "--console", port], &["--console", "different names"]);
    other(&["--console", "stdio", "--serial", "stdio"], &["--console stdio", "--serial", "contradict"]);
    other(&["--balloon", "512M"], &["--balloon", "all of the guest's RAM"]);
    other(&["--balloon", "much"], &["--balloon", "expected a size"]);
}

#[test]
fn initrds() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = path(&dir, "kernel", &kernel(64, 64));
    refused(&["--kernel", &kernel, "--initrd", "/no/such/initrd"], &["/no/such/initrd", "no such file"]);
    let big = dir.path().join("big");
    std::fs::File::create(&big).unwrap().set_len(64 << 20).unwrap();
    let big = big.to_str().unwrap();
    refused(&["--kernel", &kernel, "--initrd", big, "--memory", "32M"], &["big", "does not fit"]);
}

#[test]
fn memory() {
    for (size, part) in [
        ("0", "too little"),
        ("1M", "too little"),
        ("4T", "too much"),
        ("17000001b", "whole number"),
        ("99999999999999999999G", "too large"),
        ("lots", "expected a size"),
        ("-5", "unexpected argument"),
    ] {
        refused(&["--memory", size], &[part]);
    }
}

#[test]
fn cpus() {
    for (cpus, part) in [
        ("0", "at least one"),
        ("1000", "too many"),
        ("sockets=4,cores=1000", "too many"),
        ("sockets=0", "at least one"),
        ("two", "expected a number"),
        ("cores=2,cores=2", "twice"),
    ] {
        refused(&["--cpus", cpus], &["--cpus", part]);
    }
}

#[test]
fn options() {
    refused(&["--accel", "xen"], &["--accel", "expected auto, kvm or dbt"]);
    refused(&["--accel", "kvm", "--tier", "0"], &["contradict"]);
    refused(&["--check", "--tier", "1"], &["--check", "--tier", "contradict"]);
    refused(&["--tier", "7"], &["--tier"]);
    refused(&["--accel", "kvm", "--perf-map"], &["--perf-map", "contradict"]);
    refused(
        &["--accel", "dbt", "--kernel", "/dev/null", "--stats", "/nowhere/stats"],
        &["--stats", "/nowhere/stats"],
    );
    refused(&["--cpu", "486"], &["--cpu", "max"]);
    refused(&["--serial", "tty"], &["--serial", "file=PATH"]);
    refused(&["--name", ""], &["--name"]);
    refused(&["--json"], &["--dry-run"]);
    refused(&["--machine", "q35"], &["--machine", "pc or microvm"]);
    let microvm = ["--machine", "microvm"];
    refused(&[&microvm[..], &["--slots", "1"]].concat(), &["--slots", "no PCI bus"]);
    refused(&[&microvm[..], &["--watchdog", "none"]].concat(), &["--watchdog", "no PCI bus"]);
    refused(&["--no-such-option"], &["--no-such-option"]);
    refused(&["surplus"], &["surplus"]);
    let dir = tempfile::tempdir().unwrap();
    let kernel = path(&dir, "kernel", &kernel(64, 64));
    refused(&["--kernel", &kernel, "--serial", "file=/no/such/dir/log"], &["/no/such/dir/log"]);
}

#[test]
fn a_dry_run_shows_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = path(&dir, "kernel", &kernel(64, 64));
    let words =
        ["run", "--dry-run", "--kernel", &kernel, "--memory", "1G", "--cpus", "2", "--cmdline", "a b"];
    let output = ruse(&words);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(text.contains("1 GiB") && text.contains("a b") && text.contains("dbt: "), "{text}");
    let output = ruse(&[&words[..], &["--json"]].concat());
    let machine: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(machine["machine"]["memory"], 1u64 << 30);
    assert_eq!(machine["machine"]["cpus"]["cores"], 2);
    assert!(["dbt", "kvm"].contains(&machine["engine"]["engine"].as_str().unwrap()), "{machine}");
}

#[test]
fn a_dry_run_fetches_nothing() {
    let cache = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_ruse"))
        .args(["run", "--dry-run"])
        .env("XDG_CACHE_HOME", cache.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8(output.stdout).unwrap().contains("not fetched yet"));
    assert!(!Path::new(&cache.path().join("ruse/guest")).exists());
}

#[test]
fn the_doctor_reports() {
    let text = String::from_utf8(ruse(&["doctor"]).stdout).unwrap();
    assert!(text.contains("--accel auto") && text.contains("KVM"), "{text}");
    let report: serde_json::Value = serde_json::from_slice(&ruse(&["doctor", "--json"]).stdout).unwrap();
    assert!(["dbt", "kvm"].contains(&report["auto"]["engine"].as_str().unwrap()), "{report}");
}

#[test]
fn help_tells_the_exit_codes() {
    for words in [&["--help"][..], &["run", "--help"]] {
        let output = ruse(words);
        assert_eq!(output.status.code(), Some(0));
        assert!(String::from_utf8(output.stdout).unwrap().contains("triple fault"));
    }
}
