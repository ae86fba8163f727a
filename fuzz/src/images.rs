//! Disk images: any file is opened or refused; what is opened is described, checked, read and written without a panic,
//! without much memory and in bounded time.

use std::io::Write;
use std::path::Path;
use std::sync::LazyLock;

use arbitrary::Unstructured;
use ruse_block::{Compression, CreateOptions, Format, Image, OpenOptions, Repair, Slice, create, open};

use crate::input::{byte, file, number, one_in, pick};

/// Bytes of the disks of valid images.
const SIZE: u64 = 1 << 20;
/// Accesses of one input at most.
const MOST_STEPS: u8 = 24;
const MOST_LEN: u64 = 128 << 10;

/// A valid image of each kind, small enough to be changed anywhere.
static IMAGES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("image");
    let qcow2 = CreateOptions { cluster_size: Some(4096), ..CreateOptions::new(Format::Qcow2, SIZE) };
    let zstd = CreateOptions { compression: Compression::Zstd, ..qcow2.clone() };
    let others = [Format::Vhd, Format::Vmdk, Format::Vhdx].map(|format| CreateOptions::new(format, SIZE));
    let all = [qcow2, zstd].into_iter().chain(others);
    let make = |options: CreateOptions| {
        let image = create(&path, &CreateOptions { replace: true, ..options }).expect("an image");
        let mut bytes: Vec<u8> = (0..8192u32).map(|n| (n / 64) as u8).collect();
        image.write(4096, &[Slice::from(&mut bytes[..])]).expect("room");
        image.write_compressed(65536, &bytes[..4096]).expect("room");
        drop(image);
        let mut image = std::fs::read(&path).expect("it is there");
        // Of what is allocated in large blocks, the beginning will do.
        image.truncate(5 << 20);
        image
    };
    let descriptor = "# Disk DescriptorFile\nparentCID=ffffffff\nRW 2048 FLAT \"image\" 0\nRW 8 ZERO\n";
    all.map(make).chain([descriptor.into()]).collect()
});

/// Runs the target.
pub(crate) fn run(data: &[u8]) {
    let u = &mut Unstructured::new(data);
    let options = OpenOptions {
        format: one_in(u, 3).then(|| pick(u, &Format::ALL)),
        read_only: one_in(u, 4),
        for_repair: one_in(u, 4),
        alone: one_in(u, 2),
    };
    let steps = byte(u) % MOST_STEPS;
    let actions: Vec<_> = (0..steps).map(|_| (byte(u), number(u), number(u) % MOST_LEN)).collect();
    // In memory, if possible: images are flushed often.
    let mut holder = tempfile::NamedTempFile::new_in("/dev/shm")
        .or_else(|_| tempfile::NamedTempFile::new())
        .expect("a file");
    holder.write_all(&file(u, &IMAGES)).expect("room");
    exercise(holder.path(), &options, &actions);
}

fn exercise(path: &Path, options: &OpenOptions, actions: &[(u8, u64, u64)]) {
    let image = match open(path, options) {
        Ok(image) => image,
        Err(error) => {
            assert!(!error.to_string().contains('\n'), "one line: {error}");
            return;
        }
    };
    let _ = image.info();
    for &(action, at, len) in actions {
        act(&*image, action, at, len);
    }
}

/// One access, within the disk. Whether it comes to anything is the image's matter.
fn act(image: &dyn Image, action: u8, at: u64, len: u64) {
    let size = image.size();
    let at = if size == 0 { 0 } else { at % size };
    let len = len.min(size - at);
    let mut bytes = vec![action; len as usize];
    let slices = [Slice::from(&mut bytes[..])];
    match action % 10 {
        0..=2 => drop(image.read(at, &slices)),
        3..=5 => drop(image.write(at, &slices)),
        6 => drop(image.discard(at, len)),
        7 => drop(image.write_zeroes(at, len, true)),
        8 => drop(image.flush()),
        _ => {
            if len > 0 {
                let _ = image.extent(at, len);
            }
            let repair = if at.is_multiple_of(2) { Repair::All } else { Repair::Nothing };
            let _ = image.check(repair);
        }
    }
}
