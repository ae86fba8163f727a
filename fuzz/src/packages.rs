//! Debian packages: the `ar` archive, what its members are packed with, the tar archive inside; and apt's answers.

use std::path::Path;
use std::sync::LazyLock;

use arbitrary::Unstructured;
use ruse_guest::PackageFile;
use ruse_guest::deb::{Want, extract};

use crate::input::{byte, file, one_in};

/// Packages made by dpkg-deb (`seeds/make` makes them anew): not packed, by gzip, xz and zstd.
static PACKAGES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    vec![
        include_bytes!("../seeds/none.deb").to_vec(),
        include_bytes!("../seeds/gzip.deb").to_vec(),
        include_bytes!("../seeds/xz.deb").to_vec(),
        include_bytes!("../seeds/zstd.deb").to_vec(),
    ]
});

/// What the packed members of an `ar` archive are called.
const MEMBERS: [&str; 5] = ["data.tar", "data.tar.gz", "data.tar.xz", "data.tar.zst", "data.tar.lzma"];

/// Runs the target.
pub(crate) fn run(data: &[u8]) {
    let u = &mut Unstructured::new(data);
    if one_in(u, 8) {
        apt_line(u);
        return;
    }
    let package = if one_in(u, 4) { wrapped(u) } else { file(u, &PACKAGES) };
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("p.deb");
    std::fs::write(&path, &package).expect("a file");
    let out = dir.path().join("out");
    std::fs::create_dir(&out).expect("a directory");
    unpack(&path, &out);
}

/// A damaged packed stream in a whole archive, so that it gets to its unpacker.
fn wrapped(u: &mut Unstructured) -> Vec<u8> {
    let name = MEMBERS[usize::from(byte(u)) % MEMBERS.len()];
    let members: Vec<_> = PACKAGES.iter().map(|package| data_member(package).to_vec()).collect();
    let stream = file(u, &members);
    let header = format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 100_644, stream.len());
    [b"!<arch>\n", header.as_bytes(), &stream].concat()
}

/// The last member of an archive of dpkg-deb.
fn data_member(package: &[u8]) -> &[u8] {
    let header = package.windows(8).position(|w| w == b"data.tar").expect("a package has data");
    &package[header + 60..]
}

/// Whatever the archive says, only the wanted files are written, each whole or with an error.
fn unpack(package: &Path, out: &Path) {
    let wants = [
        Want::new(&["boot/vmlinuz-*"], out.join("kernel")),
        Want::new(&["bin/tool", "usr/bin/tool"], out.join("tool")),
    ];
    let result = extract(&[package.to_owned()], &wants);
    let written = std::fs::read_dir(out).expect("a directory").count();
    match result {
        Ok(names) => assert_eq!((names.len(), written), (2, 2)),
        Err(error) => {
            assert!(written <= 2);
            assert!(!error.to_string().is_empty());
        }
    }
}

/// A line of `apt-get download --print-uris` is understood as a plain file name with a checksum, or not at all.
fn apt_line(u: &mut Unstructured) {
    let digest = "3d3fdbe91d4660c873e14b092c213fe81c1da6362daa236eb25d0171eb108744";
    let valid = [format!("'http://h/b.deb' b_1%3a1_amd64.deb 928188 SHA256:{digest}").into_bytes()];
    let line = String::from_utf8_lossy(&file(u, &valid)).into_owned();
    if let Some(package) = PackageFile::parse(&line) {
        assert!(!package.file.contains('/') && !package.file.starts_with('.'));
        assert!(package.digest.bytes().all(|b| b.is_ascii_hexdigit()));
        assert!(!package.version().contains('/'));
    }
}
