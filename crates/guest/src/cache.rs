//! The directory that the guest is kept in: where it is, who may write to it, how files get there whole.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::{GuestError, Progress};

/// `$XDG_CACHE_HOME/ruse`, or `~/.cache/ruse`.
pub fn default_dir() -> Result<PathBuf, GuestError> {
    choose_dir(env::var_os("XDG_CACHE_HOME"), env::var_os("HOME"))
}

fn choose_dir(cache: Option<OsString>, home: Option<OsString>) -> Result<PathBuf, GuestError> {
    let absolute = |value: Option<OsString>| value.map(PathBuf::from).filter(|path| path.is_absolute());
    absolute(cache)
        .or_else(|| absolute(home).map(|home| home.join(".cache")))
        .map(|base| base.join("ruse"))
        .ok_or(GuestError::NoCacheDir)
}

/// Held while the guest is prepared, so that two runs do not do it at the same time. The lock goes
/// with the process that held it, however it ends.
pub(crate) struct CacheLock(#[expect(dead_code, reason = "held for its lock")] File);

impl CacheLock {
    /// Takes the lock, and waits for whoever has it.
    pub(crate) fn take(dir: &Path, progress: &mut dyn Progress) -> Result<CacheLock, GuestError> {
        let path = dir.join("lock");
        let file = File::create(&path).map_err(GuestError::io("create", &path))?;
        match file.try_lock() {
            Ok(()) => return Ok(CacheLock(file)),
            Err(TryLockError::WouldBlock) => {
                progress.step("another ruse prepares the default guest: waiting for it")
            }
            Err(TryLockError::Error(error)) => return Err(GuestError::io("lock", &path)(error)),
        }
        file.lock().map_err(GuestError::io("lock", &path))?;
        Ok(CacheLock(file))
    }
}

/// Writes a file beside and renames it into its place: it is there whole, or as it was.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> Result<(), GuestError> {
    let beside = path.with_extension("new");
    let mut file = File::create(&beside).map_err(GuestError::io("create", &beside))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(GuestError::io("write", &beside))?;
    fs::rename(&beside, path).map_err(GuestError::io("replace", path))
}

/// Makes an empty directory, whatever was there before.
pub(crate) fn fresh_dir(path: &Path) -> Result<(), GuestError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(GuestError::io("remove", path)(error))
        }
        _ => fs::create_dir_all(path).map_err(GuestError::io("create", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_follows_the_environment() {
        let os = |text: &str| Some(OsString::from(text));
        assert_eq!(choose_dir(os("/c"), os("/h")).unwrap(), Path::new("/c/ruse"));
        assert_eq!(choose_dir(None, os("/h")).unwrap(), Path::new("/h/.cache/ruse"));
        assert_eq!(choose_dir(os("relative"), os("/h")).unwrap(), Path::new("/h/.cache/ruse"));
        assert!(matches!(choose_dir(os(""), None), Err(GuestError::NoCacheDir)));
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write_whole(&path, b"one").unwrap();
        write_whole(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
