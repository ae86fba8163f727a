//! Random changes by one, read by the other.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use ruse_block::{
    Backing, Compression, CreateOptions, Format, Image, OpenOptions, Repair, Slice, create, open,
};
use ruse_random::Random;

pub(crate) const SIZE: u64 = 4 << 20;

/// Whether QEMU's tools are there; if not, one line says that a test is left out.
pub(crate) fn have_qemu() -> bool {
    let there =
        ["qemu-img", "qemu-io"].iter().all(|tool| Command::new(tool).arg("--version").output().is_ok());
    if !there {
        eprintln!("qemu-img and qemu-io are not there: this test is left out");
    }
    there
}

/// Runs a tool to its success and gives what it says.
pub(crate) fn tool(name: &str, words: &[&str]) -> String {
    let output = Command::new(name).args(words).output().unwrap();
    let text =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success(), "{name} {words:?}: {text}");
    text
}

pub(crate) fn word(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub(crate) fn read_all(image: &dyn Image) -> Vec<u8> {
    let mut bytes = vec![0xaa; image.size() as usize];
    image.read(0, &[Slice::from(&mut bytes[..])]).unwrap();
    bytes
}

/// QEMU's name for a format.
pub(crate) fn qemu_name(format: Format) -> &'static str {
    if format == Format::Vhd { "vpc" } else { format.name() }
}

/// QEMU finds nothing wrong with an image, and these bytes in it.
pub(crate) fn qemu_agrees(path: &Path, format: Format, bytes: &[u8]) {
    if matches!(format, Format::Qcow2 | Format::Vhdx | Format::Vmdk) {
        tool("qemu-img", &["check", "-f", qemu_name(format), word(path)]);
    }
    let plain = path.with_extension("plain");
    tool("qemu-img", &["convert", "-f", qemu_name(format), "-O", "raw", word(path), word(&plain)]);
    assert!(fs::read(&plain).unwrap() == bytes, "{} has other bytes", path.display());
    fs::remove_file(plain).unwrap();
}

/// Changes an image and its model.
pub(crate) fn change(image: &dyn Image, model: &mut [u8], random: &mut Random) {
    let sectors = model.len() as u64 / 512;
    let first = random.word() % sectors;
    let count = 1 + random.word() % 300.min(sectors - first);
    let (offset, len) = (first * 512, count * 512);
    let range = offset as usize..(offset + len) as usize;
    match random.word() % 6 {
        0 => {
            image.write_zeroes(offset, len, true).unwrap();
            model[range].fill(0);
        }
        1 => image.flush().unwrap(),
        _ => {
            model[range.clone()].fill(random.word() as u8);
            image.write(offset, &[Slice::from(&mut model[range].to_vec()[..])]).unwrap();
        }
    }
}

#[test]
fn what_ruse_writes_qemu_finds_right() {
    if !have_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("base.raw"), vec![0x5a; SIZE as usize / 2 + 1024]).unwrap();
    let raw = Backing { path: "base.raw".into(), format: Some(Format::Raw) };
    let options = CreateOptions::new(Format::Qcow2, SIZE);
    let qcow2 = |cluster_size, backing: Option<&Backing>| CreateOptions {
        cluster_size: Some(cluster_size),
        backing: backing.cloned(),
        ..options.clone()
    };
    for (seed, options) in (0..).zip([
        qcow2(512, None),
        qcow2(4096, Some(&raw)),
        qcow2(65536, None),
        qcow2(65536, Some(&raw)),
        qcow2(2 << 20, Some(&raw)),
        CreateOptions::new(Format::Vhd, SIZE),
        CreateOptions::new(Format::Vhdx, SIZE * 5),
        CreateOptions::new(Format::Vmdk, SIZE),
    ]) {
        let path = directory.path().join(format!("image{seed}"));
        let mut random = Random::new(seed);
        let mut image = create(&path, &options).unwrap();
        let mut model = read_all(&*image);
        for _ in 0..4 {
            (0..40).for_each(|_| change(&*image, &mut model, &mut random));
            drop(image);
            qemu_agrees(&path, options.format, &model);
            image = open(&path, &OpenOptions::default()).unwrap();
        }
    }
}

/// Writes of `qemu-io` at random places; the same as a script for it.
fn qemu_writes(path: &Path, format: Format, compressed: bool, cluster: u64, random: &mut Random) {
    let mut words = vec!["-f".to_owned(), qemu_name(format).to_owned()];
    let clusters = SIZE / cluster;
    // QEMU compresses only what is not there yet.
    for n in (0..clusters).step_by(clusters as usize / 6).filter(|_| compressed) {
        words.extend(["-c".to_owned(), format!("write -c -P {} {} {cluster}", n % 255 + 1, n * cluster)]);
    }
    for _ in 0..20 {
        let pattern = random.word() as u8;
        let command = match random.word() % 4 {
            0 => format!("write -z {} {cluster}", random.word() % clusters * cluster),
            _ => {
                let first = random.word() % (SIZE / 512);
                let count = 1 + random.word() % 200.min(SIZE / 512 - first);
                format!("write -P {pattern} {} {}", first * 512, count * 512)
            }
        };
        words.extend(["-c".to_owned(), command]);
    }
    words.push(word(path).to_owned());
    tool("qemu-io", &words.iter().map(String::as_str).collect::<Vec<_>>());
}

/// The bytes of an image as QEMU reads them.
fn qemu_reads(path: &Path, format: Format) -> Vec<u8> {
    let plain = path.with_extension("plain");
    tool("qemu-img", &["convert", "-f", qemu_name(format), "-O", "raw", word(path), word(&plain)]);
    fs::read(plain).unwrap()
}

fn ruse_opens(path: &Path) -> Arc<dyn Image> {
    let image = open(path, &OpenOptions::default()).unwrap();
    if let Some(report) = image.check(Repair::Nothing).unwrap() {
        assert!(report.is_clean(), "{report:?}");
    }
    image
}

#[test]
fn what_qemu_writes_ruse_reads_and_goes_on_with() {
    if !have_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("base.qcow2");
    let size = SIZE.to_string();
    tool("qemu-img", &["create", "-f", "qcow2", word(&base), &size]);
    qemu_writes(&base, Format::Qcow2, true, 65536, &mut Random::new(77));
    let behind = [" -F qcow2 -b ", word(&base)].concat();
    for (seed, (options, cluster)) in (0..).zip([
        ("-o compat=0.10".to_owned(), 65536),
        ("-o compat=1.1,cluster_size=4096,refcount_bits=1".to_owned(), 4096),
        ("-o compat=1.1,lazy_refcounts=on,refcount_bits=64".to_owned(), 65536),
        ("-o compression_type=zstd,cluster_size=16384".to_owned(), 16384),
        (format!("-o compat=0.10{behind}"), 65536),
        (format!("-o cluster_size=512{behind}"), 512),
        ("-o preallocation=metadata,compat=0.10".to_owned(), 65536),
    ]) {
        let path = directory.path().join(format!("image{seed}"));
        let mut words = vec!["create", "-f", "qcow2"];
        words.extend(options.split(' '));
        words.extend([word(&path), &size]);
        tool("qemu-img", &words);
        let mut random = Random::new(seed);
        // A refcount of one bit has no room for two compressed clusters in one.
        let compressed = !options.ends_with("refcount_bits=1") && !options.contains("preallocation");
        for round in 0..3 {
            qemu_writes(&path, Format::Qcow2, compressed && round == 0, cluster, &mut random);
            if round == 1 && compressed {
                tool("qemu-img", &["snapshot", "-c", "snap", word(&path)]);
            }
            let mut model = qemu_reads(&path, Format::Qcow2);
            let image = ruse_opens(&path);
            assert!(read_all(&*image) == model, "{options}");
            assert_eq!(image.info().unwrap().snapshots.len(), usize::from(round >= 1 && compressed));
            (0..20).for_each(|_| change(&*image, &mut model, &mut random));
            drop(image);
            qemu_agrees(&path, Format::Qcow2, &model);
        }
        if compressed {
            // What the snapshot has is as it was.
            tool("qemu-img", &["snapshot", "-a", "snap", word(&path)]);
            assert!(read_all(&*ruse_opens(&path)) == qemu_reads(&path, Format::Qcow2), "{options}");
            tool("qemu-img", &["snapshot", "-d", "snap", word(&path)]);
            tool("qemu-img", &["check", word(&path)]);
        }
    }
}

#[test]
fn other_formats_of_qemu_are_read_and_written() {
    if !have_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for (seed, (format, options)) in (0..).zip([
        (Format::Vhd, "subformat=dynamic"),
        (Format::Vhd, "subformat=fixed"),
        (Format::Vhdx, "subformat=dynamic"),
        (Format::Vhdx, "subformat=dynamic,block_size=1048576"),
        (Format::Vhdx, "subformat=fixed"),
        (Format::Vmdk, "subformat=monolithicSparse"),
        (Format::Vmdk, "subformat=monolithicSparse,zeroed_grain=on"),
        (Format::Vmdk, "subformat=monolithicFlat"),
        (Format::Vmdk, "subformat=twoGbMaxExtentFlat"),
    ]) {
        let path = directory.path().join(format!("image{seed}.vmdk"));
        tool("qemu-img", &["create", "-f", qemu_name(format), "-o", options, word(&path), "4M"]);
        let mut random = Random::new(seed);
        for _ in 0..3 {
            qemu_writes(&path, format, false, 65536, &mut random);
            let mut model = qemu_reads(&path, format);
            let image = ruse_opens(&path);
            assert_eq!(image.info().unwrap().format, format);
            assert!(read_all(&*image) == model, "{format} {options}");
            (0..20).for_each(|_| change(&*image, &mut model, &mut random));
            assert!(read_all(&*image) == model, "{format} {options}");
            drop(image);
            qemu_agrees(&path, format, &model);
        }
    }
}

#[test]
fn stream_optimized_images_are_read() {
    if !have_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (plain, path) = (directory.path().join("plain"), directory.path().join("image"));
    let mut bytes: Vec<u8> = (0..SIZE + 70_144).map(|n| (n / 30) as u8).collect();
    bytes[1 << 20..2 << 20].fill(0);
    fs::write(&plain, &bytes).unwrap();
    let words =
        ["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", word(&plain), word(&path)];
    tool("qemu-img", &words);
    let image = open(&path, &OpenOptions::default()).unwrap();
    assert!(image.is_read_only() && read_all(&*image) == bytes);
}

#[test]
fn what_is_not_supported_is_refused_in_words() {
    if !have_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path: PathBuf = directory.path().join("image");
    for (options, expected) in [
        ("extended_l2=on", "subclusters are not supported"),
        ("data_file=data", "data file are not supported"),
        ("compat=1.1", "encrypted images are not supported"),
    ] {
        let options = options.replace("=data", &format!("={}", directory.path().join("data").display()));
        tool("qemu-img", &["create", "-f", "qcow2", "-o", &options, word(&path), "1M"]);
        if options == "compat=1.1" {
            // To make such an image takes long; this is how its header begins.
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(&[0, 0, 0, 1], 32).unwrap();
        }
        let error = open(&path, &OpenOptions::default()).map(drop).unwrap_err().to_string();
        assert!(error.ends_with(expected), "{error}");
    }
}

#[test]
fn what_ruse_compresses_qemu_reads() {
    if !have_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for compression in [Compression::Zlib, Compression::Zstd] {
        let path = directory.path().join("image");
        let options = CreateOptions { compression, replace: true, ..CreateOptions::new(Format::Qcow2, SIZE) };
        let image = create(&path, &options).unwrap();
        let mut random = Random::new(3);
        let bytes: Vec<u8> = (0..SIZE).map(|n| (n / 30) as u8 ^ (random.word() & 1) as u8).collect();
        for (n, cluster) in (0..).zip(bytes.chunks(65536)) {
            assert!(image.write_compressed(n * 65536, cluster).unwrap());
        }
        drop(image);
        qemu_agrees(&path, Format::Qcow2, &bytes);
    }
}

#[test]
fn an_image_that_was_lazy_with_its_refcounts_is_mended() {
    if !have_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    tool("qemu-img", &["create", "-f", "qcow2", "-o", "lazy_refcounts=on", word(&path), "4M"]);
    // It ends without closing the image.
    let script = ["-c", "write -P 7 0 1M", "-c", "flush", "-c", "sigraise 9", word(&path)];
    assert!(!Command::new("qemu-io").args(script).output().unwrap().status.success());
    let read_only = open(&path, &OpenOptions { read_only: true, ..OpenOptions::default() }).unwrap();
    assert!(read_only.info().unwrap().dirty);
    drop(read_only);
    let image = ruse_opens(&path);
    assert!(!image.info().unwrap().dirty);
    let bytes = read_all(&*image);
    assert!(bytes[..1 << 20].iter().all(|&byte| byte == 7));
    drop(image);
    qemu_agrees(&path, Format::Qcow2, &bytes);
}
