//! What machines that run an image keep: a disk of their own, by the machine's name. It is an overlay on the image,
//! which must stay as it is as long as there are such machines.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ruse_block::{Backing, Compression, CreateOptions, DiskError, Format, OpenOptions};
use ruse_vmm::{DiskConfig, MachineConfig};
use serde::{Deserialize, Serialize};

use crate::store::{data_dir, private_dir};
use crate::{Image, ImageError};

const RECORD: &str = "machine.json";
const DISK: &str = "disk.qcow2";

/// What a machine was made from, and how it is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineRecord {
    /// The image.
    pub image: String,
    /// Its user.
    pub user: String,
    /// Its public SSH host key.
    pub host_key: String,
    /// What systemd knows the machine by, 32 hexadecimal digits; those that were made before have none from here.
    #[serde(default)]
    pub machine_id: Option<String>,
}

impl MachineRecord {
    /// The kernel's command line for a machine of this name.
    pub fn cmdline(&self, name: &str) -> String {
        let host = MachineConfig::host_name(name);
        let id = self.machine_id.as_ref().map(|id| format!(" systemd.machine_id={id}"));
        format!("console=ttyS0 quiet root=/dev/vda rw systemd.hostname={host}{}", id.unwrap_or_default())
    }
}

/// A number that no other machine has.
fn machine_id() -> Result<String, ImageError> {
    let path = Path::new("/proc/sys/kernel/random/uuid");
    let text = fs::read_to_string(path).map_err(ImageError::io("read", path))?;
    Ok(text.chars().filter(char::is_ascii_hexdigit).collect())
}

/// The machines of a user that have run an image.
#[derive(Clone, Debug)]
pub struct Machines {
    dir: PathBuf,
}

impl Machines {
    /// Those in the user's data directory: `$XDG_DATA_HOME/ruse/machines`, or `~/.local/share/ruse/machines`.
    pub fn open() -> Result<Self, ImageError> {
        Ok(Self::at(data_dir()?.join("machines")))
    }

    /// Those in a directory, which is made when there is something to keep.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The disk of a machine that runs `image`: what it was when the machine last ran, unless it is to be `fresh`. The
    /// machine's name is its caller's alone meanwhile.
    pub fn disk(&self, name: &str, image: &Image, fresh: bool) -> Result<DiskConfig, ImageError> {
        let dir = self.place(name)?;
        let path = dir.join(DISK);
        let disk = DiskConfig { format: Some(Format::Qcow2), ..DiskConfig::new(path.clone()) };
        if fresh {
            self.remove(name)?;
        } else if path.exists() {
            return match self.find(name)?.image == image.name {
                true => Ok(disk),
                false => Err(ImageError::OtherImage { name: name.to_owned() }),
            };
        }
        let beside = self.dir.join(format!(".new-{name}"));
        let _ = fs::remove_dir_all(&beside);
        private_dir(&beside)?;
        make_overlay(image, &beside.join(DISK))?;
        let manifest = &image.manifest;
        let record = MachineRecord {
            image: image.name.clone(),
            user: manifest.user.clone(),
            host_key: manifest.host_key.clone(),
            machine_id: Some(machine_id()?),
        };
        let path = beside.join(RECORD);
        let text = serde_json::to_vec_pretty(&record).expect("a record is plain data");
        fs::write(&path, text).map_err(ImageError::io("write", &path))?;
        fs::rename(&beside, &dir).map_err(ImageError::io("create", &dir))?;
        Ok(disk)
    }

    /// What a machine was made from.
    pub fn find(&self, name: &str) -> Result<MachineRecord, ImageError> {
        let path = self.place(name)?.join(RECORD);
        let text = fs::read(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => ImageError::NoImageIn { name: name.to_owned() },
            _ => ImageError::io("read", &path)(error),
        })?;
        serde_json::from_slice(&text).map_err(|error| ImageError::io("read", &path)(error.into()))
    }

    /// Writes down for SSH which host key a machine has, and says where.
    pub fn write_known_hosts(&self, name: &str, record: &MachineRecord) -> Result<PathBuf, ImageError> {
        let path = self.place(name)?.join("known_hosts");
        let beside = self.place(name)?.join(format!(".known_hosts-{}", std::process::id()));
        fs::write(&beside, format!("{name} {}\n", record.host_key))
            .map_err(ImageError::io("write", &beside))?;
        fs::rename(&beside, &path).map_err(ImageError::io("replace", &path))?;
        Ok(path)
    }

    /// The machines that keep something of this image.
    pub fn of_image(&self, image: &str) -> Result<Vec<String>, ImageError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(ImageError::io("read", &self.dir)(error)),
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let uses = |name: &String| self.find(name).is_ok_and(|record| record.image == image);
        let mut names: Vec<_> = names.filter(uses).collect();
        names.sort();
        Ok(names)
    }

    /// Throws away what a machine keeps, if it keeps anything.
    pub fn remove(&self, name: &str) -> Result<(), ImageError> {
        let dir = self.place(name)?;
        // Whatever is known of machines that run: whoever has the disk open keeps it.
        let alone = OpenOptions { format: Some(Format::Qcow2), alone: true, ..OpenOptions::default() };
        if let Err(DiskError::InUse(_)) = ruse_block::open(&dir.join(DISK), &alone) {
            return Err(ImageError::Runs { name: name.to_owned() });
        }
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(ImageError::io("remove", &dir)(error))
            }
            _ => Ok(()),
        }
    }

    fn place(&self, name: &str) -> Result<PathBuf, ImageError> {
        match MachineConfig::is_name(name) {
            true => Ok(self.dir.join(name)),
            false => Err(ImageError::BadName { name: name.to_owned() }),
        }
    }
}

/// Makes a disk that begins as the image's and has room for what is written.
fn make_overlay(image: &Image, path: &Path) -> Result<(), ImageError> {
    let base = image.disk();
    let base = base.canonicalize().map_err(ImageError::io("find", &base))?;
    let options = CreateOptions {
        format: Format::Qcow2,
        size: image.manifest.size,
        cluster_size: None,
        compression: Compression::Zlib,
        backing: Some(Backing { path: base, format: Some(Format::Raw) }),
        replace: false,
    };
    ruse_block::create(path, &options)?.flush().map_err(ImageError::io("write", path))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use ruse_block::Slice;

    use super::*;
    use crate::Manifest;

    fn image(dir: &Path, name: &str) -> Image {
        let manifest = Manifest {
            version: 1,
            system: "debian".into(),
            release: "bookworm".into(),
            created: 1,
            size: 64 << 20,
            user: "u".into(),
            host_key: "ssh-ed25519 AAAA".into(),
            kernel: "6.1".into(),
            packages: Vec::new(),
        };
        let image = Image { name: name.into(), dir: dir.join(name), manifest };
        fs::create_dir(&image.dir).unwrap();
        let disk = File::create(image.disk()).unwrap();
        disk.set_len(64 << 20).unwrap();
        for (value, at) in [(1, 0), (2, 5 << 20)] {
            disk.write_all_at(&[value; 4096], at).unwrap();
        }
        image
    }

    fn read(disk: &DiskConfig, at: u64) -> u8 {
        let options = OpenOptions { format: disk.format, read_only: true, ..OpenOptions::default() };
        let mut byte = [0; 512];
        let slices = [Slice::from(&mut byte[..])];
        ruse_block::open(&disk.path, &options).unwrap().read(at, &slices).unwrap();
        byte[0]
    }

    fn write(disk: &DiskConfig, at: u64, value: u8) {
        let options = OpenOptions { format: disk.format, ..OpenOptions::default() };
        let mut bytes = [value; 512];
        let image = ruse_block::open(&disk.path, &options).unwrap();
        image.write(at, &[Slice::from(&mut bytes[..])]).unwrap();
        image.flush().unwrap();
    }

    #[test]
    fn a_machine_keeps_its_disk_until_it_is_to_be_fresh() {
        let dir = tempfile::tempdir().unwrap();
        let (image, other) = (image(dir.path(), "one"), image(dir.path(), "two"));
        let machines = Machines::at(dir.path().join("machines"));
        assert!(matches!(machines.find("m"), Err(ImageError::NoImageIn { .. })));
        let before = fs::read(image.disk()).unwrap();
        let disk = machines.disk("m", &image, false).unwrap();
        assert_eq!((read(&disk, 0), read(&disk, 5 << 20), read(&disk, 6 << 20)), (1, 2, 0));
        assert!(fs::metadata(&disk.path).unwrap().blocks() * 512 < 1 << 20);
        let record = machines.find("m").unwrap();
        assert_eq!((&*record.user, &*record.image), ("u", "one"));
        let id = record.machine_id.clone().unwrap();
        assert!(id.len() == 32 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')), "{id}");
        assert!(
            record.cmdline("My.box").ends_with(&format!(" systemd.hostname=my-box systemd.machine_id={id}"))
        );
        assert_eq!(machines.of_image("one").unwrap(), ["m"]);
        write(&disk, 5 << 20, 9);
        assert_eq!(machines.disk("m", &image, false).unwrap(), disk);
        assert_eq!(read(&disk, 5 << 20), 9);
        assert!(matches!(machines.disk("m", &other, false), Err(ImageError::OtherImage { .. })));
        let running = ruse_block::open(&disk.path, &OpenOptions::default()).unwrap();
        assert!(matches!(machines.disk("m", &image, true), Err(ImageError::Runs { .. })));
        drop(running);
        let fresh = machines.disk("m", &image, true).unwrap();
        assert_eq!(read(&fresh, 5 << 20), 2);
        assert!(machines.find("m").unwrap().machine_id.unwrap() != id);
        assert!(fs::read(image.disk()).unwrap() == before, "nobody writes to the image");
    }
}
