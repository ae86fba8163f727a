//! Where images are kept: a directory for each, which is there whole or not at all.

use std::env;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use ruse_vmm::MachineConfig;
use serde::{Deserialize, Serialize};

use crate::ImageError;

/// The version of [`Manifest`].
pub(crate) const VERSION: u32 = 1;
const MANIFEST: &str = "image.json";

/// What an image is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of this description.
    pub version: u32,
    /// The system: `debian`.
    pub system: String,
    /// Its release.
    pub release: String,
    /// When it was built, in seconds since 1970.
    pub created: u64,
    /// Bytes of its disk.
    pub size: u64,
    /// Its user, who has an SSH key and may become root by `sudo`.
    pub user: String,
    /// Its public SSH host key, as in a file of known hosts.
    pub host_key: String,
    /// The release of its kernel.
    pub kernel: String,
    /// Its packages, `NAME VERSION`.
    pub packages: Vec<String>,
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// Its directory.
    pub dir: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

impl Image {
    /// Its disk. Machines must not write to it.
    pub fn disk(&self) -> PathBuf {
        disk(&self.dir)
    }
    /// The kernel that boots it.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }
    /// The initramfs of that kernel.
    pub fn initrd(&self) -> PathBuf {
        self.dir.join("initrd")
    }
    /// Bytes that it takes on the host.
    pub fn used(&self) -> io::Result<u64> {
        let mut sum = 0;
        for entry in fs::read_dir(&self.dir)? {
            sum += entry?.metadata()?.blocks() * 512;
        }
        Ok(sum)
    }
}

/// The disk in an image's directory.
pub(crate) fn disk(dir: &Path) -> PathBuf {
    dir.join("disk.raw")
}

/// The images of a user.
#[derive(Clone, Debug)]
pub struct Images {
    dir: PathBuf,
}

impl Images {
    /// Those in the user's data directory: `$XDG_DATA_HOME/ruse/images`, or `~/.local/share/ruse/images`.
    pub fn open() -> Result<Self, ImageError> {
        Ok(Self::at(data_dir()?.join("images")))
    }

    /// Those in a directory, which is made when there is something to keep.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// All of them, by name. One that is damaged is an error in its place.
    pub fn list(&self) -> Result<Vec<Result<Image, ImageError>>, ImageError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(ImageError::io("read", &self.dir)(error)),
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<_> = names.filter(|name| MachineConfig::is_name(name)).collect();
        names.sort();
        Ok(names.iter().map(|name| self.find(name)).collect())
    }

    /// The image of this name.
    pub fn find(&self, name: &str) -> Result<Image, ImageError> {
        let dir = self.place(name)?;
        let none = || ImageError::NoImage { name: name.to_owned() };
        let damaged = |why: String| ImageError::Damaged { name: name.to_owned(), why };
        if !dir.is_dir() {
            return Err(none());
        }
        let text = fs::read(dir.join(MANIFEST)).map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
        let manifest: Manifest =
            serde_json::from_slice(&text).map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
        if manifest.version != VERSION {
            return Err(damaged(format!("its version {} is not known here", manifest.version)));
        }
        let image = Image { name: name.to_owned(), dir, manifest };
        match [image.disk(), image.kernel(), image.initrd()].iter().find(|path| !path.is_file()) {
            Some(path) => Err(damaged(format!("there is no {}", path.display()))),
            None => Ok(image),
        }
    }

    /// Removes an image, whole or damaged.
    pub fn remove(&self, name: &str) -> Result<(), ImageError> {
        let dir = self.place(name)?;
        // Out of sight at once, so that nobody finds half of it.
        let beside = self.dir.join(format!(".removing-{name}"));
        match fs::rename(&dir, &beside) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(ImageError::NoImage { name: name.to_owned() })
            }
            Err(error) => Err(ImageError::io("remove", &dir)(error)),
            Ok(()) => fs::remove_dir_all(&beside).map_err(ImageError::io("remove", &beside)),
        }
    }

    /// Where the image of this name is or will be.
    pub(crate) fn place(&self, name: &str) -> Result<PathBuf, ImageError> {
        match MachineConfig::is_name(name) {
            true => Ok(self.dir.join(name)),
            false => Err(ImageError::BadName { name: name.to_owned() }),
        }
    }

    /// Where the image of this name is built.
    pub(crate) fn workshop(&self, name: &str) -> Result<PathBuf, ImageError> {
        self.place(name)?;
        let dir = self.dir.join(format!(".building-{name}"));
        private_dir(&dir)?;
        Ok(dir)
    }
}

/// Writes an image's description into its directory.
pub(crate) fn write_manifest(dir: &Path, manifest: &Manifest) -> Result<(), ImageError> {
    let path = dir.join(MANIFEST);
    let text = serde_json::to_vec_pretty(manifest).expect("a manifest is plain data");
    fs::write(&path, text).map_err(ImageError::io("write", &path))
}

/// Makes a directory that only its owner can enter.
pub(crate) fn private_dir(dir: &Path) -> Result<(), ImageError> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(ImageError::io("create", dir))
}

/// `$XDG_DATA_HOME/ruse`, or `~/.local/share/ruse`.
pub(crate) fn data_dir() -> Result<PathBuf, ImageError> {
    choose_dir(env::var_os("XDG_DATA_HOME"), env::var_os("HOME"))
}

fn choose_dir(data: Option<OsString>, home: Option<OsString>) -> Result<PathBuf, ImageError> {
    let absolute = |value: Option<OsString>| value.map(PathBuf::from).filter(|path| path.is_absolute());
    absolute(data)
        .or_else(|| absolute(home).map(|home| home.join(".local/share")))
        .map(|base| base.join("ruse"))
        .ok_or(ImageError::NoDataDir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            version: VERSION,
            system: "debian".into(),
            release: "bookworm".into(),
            created: 1,
            size: 1 << 30,
            user: "u".into(),
            host_key: "ssh-ed25519 AAAA".into(),
            kernel: "6.1".into(),
            packages: vec!["apt 2.6".into()],
        }
    }

    fn make(images: &Images, name: &str) -> PathBuf {
        let dir = images.place(name).unwrap();
        private_dir(&dir).unwrap();
        for file in ["disk.raw", "vmlinuz", "initrd"] {
            fs::write(dir.join(file), "x").unwrap();
        }
        write_manifest(&dir, &manifest()).unwrap();
        dir
    }

    #[test]
    fn images_are_found_listed_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::at(dir.path().join("images"));
        assert!(images.list().unwrap().is_empty());
        for name in ["two", "one", ".building-x"] {
            private_dir(&dir.path().join("images").join(name)).unwrap();
        }
        make(&images, "one");
        make(&images, "two");
        let names: Vec<_> = images.list().unwrap().into_iter().map(|image| image.unwrap().name).collect();
        assert_eq!(names, ["one", "two"]);
        assert_eq!(images.find("one").unwrap().manifest, manifest());
        images.remove("one").unwrap();
        assert!(matches!(images.find("one"), Err(ImageError::NoImage { .. })));
        assert!(matches!(images.remove("one"), Err(ImageError::NoImage { .. })));
        assert!(matches!(images.remove("../images"), Err(ImageError::BadName { .. })));
    }

    #[test]
    fn damage_is_named_and_can_be_removed() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::at(dir.path());
        for (file, content) in
            [("disk.raw", None), (MANIFEST, Some("{")), (MANIFEST, Some("{\"version\":9}"))]
        {
            let path = make(&images, "x").join(file);
            match content {
                Some(content) => fs::write(path, content).unwrap(),
                None => fs::remove_file(path).unwrap(),
            }
            let error = images.find("x").unwrap_err();
            assert!(matches!(&error, ImageError::Damaged { why, .. } if why.contains(file)), "{error}");
            assert!(images.list().unwrap()[0].is_err());
            images.remove("x").unwrap();
        }
    }

    #[test]
    fn the_directory_follows_the_environment() {
        let os = |text: &str| Some(OsString::from(text));
        assert_eq!(choose_dir(os("/d"), os("/h")).unwrap(), Path::new("/d/ruse"));
        assert_eq!(choose_dir(None, os("/h")).unwrap(), Path::new("/h/.local/share/ruse"));
        assert!(matches!(choose_dir(os("d"), None), Err(ImageError::NoDataDir)));
    }
}
