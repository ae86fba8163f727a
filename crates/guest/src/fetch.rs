//! Fetches a package's file: resumed where it was cut off, verified before anything uses it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread;
use std::time::Duration;

use sha2::{Digest, Sha256, Sha512};

use crate::{AptCommands, GuestError, PackageFile, Progress};

/// How often the growing file is looked at.
const POLL: Duration = Duration::from_millis(50);

/// Downloads the package of `file` into `dir` and returns the path there, where size and checksum are right.
pub(crate) fn fetch(
    apt: &AptCommands,
    file: &PackageFile,
    dir: &Path,
    progress: &mut dyn Progress,
) -> Result<PathBuf, GuestError> {
    let path = dir.join(&file.file);
    if is_whole(&path, file)? {
        return Ok(path);
    }
    download(apt, file, dir, progress)?;
    if is_whole(&path, file)? {
        return Ok(path);
    }
    // What was resumed may have begun as something else: once more, from nothing.
    download(apt, file, dir, progress)?;
    match verify(&path, file) {
        Ok(()) => Ok(path),
        Err(error) => {
            fs::remove_file(&path).ok();
            Err(error)
        }
    }
}

/// Whether the file is there, whole and right. One that is as long as it should be, or longer, and
/// not right is removed; a shorter one is left for apt to resume.
fn is_whole(path: &Path, file: &PackageFile) -> Result<bool, GuestError> {
    let Ok(metadata) = fs::metadata(path) else { return Ok(false) };
    if metadata.len() < file.size {
        return Ok(false);
    }
    if verify(path, file).is_ok() {
        return Ok(true);
    }
    tracing::debug!(?path, "a damaged download is thrown away");
    fs::remove_file(path).map_err(GuestError::io("remove", path))?;
    Ok(false)
}

fn download(
    apt: &AptCommands,
    file: &PackageFile,
    dir: &Path,
    progress: &mut dyn Progress,
) -> Result<(), GuestError> {
    let log = dir.join("apt.log");
    let child = apt.download(file.package(), dir, &log)?;
    watch(apt, child, file.package(), std::slice::from_ref(file), dir, &log, progress)
}

/// Waits until apt has downloaded `files`, and tells how far it is.
fn watch(
    apt: &AptCommands,
    mut child: Child,
    what: &str,
    files: &[PackageFile],
    dir: &Path,
    log: &Path,
    progress: &mut dyn Progress,
) -> Result<(), GuestError> {
    let total = files.iter().map(|file| file.size).sum();
    let status = loop {
        if let Some(status) = child.try_wait().map_err(GuestError::io("wait for", &apt.get))? {
            break status;
        }
        let so_far = files.iter().map(|file| size_so_far(dir, &file.file).min(file.size)).sum();
        progress.bytes(so_far, total);
        thread::sleep(POLL);
    };
    if !status.success() {
        return Err(apt.download_failed(what, status, log));
    }
    progress.bytes(total, total);
    Ok(())
}

/// Downloads `wanted` with all that they depend on, which is `files`, into `dir`. Size and checksum of all of them are
/// right then.
pub(crate) fn fetch_all(
    apt: &AptCommands,
    wanted: &[String],
    files: &[PackageFile],
    dir: &Path,
    progress: &mut dyn Progress,
) -> Result<(), GuestError> {
    let missing = |file: &&PackageFile| !matches!(is_whole(&dir.join(&file.file), file), Ok(true));
    if files.iter().any(|file| missing(&file)) {
        let log = dir.join("apt.log");
        let child = apt.download_all(wanted, dir, &log)?;
        watch(apt, child, &wanted.join(" "), files, dir, &log, progress)?;
    }
    files.iter().try_for_each(|file| verify(&dir.join(&file.file), file))
}

/// How much of the file has come: apt writes it in place, or beside in `partial`.
fn size_so_far(dir: &Path, name: &str) -> u64 {
    let places = [dir.join(name), dir.join("partial").join(name)];
    places.iter().filter_map(|place| fs::metadata(place).ok()).map(|found| found.len()).max().unwrap_or(0)
}

/// Checks size and checksum.
fn verify(path: &Path, file: &PackageFile) -> Result<(), GuestError> {
    let corrupt = |what: String| GuestError::Corrupt { file: file.file.clone(), what };
    let size = fs::metadata(path).map_err(GuestError::io("read", path))?.len();
    if size != file.size {
        return Err(corrupt(format!("{size} bytes came instead of {}", file.size)));
    }
    let digest = match file.algorithm.as_str() {
        "SHA512" => hash_file::<Sha512>(path),
        _ => hash_file::<Sha256>(path),
    };
    let digest = digest.map_err(GuestError::io("read", path))?;
    if digest != file.digest {
        return Err(corrupt(format!("its {} is {digest} instead of {}", file.algorithm, file.digest)));
    }
    Ok(())
}

fn hash_file<D: Digest>(path: &Path) -> io::Result<String> {
    let (mut input, mut hasher, mut buffer) = (File::open(path)?, D::new(), vec![0; 128 << 10]);
    loop {
        match input.read(&mut buffer) {
            Ok(0) => return Ok(hexadecimal(&hasher.finalize())),
            Ok(count) => hasher.update(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The SHA-256 of `bytes`, in hexadecimal digits.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
