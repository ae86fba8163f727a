//! A kernel's package: the kernel itself, and an initramfs with the modules that its disks need.

use std::fs;
use std::path::Path;

use crate::deb::{self, Want};
use crate::{GuestError, Initramfs, cache, modules};

/// The kernel's file.
pub(crate) const VMLINUZ: &str = "vmlinuz";
/// The file of the configuration that it was built with.
pub(crate) const CONFIG: &str = "config";

/// A kernel that has been unpacked.
pub(crate) struct Kernel {
    /// What it calls its release.
    pub(crate) release: String,
    /// Files of its modules, in the order in which they are to be loaded.
    pub(crate) modules: Vec<String>,
}

impl Kernel {
    /// Unpacks the kernel of a package into `dir`.
    pub(crate) fn unpack(package: &Path, dir: &Path) -> Result<Self, GuestError> {
        let mut wants = vec![
            Want::new(&["boot/vmlinuz-*"], dir.join(VMLINUZ)),
            Want::new(&["boot/config-*"], dir.join(CONFIG)),
        ];
        let needed = wants.len();
        wants.extend(modules::wants(dir));
        let mut found = deb::extract_some(package, &wants)?;
        let modules = modules::unpack(dir, &found.split_off(needed))?;
        let names = deb::require(package, &wants[..needed], found)?;
        Ok(Self { release: names[0].trim_start_matches("boot/vmlinuz-").to_owned(), modules })
    }
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
