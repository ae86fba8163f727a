//! qcow2 images (docs/interop/qcow2.txt of QEMU), versions 2 and 3: read and written, with backing files.

mod check;
mod compress;
mod entry;
mod grace;
mod header;
mod metadata;
mod refcounts;
mod state;
#[cfg(test)]
mod tests;
mod write;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

pub use header::Compression;

use self::entry::{Cluster, Run};
use self::grace::Pin;
use self::header::{Header, incompatible};
use self::state::State;
use crate::file::HostFile;
use crate::image::{Backing, CheckReport, Image, ImageInfo, Repair, ResizeError};
use crate::vectors::{Way, clear, fill, part, total};
use crate::{Disk, DiskError, Extent, Format, Place, Slice};

/// What someone else has broken.
pub(crate) fn corrupt(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// A qcow2 image.
pub struct Qcow2 {
    file: HostFile,
    size: AtomicU64,
    cluster_bits: u32,
    compression: Compression,
    backing: Option<Arc<dyn Image>>,
    state: Mutex<State>,
    /// A cluster is not busy any more.
    settled: Condvar,
    /// The compressed cluster that was read last, by its place.
    unpacked: Mutex<Option<(Run, Arc<[u8]>)>>,
}

impl std::fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2").field("file", &self.file).finish_non_exhaustive()
    }
}

/// A header that was read, before its backing file is open.
#[derive(Debug)]
pub(crate) struct Opening {
    file: HostFile,
    header: Header,
}

/// Where bytes of the disk are.
enum Where {
    File(u64),
    Zero,
    Backing,
    Compressed(Run),
}

impl Opening {
    /// Reads the header of a file.
    pub(crate) fn new(file: HostFile) -> Result<Self, DiskError> {
        let path = file.path().to_owned();
        match Header::read(&file) {
            Ok(Ok(header)) => Ok(Self { file, header }),
            Ok(Err(what)) => Err(DiskError::Format { path, what }),
            Err(source) => Err(DiskError::Open { path, source }),
        }
    }

    /// The backing file that it names.
    pub(crate) fn backing(&self) -> Result<Option<Backing>, DiskError> {
        self.header.backing().map_err(|what| DiskError::Format { path: self.file.path().to_owned(), what })
    }

    /// Whether refcounts are wrong because someone did not close the image.
    pub(crate) fn is_dirty(&self) -> bool {
        self.header.incompatible & incompatible::DIRTY != 0
    }

    /// Opens the image over its backing file. One that is known to be damaged is opened for writing only to be repaired.
    pub(crate) fn finish(
        self,
        backing: Option<Arc<dyn Image>>,
        for_repair: bool,
    ) -> Result<Qcow2, DiskError> {
        let path = self.file.path().to_owned();
        let failed = |source| DiskError::Open { path: path.clone(), source };
        let writes = !self.file.is_read_only();
        if writes && !for_repair && self.header.incompatible & incompatible::CORRUPT != 0 {
            let what = "the image is marked as damaged; ruse disk check --repair all may mend it".to_owned();
            return Err(DiskError::Format { path, what });
        }
        let dirty = self.is_dirty();
        let image = Qcow2 {
            size: AtomicU64::new(self.header.size),
            cluster_bits: self.header.cluster_bits,
            compression: self.header.compression,
            backing,
            state: Mutex::new(State::read(&self.file, self.header).map_err(failed)?),
            settled: Condvar::new(),
            unpacked: Mutex::new(None),
            file: self.file,
        };
        if writes && !for_repair {
            if dirty {
                image.repair_refcounts().map_err(failed)?;
            }
            image.clear_unknown().map_err(failed)?;
        }
        Ok(image)
    }
}

impl Qcow2 {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Makes an empty image in an empty file.
    pub(crate) fn create(
        file: &HostFile,
        cluster_bits: u32,
        compression: Compression,
        backing: Option<&Backing>,
    ) -> io::Result<()> {
        let size = 1u64 << cluster_bits;
        let header = Header {
            version: 3,
            cluster_bits,
            size: 0,
            l1_size: 0,
            l1_offset: 3 * size,
            refcount_table_offset: size,
            refcount_table_clusters: 1,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: if compression == Compression::Zstd { incompatible::COMPRESSION } else { 0 },
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            compression,
            backing: backing.map(header::backing_names).transpose()?,
            extensions: Vec::new(),
        };
        file.set_size(3 * size)?;
        file.write(size, &(2 * size).to_be_bytes())?;
        file.write(2 * size, &[0, 1, 0, 1, 0, 1])?;
        file.write(0, &header.to_bytes().map_err(io::Error::other)?)
    }

    /// Tells the header of features that end with a write, unless there are none.
    fn clear_unknown(&self) -> io::Result<()> {
        let mut state = self.lock();
        let before = state.header.clone();
        state.header.clear_unknown();
        if state.header != before { state.write_header(&self.file) } else { Ok(()) }
    }

    /// Where `offset` is, how many of `len` bytes are there in a row, and what keeps the place from being used anew.
    fn locate(&self, offset: u64, len: u64) -> io::Result<(Where, u64, Pin)> {
        let mut state = self.lock();
        let size = self.cluster_size();
        let (first, within) = (offset >> self.cluster_bits, offset % size);
        let found = state.lookup(&self.file, first)?;
        let mut clusters = 1;
        let end = (within + len).div_ceil(size);
        while clusters < end {
            let next = state.lookup(&self.file, first + clusters)?;
            let continues = match (found, next) {
                (Cluster::Data { offset: at, .. }, Cluster::Data { offset, .. }) => {
                    offset == at + clusters * size
                }
                (Cluster::Absent, Cluster::Absent) | (Cluster::Zero(_), Cluster::Zero(_)) => true,
                _ => false,
            };
            if !continues {
                break;
            }
            clusters += 1;
        }
        let place = match found {
            Cluster::Absent => Where::Backing,
            Cluster::Zero(_) => Where::Zero,
            Cluster::Data { offset, .. } => Where::File(offset + within),
            Cluster::Compressed(run) => Where::Compressed(run),
        };
        Ok((place, (clusters * size - within).min(len), state.grace.pin()))
    }

    /// Reads what is behind this image. Its damages are not this image's.
    fn read_backing(&self, offset: u64, to: &[Slice]) -> io::Result<()> {
        let Some(backing) = &self.backing else {
            clear(to);
            return Ok(());
        };
        let (len, there) = (total(to), backing.size().saturating_sub(offset));
        if there > 0 {
            backing.read(offset, &part(to, 0, there.min(len))).map_err(io::Error::other)?;
        }
        if len <= there {
            return Ok(());
        }
        clear(&part(to, there, len - there));
        Ok(())
    }

    fn unpack(&self, run: Run) -> io::Result<Arc<[u8]>> {
        let mut last = self.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, bytes)) = &*last
            && *at == run
        {
            return Ok(bytes.clone());
        }
        let bytes = self.file.read_vec(run.offset, run.len as usize)?;
        let size = self.cluster_size() as usize;
        let cluster: Arc<[u8]> = compress::decompress(self.compression, &bytes, size)?.into();
        *last = Some((run, cluster.clone()));
        Ok(cluster)
    }

    /// Notes a damage that was found, so that it is not made worse.
    fn noted<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result
            && error.kind() == io::ErrorKind::InvalidData
            && !self.file.is_read_only()
        {
            tracing::error!(path = %self.file.path().display(), %error, "the image is damaged");
            self.lock().mark_corrupt(&self.file)?;
        }
        result
    }

    fn read_at(&self, offset: u64, to: &[Slice]) -> io::Result<()> {
        let (len, mut done) = (total(to), 0);
        while done < len {
            let at = offset + done;
            let (place, here, _pin) = self.locate(at, len - done)?;
            let whole = done == 0 && here == len;
            let parts = if whole { to.to_vec() } else { part(to, done, here) };
            match place {
                Where::File(at) => self.file.transfer(Way::Read, at, &parts)?,
                Where::Zero => clear(&parts),
                Where::Backing => self.read_backing(at, &parts)?,
                Where::Compressed(run) => {
                    let within = (at % self.cluster_size()) as usize;
                    fill(&parts, &self.unpack(run)?[within..within + here as usize]);
                }
            }
            done += here;
        }
        Ok(())
    }
}

impl Disk for Qcow2 {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }
    fn is_read_only(&self) -> bool {
        self.file.is_read_only()
    }
    fn refresh_size(&self) -> io::Result<u64> {
        // Nobody else can have changed it.
        Ok(self.size())
    }

    fn read(&self, offset: u64, to: &[Slice]) -> io::Result<()> {
        self.noted(self.read_at(offset, to))
    }

    fn write(&self, offset: u64, from: &[Slice]) -> io::Result<()> {
        self.check_writable()?;
        self.noted(self.write_at(offset, from))
    }

    fn flush(&self) -> io::Result<()> {
        // Most of the data gets there while nobody waits for the tables.
        self.file.sync()?;
        let mut state = self.lock();
        if state.is_dirty() { state.commit(&self.file) } else { Ok(()) }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_writable()?;
        self.noted(self.drop_range(offset, len, false))
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap_allowed: bool) -> io::Result<()> {
        self.check_writable()?;
        self.noted(self.drop_range(offset, len, true))
    }

    fn extent(&self, offset: u64, len: u64) -> io::Result<(Extent, u64)> {
        let mut state = self.lock();
        let (size, end) = (self.cluster_size(), offset + len);
        let mut kind = None;
        let mut at = offset;
        while at < end {
            let cluster = at >> self.cluster_bits;
            let found = match state.lookup(&self.file, cluster)? {
                Cluster::Absent if state.header.backing.is_some() => Extent::Backing,
                Cluster::Absent | Cluster::Zero(_) => Extent::Zero,
                Cluster::Data { .. } | Cluster::Compressed(_) => Extent::Data,
            };
            if *kind.get_or_insert(found) != found {
                break;
            }
            let clusters = state.clusters_without_table(cluster)?.max(1);
            at = (cluster + clusters).saturating_mul(size).min(end);
        }
        Ok((kind.unwrap_or(Extent::Zero), at - offset))
    }

    fn place(&self, way: Way, offset: u64, len: u64) -> io::Result<Option<Place<'_>>> {
        let found = match way {
            Way::Read => match self.locate(offset, len)? {
                (Where::File(at), here, pin) if here == len => Some((at, pin)),
                _ => None,
            },
            Way::Write => self.place_in_file(offset, len)?,
        };
        let place = found.and_then(|(at, pin)| Some((self.file.place(way, at)?, pin)));
        Ok(place.map(|(place, pin)| Place { pin: Some(Box::new(pin)), ..place }))
    }
}

impl Image for Qcow2 {
    fn info(&self) -> io::Result<ImageInfo> {
        let state = self.lock();
        let header = &state.header;
        let compression = if self.compression == Compression::Zstd { "zstd" } else { "zlib" };
        Ok(ImageInfo {
            cluster_size: Some(self.cluster_size()),
            variant: Some(format!("version {}", header.version)),
            backing: header.backing().map_err(io::Error::other)?,
            compression: Some(compression.to_owned()),
            dirty: header.incompatible & incompatible::DIRTY != 0,
            corrupt: header.incompatible & incompatible::CORRUPT != 0,
            snapshots: state.snapshots.iter().map(|entry| entry.snapshot.clone()).collect(),
            ..ImageInfo::new(Format::Qcow2, self.size(), &self.file)?
        })
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        self.backing.as_ref()
    }

    fn resize(&self, size: u64) -> Result<(), ResizeError> {
        self.check_writable()?;
        let before = self.size();
        if size < before {
            if !self.lock().snapshots.is_empty() {
                return Err(ResizeError::Format("an image with snapshots cannot be made smaller"));
            }
            let end = before.next_multiple_of(self.cluster_size());
            self.drop_range(size, end - size, true)?;
        } else {
            let mut state = self.lock();
            state.grow_l1(&self.file, size).map_err(|error| match error.kind() {
                io::ErrorKind::FileTooLarge => {
                    ResizeError::Format("clusters of this size cannot make so large a disk")
                }
                _ => error.into(),
            })?;
        }
        self.set_header(|header| header.size = size)?;
        self.size.store(size, Ordering::Relaxed);
        // What is behind the old end must not show what a longer backing file has there, unless the image is new.
        let hidden = self.backing.as_ref().map_or(0, |backing| backing.size()).min(size);
        if hidden > before && before > 0 {
            self.drop_range(before, hidden - before, true)?;
        }
        Ok(self.flush()?)
    }

    fn check(&self, repair: Repair) -> io::Result<Option<CheckReport>> {
        self.check_image(repair).map(Some)
    }

    fn set_backing(&self, backing: Option<&Backing>) -> io::Result<()> {
        let names = backing.map(header::backing_names).transpose()?;
        self.set_header(|header| header.backing = names)
    }

    fn clear(&self) -> io::Result<()> {
        self.lock().clear(&self.file)
    }

    fn write_compressed(&self, offset: u64, bytes: &[u8]) -> io::Result<bool> {
        self.compress_at(offset, bytes)
    }
}

impl Qcow2 {
    fn check_writable(&self) -> io::Result<()> {
        match self.is_read_only() {
            true => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            false => Ok(()),
        }
    }

    /// Changes the header, when all before is in the file.
    fn set_header(&self, change: impl FnOnce(&mut Header)) -> io::Result<()> {
        let mut state = self.lock();
        state.commit(&self.file)?;
        let before = state.header.clone();
        change(&mut state.header);
        let written = state.write_header(&self.file);
        if written.is_err() {
            state.header = before;
        }
        written
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if self.is_read_only() {
            return;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // What is freed by the first is counted as free by the second.
        for _ in 0..2 {
            if state.is_dirty()
                && let Err(error) = state.commit(&self.file)
            {
                tracing::error!(path = %self.file.path().display(), %error, "an image could not be closed");
                return;
            }
        }
    }
}
