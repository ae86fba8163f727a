//! A writer is killed at any time: the image is still right, and what was flushed is there.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use ruse_block::{CreateOptions, Format, OpenOptions, Repair, Slice, create, open};
use ruse_random::Random;

use crate::qemu::{have_qemu, read_all, tool, word};

/// The variable that makes a process of this test the writer, and names its image.
const IMAGE: &str = "RUSE_TEST_KILL_IMAGE";
const SIZE: u64 = 64 << 20;
const BLOCK: u64 = 12 << 10;
/// Kills of each image.
const KILLS: u64 = 12;

/// The writer: block after block, each with its round in all of its bytes, some of them discarded between; after a flush,
/// it says how far it is.
#[test]
fn writer() {
    let Some(path) = std::env::var_os(IMAGE).map(PathBuf::from) else { return };
    let image = open(&path, &OpenOptions::default()).unwrap();
    let round = read_round(&path);
    let mut random = Random::new(round.into());
    let write = |n: u64| {
        image.write(n * BLOCK, &[Slice::from(&mut [round; BLOCK as usize][..])]).unwrap();
    };
    for n in 0..SIZE / BLOCK {
        write(n);
        if random.chance(25) {
            // Far behind, where no flushed block is that counts.
            image.discard(SIZE / 2 + random.word() % 64 * BLOCK, BLOCK * 5).unwrap();
        }
        if random.chance(12) {
            image.flush().unwrap();
            println!("flushed {n}");
        }
    }
}

/// The round is in a file beside the image.
fn read_round(path: &Path) -> u8 {
    fs::read(path.with_extension("round")).unwrap()[0]
}

/// Runs the writer for a while, kills it, and gives the last block that it has flushed.
fn run_and_kill(path: &Path, patience: Duration) -> Option<u64> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["kill::writer", "--exact", "--nocapture"])
        .env(IMAGE, path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let reader = std::thread::spawn(move || {
        let lines = output.lines().map_while(Result::ok);
        lines.filter_map(|line| line.strip_prefix("flushed ")?.parse::<u64>().ok()).last()
    });
    std::thread::sleep(patience);
    child.kill().unwrap();
    child.wait().unwrap();
    reader.join().unwrap()
}

/// Kills writers of an image of this kind, and looks at what is left.
fn check_kills(options: &CreateOptions) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    drop(create(&path, options).unwrap());
    let mut random = Random::new(1);
    let mut flushed_any = false;
    for round in 1..=KILLS + 1 {
        // On a slow host, a writer may need more time for its first flush.
        let patience = match round <= KILLS {
            true => Duration::from_millis(20 + random.below(400)),
            false if flushed_any => break,
            false => Duration::from_secs(20),
        };
        fs::write(path.with_extension("round"), [round as u8]).unwrap();
        let last = run_and_kill(&path, patience);
        if have_qemu() && options.format == Format::Qcow2 {
            // Leaks have 3 as the exit code.
            let status = Command::new("qemu-img").args(["check", "-q", word(&path)]).status().unwrap();
            assert!(matches!(status.code(), Some(0 | 3)), "{status}");
        }
        let image = open(&path, &OpenOptions::default()).unwrap();
        if let Some(report) = image.check(Repair::Nothing).unwrap() {
            assert_eq!(report.errors, Vec::<String>::new());
            assert!(image.check(Repair::Leaks).unwrap().unwrap().is_clean());
        }
        let bytes = read_all(&*image);
        for n in 0..last.map_or(0, |last| last + 1).min(SIZE / 2 / BLOCK) {
            let block = &bytes[(n * BLOCK) as usize..((n + 1) * BLOCK) as usize];
            assert!(
                block.iter().all(|&byte| u64::from(byte) == round),
                "block {n} of {last:?}, round {round}"
            );
        }
        flushed_any |= last.is_some();
    }
    assert!(flushed_any, "a writer has written");
    if have_qemu() && options.format == Format::Qcow2 {
        tool("qemu-img", &["check", word(&path)]);
    }
}

#[test]
fn images_of_other_formats_survive_kills() {
    for format in [Format::Vhd, Format::Vhdx, Format::Vmdk] {
        check_kills(&CreateOptions::new(format, SIZE));
    }
}

#[test]
fn a_qcow2_image_survives_kills() {
    for cluster_size in [4096, 65536] {
        check_kills(&CreateOptions {
            cluster_size: Some(cluster_size),
            ..CreateOptions::new(Format::Qcow2, SIZE)
        });
    }
}
