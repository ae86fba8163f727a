//! The disk by which cloud-init in a guest learns what it is to set up: its data source NoCloud, a FAT file system labelled
//! `cidata` with a few files in it. It is made in memory.

use std::fs::File;
use std::io::{self, Cursor, Read, Write};
use std::path::{Path, PathBuf};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions, format_volume};
use ruse_block::MemoryDisk;

use crate::MachineConfig;
use crate::config::SeedConfig;

/// What the guest knows the disk by.
pub(crate) const LABEL: &str = "cidata";
/// The same as FAT has it.
const FAT_LABEL: [u8; 11] = *b"cidata     ";
/// Most bytes of a file.
const MOST: u64 = 16 << 20;
/// Bytes for all that a file system has beside files.
const OVERHEAD: usize = 1 << 20;

/// Why there is no such disk.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// A file cannot be read.
    #[error("cannot read '{}': {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// A file is too large.
    #[error("'{}' has more than 16 MiB", .0.display())]
    Large(PathBuf),
    /// The file system cannot be made.
    #[error("cannot make the disk for cloud-init: {0}")]
    Make(io::Error),
}

/// Makes the disk for a machine of this name.
pub(crate) fn make(config: &SeedConfig, name: &str) -> Result<MemoryDisk, SeedError> {
    let given = |path: &Option<PathBuf>| path.as_deref().map(read).transpose();
    // Without the first two, the guest takes the disk for something else.
    let mut files = vec![
        ("user-data", given(&config.user_data)?.unwrap_or_default()),
        ("meta-data", given(&config.meta_data)?.unwrap_or_else(|| meta_data(name).into_bytes())),
    ];
    files.extend(given(&config.network_config)?.map(|bytes| ("network-config", bytes)));
    file_system(&files).map(MemoryDisk::new).map_err(SeedError::Make)
}

/// What the guest is told where nothing is said. It sets itself up once for each instance: a machine that keeps its disk
/// and its name stays the same.
fn meta_data(name: &str) -> String {
    // In quotes, as YAML takes some names for numbers.
    format!("instance-id: \"{name}\"\nlocal-hostname: \"{}\"\n", MachineConfig::host_name(name))
}

fn read(path: &Path) -> Result<Vec<u8>, SeedError> {
    let failed = |source| SeedError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).map_err(failed)?.take(MOST + 1).read_to_end(&mut bytes).map_err(failed)?;
    match bytes.len() as u64 > MOST {
        true => Err(SeedError::Large(path.to_owned())),
        false => Ok(bytes),
    }
}

/// A FAT file system with these files.
fn file_system(files: &[(&str, Vec<u8>)]) -> io::Result<Vec<u8>> {
    let content: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    // Clusters and the tables of clusters take some.
    let size = (OVERHEAD + content + content / 16).next_multiple_of(OVERHEAD);
    let mut disk = Cursor::new(vec![0; size]);
    format_volume(&mut disk, FormatVolumeOptions::new().volume_label(FAT_LABEL))?;
    let system = FileSystem::new(&mut disk, FsOptions::new())?;
    for (name, bytes) in files {
        system.root_dir().create_file(name)?.write_all(bytes)?;
    }
    system.unmount()?;
    Ok(disk.into_inner())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use ruse_block::{Disk, Slice};

    use super::*;

    #[test]
    fn what_is_not_given_is_made_and_what_is_wrong_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("user");
        fs::write(&path, "#cloud-config\n").unwrap();
        let config = SeedConfig { user_data: Some(path.clone()), ..SeedConfig::default() };
        let bytes = |name: &str| {
            let disk = make(&config, name).unwrap();
            let mut bytes = vec![0; disk.size() as usize];
            disk.read(0, &[Slice::from(&mut bytes[..])]).unwrap();
            bytes
        };
        let has = |bytes: &[u8], text: &str| bytes.windows(text.len()).any(|part| part == text.as_bytes());
        let disk = bytes("my.web_1");
        assert!(has(&disk, "#cloud-config\n"));
        assert!(has(&disk, "instance-id: \"my.web_1\"\nlocal-hostname: \"my-web-1\"\n"));
        assert!(disk == bytes("my.web_1") && disk != bytes("other"));
        let missing = SeedConfig { meta_data: Some(dir.path().join("none")), ..config.clone() };
        assert!(make(&missing, "m").unwrap_err().to_string().starts_with("cannot read '"));
        fs::write(&path, vec![b'x'; MOST as usize + 1]).unwrap();
        assert!(make(&config, "m").unwrap_err().to_string().ends_with("more than 16 MiB"));
        fs::write(&path, vec![b'x'; MOST as usize]).unwrap();
        assert!(has(&bytes("m"), "instance-id: \"m\"\n"));
    }

    /// mtools, another implementation of FAT, find what was written. Where there are none, this says so.
    #[test]
    fn others_find_the_files() {
        let large: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
        let files = [("user-data", large), ("meta-data", b"x: y\n".to_vec()), ("network-config", Vec::new())];
        let image = tempfile::NamedTempFile::new().unwrap();
        fs::write(image.path(), file_system(&files).unwrap()).unwrap();
        let ask = |program: &str, words: &[&str]| {
            let output = Command::new(program).arg("-i").arg(image.path()).args(words).output().ok()?;
            assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
            Some(output.stdout)
        };
        let Some(list) = ask("mdir", &["-b", "::"]) else {
            println!("skipped, there are no mtools");
            return;
        };
        let list = String::from_utf8(list).unwrap();
        assert_eq!(list.lines().collect::<Vec<_>>(), ["::/user-data", "::/meta-data", "::/network-config"]);
        for (name, bytes) in &files {
            assert!(ask("mtype", &[&format!("::{name}")]).unwrap() == *bytes, "{name}");
        }
        let label = ask("mlabel", &["-s", "::"]).unwrap();
        assert!(String::from_utf8(label).unwrap().contains("Volume label is cidata"));
    }
}
