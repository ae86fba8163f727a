//! Writing: in place, or to new clusters that then take the place of the old ones.

use std::io;
use std::sync::{MutexGuard, PoisonError};

use super::compress::compress;
use super::entry::{Cluster, Run};
use super::grace::Pin;
use super::state::State;
use super::{Qcow2, Where};
use crate::vectors::{Way, part, total};
use crate::{Disk, Slice};

/// Most clusters that get a place at once.
const MOST: u64 = 256;

/// Where a write goes.
enum Target {
    /// Clusters that are there.
    InPlace(u64),
    /// New ones, for clusters of the disk from the first on.
    New(Fresh),
}

/// Clusters of the file for clusters of the disk that are busy until they have them.
#[derive(Clone, Copy)]
struct Fresh {
    first: u64,
    count: u64,
    offset: u64,
    /// They read as zeros.
    zeros: bool,
}

impl Qcow2 {
    pub(super) fn write_at(&self, offset: u64, from: &[Slice]) -> io::Result<()> {
        let (len, mut done) = (total(from), 0);
        while done < len {
            let at = offset + done;
            let mut state = self.lock();
            if state.is_full() {
                state.commit(&self.file)?;
            }
            let (mut state, clusters) = self.settle(state, at, len - done);
            let (target, here) = self.target(&mut state, at, clusters, len - done)?;
            let pin = state.grace.pin();
            drop(state);
            let parts = part(from, done, here);
            match target {
                Target::InPlace(place) => self.file.transfer(Way::Write, place, &parts)?,
                Target::New(fresh) => {
                    let written = self.write_fresh(fresh, at, &parts, here);
                    self.finish_fresh(fresh, written)?;
                }
            }
            drop(pin);
            done += here;
        }
        Ok(())
    }

    /// Where bytes can be written in place, and what keeps the place; `None` if it is not as simple as that.
    pub(super) fn place_in_file(&self, offset: u64, len: u64) -> io::Result<Option<(u64, Pin)>> {
        let size = self.cluster_size();
        let mut state = self.lock();
        let (first, end) = (offset >> self.cluster_bits, (offset + len).div_ceil(size));
        if state.busy.range(first..end).next().is_some() {
            return Ok(None);
        }
        let mut begin = None;
        for cluster in first..end {
            let Some(offset) = state.own_place(&self.file, cluster)? else { return Ok(None) };
            if *begin.get_or_insert(offset) + (cluster - first) * size != offset {
                return Ok(None);
            }
        }
        Ok(begin.map(|begin| (begin + offset % size, state.grace.pin())))
    }

    /// Waits until the cluster at `offset` is not busy; gives the number of clusters from there on that are not, of
    /// those that `len` bytes touch.
    fn settle<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        offset: u64,
        len: u64,
    ) -> (MutexGuard<'a, State>, u64) {
        let first = offset >> self.cluster_bits;
        let end = (offset + len).div_ceil(self.cluster_size());
        while state.busy.contains(&first) {
            state = self.settled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let busy = state.busy.range(first..end).next().copied();
        let clusters = busy.unwrap_or(end) - first;
        (state, clusters)
    }

    /// Where to write bytes at `offset`, and how many of them, in `clusters` clusters that are not busy.
    fn target(&self, state: &mut State, offset: u64, clusters: u64, len: u64) -> io::Result<(Target, u64)> {
        let size = self.cluster_size();
        let (first, within) = (offset >> self.cluster_bits, offset % size);
        let found = state.own_place(&self.file, first)?;
        let mut count = 1;
        while count < clusters.min(MOST) {
            let next = state.own_place(&self.file, first + count)?;
            if next != found.map(|at| at + count * size) {
                break;
            }
            count += 1;
        }
        let target = match found {
            Some(at) => Target::InPlace(at + within),
            None => {
                let (at, taken) = state.refcounts.allocate(&self.file, count)?;
                count = taken;
                let begin = at >> self.cluster_bits;
                // All are asked, so that all are used from now on.
                let zeros = (begin..begin + count).rev().filter(|&n| state.refcounts.use_fresh(n)).count();
                state.busy.extend(first..first + count);
                Target::New(Fresh { first, count, offset: at, zeros: zeros as u64 == count })
            }
        };
        Ok((target, (count * size - within).min(len)))
    }

    /// Writes data to new clusters, and around it what the old ones have there.
    fn write_fresh(&self, fresh: Fresh, offset: u64, from: &[Slice], len: u64) -> io::Result<()> {
        let size = self.cluster_size();
        let (begin, end) = (fresh.first * size, (fresh.first + fresh.count) * size);
        self.copy_old(fresh, begin, offset)?;
        self.file.transfer(Way::Write, fresh.offset + (offset - begin), from)?;
        self.copy_old(fresh, offset + len, end)
    }

    /// Copies what the disk has in a range to its new place.
    fn copy_old(&self, fresh: Fresh, begin: u64, end: u64) -> io::Result<()> {
        if begin == end {
            return Ok(());
        }
        let mut bytes = vec![0; (end - begin) as usize];
        self.read_at(begin, &[Slice::from(&mut bytes[..])])?;
        if fresh.zeros && bytes.iter().all(|&byte| byte == 0) {
            return Ok(());
        }
        self.file.write(fresh.offset + (begin - fresh.first * self.cluster_size()), &bytes)
    }

    /// Makes new clusters those of the disk, if they were written.
    fn finish_fresh(&self, fresh: Fresh, written: io::Result<()>) -> io::Result<()> {
        let mut state = self.lock();
        let mut done = 0;
        let mut result = written;
        while result.is_ok() && done < fresh.count {
            let entry = Cluster::data(fresh.offset + done * self.cluster_size());
            result = state.replace(&self.file, fresh.first + done, entry);
            done += u64::from(result.is_ok());
        }
        if result.is_err() {
            let unused = fresh.offset + done * self.cluster_size();
            // Whatever becomes of that, nobody waits for these clusters any more; the first failure counts.
            result = result.and(state.give_back(&self.file, unused, fresh.count - done));
        }
        state.busy.retain(|cluster| !(fresh.first..fresh.first + fresh.count).contains(cluster));
        drop(state);
        self.settled.notify_all();
        result
    }

    /// Discards whole clusters of a range, or makes all of the range zero.
    pub(super) fn drop_range(&self, offset: u64, len: u64, zero: bool) -> io::Result<()> {
        let (size, end) = (self.cluster_size(), offset + len);
        let mut at = offset;
        while at < end {
            let next = (at + 1).next_multiple_of(size).min(end);
            // The last cluster of a disk is whole where the disk ends.
            let whole = at.is_multiple_of(size) && (next - at == size || next >= self.size());
            let dropped = whole && self.drop_cluster(at, zero)?;
            if zero && !dropped {
                self.zero_part(at, next - at)?;
            }
            at = next;
        }
        Ok(())
    }

    /// Drops the cluster at `offset`; `false` if that would show what is behind it.
    fn drop_cluster(&self, offset: u64, zero: bool) -> io::Result<bool> {
        let state = self.lock();
        let (mut state, _) = self.settle(state, offset, 1);
        let cluster = offset >> self.cluster_bits;
        let found = state.lookup(&self.file, cluster)?;
        let entry = match self.backing {
            None => 0,
            Some(_) if state.header.version >= 3 => Cluster::ZEROS,
            Some(_) => return Ok(false),
        };
        match found {
            Cluster::Zero(None) => return Ok(true),
            Cluster::Absent if entry == 0 || !zero => return Ok(true),
            _ => {}
        }
        if state.is_full() {
            state.commit(&self.file)?;
        }
        state.replace(&self.file, cluster, entry)?;
        Ok(true)
    }

    /// Makes a part of a cluster zero.
    fn zero_part(&self, offset: u64, len: u64) -> io::Result<()> {
        let is_zero = match self.locate(offset, len)?.0 {
            Where::Zero => true,
            Where::Backing => self.backing.is_none(),
            Where::File(_) | Where::Compressed(_) => false,
        };
        if is_zero {
            return Ok(());
        }
        self.write_at(offset, &[Slice::from(&mut vec![0; len as usize][..])])
    }

    /// Writes a whole cluster compressed, if it is not there yet.
    pub(super) fn compress_at(&self, offset: u64, bytes: &[u8]) -> io::Result<bool> {
        let Some(packed) = compress(self.compression, bytes) else { return Ok(false) };
        let mut state = self.lock();
        if state.is_full() {
            state.commit(&self.file)?;
        }
        let cluster = offset >> self.cluster_bits;
        if bytes.len() as u64 != self.cluster_size() || state.lookup(&self.file, cluster)? != Cluster::Absent
        {
            return Ok(false);
        }
        let run =
            Run { offset: self.place_compressed(&mut state, packed.len() as u64)?, len: packed.len() as u64 };
        let Some(entry) = Cluster::compressed(run, self.cluster_bits) else { return Ok(false) };
        *self.unpacked.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.file.write(run.offset, &packed)?;
        state.replace(&self.file, cluster, entry)?;
        Ok(true)
    }

    /// A place for `len` bytes, behind the last compressed ones if they fit.
    fn place_compressed(&self, state: &mut State, len: u64) -> io::Result<u64> {
        let size = self.cluster_size();
        let end = state.compressed_end;
        let room = end.next_multiple_of(size) - end;
        let shared = end >> self.cluster_bits;
        if len <= room {
            let count = state.refcounts.get(&self.file, shared)?;
            if count > 0 && count < state.refcounts.most() {
                state.refcounts.set(&self.file, shared, count + 1)?;
                state.compressed_end = end + len;
                return Ok(end);
            }
        }
        let (at, _) = state.refcounts.allocate(&self.file, 1)?;
        state.refcounts.use_fresh(at >> self.cluster_bits);
        state.compressed_end = at + len;
        Ok(at)
    }
}
