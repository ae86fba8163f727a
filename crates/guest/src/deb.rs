//! Takes files out of a Debian package.
//!
//! A package is an `ar` archive whose member `data.tar.*` holds the files. Names in the archive are only
//! ever compared with the names that are wanted; what is written is always the caller's own path,
//! so no archive can write outside of it.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use crate::{GuestError, cache};

/// No file that is wanted from a package is larger than this.
const LARGEST_FILE: u64 = 256 << 20;

/// A file wanted from a package.
#[derive(Debug, Clone)]
pub struct Want {
    /// Names that it may have, without a leading `./`; a `*` in one stands for any text.
    pub names: Vec<String>,
    /// Where to write it.
    pub to: PathBuf,
}

impl Want {
    /// One file that may be found under any of `names`.
    pub fn new(names: &[&str], to: impl Into<PathBuf>) -> Want {
        Want { names: names.iter().map(|name| name.to_string()).collect(), to: to.into() }
    }

    fn matches(&self, name: &str) -> bool {
        self.names.iter().any(|want| match want.split_once('*') {
            Some((prefix, suffix)) => name.strip_prefix(prefix).is_some_and(|rest| rest.ends_with(suffix)),
            None => name == want,
        })
    }
}

/// Writes the wanted files of some packages to where they are wanted, and returns the name in its archive of each, in the order
/// of `wants`. All of them have to be there; where one is not, the error names the first package.
pub fn extract(packages: &[PathBuf], wants: &[Want]) -> Result<Vec<String>, GuestError> {
    require(packages, wants, extract_some(packages, wants)?)
}

/// The names of files all of which have to be there.
pub(crate) fn require(
    packages: &[PathBuf],
    wants: &[Want],
    found: Vec<Option<String>>,
) -> Result<Vec<String>, GuestError> {
    let path = packages.first().cloned().unwrap_or_default();
    let missing =
        |want: &Want| GuestError::MissingMember { path: path.clone(), member: want.names.join(" or ") };
    found.into_iter().zip(wants).map(|(name, want)| name.ok_or_else(|| missing(want))).collect()
}

/// As [`extract`], with `None` for those that are not there.
pub(crate) fn extract_some(packages: &[PathBuf], wants: &[Want]) -> Result<Vec<Option<String>>, GuestError> {
    let mut found = vec![None; wants.len()];
    packages.iter().try_for_each(|package| extract_more(package, wants, &mut found))?;
    Ok(found)
}

/// Writes those of the wanted files that have not been found in other packages.
fn extract_more(package: &Path, wants: &[Want], found: &mut [Option<String>]) -> Result<(), GuestError> {
    let bad = |error: io::Error| GuestError::BadPackage { path: package.to_owned(), why: error.to_string() };
    let file = File::open(package).map_err(GuestError::io("open", package))?;
    let mut archive = tar::Archive::new(data_member(BufReader::new(file)).map_err(bad)?);
    for entry in archive.entries().map_err(bad)? {
        let mut entry = entry.map_err(bad)?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let name = name.strip_prefix("./").unwrap_or(&name);
        let Some(at) = (0..wants.len()).find(|&at| found[at].is_none() && wants[at].matches(name)) else {
            continue;
        };
        if entry.size() > LARGEST_FILE {
            return Err(bad(io::Error::other(format!("{name} claims {} bytes", entry.size()))));
        }
        let size = entry.size();
        write_out(&mut entry, size, &wants[at].to, bad)?;
        found[at] = Some(name.to_owned());
        if found.iter().all(Option::is_some) {
            break;
        }
    }
    Ok(())
}

/// Unpacks a file in its place that is packed in a way of [`decompressor`].
pub(crate) fn decompress(path: &Path, kind: &str) -> Result<(), GuestError> {
    let bad = |error: io::Error| GuestError::BadPackage { path: path.to_owned(), why: error.to_string() };
    let packed = File::open(path).map_err(GuestError::io("open", path))?;
    let mut bytes = Vec::new();
    decompressor(kind, packed)
        .and_then(|data| data.take(LARGEST_FILE).read_to_end(&mut bytes))
        .map_err(bad)?;
    cache::write_whole(path, &bytes)
}

/// Copies an entry of `size` bytes to a new file and makes it durable; `bad` names what is wrong with
/// the archive.
fn write_out(
    entry: &mut impl Read,
    size: u64,
    to: &Path,
    bad: impl Fn(io::Error) -> GuestError,
) -> Result<(), GuestError> {
    let mut file = File::create(to).map_err(GuestError::io("create", to))?;
    let (mut buffer, mut copied) = (vec![0; 64 << 10], 0);
    loop {
        match entry.read(&mut buffer) {
            // An archive that was cut off ends here too.
            Ok(0) if copied < size => return Err(bad(io::ErrorKind::UnexpectedEof.into())),
            Ok(0) => break,
            Ok(count) => {
                file.write_all(&buffer[..count]).map_err(GuestError::io("write", to))?;
                copied += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(bad(error)),
        }
    }
    file.sync_all().map_err(GuestError::io("write", to))
}

/// Finds `data.tar*` in the `ar` archive and gives a reader of the tar archive in it.
fn data_member(mut package: impl Read + 'static) -> io::Result<Box<dyn Read>> {
    let mut magic = [0; 8];
    package.read_exact(&mut magic)?;
    if &magic != b"!<arch>\n" {
        return Err(io::Error::other("it does not begin as an ar archive"));
    }
    loop {
        let mut header = [0; 60];
        package.read_exact(&mut header).map_err(|_| io::Error::other("no member data.tar in it"))?;
        if &header[58..] != b"`\n" {
            return Err(io::Error::other("a damaged header in the ar archive"));
        }
        let text = |range: std::ops::Range<usize>| String::from_utf8_lossy(&header[range]).trim().to_owned();
        let name = text(0..16).trim_end_matches('/').to_owned();
        let size: u64 = text(48..58)
            .parse()
            .map_err(|_| io::Error::other("a member of the ar archive without a size"))?;
        if let Some(kind) = name.strip_prefix("data.tar") {
            return decompressor(kind, package.take(size));
        }
        let padded = size + size % 2;
        if io::copy(&mut (&mut package).take(padded), &mut io::sink())? != padded {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

fn decompressor(kind: &str, data: impl Read + 'static) -> io::Result<Box<dyn Read>> {
    Ok(match kind {
        "" => Box::new(data),
        ".gz" => Box::new(flate2::read::MultiGzDecoder::new(data)),
        ".xz" => Box::new(lzma_rust2::XzReader::new(data, true)),
        ".zst" => Box::new(ruzstd::decoding::StreamingDecoder::new(data).map_err(io::Error::other)?),
        other => return Err(io::Error::other(format!("a file packed in an unknown way: {other}"))),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::modules;

    /// A package made by hand, with its files packed in one way.
    pub(crate) fn package(kind: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = tar::Header::new_gnu();
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_size(content.len() as u64);
            header.set_mode(0o755);
            header.set_entry_type(tar::EntryType::Regular);
            header.set_cksum();
            tar.append(&header, *content).unwrap();
        }
        let tar = tar.into_inner().unwrap();
        let data = match kind {
            ".gz" => {
                let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                out.write_all(&tar).unwrap();
                out.finish().unwrap()
            }
            ".xz" => {
                let mut out =
                    lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
                out.write_all(&tar).unwrap();
                out.finish().unwrap()
            }
            ".zst" => {
                ruzstd::encoding::compress_to_vec(&tar[..], ruzstd::encoding::CompressionLevel::Uncompressed)
            }
            _ => tar,
        };
        let mut package = b"!<arch>\n".to_vec();
        let parts = [
            ("debian-binary", b"2.0\n".to_vec()),
            ("control.tar", vec![1; 7]),
            (&format!("data.tar{kind}"), data),
        ];
        for (name, content) in parts {
            package.extend(
                format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 100644, content.len()).bytes(),
            );
            package.extend(&content);
            package.resize(package.len().next_multiple_of(2), b'\n');
        }
        package
    }

    fn extract_bytes(
        bytes: &[u8],
        wants: &[(&[&str], &str)],
    ) -> (tempfile::TempDir, Result<Vec<String>, GuestError>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.deb");
        std::fs::write(&path, bytes).unwrap();
        let wants: Vec<Want> =
            wants.iter().map(|(names, to)| Want::new(names, dir.path().join(to))).collect();
        let result = extract(&[path], &wants);
        (dir, result)
    }

    #[test]
    fn wanted_files_come_out_of_every_kind_of_package() {
        for kind in ["", ".gz", ".xz", ".zst"] {
            let bytes = package(
                kind,
                &[("./boot/config-1", b"c"), ("./boot/vmlinuz-6.1", b"kernel"), ("./bin/x", b"x")],
            );
            let (dir, result) =
                extract_bytes(&bytes, &[(&["boot/vmlinuz-*"], "k"), (&["usr/bin/x", "bin/x"], "x")]);
            assert_eq!(result.unwrap(), ["boot/vmlinuz-6.1", "bin/x"], "{kind}");
            assert_eq!(std::fs::read(dir.path().join("k")).unwrap(), b"kernel");
            assert_eq!(std::fs::read(dir.path().join("x")).unwrap(), b"x");
        }
    }

    #[test]
    fn an_archive_cannot_write_where_it_likes() {
        let bytes = package(
            ".xz",
            &[("../../evil", b"evil"), ("boot/vmlinuz-../../../evil", b"k"), ("/etc/x", b"y")],
        );
        let (dir, result) = extract_bytes(&bytes, &[(&["boot/vmlinuz-*"], "k")]);
        result.unwrap();
        let names: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        assert!(!dir.path().join("../../evil").exists());
    }

    #[test]
    fn damage_is_an_error_at_every_length() {
        let mut random = 1u32;
        let mut next = || {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (random >> 24) as u8
        };
        let kernel: Vec<u8> = (0..20_000).map(|_| next()).collect();
        for kind in [".gz", ".xz", ".zst", ""] {
            let bytes = package(kind, &[("boot/vmlinuz-1", &kernel)]);
            for length in (0..bytes.len() - 1600).step_by(197) {
                let (_dir, result) = extract_bytes(&bytes[..length], &[(&["boot/vmlinuz-*"], "k")]);
                assert!(matches!(result, Err(GuestError::BadPackage { .. })), "{kind} {length}: {result:?}");
            }
        }
    }

    #[test]
    fn modules_are_found_under_any_release_and_unpacked() {
        let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
        xz.write_all(b"packed").unwrap();
        let files: [(&str, &[u8]); 3] = [
            ("./lib/modules/6.1/kernel/drivers/virtio/virtio.ko", b"plain"),
            ("./usr/lib/modules/6.1/kernel/drivers/block/virtio_blk.ko.xz", &xz.finish().unwrap()),
            ("./lib/modules/6.1/kernel/drivers/virtio/virtio_pci.ko.sig", b"no module"),
        ];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.deb");
        std::fs::write(&path, package(".gz", &files)).unwrap();
        let found = extract_some(&[path], &modules::wants(dir.path())).unwrap();
        let names = modules::unpack(dir.path(), &found).unwrap();
        assert_eq!(names, ["virtio_blk.ko", "virtio.ko"]);
        let kinds = modules::read(dir.path(), &names).unwrap();
        let disks = kinds.into_iter().find(|kind| kind.name == "disks").unwrap();
        let contents: Vec<_> = disks.modules.into_iter().map(|module| module.content).collect();
        assert_eq!(contents, [b"plain".to_vec(), b"packed".to_vec()]);
    }

    #[test]
    fn a_missing_file_is_named() {
        let (_dir, result) = extract_bytes(&package(".gz", &[("a", b"a")]), &[(&["boot/vmlinuz-*"], "k")]);
        assert!(result.unwrap_err().to_string().contains("boot/vmlinuz-*"));
    }
}
