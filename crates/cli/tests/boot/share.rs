//! Folders of the host as Debian's kernel mounts them.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use crate::disk::md5;
use crate::linux::{guest, run_script};
use crate::log;
use crate::machine::word;

const SCRIPT: &str = r#"
mkdir /a /b; mount -t virtiofs first /a; mount -t virtiofs second /b
echo -- read; md5sum < /a/large; ls /a/many | wc -l; cat /a/sub/deep/file; cat /a/out 2>&1; readlink /a/out
echo -- write; cd /a; seq 1 200000 > new; cat new > /tmp/new; cmp new /tmp/new && mkdir -p x/y && mv new x/y/moved
ln x/y/moved link; ln -s moved x/y/soft; md5sum < x/y/soft; rm many/7; rmdir sub/deep 2>&1; chmod 751 x; touch -d @1000 x/y
dd if=/dev/zero of=large bs=4k seek=100 count=10 conv=notrunc 2>/dev/null; truncate -s 3 sub/cut; mknod null c 1 3 2>&1
df /a | wc -l; cd /
echo -- only; cat /b/file; echo x 2>&1 > /b/file; rm /b/file 2>&1; mkdir /b/x 2>&1
umount /a; umount /b
"#;

#[test]
fn a_folder_is_read_and_written_and_another_only_read() {
    let Some(files) = guest() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    for folder in ["first/many", "first/sub/deep", "second"] {
        fs::create_dir_all(dir.path().join(folder)).unwrap();
    }
    let large: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect();
    fs::write(first.join("large"), &large).unwrap();
    (0..300).for_each(|n| fs::write(first.join("many").join(n.to_string()), "").unwrap());
    fs::write(first.join("sub/deep/file"), "deep\n").unwrap();
    fs::write(first.join("sub/cut"), "to be cut").unwrap();
    fs::write(second.join("file"), "fixed\n").unwrap();
    fs::write(dir.path().join("secret"), "secret").unwrap();
    symlink("../secret", first.join("out")).unwrap();
    let shares = [format!("{}:first", word(&first)), format!("{}:second,ro", word(&second))];
    let options = ["--cpus", "2", "--share", &shares[0], "--share", &shares[1]];
    let script = format!("{SCRIPT}{}echo -- end\n", log::SCRIPT);
    let ended = run_script(&files.kernel, &files, &options, "", &script);
    let missing = "cat: can't open '/a/out': No such file or directory";
    let sum = |bytes: &[u8]| format!("{}  -", md5(bytes));
    assert_eq!(ended.section("read"), [&*sum(&large), "300", "deep", missing, "../secret"]);
    let new: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    let not_empty = "rmdir: 'sub/deep': Directory not empty";
    let no_device = "mknod: null: Operation not permitted";
    assert_eq!(ended.section("write"), [&*sum(new.as_bytes()), not_empty, no_device, "2"]);
    let refused = "Read-only file system";
    let only = ended.section("only");
    assert_eq!(only[0], "fixed");
    assert!(only[1..].iter().filter(|line| line.ends_with(refused)).count() >= 3, "{only:?}");
    log::check(&ended, 2);

    assert!(fs::read_to_string(first.join("link")).unwrap() == new);
    assert_eq!(fs::metadata(first.join("x/y/moved")).unwrap().nlink(), 2);
    assert_eq!(fs::read_link(first.join("x/y/soft")).unwrap().to_str(), Some("moved"));
    assert_eq!(fs::metadata(first.join("x")).unwrap().mode() & 0o7777, 0o751);
    assert_eq!(fs::metadata(first.join("x/y")).unwrap().mtime(), 1000);
    assert_eq!(fs::read_to_string(first.join("sub/cut")).unwrap(), "to ");
    assert!(!first.join("many/7").exists() && !first.join("null").exists());
    let mut expected = large;
    expected[409_600..450_560].fill(0);
    assert!(fs::read(first.join("large")).unwrap() == expected);
    assert_eq!(fs::read_to_string(second.join("file")).unwrap(), "fixed\n");
}
