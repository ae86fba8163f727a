//! The lab's kernel and initramfs: the default guest's, with modules of KVM and vhost and what is to be run.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use ruse_guest::deb::{self, Want};
use ruse_guest::{DefaultGuest, GuestFiles, Initramfs, Module, Silent};

use super::archive::Archive;

/// Modules by path in a kernel's tree, in the order in which they have to be loaded.
const MODULES: [&str; 11] = [
    "virt/lib/irqbypass.ko",
    "arch/x86/kvm/kvm.ko",
    "arch/x86/kvm/kvm-amd.ko",
    "drivers/vhost/vhost_iotlb.ko",
    "drivers/vhost/vhost.ko",
    "drivers/net/tun.ko",
    "drivers/net/tap.ko",
    "drivers/vhost/vhost_net.ko",
    "net/vmw_vsock/vsock.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common.ko",
    "drivers/vhost/vhost_vsock.ko",
];

/// What QEMU boots.
pub struct Image {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

impl Image {
    /// Makes the image NAME of the default guest, the modules and an archive.
    pub fn prepare(name: &str, archive: Archive) -> Result<Image> {
        let guest = DefaultGuest::new()?.prepare(&mut Silent)?;
        let modules = modules(&guest)?;
        let base = Initramfs { busybox: fs::read(&guest.busybox)?, modules, device_modules: Vec::new() };
        let mut bytes = base.build()?;
        // The kernel unpacks one archive after the other.
        bytes.extend(archive.finish()?);
        let initrd = directory()?.join(format!("{name}.cpio"));
        fs::write(&initrd, bytes).with_context(|| format!("writing {}", initrd.display()))?;
        Ok(Image { kernel: guest.kernel, initrd })
    }
}

/// The modules for the guest's kernel, from its packages, which are fetched once.
fn modules(guest: &GuestFiles) -> Result<Vec<Module>> {
    let directory = directory()?.join(&guest.release);
    let name = |path: &str| path.rsplit('/').next().unwrap_or(path).to_owned();
    if !MODULES.iter().all(|path| directory.join(name(path)).is_file()) {
        let packages = fetch(guest, &directory)?;
        let wants: Vec<_> = MODULES
            .iter()
            .map(|path| {
                let path_in = |root: &str| format!("{root}lib/modules/{}/kernel/{path}*", guest.release);
                Want::new(&[&path_in(""), &path_in("usr/")], directory.join(name(path)))
            })
            .collect();
        deb::extract(&packages, &wants)?;
        packages.iter().try_for_each(fs::remove_file)?;
    }
    MODULES
        .iter()
        .map(|path| {
            let name = name(path);
            Ok(Module { content: fs::read(directory.join(&name))?, name })
        })
        .collect()
}

/// Fetches the packages of the guest's kernel.
fn fetch(guest: &GuestFiles, directory: &Path) -> Result<Vec<PathBuf>> {
    let kernels = guest.packages.iter().filter(|package| package.starts_with("linux-"));
    let wanted: Vec<_> = kernels.map(|package| package.replacen(' ', "=", 1)).collect();
    ensure!(!wanted.is_empty(), "the default guest does not say which packages its kernel is from");
    eprintln!("fetching {}", wanted.join(", "));
    fs::create_dir_all(directory)?;
    let output = Command::new("apt-get")
        .args(["-q", "download"])
        .args(&wanted)
        .current_dir(directory)
        .output()
        .context("running apt-get")?;
    if !output.status.success() {
        bail!("apt-get download {}:\n{}", wanted.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    let files = fs::read_dir(directory)?.filter_map(|entry| Some(entry.ok()?.path()));
    let packages: Vec<_> = files.filter(|path| path.extension().is_some_and(|e| e == "deb")).collect();
    ensure!(packages.len() == wanted.len(), "other packages in {}: {packages:?}", directory.display());
    Ok(packages)
}

/// Where the lab's files are, beside what cargo builds.
pub fn directory() -> Result<PathBuf> {
    let this = env::current_exe().context("finding this program")?;
    let directory = this.ancestors().nth(2).context("finding this program's directory")?.join("lab");
    fs::create_dir_all(&directory)?;
    Ok(directory)
}
