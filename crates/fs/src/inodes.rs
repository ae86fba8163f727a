//! The files and folders that a guest knows, by the numbers that it was given for them.
//!
//! Each is held open (O_PATH), so that it stays the same whatever becomes of its name. A guest may know more than a process
//! may have open: those that were opened longest ago are then known by their path, and looked up again, which finds the
//! same file or none.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat2, readlinkat};
use rustix::io::Errno;

use crate::abi::ROOT;

/// How a file is held: it can be named, but not read.
pub const HOLD: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Where a file is.
#[derive(Debug)]
enum Place {
    /// Held open.
    Open(Arc<OwnedFd>),
    /// Below the root.
    Path(PathBuf),
}

#[derive(Debug)]
struct Node {
    identity: Identity,
    place: Place,
    /// How often the guest was given its number.
    lookups: u64,
}

#[derive(Debug, Default)]
struct Known {
    nodes: HashMap<u64, Node>,
    numbers: HashMap<Identity, u64>,
    /// Those that are held open, the first of them for the longest time; some have been forgotten.
    open: VecDeque<u64>,
    last: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Inodes {
    root: Arc<OwnedFd>,
    /// `/proc/self/fd`.
    links: OwnedFd,
    /// Most files that are held open.
    most_open: usize,
    known: Mutex<Known>,
}

impl Inodes {
    /// Only the root is known. `links` is `/proc/self/fd`; at most `most_open` files are held open.
    pub fn new(root: OwnedFd, links: OwnedFd, most_open: usize) -> Self {
        let known = Mutex::new(Known { last: ROOT, ..Known::default() });
        Self { root: Arc::new(root), links, most_open: most_open.max(1), known }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all but the root.
    pub fn clear(&self) {
        let mut known = self.known();
        let last = known.last;
        // Numbers are not given twice: each means one file for ever (`generation`).
        *known = Known { last, ..Known::default() };
    }

    /// The file of a number.
    pub fn get(&self, number: u64) -> Result<Arc<OwnedFd>, Errno> {
        if number == ROOT {
            return Ok(self.root.clone());
        }
        let mut known = self.known();
        let node = known.nodes.get(&number).ok_or(Errno::STALE)?;
        let path = match &node.place {
            Place::Open(file) => return Ok(file.clone()),
            Place::Path(path) => path,
        };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let file = openat2(&self.root, path, HOLD, Mode::empty(), resolve).map_err(|_| Errno::STALE)?;
        if identity(&fstat(&file)?) != node.identity {
            return Err(Errno::STALE);
        }
        let file = Arc::new(file);
        self.hold(&mut known, number, file.clone());
        Ok(file)
    }

    /// The guest is given the number of a file.
    pub fn enter(&self, file: OwnedFd, stat: &Stat) -> u64 {
        let identity = identity(stat);
        let mut known = self.known();
        let number = known.numbers.get(&identity).copied().unwrap_or_else(|| {
            known.last += 1;
            let number = known.last;
            known.numbers.insert(identity, number);
            known.nodes.insert(number, Node { identity, place: Place::Path(PathBuf::new()), lookups: 0 });
            number
        });
        let node = known.nodes.get_mut(&number).expect("each number has its file");
        node.lookups += 1;
        if matches!(node.place, Place::Path(_)) {
            self.hold(&mut known, number, Arc::new(file));
        }
        number
    }

    /// The guest has forgotten a number so many times.
    pub fn forget(&self, number: u64, times: u64) {
        let mut known = self.known();
        let Some(node) = known.nodes.get_mut(&number) else { return };
        node.lookups = node.lookups.saturating_sub(times);
        if node.lookups == 0 {
            let identity = node.identity;
            known.nodes.remove(&number);
            known.numbers.remove(&identity);
            if known.open.len() > 2 * known.nodes.len() + 64 {
                let Known { open, nodes, .. } = &mut *known;
                open.retain(|number| nodes.contains_key(number));
            }
        }
    }

    /// Holds a file open, and others no more if they are too many.
    fn hold(&self, known: &mut Known, number: u64, file: Arc<OwnedFd>) {
        if let Some(node) = known.nodes.get_mut(&number) {
            node.place = Place::Open(file);
        }
        known.open.push_back(number);
        for _ in 0..known.open.len().saturating_sub(self.most_open) {
            let Some(number) = known.open.pop_front() else { return };
            let Some(node) = known.nodes.get_mut(&number) else { continue };
            let Place::Open(file) = &node.place else { continue };
            match self.path(file) {
                Some(path) => node.place = Place::Path(path),
                // It has no name any more: nothing else leads to it.
                None => known.open.push_back(number),
            }
        }
    }

    /// Where a file lies below the root, if it has a name there.
    fn path(&self, file: &OwnedFd) -> Option<PathBuf> {
        let read = |fd: &OwnedFd| readlinkat(&self.links, fd.as_raw_fd().to_string(), Vec::new()).ok();
        let (root, path) = (read(&self.root)?, read(file)?);
        let (root, path) = (root.to_bytes(), path.to_bytes());
        let path = Path::new(OsStr::from_bytes(path));
        let path = path.strip_prefix(OsStr::from_bytes(root)).ok()?.to_owned();
        // A deleted file's link says so in its name; another file may have just that name.
        (fstat(file).ok()?.st_nlink > 0 && !path.as_os_str().is_empty()).then_some(path)
    }

    /// How many are known, besides the root.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.known().nodes.len()
    }

    /// `/proc/self/fd`: each name in it is a file that this process has open.
    pub fn links(&self) -> impl AsFd + '_ {
        &self.links
    }
}

/// What a file is known by: device, inode and type. While nobody holds it open, another file may get its inode.
type Identity = (u64, u64, u32);

fn identity(stat: &Stat) -> Identity {
    (stat.st_dev, stat.st_ino, FileType::from_raw_mode(stat.st_mode).as_raw_mode())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rustix::fs::{CWD, openat};

    use super::*;

    fn hold(path: &Path) -> (OwnedFd, Stat) {
        let file = openat(CWD, path, HOLD, Mode::empty()).unwrap();
        let stat = fstat(&file).unwrap();
        (file, stat)
    }

    fn inodes(root: &Path, most_open: usize) -> Inodes {
        Inodes::new(hold(root).0, hold(Path::new("/proc/self/fd/.")).0, most_open)
    }

    #[test]
    fn a_file_keeps_its_number_until_it_is_forgotten_as_often() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "x").unwrap();
        let inodes = inodes(folder.path(), 100);
        let enter = || {
            let (file, stat) = hold(&file);
            inodes.enter(file, &stat)
        };
        let number = enter();
        assert_eq!(enter(), number);
        inodes.forget(number, 1);
        assert!(inodes.get(number).is_ok());
        inodes.forget(number, 1);
        assert_eq!((inodes.get(number).err(), inodes.len()), (Some(Errno::STALE), 0));
        assert_ne!(enter(), number, "no number comes back");
        assert!(inodes.get(ROOT).is_ok());
        inodes.forget(ROOT, 1000);
        assert!(inodes.get(ROOT).is_ok());
    }

    #[test]
    fn more_files_are_known_than_are_open() {
        let folder = tempfile::tempdir().unwrap();
        let inodes = inodes(folder.path(), 4);
        let name = |n: u32| folder.path().join(format!("sub/file {n}"));
        fs::create_dir(folder.path().join("sub")).unwrap();
        let numbers: Vec<_> = (0..20)
            .map(|n| {
                fs::write(name(n), n.to_string()).unwrap();
                let (file, stat) = hold(&name(n));
                inodes.enter(file, &stat)
            })
            .collect();
        let open = inodes.known().nodes.values().filter(|n| matches!(n.place, Place::Open(_))).count();
        assert_eq!(open, 4);
        fs::rename(name(3), name(33)).unwrap();
        fs::remove_file(name(4)).unwrap();
        fs::create_dir(name(3)).unwrap();
        for (n, number) in (0..).zip(numbers) {
            match inodes.get(number) {
                Ok(file) => assert_eq!(fstat(&*file).unwrap().st_ino, hold(&name(n)).1.st_ino),
                Err(error) => assert!(error == Errno::STALE && matches!(n, 3 | 4), "{n}"),
            }
        }
    }
}
