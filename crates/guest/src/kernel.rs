//! A kernel's packages: the kernel itself, and an initramfs with the modules that its disks need.

use std::fs;
use std::path::{Path, PathBuf};

use crate::deb::{self, Want};
use crate::{AptCommands, GuestError, Initramfs, PackageFile, cache, modules};

/// The kernel's file.
pub(crate) const VMLINUZ: &str = "vmlinuz";
/// The file of the configuration that it was built with.
pub(crate) const CONFIG: &str = "config";

/// What the name of a kernel's package begins with. Its release follows.
const IMAGE: &str = "linux-image-";

/// The packages of a kernel: the one that the first of `names` that apt knows stands for, and those that it depends on of the
/// same release. Debian until 13 has all in one; later ones, and Ubuntu, have modules and configuration in others. Apt is
/// asked for them in a directory that is `empty`.
pub(crate) fn packages(
    apt: &AptCommands,
    names: &[&str],
    empty: &Path,
) -> Result<Vec<PackageFile>, GuestError> {
    let image = apt.resolve(names, IMAGE)?;
    let release = image.strip_prefix(IMAGE).unwrap_or(&image);
    let is_part = |name: &String| {
        let kind = name.strip_suffix(release).and_then(|rest| rest.strip_prefix("linux-"));
        *name != image && kind.is_some_and(|kind| kind.ends_with('-'))
    };
    let parts = apt.dependencies(&image)?.into_iter().filter(is_part);
    [image.clone()].into_iter().chain(parts).map(|name| apt.locate(&name, empty)).collect()
}

/// A kernel that has been unpacked.
pub(crate) struct Kernel {
    /// What it calls its release.
    pub(crate) release: String,
    /// Files of its modules, in the order in which they are to be loaded.
    pub(crate) modules: Vec<String>,
}

impl Kernel {
    /// Unpacks the kernel of some packages, of which one is called by its name, into `dir`.
    pub(crate) fn unpack(packages: &[PathBuf], dir: &Path) -> Result<Self, GuestError> {
        let mut wants = vec![
            Want::new(&["boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz"], dir.join(VMLINUZ)),
            Want::new(&["boot/config-*", "usr/lib/modules/*/config"], dir.join(CONFIG)),
        ];
        let needed = wants.len();
        wants.extend(modules::wants(dir));
        let mut found = deb::extract_some(packages, &wants)?;
        let modules = modules::unpack(dir, &found.split_off(needed))?;
        let names = deb::require(packages, &wants[..needed], found)?;
        Ok(Self { release: release(&names[0]).to_owned(), modules })
    }
}

/// The release in the name of a kernel's file, `boot/vmlinuz-RELEASE` or `usr/lib/modules/RELEASE/vmlinuz`.
fn release(file: &str) -> &str {
    file.trim_end_matches("/vmlinuz")
        .trim_start_matches("boot/vmlinuz-")
        .trim_start_matches("usr/lib/modules/")
}

/// Writes an initramfs with modules out of `dir`, which are loaded where there are devices for them.
pub(crate) fn write_initrd(
    busybox: &Path,
    dir: impl AsRef<Path>,
    modules: &[String],
    to: &Path,
) -> Result<(), GuestError> {
    let device_modules = modules::read(dir.as_ref(), modules)?;
    let busybox = fs::read(busybox).map_err(GuestError::io("read", busybox))?;
    let archive = Initramfs { busybox, modules: Vec::new(), device_modules }.build();
    cache::write_whole(to, &archive.map_err(GuestError::io("write", to))?)
}
