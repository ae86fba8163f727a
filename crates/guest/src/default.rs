//! Prepares the default guest, or finds it prepared.

use std::fs;
use std::path::{Path, PathBuf};
use std::slice;

use serde::{Deserialize, Serialize};

use crate::apt::AptCommands;
use crate::cache::{self, CacheLock};
use crate::deb::{self, Want};
use crate::fetch::fetch;
use crate::kernel::{self, CONFIG, Kernel, VMLINUZ, write_initrd};
use crate::{GuestError, Initramfs, PackageFile, Progress, modules};

/// Packages that bring a kernel for virtual machines: Debian's, then Ubuntu's.
const KERNEL_PACKAGES: &[&str] = &["linux-image-cloud-amd64", "linux-image-virtual"];
const BUSYBOX_PACKAGE: &str = "busybox-static";

/// The file that names what is prepared.
const MANIFEST: &str = "current.json";

/// The default guest in a cache directory.
#[derive(Debug, Clone)]
pub struct DefaultGuest {
    dir: PathBuf,
    apt: AptCommands,
    kernels: &'static [&'static str],
}

/// The files of a guest, ready to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFiles {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// The configuration that the kernel was built with.
    pub config: PathBuf,
    /// The static busybox that the initramfs carries.
    pub busybox: PathBuf,
    /// What the kernel calls its release, `6.1.0-56-cloud-amd64`.
    pub release: String,
    /// The packages that all this comes from, `NAME VERSION`.
    pub packages: Vec<String>,
}

/// What is prepared, as kept in [`MANIFEST`].
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    directory: String,
    release: String,
    packages: Vec<String>,
    /// Names and sizes of the files that came from packages.
    files: Vec<(String, u64)>,
    /// The kernel's modules.
    modules: Vec<String>,
    /// Which modules were looked for ([`modules::recipe`]). What an earlier version has prepared has none, or others.
    recipe: String,
}

/// A package that has been fetched.
struct Fetched {
    file: PackageFile,
    path: PathBuf,
}

/// What the guest is made of.
struct Packages {
    /// The first is called by the kernel's name.
    kernel: Vec<Fetched>,
    busybox: Fetched,
}

impl DefaultGuest {
    /// The guest in the user's cache directory: `$XDG_CACHE_HOME/ruse`, or `~/.cache/ruse`.
    pub fn new() -> Result<DefaultGuest, GuestError> {
        Ok(DefaultGuest::in_dir(cache::default_dir()?))
    }

    /// The guest in a directory, which is made where it is missing.
    pub fn in_dir(dir: impl Into<PathBuf>) -> DefaultGuest {
        let (dir, apt) = (dir.into().join("guest"), AptCommands::default());
        DefaultGuest { dir, apt, kernels: KERNEL_PACKAGES }
    }

    /// Uses these programs in place of `apt-get` and `apt-cache`.
    pub fn with_apt(mut self, apt: AptCommands) -> DefaultGuest {
        self.apt = apt;
        self
    }

    /// Takes the kernel of the first of these packages that apt knows. Guests with different kernels
    /// need directories of their own.
    pub fn with_kernel(mut self, packages: &'static [&'static str]) -> DefaultGuest {
        self.kernels = packages;
        self
    }

    /// The guest's files where they are prepared already; nothing is fetched or written.
    pub fn prepared(&self) -> Option<GuestFiles> {
        let files = self.files(&self.manifest()?);
        files.initrd.exists().then_some(files)
    }

    /// The guest's files, fetched and written first where they are not there yet. What an earlier
    /// run left half done is taken up, or thrown away.
    pub fn prepare(&self, progress: &mut dyn Progress) -> Result<GuestFiles, GuestError> {
        if let Some(files) = self.prepared() {
            return Ok(files);
        }
        let files = self.prepare_locked(progress);
        progress.finish();
        files
    }

    fn prepare_locked(&self, progress: &mut dyn Progress) -> Result<GuestFiles, GuestError> {
        fs::create_dir_all(&self.dir).map_err(GuestError::io("create", &self.dir))?;
        let _lock = CacheLock::take(&self.dir, progress)?;
        let manifest = match self.manifest() {
            Some(manifest) => manifest,
            None => self.install(progress)?,
        };
        let files = self.files(&manifest);
        if !files.initrd.exists() {
            progress.step("writing the initramfs");
            write_initrd(
                &files.busybox,
                self.dir.join(&manifest.directory),
                &manifest.modules,
                &files.initrd,
            )?;
        }
        Ok(files)
    }

    /// What is prepared, if its files are all there.
    fn manifest(&self) -> Option<Manifest> {
        let text = fs::read(self.dir.join(MANIFEST)).ok()?;
        let manifest: Manifest = serde_json::from_slice(&text).ok()?;
        let dir = self.dir.join(&manifest.directory);
        let whole =
            |(name, size): &(String, u64)| fs::metadata(dir.join(name)).is_ok_and(|file| file.len() == *size);
        let current = manifest.recipe == modules::recipe();
        (current && manifest.files.iter().all(whole)).then_some(manifest)
    }

    fn files(&self, manifest: &Manifest) -> GuestFiles {
        let dir = self.dir.join(&manifest.directory);
        GuestFiles {
            kernel: dir.join(VMLINUZ),
            initrd: dir.join(format!("initrd-{}.cpio", Initramfs::recipe())),
            config: dir.join(CONFIG),
            busybox: dir.join("busybox"),
            release: manifest.release.clone(),
            packages: manifest.packages.clone(),
        }
    }

    /// Fetches and unpacks the packages, and makes them the current ones.
    fn install(&self, progress: &mut dyn Progress) -> Result<Manifest, GuestError> {
        let downloads = self.dir.join("downloads");
        fs::create_dir_all(&downloads).map_err(GuestError::io("create", &downloads))?;
        let packages = self.fetch_packages(&downloads, progress)?;
        progress.step("unpacking");
        let manifest = self.unpack(&packages)?;
        let text = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data");
        cache::write_whole(&self.dir.join(MANIFEST), &text)?;
        if let Err(error) = fs::remove_dir_all(&downloads) {
            tracing::warn!(path = ?downloads, %error, "cannot remove the downloads");
        }
        Ok(manifest)
    }

    /// Fetches by the machine's own lists of packages; where they are empty or out of date, by lists
    /// fetched for this.
    fn fetch_packages(&self, dir: &Path, progress: &mut dyn Progress) -> Result<Packages, GuestError> {
        let error = match self.fetch_by(&self.apt, dir, progress) {
            Err(error) if error.may_be_old_lists() => error,
            done => return done,
        };
        tracing::debug!(%error, "the machine's lists of packages do not serve");
        progress.step("fetching lists of packages (apt's own are empty or out of date)");
        let private = self.apt.with_private_lists(&dir.join("apt"))?;
        self.fetch_by(&private, dir, progress)
    }

    fn fetch_by(
        &self,
        apt: &AptCommands,
        dir: &Path,
        progress: &mut dyn Progress,
    ) -> Result<Packages, GuestError> {
        progress.step("asking apt for the packages");
        let empty = dir.join("empty");
        cache::fresh_dir(&empty)?;
        let kernel = kernel::packages(apt, self.kernels, &empty)?;
        let busybox = apt.locate(BUSYBOX_PACKAGE, &empty)?;
        let mut get = |file: PackageFile| {
            progress.step(&format!("fetching {}", file.described()));
            let path = fetch(apt, &file, dir, progress)?;
            Ok(Fetched { file, path })
        };
        Ok(Packages {
            kernel: kernel.into_iter().map(&mut get).collect::<Result<_, _>>()?,
            busybox: get(busybox)?,
        })
    }

    /// Unpacks what is needed into a directory beside, and renames it into its place.
    fn unpack(&self, Packages { kernel, busybox }: &Packages) -> Result<Manifest, GuestError> {
        let beside = self.dir.join("unpacking");
        cache::fresh_dir(&beside)?;
        let paths: Vec<_> = kernel.iter().map(|package| package.path.clone()).collect();
        let Kernel { release, modules } = Kernel::unpack(&paths, &beside)?;
        let applets = Want::new(&["bin/busybox", "usr/bin/busybox"], beside.join("busybox"));
        deb::extract(slice::from_ref(&busybox.path), &[applets])?;

        let mut files = Vec::new();
        for name in [VMLINUZ, CONFIG, "busybox"].into_iter().chain(modules.iter().map(|name| &**name)) {
            let path = beside.join(name);
            let size = fs::metadata(&path).map_err(GuestError::io("read", &path))?.len();
            files.push((name.to_owned(), size));
        }
        // A name of its own for what has other files in it than earlier versions made.
        let directory = [kernel[0].file.described(), busybox.file.described(), modules::recipe()].join("+");
        let directory = file_name(&directory);
        let place = self.dir.join(&directory);
        cache::fresh_dir(&place)?;
        fs::rename(&beside, &place).map_err(GuestError::io("replace", &place))?;
        Ok(Manifest {
            directory,
            release,
            packages: kernel.iter().chain([busybox]).map(|package| package.file.described()).collect(),
            files,
            modules,
            recipe: modules::recipe(),
        })
    }
}

/// A name for a file: letters, digits and a few signs of `text`, all else as an underscore.
fn file_name(text: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-+.~".contains(c) { c } else { '_' };
    text.chars().map(plain).collect()
}
