//! Several transfers at a time.
//!
//! Where the kernel has io_uring, all transfers of a round that are one run of bytes of a file are under way together, and
//! take one system call. What needs more than a transfer (new clusters, compressed ones) is done meanwhile. Elsewhere, what is
//! in the host's page cache is transferred at once, and what has to be waited for is waited for by several threads.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};
use std::thread::Builder;

use io_uring::{IoUring, opcode, types};
use ruse_memory::vectored::{MOST, iovecs};

use crate::vectors::{Way, part, read_cached, total};
use crate::{Disk, Slice};

/// Most transfers under way together.
const ENTRIES: u32 = 64;
/// Most threads that wait for a disk.
const THREADS: usize = 8;

/// Where bytes of a disk are: a run of bytes of a file, which stays what it is while the place is held.
pub struct Place<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Where they begin.
    pub offset: u64,
    /// What keeps the place from being used for anything else.
    pub pin: Option<Box<dyn Send>>,
}

/// Bytes of a disk to be read or written.
pub struct Transfer<'a> {
    /// Which way.
    pub way: Way,
    /// Where.
    pub offset: u64,
    /// From or to where.
    pub slices: Vec<Slice<'a>>,
    /// What has come of it.
    pub result: io::Result<()>,
}

impl Transfer<'_> {
    fn run(&mut self, disk: &dyn Disk) {
        self.result = match self.way {
            Way::Read => disk.read(self.offset, &self.slices),
            Way::Write => disk.write(self.offset, &self.slices),
        };
    }
}

/// Makes transfers.
pub struct Lane {
    ring: Option<IoUring>,
}

impl Lane {
    /// One that uses io_uring, if the kernel allows it; otherwise it says why not, once.
    pub fn new() -> Self {
        static COMPLAINT: std::sync::Once = std::sync::Once::new();
        let ring = IoUring::new(ENTRIES).inspect_err(|error| {
            COMPLAINT.call_once(|| tracing::info!(%error, "no io_uring: disks use system calls and threads"));
        });
        Self { ring: ring.ok() }
    }

    /// One that does not use io_uring.
    pub fn without_ring() -> Self {
        Self { ring: None }
    }

    /// Whether it uses io_uring.
    pub fn has_ring(&self) -> bool {
        self.ring.is_some()
    }

    /// Makes all transfers, in any order, and calls `meanwhile` in between.
    pub fn run(&mut self, disk: &dyn Disk, transfers: &mut [Transfer], meanwhile: impl FnOnce()) {
        match &mut self.ring {
            // For one, a plain call is faster.
            Some(ring) if transfers.len() > 1 => {
                let mut meanwhile = Some(meanwhile);
                for round in transfers.chunks_mut(ENTRIES as usize) {
                    run_ring(ring, disk, round, || meanwhile.take().into_iter().for_each(|call| call()));
                }
            }
            _ => {
                meanwhile();
                run_calls(disk, transfers);
            }
        }
    }
}

impl Default for Lane {
    fn default() -> Self {
        Self::new()
    }
}

/// One at a time, but those that have to wait for the storage together.
fn run_calls(disk: &dyn Disk, transfers: &mut [Transfer]) {
    if let [transfer] = transfers {
        return transfer.run(disk);
    }
    let mut slow = Vec::new();
    for transfer in transfers {
        let cached = transfer.way == Way::Read
            && matches!(disk.place(Way::Read, transfer.offset, total(&transfer.slices)), Ok(Some(place))
                if read_cached(place.file, place.offset, &transfer.slices));
        match transfer.way {
            Way::Read if cached => transfer.result = Ok(()),
            Way::Read => slow.push(transfer),
            Way::Write => transfer.run(disk),
        }
    }
    if slow.len() < 2 {
        slow.into_iter().for_each(|transfer| transfer.run(disk));
        return;
    }
    run_together(disk, slow, Builder::new);
}

/// By several threads, of which each takes the next one when it is done. This thread is one of them: where the host refuses
/// others, it does all.
fn run_together(disk: &dyn Disk, transfers: Vec<&mut Transfer>, thread: impl Fn() -> Builder) {
    let helpers = THREADS.min(transfers.len()) - 1;
    let transfers: Vec<_> = transfers.into_iter().map(Shared).collect();
    let waiting = Mutex::new(transfers.into_iter());
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some(Shared(transfer)) = next() {
            transfer.run(disk);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..helpers {
            if let Err(error) = thread().spawn_scoped(scope, work) {
                tracing::debug!(%error, "a disk waits with fewer threads");
                break;
            }
        }
        work();
    });
}

/// A transfer for any thread.
struct Shared<'a, 'b>(&'a mut Transfer<'b>);

// SAFETY: slices are memory that anyone may change at any time, from any thread; all else of a transfer is plain.
unsafe impl Send for Shared<'_, '_> {}

/// All that are one run of bytes by the ring, the others while these are under way.
fn run_ring(ring: &mut IoUring, disk: &dyn Disk, transfers: &mut [Transfer], meanwhile: impl FnOnce()) {
    let mut under_way: Vec<Option<(Place, Vec<libc::iovec>)>> = Vec::with_capacity(transfers.len());
    for (n, transfer) in (0..).zip(&*transfers) {
        let place = disk.place(transfer.way, transfer.offset, total(&transfer.slices)).unwrap_or(None);
        let entry = place.map(|place| (place, iovecs(&transfer.slices)));
        // What cannot be pushed is done by a plain call.
        under_way.push(entry.filter(|(place, vectors)| push(ring, transfer.way, place, vectors, n)));
    }
    let count = under_way.iter().flatten().count();
    submit(ring, 0);
    for (transfer, _) in transfers.iter_mut().zip(&under_way).filter(|(_, entry)| entry.is_none()) {
        transfer.run(disk);
    }
    meanwhile();
    let mut left = count;
    while left > 0 {
        submit(ring, 1);
        for completion in ring.completion() {
            left -= 1;
            let n = completion.user_data() as usize;
            let Some(transfer) = transfers.get_mut(n) else { continue };
            // The place goes: a transfer that is not whole finds it again.
            under_way[n] = None;
            finish(transfer, completion.result(), disk);
        }
    }
}

/// Puts a transfer into the ring; `false` if it has no room for it.
fn push(ring: &mut IoUring, way: Way, place: &Place, vectors: &[libc::iovec], n: u64) -> bool {
    if vectors.is_empty() || vectors.len() > MOST || i64::try_from(place.offset).is_err() {
        return false;
    }
    let (fd, count) = (types::Fd(place.file.as_raw_fd()), vectors.len() as u32);
    let entry = match way {
        Way::Read => opcode::Readv::new(fd, vectors.as_ptr(), count).offset(place.offset).build(),
        Way::Write => opcode::Writev::new(fd, vectors.as_ptr(), count).offset(place.offset).build(),
    };
    // SAFETY: the vectors and the memory that they name, which the transfer borrows, stay until the completion is
    // seen: `run_ring` does not return before. Nobody relies on what is in the memory meanwhile.
    unsafe { ring.submission().push(&entry.user_data(n)).is_ok() }
}

/// Submits what was pushed, and waits for `wanted` completions. It is not left before the kernel has taken all.
fn submit(ring: &mut IoUring, wanted: usize) {
    while let Err(error) = ring.submit_and_wait(wanted) {
        if !matches!(error.raw_os_error(), Some(libc::EINTR)) {
            // Out of memory, or too much is under way: some of it will be done soon.
            tracing::debug!(%error, "io_uring");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        if !ring.completion().is_empty() {
            return;
        }
    }
}

/// What has come of a transfer by the ring.
fn finish(transfer: &mut Transfer, result: i32, disk: &dyn Disk) {
    match result {
        done if u64::try_from(done) == Ok(total(&transfer.slices)) => transfer.result = Ok(()),
        error if error < 0 && !matches!(-error, libc::EINTR | libc::EAGAIN) => {
            transfer.result = Err(io::Error::from_raw_os_error(-error));
        }
        // A plain call says why it is not whole, or makes it so.
        done => {
            let done = u64::try_from(done).unwrap_or(0);
            let slices = part(&transfer.slices, done, total(&transfer.slices) - done);
            let offset = transfer.offset + done;
            let mut rest = Transfer { way: transfer.way, offset, slices, result: Ok(()) };
            rest.run(disk);
            transfer.result = rest.result;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CreateOptions, Format, create};

    /// Writes and reads many blocks together.
    fn check(format: Format, mut lane: Lane) {
        let directory = tempfile::tempdir().unwrap();
        let disk = create(&directory.path().join("image"), &CreateOptions::new(format, 1 << 20)).unwrap();
        for round in 0..3u8 {
            let mut blocks: Vec<Vec<u8>> = (0..200).map(|n| vec![n ^ round; 4096]).collect();
            let transfers = |way, blocks: &mut [Vec<u8>], lane: &mut Lane| {
                let mut transfers: Vec<_> = (0u64..)
                    .zip(blocks)
                    .map(|(n, block)| {
                        let (a, b) = block.split_at_mut(1000);
                        let slices = vec![Slice::from(a), Slice::from(b)];
                        Transfer { way, offset: n * 5120, slices, result: Err(io::ErrorKind::Other.into()) }
                    })
                    .collect();
                let mut called = false;
                lane.run(&*disk, &mut transfers, || called = true);
                assert!(called && transfers.iter().all(|transfer| transfer.result.is_ok()));
            };
            transfers(Way::Write, &mut blocks, &mut lane);
            let mut read = vec![vec![0; 4096]; 200];
            transfers(Way::Read, &mut read, &mut lane);
            assert!(read == blocks, "{format}, round {round}");
            disk.discard(65536, 131_072).unwrap();
        }
    }

    #[test]
    fn many_transfers_are_made_together() {
        for format in Format::ALL {
            check(format, Lane::new());
            check(format, Lane::without_ring());
        }
    }

    #[test]
    fn transfers_are_made_where_the_host_refuses_threads() {
        let directory = tempfile::tempdir().unwrap();
        let options = CreateOptions::new(Format::Raw, 1 << 20);
        let disk = create(&directory.path().join("image"), &options).unwrap();
        let mut bytes = vec![7; 1 << 20];
        let mut transfers: Vec<_> = (0u64..)
            .zip(bytes.chunks_mut(4096))
            .map(|(n, block)| Transfer {
                way: Way::Read,
                offset: n * 4096,
                slices: vec![Slice::from(block)],
                result: Err(io::ErrorKind::Other.into()),
            })
            .collect();
        // No host has room for such a stack.
        let refused = || Builder::new().stack_size(1 << 60);
        assert!(refused().spawn(|| ()).is_err());
        run_together(&*disk, transfers.iter_mut().collect(), refused);
        assert!(transfers.iter().all(|transfer| transfer.result.is_ok()));
        assert!(bytes.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_transfer_beyond_the_file_reads_zeros() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let disk = crate::RawDisk::open(file.path(), false).unwrap();
        file.as_file().set_len(4096).unwrap();
        let mut bytes = [7; 12288];
        let transfers = bytes.chunks_mut(4096).zip(0u64..).map(|(block, n)| Transfer {
            way: Way::Read,
            offset: n * 4096 + 2048,
            slices: vec![Slice::from(block)],
            result: Ok(()),
        });
        let mut transfers: Vec<_> = transfers.collect();
        Lane::new().run(&disk, &mut transfers, || ());
        assert!(transfers.iter().all(|transfer| transfer.result.is_ok()));
        assert_eq!(bytes, [0; 12288]);
    }
}
