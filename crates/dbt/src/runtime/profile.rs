//! Tells Linux `perf` where translated code lies: a map of names, and a dump of the code with them.

use std::{
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
    process,
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError},
};

use rustix::{
    mm::{MapFlags, ProtFlags, mmap, munmap},
    thread::gettid,
    time::{ClockId, clock_gettime},
};

/// What is written for `perf`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProfileOptions {
    /// Names for `perf report`, in `/tmp/perf-PID.map`, where it looks for them.
    pub perf_map: bool,
    /// Names and code for `perf inject --jit`, in `jit-PID.dump` in this directory.
    pub jitdump: Option<PathBuf>,
}

/// Files of one process, which its vCPUs share.
pub struct Profile {
    files: Mutex<Files>,
}

struct Files {
    map: Option<File>,
    dump: Option<JitDump>,
}

impl Profile {
    /// Begins the files; nothing if there are to be none.
    pub fn start(options: &ProfileOptions) -> io::Result<Option<Arc<Profile>>> {
        let map = match options.perf_map {
            true => Some(File::create(format!("/tmp/perf-{}.map", process::id()))?),
            false => None,
        };
        let dump = options.jitdump.as_deref().map(JitDump::create).transpose()?;
        let wanted = map.is_some() || dump.is_some();
        Ok(wanted.then(|| Arc::new(Profile { files: Mutex::new(Files { map, dump }) })))
    }

    /// There is code at host address `at` now.
    pub fn add(&self, name: &str, at: u64, code: &[u8]) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let Files { map, dump } = &mut *files;
        keep(map, "the map for perf", |file| {
            file.write_all(format!("{at:x} {:x} {name}\n", code.len()).as_bytes())
        });
        keep(dump, "the dump for perf", |dump| dump.load(name, at, code));
    }
}

/// Writes to a file as long as that works.
fn keep<F>(file: &mut Option<F>, what: &str, write: impl FnOnce(&mut F) -> io::Result<()>) {
    if let Some(Err(error)) = file.as_mut().map(write) {
        tracing::warn!(%error, "{what} ends early");
        *file = None;
    }
}

/// A file in the jitdump format (tools/perf/Documentation/jitdump-specification.txt of Linux).
struct JitDump {
    file: File,
    /// A mapping of the file, by which `perf record` notices it.
    marker: NonNull<u8>,
    /// Functions written.
    count: u64,
}

// SAFETY: the mapping belongs to the value, and nothing reads it.
unsafe impl Send for JitDump {}

/// Version of the format, and bytes of the file's header.
const VERSION: u32 = 1;
const HEADER: u32 = 40;
/// Machine of the code, as in ELF files: EM_X86_64.
const MACHINE: u32 = 62;
/// The record of a piece of code, and its bytes before the name.
const CODE_LOAD: u32 = 0;
const LOAD_HEADER: usize = 56;
/// Bytes of the mapping.
const MARKED: usize = 4096;

impl JitDump {
    fn create(directory: &Path) -> io::Result<Self> {
        let path = directory.join(format!("jit-{}.dump", process::id()));
        let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        let mut header = Vec::new();
        // "JiTD" as the machine writes it; padding and flags are 0.
        put32(&mut header, &[0x4a69_5444, VERSION, HEADER, MACHINE, 0, process::id()]);
        put64(&mut header, &[now(), 0]);
        file.write_all(&header)?;
        let rights = ProtFlags::READ | ProtFlags::EXEC;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { mmap(std::ptr::null_mut(), MARKED, rights, MapFlags::PRIVATE, &file, 0) }?;
        let marker = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { file, marker, count: 0 })
    }

    fn load(&mut self, name: &str, at: u64, code: &[u8]) -> io::Result<()> {
        let size = LOAD_HEADER + name.len() + 1 + code.len();
        let mut record = Vec::with_capacity(size);
        put32(&mut record, &[CODE_LOAD, size as u32]);
        put64(&mut record, &[now()]);
        put32(&mut record, &[process::id(), gettid().as_raw_nonzero().get() as u32]);
        put64(&mut record, &[at, at, code.len() as u64, self.count]);
        debug_assert_eq!(record.len(), LOAD_HEADER);
        record.extend(name.bytes().chain([0]));
        record.extend(code);
        self.count += 1;
        self.file.write_all(&record)
    }
}

impl Drop for JitDump {
    fn drop(&mut self) {
        // SAFETY: mapped in `create` with this size, and nobody else knows of it.
        let _ = unsafe { munmap(self.marker.as_ptr().cast(), MARKED) };
    }
}

fn put32(to: &mut Vec<u8>, words: &[u32]) {
    to.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

fn put64(to: &mut Vec<u8>, words: &[u64]) {
    to.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

/// The clock of `perf record -k mono`.
fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dump_has_the_code_with_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let mut dump = JitDump::create(directory.path()).unwrap();
        dump.load("user_1000", 0x7000_0000, &[0x90, 0xc3]).unwrap();
        dump.load("user_2000", 0x7000_0010, &[0xc3]).unwrap();
        let bytes = std::fs::read(directory.path().join(format!("jit-{}.dump", process::id()))).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!((&bytes[..4], word(4), word(8), word(12)), (&b"DTiJ"[..], 1, 40, 62));
        let first = 40;
        assert_eq!((word(first), word(first + 4)), (0, 56 + 10 + 2));
        assert_eq!((long(first + 24), long(first + 40), long(first + 48)), (0x7000_0000, 2, 0));
        assert_eq!(&bytes[first + 56..first + 68], b"user_1000\0\x90\xc3");
        let second = first + 68;
        assert_eq!((long(second + 32), long(second + 48)), (0x7000_0010, 1));
        assert_eq!(bytes.len(), second + 56 + 10 + 1);
        assert!(long(second + 8) >= long(first + 8), "time goes on");
    }
}
