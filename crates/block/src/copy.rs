//! From image to image: conversion, commit and rebase.

use std::io;

use crate::image::Image;
use crate::{Extent, Slice};

/// Bytes that are copied at once.
const CHUNK: u64 = 2 << 20;
/// Runs of zeros from this size on stay holes.
const GRAIN: usize = 64 << 10;

/// Hears how many bytes of a disk are done.
pub type Progress<'a> = &'a mut dyn FnMut(u64);

/// Whether an image, with all that is behind it, is known to be zero at `offset`, and for how many bytes.
pub fn known_zero(image: &dyn Image, offset: u64, len: u64) -> io::Result<(bool, u64)> {
    let len = len.min(image.size().saturating_sub(offset));
    match image.extent(offset, len)? {
        (Extent::Data, len) => Ok((false, len)),
        (Extent::Zero, len) => Ok((true, len)),
        (Extent::Backing, len) => match image.backing() {
            Some(behind) if offset < behind.size() => known_zero(&**behind, offset, len),
            _ => Ok((true, len)),
        },
    }
}

/// Copies a disk to an image that is zero and no smaller. What is zero is not written.
pub fn copy(from: &dyn Image, to: &dyn Image, compress: bool, progress: Progress) -> io::Result<()> {
    let size = from.size();
    let cluster = to.info()?.cluster_size.unwrap_or(0);
    let grain = if compress { cluster.max(1) as usize } else { GRAIN };
    let mut at = 0;
    while at < size {
        // Whole clusters, as only those are compressed.
        let chunk = CHUNK.next_multiple_of(grain as u64).min(size - at);
        let (zero, len) = known_zero(from, at, size - at)?;
        if zero && (len >= chunk || len == size - at) {
            at += if len == size - at { len } else { len / grain as u64 * grain as u64 };
        } else {
            let mut bytes = vec![0; chunk as usize];
            from.read(at, &[Slice::from(&mut bytes[..])])?;
            write_sparse(to, at, &mut bytes, grain, compress)?;
            at += chunk;
        }
        progress(at);
    }
    to.flush()
}

/// Writes what of a chunk is not zero.
fn write_sparse(to: &dyn Image, at: u64, bytes: &mut [u8], grain: usize, compress: bool) -> io::Result<()> {
    for (offset, piece) in (at..).step_by(grain).zip(bytes.chunks_mut(grain)) {
        let zero = piece.iter().all(|&byte| byte == 0);
        if zero || compress && piece.len() == grain && to.write_compressed(offset, piece)? {
            continue;
        }
        to.write(offset, &[Slice::from(piece)])?;
    }
    Ok(())
}

/// Writes what is in an image, and not behind it, to the image behind it, which is no smaller.
pub fn commit(image: &dyn Image, behind: &dyn Image, progress: Progress) -> io::Result<()> {
    let size = image.size();
    let mut at = 0;
    while at < size {
        let (extent, len) = image.extent(at, CHUNK.min(size - at))?;
        match extent {
            Extent::Backing => {}
            Extent::Zero => behind.write_zeroes(at, len, true)?,
            Extent::Data => {
                let mut bytes = vec![0; len as usize];
                image.read(at, &[Slice::from(&mut bytes[..])])?;
                behind.write(at, &[Slice::from(&mut bytes[..])])?;
            }
        }
        at += len;
        progress(at);
    }
    behind.flush()?;
    image.clear()
}

/// Takes into an image what would read otherwise with another image, or none, behind it.
pub fn keep_content(image: &dyn Image, new: Option<&dyn Image>, progress: Progress) -> io::Result<()> {
    let size = image.size();
    let mut at = 0;
    while at < size {
        let (extent, len) = image.extent(at, CHUNK.min(size - at))?;
        if extent == Extent::Backing {
            let old = read_padded(Some(image), at, len)?;
            let new = read_padded(new, at, len)?;
            let pieces = old.chunks(GRAIN).zip(new.chunks(GRAIN));
            for (offset, (old, _)) in (at..).step_by(GRAIN).zip(pieces).filter(|(_, (old, new))| old != new) {
                image.write(offset, &[Slice::from(&mut old.to_vec()[..])])?;
            }
        }
        at += len;
        progress(at);
    }
    image.flush()
}

/// Reads bytes; what is behind the end is zero.
fn read_padded(image: Option<&dyn Image>, at: u64, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    if let Some(image) = image {
        let there = image.size().saturating_sub(at).min(len);
        image.read(at, &[Slice::from(&mut bytes[..there as usize])])?;
    }
    Ok(bytes)
}
