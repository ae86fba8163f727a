//! Where the folders of running machines are, and whose they are.
//!
//! A machine's process holds a lock on a file in its folder. The lock goes with the process, however it ends: a folder
//! whose lock can be had is stale, and whoever finds it removes it. Folders are made and removed under a lock of the
//! whole registry only.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use ruse_vmm::MachineConfig;
use ruse_vmm::host::runtime_dir;
use rustix::fs::{Mode, OFlags, open};
use rustix::process::getuid;
use serde::{Deserialize, Serialize};

use crate::ManagerError;

/// The lock of the registry; no machine has a name that begins with a dot.
const REGISTRY_LOCK: &str = ".lock";
/// The lock that a machine's process holds.
const LOCK: &str = "lock";
/// What a machine is, for those whom it does not answer.
const RECORD: &str = "machine.json";
/// The control socket.
const CONTROL: &str = "control";
/// The socket of the serial console.
const CONSOLE: &str = "console";
/// Most machines whose names are made from one word.
const MOST_NUMBERED: u32 = 10_000;

/// How a machine is to be called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    /// So and not otherwise.
    Exactly(String),
    /// So, or with a number behind it if that is taken.
    Like(String),
}

/// What a machine is, as its folder says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its process.
    pub pid: u32,
    /// When it was registered, in seconds since 1970.
    pub started: u64,
    /// What it was made from.
    pub config: MachineConfig,
}

/// A machine that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// What it is, once it has said so.
    pub record: Option<Record>,
}

/// The folders of a user's machines.
#[derive(Clone, Debug)]
pub struct Registry {
    dir: PathBuf,
}

impl Registry {
    /// The user's registry: in `$XDG_RUNTIME_DIR` or `/run/user/UID`, for root in `/run`, else in a directory of the
    /// user's own under `$TMPDIR`.
    pub fn open() -> Result<Self, ManagerError> {
        Self::at(runtime_dir())
    }

    /// A registry in this directory, which is made where it is missing.
    pub fn at(dir: impl Into<PathBuf>) -> Result<Self, ManagerError> {
        let dir = dir.into();
        match fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(ManagerError::io("create", &dir)(error));
            }
            _ => {}
        }
        let found = fs::symlink_metadata(&dir).map_err(ManagerError::io("look at", &dir))?;
        if !found.is_dir() || found.uid() != getuid().as_raw() || found.mode() & 0o077 != 0 {
            return Err(ManagerError::NotOurs { path: dir });
        }
        Ok(Self { dir })
    }

    /// Makes the folder of a machine that is about to run, which is `config` but for its name. It is removed when the
    /// registration is dropped.
    pub fn register(&self, name: &Name, config: &MachineConfig) -> Result<Registration, ManagerError> {
        let _lock = self.lock()?;
        let (name, lock) = match name {
            Name::Exactly(name) => {
                let lock = self.claim(name)?.ok_or_else(|| ManagerError::Taken { name: name.clone() })?;
                (name.clone(), lock)
            }
            Name::Like(word) => self.claim_numbered(word)?,
        };
        let dir = self.dir.join(&name);
        write_record(&dir, MachineConfig { name: name.clone(), ..config.clone() })?;
        let listen = |socket| {
            let (_dir, path) = short_path(&dir, socket)?;
            UnixListener::bind(path).map_err(ManagerError::io("make a socket in", &dir))
        };
        let (control, console) = (listen(CONTROL)?, listen(CONSOLE)?);
        Ok(Registration { registry: self.clone(), name, dir, control, console, _lock: lock })
    }

    fn claim_numbered(&self, word: &str) -> Result<(String, File), ManagerError> {
        if let Some(lock) = self.claim(word)? {
            return Ok((word.to_owned(), lock));
        }
        for number in 2..MOST_NUMBERED {
            let name = format!("{word}-{number}");
            if let Some(lock) = self.claim(&name)? {
                return Ok((name, lock));
            }
        }
        Err(ManagerError::Taken { name: word.to_owned() })
    }

    /// Makes an empty folder and locks it; `None` if a machine has it.
    fn claim(&self, name: &str) -> Result<Option<File>, ManagerError> {
        let dir = self.dir.join(name);
        if self.is_alive(name)? {
            return Ok(None);
        }
        self.remove(name)?;
        fs::DirBuilder::new().mode(0o700).create(&dir).map_err(ManagerError::io("create", &dir))?;
        let path = dir.join(LOCK);
        let file = File::create(&path).map_err(ManagerError::io("create", &path))?;
        file.lock().map_err(ManagerError::io("lock", &path))?;
        Ok(Some(file))
    }

    /// Whether the process of this machine lives. The registry is locked meanwhile: nobody is about to take the lock.
    fn is_alive(&self, name: &str) -> Result<bool, ManagerError> {
        let path = self.dir.join(name).join(LOCK);
        match File::open(&path) {
            Ok(file) => match file.try_lock_shared() {
                Ok(()) => Ok(false),
                Err(TryLockError::WouldBlock) => Ok(true),
                Err(TryLockError::Error(error)) => Err(ManagerError::io("lock", &path)(error)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(ManagerError::io("open", &path)(error)),
        }
    }

    fn remove(&self, name: &str) -> Result<(), ManagerError> {
        let dir = self.dir.join(name);
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(ManagerError::io("remove", &dir)(error))
            }
            _ => Ok(()),
        }
    }

    /// The machines that run, by name. What dead ones have left is removed.
    pub fn list(&self) -> Result<Vec<Entry>, ManagerError> {
        let _lock = self.lock()?;
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(ManagerError::io("read", &self.dir))? {
            let entry = entry.map_err(ManagerError::io("read", &self.dir))?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if !entry.path().is_dir() || !is_name(&name) {
                continue;
            }
            if self.is_alive(&name)? {
                entries.push(Entry { record: self.record(&name), name });
            } else {
                self.remove(&name)?;
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// What a machine's folder says of it.
    fn record(&self, name: &str) -> Option<Record> {
        serde_json::from_slice(&fs::read(self.dir.join(name).join(RECORD)).ok()?).ok()
    }

    /// Finds a machine that runs.
    pub fn find(&self, name: &str) -> Result<Entry, ManagerError> {
        let _lock = self.lock()?;
        match is_name(name) && self.is_alive(name)? {
            true => Ok(Entry { name: name.to_owned(), record: self.record(name) }),
            false => Err(ManagerError::NoMachine { name: name.to_owned() }),
        }
    }

    /// The folder of a machine.
    pub fn folder(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn connect_control(&self, name: &str) -> Result<UnixStream, ManagerError> {
        self.connect(name, CONTROL)
    }

    pub(crate) fn connect_console(&self, name: &str) -> Result<UnixStream, ManagerError> {
        self.connect(name, CONSOLE)
    }

    fn connect(&self, name: &str, socket: &str) -> Result<UnixStream, ManagerError> {
        let entry = self.find(name)?;
        let silent =
            |_| ManagerError::Silent { name: entry.name, pid: entry.record.map(|record| record.pid) };
        let (_dir, path) = short_path(&self.folder(name), socket)?;
        UnixStream::connect(path).map_err(silent)
    }

    fn lock(&self) -> Result<File, ManagerError> {
        let path = self.dir.join(REGISTRY_LOCK);
        let file = File::create(&path).map_err(ManagerError::io("create", &path))?;
        file.lock().map_err(ManagerError::io("lock", &path))?;
        Ok(file)
    }
}

/// A machine's folder, while its process lives.
#[derive(Debug)]
pub struct Registration {
    registry: Registry,
    name: String,
    dir: PathBuf,
    pub(crate) control: UnixListener,
    pub(crate) console: UnixListener,
    _lock: File,
}

impl Registration {
    /// The machine's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The machine's folder, which nobody else can enter. Sockets and other files that live as long as the machine
    /// does may be made in it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let removed = self.registry.lock().and_then(|_lock| self.registry.remove(&self.name));
        if let Err(error) = removed {
            tracing::warn!(%error, "a folder is left; whoever lists the machines next removes it");
        }
    }
}

/// Writes down what a machine is.
fn write_record(dir: &Path, config: MachineConfig) -> Result<(), ManagerError> {
    let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let record = Record { pid: std::process::id(), started, config };
    let path = dir.join(RECORD);
    let text = serde_json::to_vec_pretty(&record).expect("a record is plain data");
    fs::write(&path, text).map_err(ManagerError::io("write", &path))
}

/// Whether a machine can have this name (`vmm` refuses others).
fn is_name(name: &str) -> bool {
    MachineConfig::is_name(name)
}

/// A path for a socket in a directory that is short enough for a socket's address (108 bytes), whatever the
/// directory's own is. It holds while the file does.
fn short_path(dir: &Path, socket: &str) -> Result<(OwnedFd, PathBuf), ManagerError> {
    use std::os::fd::AsRawFd;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let file = open(dir, flags, Mode::empty()).map_err(ManagerError::io("open", dir))?;
    let path = format!("/proc/self/fd/{}/{socket}", file.as_raw_fd());
    Ok((file, path.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        // Longer than a socket's address.
        let place = dir.path().join("x".repeat(120));
        (dir, Registry::at(place).unwrap())
    }

    fn register(registry: &Registry, name: &str) -> Result<Registration, ManagerError> {
        registry.register(&Name::Exactly(name.into()), &MachineConfig::new("vmlinuz"))
    }

    fn names(registry: &Registry) -> Vec<String> {
        registry.list().unwrap().into_iter().map(|entry| entry.name).collect()
    }

    #[test]
    fn a_machine_is_there_as_long_as_its_registration() {
        let (_dir, registry) = registry();
        let one = register(&registry, "one").unwrap();
        let record = registry.find("one").unwrap().record.unwrap();
        let config = MachineConfig { name: "one".into(), ..MachineConfig::new("vmlinuz") };
        assert_eq!((record.pid, record.config), (std::process::id(), config));
        let _two = register(&registry, "two").unwrap();
        assert_eq!(names(&registry), ["one", "two"]);
        drop(one);
        assert_eq!(names(&registry), ["two"]);
        assert!(matches!(registry.find("one"), Err(ManagerError::NoMachine { .. })));
    }

    #[test]
    fn a_name_is_given_once() {
        let (_dir, registry) = registry();
        let _one = register(&registry, "x").unwrap();
        let error = register(&registry, "x").unwrap_err();
        assert!(matches!(&error, ManagerError::Taken { name } if name == "x"), "{error}");
        let like_x = || registry.register(&Name::Like("x".into()), &MachineConfig::new("vmlinuz"));
        let second = like_x().unwrap();
        let third = like_x().unwrap();
        assert_eq!((second.name(), third.name()), ("x-2", "x-3"));
        drop(second);
        assert_eq!(like_x().unwrap().name(), "x-2");
    }

    #[test]
    fn what_a_dead_machine_left_is_removed() {
        let (_dir, registry) = registry();
        for name in ["dead", "without-lock"] {
            fs::create_dir(registry.folder(name)).unwrap();
        }
        for file in [LOCK, CONTROL, RECORD] {
            fs::write(registry.folder("dead").join(file), "{").unwrap();
        }
        let alive = register(&registry, "alive").unwrap();
        assert_eq!(names(&registry), ["alive"]);
        assert!(!registry.folder("dead").exists() && !registry.folder("without-lock").exists());
        assert!(alive.dir().join(CONTROL).exists());
        fs::create_dir(registry.folder("again")).unwrap();
        register(&registry, "again").unwrap();
    }

    #[test]
    fn names_do_not_lead_elsewhere() {
        let (dir, registry) = registry();
        fs::create_dir(dir.path().join("outside")).unwrap();
        for name in ["../outside", "..", ".", "", ".lock", "a/b"] {
            assert!(matches!(registry.find(name), Err(ManagerError::NoMachine { .. })), "{name}");
        }
        assert!(dir.path().join("outside").exists());
    }

    #[test]
    fn a_directory_that_others_can_use_is_refused() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(Registry::at(&open), Err(ManagerError::NotOurs { .. })));
        fs::set_permissions(&open, fs::Permissions::from_mode(0o700)).unwrap();
        symlink(&open, dir.path().join("link")).unwrap();
        assert!(matches!(Registry::at(dir.path().join("link")), Err(ManagerError::NotOurs { .. })));
        Registry::at(&open).unwrap();
    }
}
