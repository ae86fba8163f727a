//! Kernel modules of the default guest: what its disks need.

use std::fs;
use std::path::{Path, PathBuf};

use crate::deb::{self, Want};
use crate::{GuestError, Module};

/// The modules in the order in which they are to be loaded, by their place below `kernel/` without an extension.
const MODULES: &[&str] = &[
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
];
/// How a module's file ends.
const ENDINGS: &[&str] = &[".ko", ".ko.xz", ".ko.zst", ".ko.gz"];

/// The modules as files of a kernel's package, to be written into `dir`. A kernel has some of them built in.
pub(crate) fn wants(dir: &Path) -> Vec<Want> {
    let want = |place: &&str| {
        let roots = ["lib/modules/*/kernel", "usr/lib/modules/*/kernel"];
        let names =
            roots.iter().flat_map(|root| ENDINGS.iter().map(move |end| format!("{root}/{place}{end}")));
        Want { names: names.collect(), to: path(dir, place) }
    };
    MODULES.iter().map(want).collect()
}

fn file_name(place: &str) -> String {
    format!("{}.ko", place.rsplit('/').next().unwrap_or(place))
}

fn path(dir: &Path, place: &str) -> PathBuf {
    dir.join(file_name(place))
}

/// Unpacks what was found for [`wants`] and gives the names of the files that are there now, in their order.
pub(crate) fn unpack(dir: &Path, found: &[Option<String>]) -> Result<Vec<String>, GuestError> {
    let mut names = Vec::new();
    for (place, found) in MODULES.iter().zip(found) {
        let Some(found) = found else { continue };
        let path = path(dir, place);
        let packed = found.rsplit_once(".ko").map_or("", |(_, kind)| kind);
        if !packed.is_empty() {
            deb::decompress(&path, packed)?;
        }
        names.push(file_name(place));
    }
    Ok(names)
}

/// Reads the modules of these names.
pub(crate) fn read(dir: &Path, names: &[String]) -> Result<Vec<Module>, GuestError> {
    let read = |name: &String| {
        let path = dir.join(name);
        let content = fs::read(&path).map_err(GuestError::io("read", &path))?;
        Ok(Module { name: name.clone(), content })
    };
    names.iter().map(read).collect()
}
