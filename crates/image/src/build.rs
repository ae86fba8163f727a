//! Makes a Debian image.

use std::fs::{self, File, TryLockError};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use ruse_guest::{AptCommands, DefaultGuest, PackageFile, Progress, SystemPackages, SystemPlan, cache_dir};

use crate::builder::Job;
use crate::parts::{self, Settings};
use crate::store::{self, Manifest, VERSION};
use crate::{GuestUser, Image, ImageError, Images, SshKey};

/// What every image has beside Debian's essential packages: what boots it, and what reaches it.
const PACKAGES: &[&str] = &[
    "apt",
    "ca-certificates",
    "chrony",
    "dbus",
    "e2fsprogs",
    "init",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "libpam-systemd",
    "login",
    "mount",
    "nano",
    "netbase",
    "openssh-server",
    "passwd",
    "procps",
    "sudo",
    "systemd-resolved",
    "udev",
];
/// Least and most bytes of a disk.
const SIZES: std::ops::RangeInclusive<u64> = 1 << 30..=64 << 40;
const MIB: u64 = 1 << 20;
/// RAM of the machine that builds, beside what it takes for packages.
const MEMORY: u64 = 512 * MIB;

/// What a Debian image is to be like.
#[derive(Clone, Debug)]
pub struct DebianPlan {
    /// The image's name.
    pub name: String,
    /// The release, by its code name.
    pub release: String,
    /// Packages beside those that every image has.
    pub packages: Vec<String>,
    /// Bytes of its disk.
    pub size: u64,
    /// Its user.
    pub user: GuestUser,
}

impl DebianPlan {
    /// An image of this name with the default of everything else.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            release: "bookworm".into(),
            packages: Vec::new(),
            size: 8 << 30,
            user: GuestUser::of_host(),
        }
    }

    /// Builds the image. What is fetched for it, another attempt finds.
    pub fn build(&self, images: &Images, progress: &mut dyn Progress) -> Result<Image, ImageError> {
        let built = self.build_in(images, progress);
        progress.finish();
        built
    }

    fn build_in(&self, images: &Images, progress: &mut dyn Progress) -> Result<Image, ImageError> {
        let place = images.place(&self.name)?;
        if place.exists() {
            return Err(ImageError::Exists { name: self.name.clone() });
        }
        if !SIZES.contains(&self.size) || !self.size.is_multiple_of(MIB) {
            return Err(ImageError::Size);
        }
        let plan = self.system();
        plan.check()?;
        let key = SshKey::open()?;
        let workshop = images.workshop(&self.name)?;
        let _lock = self.lock(&workshop)?;
        let guest = DefaultGuest::new()?.prepare(progress)?;
        let cache = cache_dir()?.join("debian").join(&self.release);
        let packages = plan.fetch(&AptCommands::default(), &cache, progress)?;
        let made = workshop.join("image");
        let _ = fs::remove_dir_all(&made);
        store::private_dir(&made)?;
        let kernel = packages.write_kernel(&guest.busybox, &made)?;

        progress.step("starting a machine to build in");
        let (disk, archive) = (store::disk(&made), workshop.join("parts.tar"));
        let file = File::create(&disk).map_err(ImageError::io("create", &disk))?;
        file.set_len(self.size).map_err(ImageError::io("enlarge", &disk))?;
        let settings = Settings { user: &self.user, host: &self.name, keys: &key.public };
        parts::write(&archive, &packages, &settings)?;
        let fetched = fs::metadata(&archive).map_err(ImageError::io("read", &archive))?.len();
        let job = Job {
            guest: &guest,
            disk: &disk,
            parts: &archive,
            log: workshop.join("log"),
            memory: (MEMORY + 2 * fetched).next_multiple_of(MIB),
            packages: packages.all.len(),
        };
        let host_key = job.run(progress)?;
        file.sync_all().map_err(ImageError::io("write", &disk))?;
        store::write_manifest(&made, &self.manifest(&packages, kernel, host_key))?;
        fs::rename(&made, &place).map_err(ImageError::io("create", &place))?;
        for (what, dir) in [("workshop", &workshop), ("packages", &cache)] {
            if let Err(error) = fs::remove_dir_all(dir) {
                tracing::warn!(path = ?dir, %error, "cannot remove the {what}");
            }
        }
        images.find(&self.name)
    }

    fn system(&self) -> SystemPlan {
        let own = PACKAGES.iter().map(|name| name.to_string());
        SystemPlan {
            release: self.release.clone(),
            packages: own.chain(self.packages.iter().cloned()).collect(),
        }
    }

    /// One process builds an image at a time.
    fn lock(&self, workshop: &Path) -> Result<File, ImageError> {
        let path = workshop.join("lock");
        let file = File::create(&path).map_err(ImageError::io("create", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(ImageError::Busy { name: self.name.clone() }),
            Err(TryLockError::Error(error)) => Err(ImageError::io("lock", &path)(error)),
        }
    }

    fn manifest(&self, packages: &SystemPackages, kernel: String, host_key: String) -> Manifest {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut names: Vec<_> = packages.all.iter().map(PackageFile::described).collect();
        names.sort();
        Manifest {
            version: VERSION,
            system: "debian".into(),
            release: self.release.clone(),
            created,
            size: self.size,
            user: self.user.name.clone(),
            host_key,
            kernel,
            packages: names,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_images_are_refused_before_anything_is_fetched() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::at(dir.path());
        let build = |plan: &DebianPlan| plan.build(&images, &mut ruse_guest::Silent).unwrap_err();
        fs::create_dir(dir.path().join("old")).unwrap();
        assert!(matches!(build(&DebianPlan::new("old")), ImageError::Exists { .. }));
        assert!(matches!(build(&DebianPlan::new("a/b")), ImageError::BadName { .. }));
        for size in [0, MIB, (1 << 30) + 1, u64::MAX] {
            assert!(matches!(build(&DebianPlan { size, ..DebianPlan::new("x") }), ImageError::Size));
        }
        let odd = DebianPlan { packages: vec!["-oAPT=1".into()], ..DebianPlan::new("x") };
        assert!(build(&odd).is_bad_input());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
