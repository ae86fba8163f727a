//! The user's SSH key for guests.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::ImageError;
use crate::store::{data_dir, private_dir};

/// A pair of keys that opens the guests of a user, and nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshKey {
    /// The private key's file.
    pub private: PathBuf,
    /// The public key, as a line of `authorized_keys`.
    pub public: String,
}

impl SshKey {
    /// The user's key, made where there is none: `$XDG_DATA_HOME/ruse/ssh/id_ed25519`.
    pub fn open() -> Result<Self, ImageError> {
        Self::in_dir(&data_dir()?.join("ssh"))
    }

    /// The key in this directory.
    pub fn in_dir(dir: &Path) -> Result<Self, ImageError> {
        private_dir(dir)?;
        let path = dir.join("lock");
        let lock = File::create(&path).map_err(ImageError::io("create", &path))?;
        lock.lock().map_err(ImageError::io("lock", &path))?;
        let (private, public) = (dir.join("id_ed25519"), dir.join("id_ed25519.pub"));
        // The public one is written last: with it the pair is whole.
        if !public.exists() {
            make(&private)?;
        }
        let public = fs::read_to_string(&public).map_err(ImageError::io("read", &public))?;
        Ok(Self { private, public: public.trim().to_owned() })
    }
}

fn make(private: &Path) -> Result<(), ImageError> {
    let failed = |what: String| ImageError::Key { what };
    match fs::remove_file(private) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(ImageError::io("remove", private)(error));
        }
        _ => {}
    }
    let output = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "ruse", "-f"])
        .arg(private)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => failed("is not on this machine (Debian: openssh-client)".into()),
            _ => failed(error.to_string()),
        })?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(String::from_utf8_lossy(&output.stderr).trim().replace('\n', " "))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_is_the_users_alone() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("ssh");
        let key = SshKey::in_dir(&place).unwrap();
        assert!(key.public.starts_with("ssh-ed25519 "), "{}", key.public);
        assert_eq!(fs::metadata(&key.private).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(SshKey::in_dir(&place).unwrap(), key);
        fs::remove_file(place.join("id_ed25519.pub")).unwrap();
        assert_ne!(SshKey::in_dir(&place).unwrap().public, key.public, "half a pair is none");
    }
}
