//! Files that are loaded into a guest: kernels, initial RAM disks and modules.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
    path::Path,
};

use ruse_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::LoadError;

/// Most bytes that are taken from something that is not a regular file (a pipe, for example).
const MAX_STREAM: u64 = 1 << 30;

/// A file to load: its name for messages and its contents.
#[derive(Debug)]
pub struct Image {
    name: String,
    len: u64,
    data: Data,
}

#[derive(Debug)]
enum Data {
    Bytes(Vec<u8>),
    /// Read in place, straight into guest memory.
    File(File),
}

impl Image {
    /// Opens a file. A regular file stays open and is read when it is loaded; of anything else up to 1 GiB is read
    /// now.
    ///
    /// # Errors
    /// [`LoadError::NoSuchFile`], [`LoadError::Read`], [`LoadError::TooLarge`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, LoadError> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let fail = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => LoadError::NoSuchFile { name: name.clone() },
            _ => LoadError::Read { name: name.clone(), source },
        };
        let file = File::open(path).map_err(fail)?;
        let meta = file.metadata().map_err(fail)?;
        if meta.is_dir() {
            return Err(fail(io::Error::from(io::ErrorKind::IsADirectory)));
        }
        if meta.is_file() {
            return Ok(Self { len: meta.len(), data: Data::File(file), name });
        }
        let mut bytes = Vec::new();
        file.take(MAX_STREAM + 1).read_to_end(&mut bytes).map_err(fail)?;
        if bytes.len() as u64 > MAX_STREAM {
            return Err(LoadError::TooLarge { name, max: MAX_STREAM });
        }
        Ok(Self::from_bytes(name, bytes))
    }

    /// An image that is in memory already; `name` is for messages.
    pub fn from_bytes(name: impl Into<String>, bytes: Vec<u8>) -> Self {
        Self { name: name.into(), len: bytes.len() as u64, data: Data::Bytes(bytes) }
    }

    /// The name for messages: the path as it was given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of the image.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Up to `max` bytes from `offset` on, fewer at the end of the file.
    pub(crate) fn prefix(&self, offset: u64, max: usize) -> Result<Vec<u8>, LoadError> {
        let len = self.len.saturating_sub(offset).min(max as u64) as usize;
        match &self.data {
            Data::Bytes(bytes) if len == 0 => Ok(bytes[..0].to_vec()),
            Data::Bytes(bytes) => Ok(bytes[offset as usize..offset as usize + len].to_vec()),
            Data::File(file) => {
                let mut buffer = vec![0; len];
                file.read_exact_at(&mut buffer, offset).map_err(|e| self.unreadable(e))?;
                Ok(buffer)
            }
        }
    }

    /// Exactly `len` bytes from `offset` on; `part` names them if the file ends before.
    pub(crate) fn part(&self, offset: u64, len: usize, part: &'static str) -> Result<Vec<u8>, LoadError> {
        self.check(offset, len as u64, part)?;
        self.prefix(offset, len)
    }

    /// Checks that the file has `len` bytes from `offset` on.
    pub(crate) fn check(&self, offset: u64, len: u64, part: &'static str) -> Result<(), LoadError> {
        let missing = offset.saturating_add(len).saturating_sub(self.len);
        if missing > 0 && len > 0 {
            return Err(LoadError::Truncated { name: self.name.clone(), part, missing });
        }
        Ok(())
    }

    /// Copies `len` bytes from `offset` on to guest address `gpa`, which must be RAM.
    pub(crate) fn copy_to(
        &self,
        offset: u64,
        len: u64,
        ram: &GuestRam,
        gpa: u64,
        part: &'static str,
    ) -> Result<(), LoadError> {
        if len == 0 {
            return Ok(());
        }
        self.check(offset, len, part)?;
        let to = GuestAddress(gpa);
        match &self.data {
            Data::Bytes(bytes) => {
                ram.memory().write_slice(&bytes[offset as usize..(offset + len) as usize], to)?;
            }
            Data::File(file) => {
                if ram.write_file(gpa, file, offset, len).is_ok() {
                    return Ok(());
                }
                let mut reader = file;
                reader.seek(SeekFrom::Start(offset)).map_err(|e| self.unreadable(e))?;
                ram.memory().read_exact_volatile_from(to, &mut reader, len as usize).map_err(
                    |e| match e {
                        vm_memory::GuestMemoryError::IOError(source) => self.unreadable(source),
                        other => LoadError::Memory(other),
                    },
                )?;
            }
        }
        Ok(())
    }

    fn unreadable(&self, source: io::Error) -> LoadError {
        LoadError::Read { name: self.name.clone(), source }
    }
}

/// An initial RAM disk for Linux, or a module for a multiboot kernel.
#[derive(Debug)]
pub struct Module {
    /// The file.
    pub image: Image,
    /// What a multiboot or PVH kernel gets as the module's command line: path and arguments.
    pub args: String,
}

impl Module {
    /// Opens `PATH` or `PATH ARGUMENTS`. A path with spaces is found if the file exists.
    ///
    /// # Errors
    /// Those of [`Image::open`].
    pub fn open(spec: &str) -> Result<Self, LoadError> {
        let path = match spec.split_once(' ') {
            Some((path, _)) if !Path::new(spec).exists() => path,
            _ => spec,
        };
        Ok(Self { image: Image::open(path)?, args: spec.to_owned() })
    }

    /// Opens a list of modules, `PATH[ ARGUMENTS][,PATH[ ARGUMENTS]...]`; `,,` stands for one comma.
    ///
    /// # Errors
    /// [`LoadError::EmptyModule`] and those of [`Image::open`].
    pub fn open_list(list: &str) -> Result<Vec<Self>, LoadError> {
        split_list(list)
            .iter()
            .map(|spec| match spec.trim() {
                "" => Err(LoadError::EmptyModule { list: list.to_owned() }),
                spec => Self::open(spec),
            })
            .collect()
    }
}

/// Splits at single commas and undoubles double ones.
fn split_list(list: &str) -> Vec<String> {
    let mut specs = vec![String::new()];
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            specs.push(String::new());
        } else if let Some(last) = specs.last_mut() {
            last.push(c);
        }
    }
    specs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_split_at_single_commas() {
        assert_eq!(split_list("a,b c,d,,e"), ["a", "b c", "d,e"]);
        assert_eq!(split_list(""), [""]);
    }

    #[test]
    fn names_of_missing_files_are_told() {
        let e = Image::open("/nonexistent/vmlinuz").unwrap_err();
        assert_eq!(e.to_string(), "'/nonexistent/vmlinuz': no such file");
        assert!(matches!(Module::open_list("a,,b,"), Err(LoadError::NoSuchFile { name }) if name == "a,b"));
        assert!(matches!(Module::open_list(""), Err(LoadError::EmptyModule { .. })));
        assert!(matches!(Image::open("/"), Err(LoadError::Read { .. })));
    }

    #[test]
    fn a_file_and_bytes_load_alike() {
        let path = std::env::temp_dir().join(format!("ruse-image-{}", std::process::id()));
        let bytes: Vec<u8> = (0..=255).cycle().take(9000).collect();
        std::fs::write(&path, &bytes).unwrap();
        let ram = GuestRam::new(1 << 20).unwrap();
        for (image, gpa) in
            [(Image::open(&path).unwrap(), 0x1000), (Image::from_bytes("b", bytes.clone()), 0x8000)]
        {
            assert_eq!(image.prefix(8990, 100).unwrap(), &bytes[8990..]);
            assert_eq!(image.prefix(u64::MAX, 1).unwrap(), []);
            assert!(matches!(image.part(8990, 11, "tail"), Err(LoadError::Truncated { missing: 1, .. })));
            image.copy_to(3, 8000, &ram, gpa, "all").unwrap();
            let mut back = vec![0; 8000];
            ram.memory().read_slice(&mut back, GuestAddress(gpa)).unwrap();
            assert_eq!(back, &bytes[3..8003]);
        }
        std::fs::remove_file(path).unwrap();
    }
}
