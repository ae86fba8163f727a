//! The initramfs of the default guest: busybox, kernel modules if any, and the script that starts it all.

use std::collections::BTreeSet;
use std::io;

use crate::cpio::CpioWriter;
use crate::fetch::sha256;

/// The guest's first program.
pub(crate) const INIT: &str = include_str!("../assets/init");
/// What configures its networks.
const DHCP: &str = include_str!("../assets/dhcp");
/// What its shells read first.
const PROFILE: &str = include_str!("../assets/profile");
/// Counts changes of the layout below that the files above do not show.
const LAYOUT: &str = "4";

const DIRECTORIES: &[&str] = &[
    "bin",
    "dev",
    "etc",
    "lib",
    "lib/modules",
    "mnt",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "tmp",
    "usr",
    "usr/bin",
    "usr/sbin",
    "var",
];

/// A kernel module to carry, loaded at boot.
#[derive(Debug, Clone)]
pub struct Module {
    /// Name of its file, `virtio.ko`.
    pub name: String,
    /// What is in it.
    pub content: Vec<u8>,
}

/// Modules for a kind of device.
#[derive(Debug, Clone, Default)]
pub struct DeviceModules {
    /// The kind: a word.
    pub name: String,
    /// Ids as sysfs shows them, one of which has to be there: `0x0011` of a PCI function, `virtio:0x0002` of a virtio device.
    pub ids: Vec<String>,
    /// The modules in the order in which they are to be loaded. Several kinds may have the same ones.
    pub modules: Vec<Module>,
}

/// What goes into an initramfs.
#[derive(Debug, Clone, Default)]
pub struct Initramfs {
    /// The static busybox.
    pub busybox: Vec<u8>,
    /// Modules in the order in which they are to be loaded.
    pub modules: Vec<Module>,
    /// Modules that are loaded after those, where there are devices for them.
    pub device_modules: Vec<DeviceModules>,
}

impl Initramfs {
    /// The archive, as the kernel takes it. The same content gives the same bytes.
    pub fn build(&self) -> io::Result<Vec<u8>> {
        let mut archive = CpioWriter::new(Vec::with_capacity(self.busybox.len() + (64 << 10)));
        for directory in DIRECTORIES {
            archive.directory(directory)?;
        }
        archive.char_device("dev/console", 5, 1)?;
        archive.char_device("dev/null", 1, 3)?;
        archive.file("bin/busybox", 0o755, &self.busybox)?;
        archive.symlink("bin/sh", "busybox")?;
        for (name, content) in [
            ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
            ("etc/group", "root:x:0:\n"),
            ("etc/profile", PROFILE),
        ] {
            archive.file(name, 0o644, content.as_bytes())?;
        }
        let mut lists = vec![("order".to_owned(), &self.modules)];
        lists.extend(self.device_modules.iter().map(|kind| (format!("order-{}", kind.name), &kind.modules)));
        let mut written = BTreeSet::new();
        for (list, modules) in lists {
            let mut order = String::new();
            for module in modules {
                if written.insert(&module.name) {
                    archive.file(&format!("lib/modules/{}", module.name), 0o644, &module.content)?;
                }
                order.push_str(&module.name);
                order.push('\n');
            }
            archive.file(&format!("lib/modules/{list}"), 0o644, order.as_bytes())?;
        }
        let kind = |kind: &DeviceModules| format!("{} {}\n", kind.name, kind.ids.join(" "));
        let kinds: String = self.device_modules.iter().map(kind).collect();
        archive.file("lib/modules/devices", 0o644, kinds.as_bytes())?;
        archive.file("etc/dhcp", 0o755, DHCP.as_bytes())?;
        archive.file("init", 0o755, INIT.as_bytes())?;
        archive.finish()
    }

    /// Names what this version of Ruse puts into an initramfs besides the packages' files.
    pub(crate) fn recipe() -> String {
        sha256(format!("{LAYOUT}\0{INIT}\0{DHCP}\0{PROFILE}").as_bytes())[..12].to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_content_gives_the_same_bytes() {
        let module = Module { name: "virtio.ko".into(), content: vec![7; 33] };
        let initramfs =
            Initramfs { busybox: vec![1; 1001], modules: vec![module], device_modules: Vec::new() };
        let bytes = initramfs.build().unwrap();
        assert_eq!(bytes, initramfs.build().unwrap());
        let text = String::from_utf8_lossy(&bytes);
        for name in ["init\0", "bin/busybox\0", "lib/modules/virtio.ko\0", "dev/console\0"] {
            assert!(text.contains(name), "{name}");
        }
    }
}
