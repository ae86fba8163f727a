//! The archive from which the machine that builds an image takes packages, scripts and settings.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;

use ruse_guest::SystemPackages;

use crate::{GuestUser, ImageError, ROOT_LABEL};

/// The scripts: one for the default guest, one for the new system.
const BUILD: &str = include_str!("../assets/build.sh");
const CONFIGURE: &str = include_str!("../assets/configure.sh");
/// Packages that make a file system, by the names that they have in different releases.
const TOOLS: &[&str] =
    &["libc6", "libcom-err2", "libblkid1", "libuuid1", "libext2fs2", "libext2fs2t64", "e2fsprogs"];

/// What the default guest is to do with the archive on its second disk.
pub(crate) const UNPACK: &str = "mkdir /parts && tar -x -f /dev/vdb -C /parts && sh /parts/build";

/// What an image is to be like. All of it is plain words.
pub(crate) struct Settings<'a> {
    /// Its user.
    pub(crate) user: &'a GuestUser,
    /// What it is called in the network, unless a machine has another name.
    pub(crate) host: &'a str,
    /// Lines of `authorized_keys`.
    pub(crate) keys: &'a str,
}

impl Settings<'_> {
    /// As a shell reads them.
    fn script(&self, packages: &SystemPackages) -> String {
        let tools: Vec<_> =
            TOOLS.iter().filter_map(|name| packages.file_of(name)).map(|file| &*file.file).collect();
        let kernel: Vec<_> = packages.kernel.iter().map(|file| &*file.file).collect();
        let lines = [
            ("NAME", &*self.user.name),
            ("ID", &self.user.id.to_string()),
            ("HOST", self.host),
            ("LABEL", ROOT_LABEL),
            ("KERNEL", &kernel.join(" ")),
            ("TOOLS", &tools.join(" ")),
        ];
        lines.iter().map(|(name, value)| format!("{name}='{value}'\n")).collect()
    }
}

/// Writes the archive.
pub(crate) fn write(path: &Path, packages: &SystemPackages, settings: &Settings) -> Result<(), ImageError> {
    let file = File::create(path).map_err(ImageError::io("create", path))?;
    let mut archive = tar::Builder::new(BufWriter::new(file));
    let write = || -> io::Result<()> {
        let all: Vec<_> = packages.all.iter().map(|file| &*file.file).collect();
        for (name, content) in [
            ("build", BUILD),
            ("configure", CONFIGURE),
            ("settings", &settings.script(packages)),
            ("authorized_keys", &format!("{}\n", settings.keys)),
            ("sources.list", &packages.sources),
            ("all", &all.join("\n")),
            ("base", &packages.base.join("\n")),
        ] {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            archive.append_data(&mut header, name, content.as_bytes())?;
        }
        for name in all.into_iter().chain(packages.kernel.iter().map(|file| &*file.file)) {
            archive.append_path_with_name(packages.dir.join(name), format!("packages/{name}"))?;
        }
        archive.into_inner()?.into_inner().map_err(|error| error.into_error())?.sync_all()
    };
    write().map_err(ImageError::io("write", path))
}
