//! Images of Ruse's own against a plain model: what is written is read, and refcounts stay right.

use std::path::Path;

use ruse_random::Random;

use crate::{Backing, Compression, CreateOptions, Format, Image, OpenOptions, Repair, Slice, create, open};

const SIZE: u64 = 3 << 20;

fn read(image: &dyn Image, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xaa; len];
    image.read(offset, &[Slice::from(&mut bytes[..])]).unwrap();
    bytes
}

fn check(image: &dyn Image) {
    let report = image.check(Repair::Nothing).unwrap().unwrap();
    assert_eq!((report.errors, report.leaks), (vec![], 0));
}

/// Changes the disk and the model in the same way.
fn change(image: &dyn Image, model: &mut [u8], random: &mut Random) {
    let sectors = SIZE / 512;
    let first = random.word() % sectors;
    let most = if random.chance(25) { 600 } else { 16 };
    let count = 1 + random.word() % most.min(sectors - first);
    let (offset, len) = (first * 512, count * 512);
    let range = offset as usize..(offset + len) as usize;
    match random.word() % 8 {
        0 => {
            image.write_zeroes(offset, len, true).unwrap();
            model[range].fill(0);
        }
        1 => {
            image.discard(offset, len).unwrap();
            // What is left is not said.
            model[range].copy_from_slice(&read(image, offset, len as usize));
        }
        2 => image.flush().unwrap(),
        3 => assert!(read(image, offset, len as usize) == model[range], "{len} bytes at {offset}"),
        _ => {
            let mut bytes = vec![random.word() as u8; len as usize];
            let (a, b) = bytes.split_at_mut((len / 3) as usize);
            image.write(offset, &[Slice::from(a), Slice::from(b)]).unwrap();
            model[range].copy_from_slice(&bytes);
        }
    }
}

fn options(cluster_size: u64) -> CreateOptions {
    CreateOptions { cluster_size: Some(cluster_size), ..CreateOptions::new(Format::Qcow2, SIZE) }
}

#[test]
fn what_is_written_is_read_after_any_changes() {
    let directory = tempfile::tempdir().unwrap();
    for (seed, cluster_size) in (0..).zip([512, 4096, 65536, 2 << 20]) {
        let path = directory.path().join(format!("{cluster_size}.qcow2"));
        let mut image = create(&path, &options(cluster_size)).unwrap();
        let (mut model, mut random) = (vec![0; SIZE as usize], Random::new(seed));
        for round in 0..300 {
            change(&*image, &mut model, &mut random);
            if round % 100 == 99 {
                drop(image);
                image = open(&path, &OpenOptions::default()).unwrap();
                check(&*image);
            }
        }
        assert!(read(&*image, 0, model.len()) == model, "clusters of {cluster_size}");
    }
}

#[test]
fn an_overlay_hides_what_is_behind_it_and_leaves_it_alone() {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("base.raw");
    // Shorter than the overlay, and no multiple of a cluster.
    let bytes: Vec<u8> = (0..SIZE as usize / 2 + 512).map(|n| (n / 512) as u8).collect();
    std::fs::write(&base, &bytes).unwrap();
    let path = directory.path().join("overlay.qcow2");
    let backing = Some(Backing { path: "base.raw".into(), format: Some(Format::Raw) });
    let image = create(&path, &CreateOptions { backing, ..options(4096) }).unwrap();
    let mut model = bytes.clone();
    model.resize(SIZE as usize, 0);
    let mut random = Random::new(5);
    for _ in 0..300 {
        change(&*image, &mut model, &mut random);
    }
    assert!(read(&*image, 0, model.len()) == model);
    check(&*image);
    image.clear().unwrap();
    check(&*image);
    assert!(read(&*image, 0, bytes.len()) == bytes);
    assert!(std::fs::read(&base).unwrap() == bytes);
}

#[test]
fn several_threads_write_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let image = create(&path, &options(4096)).unwrap();
    let stripe = 512 * 6;
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let image = &image;
            scope.spawn(move || {
                let mut random = Random::new(thread);
                for _ in 0..400 {
                    let n = random.word() % (SIZE / (4 * stripe));
                    let offset = (n * 4 + thread) * stripe;
                    match random.word() % 8 {
                        0 => image.discard(offset, stripe).unwrap(),
                        1 => image.flush().unwrap(),
                        _ => {
                            let mut bytes = vec![n as u8 ^ thread as u8; stripe as usize];
                            image.write(offset, &[Slice::from(&mut bytes[..])]).unwrap();
                            assert!(read(&**image, offset, bytes.len()) == bytes);
                        }
                    }
                }
            });
        }
    });
    check(&*image);
}

#[test]
fn storage_that_is_discarded_is_used_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let image = create(&path, &options(65536)).unwrap();
    for _ in 0..5 {
        image.write(0, &[Slice::from(&mut vec![7; SIZE as usize][..])]).unwrap();
        image.discard(0, SIZE).unwrap();
        image.flush().unwrap();
    }
    assert!(std::fs::metadata(&path).unwrap().len() < 2 * SIZE);
    assert!(image.info().unwrap().allocated < SIZE / 2);
}

#[test]
fn a_disk_grows_and_shrinks() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let image = create(&path, &options(512)).unwrap();
    image.write(SIZE - 1024, &[Slice::from(&mut [7; 1024][..])]).unwrap();
    image.resize(SIZE * 4).unwrap();
    assert_eq!(read(&*image, SIZE - 512, 1024), [[7; 512], [0; 512]].concat());
    image.write(SIZE * 4 - 512, &[Slice::from(&mut [8; 512][..])]).unwrap();
    image.resize(SIZE - 512).unwrap();
    image.resize(SIZE * 5).unwrap();
    assert_eq!(read(&*image, SIZE - 1024, 1024), [[7; 512], [0; 512]].concat());
    check(&*image);
    drop(image);
    assert_eq!(open(&path, &OpenOptions::default()).unwrap().size(), SIZE * 5);
}

#[test]
fn compressed_clusters_are_read_and_overwritten() {
    for compression in [Compression::Zlib, Compression::Zstd] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let image = create(&path, &CreateOptions { compression, ..options(65536) }).unwrap();
        let mut model: Vec<u8> = (0..SIZE as usize).map(|n| (n / 77) as u8).collect();
        for (n, cluster) in model.chunks(65536).enumerate() {
            assert!(image.write_compressed(n as u64 * 65536, cluster).unwrap());
        }
        assert!(std::fs::metadata(&path).unwrap().len() < SIZE / 2);
        let mut random = Random::new(9);
        for _ in 0..60 {
            change(&*image, &mut model, &mut random);
        }
        assert!(read(&*image, 0, model.len()) == model);
        check(&*image);
    }
}

/// What is wrong with an image, in words.
fn refusal(path: &Path) -> String {
    open(path, &OpenOptions::default()).map(drop).unwrap_err().to_string()
}

#[test]
fn chains_that_cannot_be_are_refused_in_words() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let over = |name: &str, behind: &str| {
        let backing = Some(Backing { path: behind.into(), format: Some(Format::Qcow2) });
        create(&path(name), &CreateOptions { backing, ..options(65536) }).map(drop)
    };
    create(&path("a"), &options(65536)).unwrap();
    over("b", "a").unwrap();
    over("c", "b").unwrap();
    assert!(matches!(over("c", "c"), Err(crate::DiskError::Create { .. })));
    let image = open(&path("a"), &OpenOptions::default()).unwrap();
    assert!(refusal(&path("c")).ends_with("a' is in use by another machine"));
    image.set_backing(Some(&Backing { path: "c".into(), format: Some(Format::Qcow2) })).unwrap();
    drop(image);
    assert!(refusal(&path("c")).ends_with("c' is among its own backing files"));
    std::fs::remove_file(path("a")).unwrap();
    assert!(refusal(&path("c")).contains("needs its backing file: cannot open"));
    // Of a file whose format nobody has named, a guest may have written the header.
    create(&path("a"), &options(65536)).unwrap();
    let image = open(&path("c"), &OpenOptions::default()).unwrap();
    image.set_backing(Some(&Backing { path: "b".into(), format: None })).unwrap();
    drop(image);
    assert!(refusal(&path("c")).contains("only guessed"));
}

#[test]
fn damage_is_noted_and_repaired() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let image = create(&path, &options(65536)).unwrap();
    image.write(0, &[Slice::from(&mut [7; 512][..])]).unwrap();
    drop(image);
    let mut bytes = std::fs::read(&path).unwrap();
    // All clusters seem to be free, and one more to be used twice.
    bytes[2 << 16..(2 << 16) + 32].fill(0);
    bytes[(2 << 16) + 100] = 2;
    std::fs::write(&path, &bytes).unwrap();
    let image = open(&path, &OpenOptions { for_repair: true, ..OpenOptions::default() }).unwrap();
    let report = image.check(Repair::Nothing).unwrap().unwrap();
    assert!(report.error_count > 0 && !report.is_clean());
    assert!(image.check(Repair::All).unwrap().unwrap().is_clean());
    check(&*image);
    assert_eq!(read(&*image, 0, 512), [7; 512]);
    drop(image);
    // A cluster behind the end of the file seems to be used.
    let mut odd = std::fs::read(&path).unwrap();
    odd[(2 << 16) + 60_000] = 1;
    std::fs::write(&path, &odd).unwrap();
    let image = open(&path, &OpenOptions { for_repair: true, ..OpenOptions::default() }).unwrap();
    assert_eq!(image.check(Repair::Leaks).unwrap().unwrap().repaired_leaks, 1);
    check(&*image);
    drop(image);
    // An L2 table twice: only one of them can be written.
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    bytes.copy_within(l1..l1 + 8, l1 + 8);
    bytes[36..40].copy_from_slice(&2u32.to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let image = open(&path, &OpenOptions { for_repair: true, ..OpenOptions::default() }).unwrap();
    assert!(!image.check(Repair::All).unwrap().unwrap().is_clean());
    drop(image);
    // An L2 table in the header.
    bytes[l1..l1 + 8].copy_from_slice(&(1u64 << 63 | 1 << 16).to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let image = open(&path, &OpenOptions::default()).unwrap();
    assert!(image.write(0, &[Slice::from(&mut [7; 512][..])]).is_err());
    drop(image);
    assert!(refusal(&path).contains("marked as damaged"));
    assert!(open(&path, &OpenOptions { read_only: true, ..OpenOptions::default() }).is_ok());
}

/// The field of eight bytes at `at`.
fn field(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn set_field(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// An image with clusters of 4 KiB whose first cluster is written, as bytes: the header, the refcount table, its block, the L1
/// table, an L2 table and the cluster.
fn small_image(path: &Path) -> Vec<u8> {
    let image = create(path, &CreateOptions { replace: true, ..options(4096) }).unwrap();
    image.write(0, &[Slice::from(&mut [7; 4096][..])]).unwrap();
    drop(image);
    std::fs::read(path).unwrap()
}

/// Writes to an image with damage until it is refused; gives what the file is then.
fn write_to_damaged(path: &Path, bytes: &[u8], what: &str) -> Vec<u8> {
    std::fs::write(path, bytes).unwrap();
    let image = match open(path, &OpenOptions::default()) {
        Ok(image) => image,
        Err(_) => return std::fs::read(path).unwrap(),
    };
    let refused = (0..64).any(|n| image.write(n * 4096, &[Slice::from(&mut [9; 4096][..])]).is_err());
    assert!(refused, "{what}");
    drop(image);
    assert!(refusal(path).contains("marked as damaged"), "{what}");
    std::fs::read(path).unwrap()
}

#[test]
fn tables_are_not_overwritten_whatever_refcounts_say() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let whole = small_image(&path);
    // The beginning of the header has no flags.
    let same = |bytes: &[u8], cluster: usize| {
        let range = cluster * 4096..cluster * 4096 + if cluster == 0 { 72 } else { 4096 };
        bytes[range.clone()] == whole[range]
    };
    let block = field(&whole, field(&whole, 48) as usize) as usize;
    let l1 = field(&whole, 40) as usize;
    let l2 = (field(&whole, l1) & super::entry::OFFSET) as usize;
    for table in [0, field(&whole, 48) as usize, block, l1, l2] {
        let mut bytes = whole.clone();
        bytes[block + table / 4096 * 2..][..2].fill(0);
        let after = write_to_damaged(&path, &bytes, &format!("the refcount of {table:#x}"));
        let changes = table == block || table == l2;
        assert!(changes || same(&after, table / 4096), "{table:#x} is overwritten");
        assert!(same(&after, 0));
    }
    let mut bytes = whole.clone();
    set_field(&mut bytes, field(&whole, 48) as usize, 0);
    let after = write_to_damaged(&path, &bytes, "no refcount block");
    assert!(same(&after, 0), "the header is a refcount block");
}

#[test]
fn compressed_clusters_are_not_in_tables() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let mut bytes = small_image(&path);
    let l2 = (field(&bytes, field(&bytes, 40) as usize) & super::entry::OFFSET) as usize;
    // To free it would be to free the header.
    set_field(&mut bytes, l2, 1 << 62 | 512);
    let after = write_to_damaged(&path, &bytes, "a compressed cluster");
    assert!(after[..72] == bytes[..72]);
}

#[test]
fn nothing_is_written_far_behind_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let whole = small_image(&path);
    let (table, l1) = (field(&whole, 48) as usize, field(&whole, 40) as usize);
    let l2 = (field(&whole, l1) & super::entry::OFFSET) as usize;
    for (place, flags) in
        [(48, 0), (40, 0), (table, 0), (l1, super::entry::COPIED), (l2, super::entry::COPIED)]
    {
        let mut bytes = whole.clone();
        set_field(&mut bytes, place, 1 << 40 | flags);
        let after = write_to_damaged(&path, &bytes, &format!("the field at {place:#x}"));
        assert!(after.len() < 1 << 20);
    }
}

#[test]
fn what_is_written_and_discarded_is_free_without_a_flush() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let image = create(&path, &options(512)).unwrap();
    for _ in 0..8 {
        image.write(0, &[Slice::from(&mut vec![7; SIZE as usize][..])]).unwrap();
        image.discard(0, SIZE).unwrap();
    }
    assert!(std::fs::metadata(&path).unwrap().len() < 4 * SIZE);
    drop(image);
    check(&*open(&path, &OpenOptions::default()).unwrap());
}

#[test]
fn a_check_takes_no_longer_for_holes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let began = std::time::Instant::now();
    let mut bytes = small_image(&path);
    // All refcounts of the table, and all L2 tables, are in holes.
    let (table, l1) = (field(&bytes, 48) as usize, field(&bytes, 40) as usize);
    for n in 1..512 {
        set_field(&mut bytes, table + n * 8, 1 << 33 | (n as u64) << 12);
        set_field(&mut bytes, l1 + n * 8, 1 << 34 | (n as u64) << 12);
    }
    for (what, bytes) in [("sound", small_image(&path)), ("tables in holes", bytes)] {
        std::fs::write(&path, &bytes).unwrap();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 43).unwrap();
        let image = open(&path, &OpenOptions { for_repair: true, ..OpenOptions::default() }).unwrap();
        let report = image.check(Repair::Nothing).unwrap().unwrap();
        assert_eq!(report.is_clean(), what == "sound", "{what}");
    }
    assert!(began.elapsed().as_secs() < 30);
}

#[test]
fn snapshots_with_too_large_tables_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let mut bytes = small_image(&path);
    let at = bytes.len();
    bytes[60..64].copy_from_slice(&3u32.to_be_bytes());
    set_field(&mut bytes, 64, at as u64);
    for _ in 0..3 {
        let mut entry = [0; 40];
        entry[8..12].copy_from_slice(&(4u32 << 20).to_be_bytes());
        bytes.extend(entry);
    }
    std::fs::write(&path, &bytes).unwrap();
    assert!(refusal(&path).contains("table of snapshots"));
}
