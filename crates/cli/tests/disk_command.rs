//! `ruse disk`: what it makes of images, by its own words and, where it is there, by QEMU's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const MIB: usize = 1 << 20;

fn ruse(directory: &Path, words: &str) -> Output {
    let words = words.split(' ').map(|word| if word == "''" { "" } else { word });
    Command::new(env!("CARGO_BIN_EXE_ruse")).arg("disk").args(words).current_dir(directory).output().unwrap()
}

/// Runs a command to its success and gives its output.
fn done(directory: &Path, words: &str) -> String {
    let output = ruse(directory, words);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), message.as_str()), (Some(0), ""), "{words}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command that must be refused with one line that has `part`.
fn refused(directory: &Path, words: &str, part: &str) {
    let output = ruse(directory, words);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{words}: {message}");
    assert!(message.starts_with("ruse: ") && message.lines().count() == 1, "{words}: {message}");
    assert!(message.contains(part), "{words}: {part} in {message}");
}

fn json(directory: &Path, words: &str) -> serde_json::Value {
    serde_json::from_str(&done(directory, words)).unwrap()
}

/// A directory with a raw disk of some data and some holes, and its bytes.
fn bench() -> (tempfile::TempDir, PathBuf, Vec<u8>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_owned();
    let mut bytes = vec![0; 8 * MIB];
    for (n, byte) in bytes.iter_mut().enumerate().filter(|(n, _)| n / MIB % 3 == 1) {
        *byte = (n / 1000) as u8;
    }
    bytes[8 * MIB - 1] = 1;
    fs::write(path.join("disk.raw"), &bytes).unwrap();
    (directory, path, bytes)
}

/// QEMU finds the same bytes in two images.
fn qemu_compares(directory: &Path, a: &str, b: &str) {
    match Command::new("qemu-img").args(["compare", a, b]).current_dir(directory).output() {
        Ok(output) => assert!(output.status.success(), "{a} and {b}: {output:?}"),
        Err(_) => eprintln!("qemu-img is not there: {a} and {b} are not compared by it"),
    }
}

#[test]
fn a_disk_goes_through_all_formats() {
    let (_directory, path, bytes) = bench();
    for (to, options) in [
        ("a.qcow2", ""),
        ("b.qcow2", "-c "),
        ("c.qcow2", "-c --compression zstd --cluster-size 128k "),
        ("d.vhd", ""),
        ("e.vhdx", ""),
        ("f.vmdk", ""),
        ("g", ""),
    ] {
        done(&path, &format!("convert {options}disk.raw {to}"));
        let info = json(&path, &format!("info --json {to}"));
        assert_eq!(info["virtual_size"], 8 * MIB, "{to}");
        assert!(info["allocated"].as_u64().unwrap() < 6 * MIB as u64, "{to} has holes: {info}");
        if !to.ends_with("vhd") {
            // QEMU's idea of a VHD's size has another source.
            qemu_compares(&path, "disk.raw", to);
        }
        done(&path, &format!("convert --force {to} back.raw"));
        assert!(fs::read(path.join("back.raw")).unwrap() == bytes, "{to}");
    }
    refused(&path, "convert disk.raw a.qcow2", "File exists");
    refused(&path, "convert -c disk.raw x.vhd", "not compressed");
    refused(&path, "convert no.raw x", "No such file");
}

#[test]
fn images_are_made_and_described() {
    let (_directory, path, _) = bench();
    done(&path, "create -f qcow2 --cluster-size 4k image 3G");
    let text = done(&path, "info image");
    assert!(text.contains("qcow2, version 3") && text.contains("3 GiB (3221225472 bytes)"), "{text}");
    assert!(done(&path, "check image").starts_with("nothing is wrong\n0 of 786432 clusters"));
    done(&path, "create -b disk.raw over.qcow2");
    let info = json(&path, "info --json over.qcow2");
    assert_eq!(info["backing"], serde_json::json!({ "path": "disk.raw", "format": "raw" }));
    assert_eq!(info["virtual_size"], 8 * MIB);
    assert_eq!(json(&path, "info --json --chain over.qcow2")[1]["path"], "disk.raw");
    qemu_compares(&path, "over.qcow2", "disk.raw");
    refused(&path, "create image 1M", "File exists");
    refused(&path, "create x.raw", "size of the disk is missing");
    refused(&path, "create --cluster-size 3000b x.qcow2 1M", "power of two");
    refused(&path, "create -b no.raw x.qcow2", "No such file");
    refused(&path, "create -f raw -b disk.raw x", "have no backing files");
    refused(&path, "create x.img 1.5Q", "expected a size");
    refused(&path, "check disk.raw", "raw images say nothing twice");
    assert!(!path.join("x.qcow2").exists());
    done(&path, "create --force image 1M");
    assert_eq!(fs::metadata(path.join("image")).unwrap().len(), MIB as u64);
}

#[test]
fn disks_change_their_size() {
    let (_directory, path, bytes) = bench();
    done(&path, "convert disk.raw image.qcow2");
    done(&path, "resize image.qcow2 +2M");
    assert_eq!(json(&path, "info --json image.qcow2")["virtual_size"], 10 * MIB);
    refused(&path, "resize image.qcow2 8M", "--shrink");
    done(&path, "resize --shrink image.qcow2 8M");
    qemu_compares(&path, "disk.raw", "image.qcow2");
    done(&path, "check image.qcow2");
    done(&path, "resize disk.raw +1M");
    assert!(fs::read(path.join("disk.raw")).unwrap() == [&bytes[..], &vec![0; MIB]].concat());
    done(&path, "create image.vhdx 4M");
    refused(&path, "resize image.vhdx 5M", "ruse disk convert");
    refused(&path, "resize disk.raw 5", "--shrink");
    refused(&path, "resize disk.raw x", "expected a size");
}

#[test]
fn changes_are_committed_and_put_on_other_files() {
    let (_directory, path, mut bytes) = bench();
    done(&path, "create -b disk.raw over.qcow2 9M");
    write(&path.join("over.qcow2"), 5 * MIB as u64 + 512, &[7; 1024]);
    bytes[5 * MIB + 512..5 * MIB + 1536].fill(7);
    bytes.resize(9 * MIB, 0);
    done(&path, "convert over.qcow2 expected.raw");
    assert!(fs::read(path.join("expected.raw")).unwrap() == bytes);
    // On another file, it is the same disk.
    done(&path, "create other.raw 2M");
    done(&path, "rebase -b other.raw over.qcow2");
    qemu_compares(&path, "over.qcow2", "expected.raw");
    done(&path, "rebase -b disk.raw -F raw over.qcow2");
    qemu_compares(&path, "over.qcow2", "expected.raw");
    done(&path, "commit over.qcow2");
    assert!(fs::read(path.join("disk.raw")).unwrap() == bytes);
    assert_eq!(json(&path, "check --json over.qcow2")["allocated_clusters"], 0);
    // Without one, it has all that it needs.
    done(&path, "rebase over.qcow2");
    assert!(json(&path, "info --json over.qcow2").get("backing").is_none());
    qemu_compares(&path, "over.qcow2", "expected.raw");
    done(&path, "rebase -u -b other.raw -F raw over.qcow2");
    assert_eq!(json(&path, "info --json over.qcow2")["backing"]["path"], "other.raw");
    refused(&path, "commit disk.raw", "has no backing file");
}

fn write(image: &Path, offset: u64, bytes: &[u8]) {
    let image = ruse_block::open(image, &ruse_block::OpenOptions::default()).unwrap();
    image.write(offset, &[ruse_block::Slice::from(&mut bytes.to_vec()[..])]).unwrap();
}

#[test]
fn damage_is_reported_by_the_exit_code() {
    let (_directory, path, _) = bench();
    done(&path, "convert disk.raw image.qcow2");
    // One more cluster seems to be in use.
    let mut bytes = fs::read(path.join("image.qcow2")).unwrap();
    bytes[(2 << 16) + 2000] = 1;
    fs::write(path.join("image.qcow2"), &bytes).unwrap();
    let output = ruse(&path, "check image.qcow2");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("clusters that nobody uses: 1"));
    done(&path, "check --repair leaks image.qcow2");
    done(&path, "check image.qcow2");
}
