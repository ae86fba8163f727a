//! Kernel modules of the default guest: what its devices need.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::deb::{self, Want};
use crate::fetch::sha256;
use crate::{DeviceModules, GuestError, Module};

/// What all virtio devices need.
const VIRTIO: &[&str] = &["drivers/virtio/virtio_ring", "drivers/virtio/virtio"];

/// Modules for a kind of device.
struct Group {
    name: &'static str,
    /// What sysfs shows of them: ids of PCI functions or of their vendor, of ACPI devices, or of virtio devices.
    ids: &'static [&'static str],
    /// [`VIRTIO`] comes before these.
    is_virtio: bool,
    /// The modules in the order in which they are to be loaded, by their place below `kernel/` without an extension.
    modules: &'static [&'static str],
}

/// Transports of virtio come first: devices show when they are loaded.
const GROUPS: &[Group] = &[
    Group {
        name: "virtio-pci",
        ids: &["0x1af4"],
        is_virtio: true,
        modules: &[
            "drivers/virtio/virtio_pci_legacy_dev",
            "drivers/virtio/virtio_pci_modern_dev",
            "drivers/virtio/virtio_pci",
        ],
    },
    Group {
        name: "virtio-mmio",
        ids: &["LNRO0005"],
        is_virtio: true,
        modules: &["drivers/virtio/virtio_mmio"],
    },
    Group { name: "disks", ids: &["virtio:0x0002"], is_virtio: true, modules: &["drivers/block/virtio_blk"] },
    Group {
        name: "networks",
        ids: &["virtio:0x0001"],
        is_virtio: true,
        modules: &["net/core/failover", "drivers/net/net_failover", "drivers/net/virtio_net"],
    },
    Group {
        name: "vsock",
        ids: &["virtio:0x0013"],
        is_virtio: true,
        modules: &[
            "net/vmw_vsock/vsock",
            "net/vmw_vsock/vmw_vsock_virtio_transport_common",
            "net/vmw_vsock/vmw_vsock_virtio_transport",
        ],
    },
    Group {
        name: "shares",
        ids: &["virtio:0x001a"],
        is_virtio: true,
        modules: &["fs/fuse/fuse", "fs/fuse/virtiofs"],
    },
    Group {
        name: "consoles",
        ids: &["virtio:0x0003"],
        is_virtio: true,
        modules: &["drivers/char/virtio_console"],
    },
    Group {
        name: "balloon",
        ids: &["virtio:0x0005"],
        is_virtio: true,
        modules: &["drivers/virtio/virtio_balloon"],
    },
    Group {
        name: "pmem",
        ids: &["virtio:0x001b"],
        is_virtio: true,
        modules: &[
            "drivers/nvdimm/libnvdimm",
            "drivers/nvdimm/nd_virtio",
            "drivers/nvdimm/virtio_pmem",
            "drivers/nvdimm/nd_btt",
            "drivers/nvdimm/nd_pmem",
        ],
    },
    Group {
        name: "memory",
        ids: &["virtio:0x0018"],
        is_virtio: true,
        modules: &["drivers/virtio/virtio_mem"],
    },
    Group {
        name: "pvpanic",
        ids: &["0x0011"],
        is_virtio: false,
        modules: &["drivers/misc/pvpanic/pvpanic", "drivers/misc/pvpanic/pvpanic-pci"],
    },
    Group {
        name: "watchdog",
        ids: &["0x25ab"],
        is_virtio: false,
        modules: &["drivers/watchdog/watchdog", "drivers/watchdog/i6300esb"],
    },
];

impl Group {
    fn places(&self) -> impl Iterator<Item = &'static str> {
        let common = if self.is_virtio { VIRTIO } else { &[] };
        common.iter().chain(self.modules).copied()
    }
}

/// How a module's file ends.
const ENDINGS: &[&str] = &[".ko", ".ko.xz", ".ko.zst", ".ko.gz"];

/// All modules, each once.
fn all() -> BTreeSet<&'static str> {
    GROUPS.iter().flat_map(Group::places).collect()
}

/// Names what this version of Ruse takes from a kernel's package.
pub(crate) fn recipe() -> String {
    let places: Vec<_> = all().into_iter().collect();
    sha256(places.join("\n").as_bytes())[..8].to_owned()
}

/// The modules as files of a kernel's package, to be written into `dir`. A kernel has some of them built in.
pub(crate) fn wants(dir: &Path) -> Vec<Want> {
    let want = |place: &str| {
        let roots = ["lib/modules/*/kernel", "usr/lib/modules/*/kernel"];
        let names =
            roots.iter().flat_map(|root| ENDINGS.iter().map(move |end| format!("{root}/{place}{end}")));
        Want { names: names.collect(), to: path(dir, place) }
    };
    all().into_iter().map(want).collect()
}

fn file_name(place: &str) -> String {
    format!("{}.ko", place.rsplit('/').next().unwrap_or(place))
}

fn path(dir: &Path, place: &str) -> PathBuf {
    dir.join(file_name(place))
}

/// Unpacks what was found for [`wants`] and gives the names of the files that are there now.
pub(crate) fn unpack(dir: &Path, found: &[Option<String>]) -> Result<Vec<String>, GuestError> {
    let mut names = Vec::new();
    for (place, found) in all().into_iter().zip(found) {
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

/// Reads the modules of each kind of device; those of `names` are there.
pub(crate) fn read(dir: &Path, names: &[String]) -> Result<Vec<DeviceModules>, GuestError> {
    let read = |name: String| {
        let path = dir.join(&name);
        let content = fs::read(&path).map_err(GuestError::io("read", &path))?;
        Ok(Module { name, content })
    };
    let group = |group: &Group| {
        let present = group.places().map(file_name).filter(|name| names.contains(name));
        Ok(DeviceModules {
            name: group.name.into(),
            ids: group.ids.iter().map(ToString::to_string).collect(),
            modules: present.map(read).collect::<Result<_, _>>()?,
        })
    };
    GROUPS.iter().map(group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kernel_has_built_in_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["virtio.ko", "virtio_blk.ko", "pvpanic.ko"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        let names = ["pvpanic.ko", "virtio.ko", "virtio_blk.ko"].map(String::from);
        let groups = read(dir.path(), &names).unwrap();
        let found = |name: &str| {
            let group = groups.iter().find(|group| group.name == name).unwrap();
            group.modules.iter().map(|module| module.name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(found("disks"), ["virtio.ko", "virtio_blk.ko"]);
        assert_eq!(found("vsock"), ["virtio.ko"]);
        assert_eq!(found("pvpanic"), ["pvpanic.ko"]);
    }
}
