//! Frames as a driver takes them: what it did not agree to do is done here.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::Offloads;
use crate::checksum::Sum;
use crate::header::{Gso, HEADER_LEN, Header};

/// Bytes of the largest frame: its header, Ethernet's with a VLAN, and 64 KiB.
pub(crate) const LARGEST: usize = HEADER_LEN + 18 + 65535;

/// Bits of a header of TCP that only the last segment has: FIN and PSH.
const LAST_ONLY: u8 = 9;
/// Bit of TCP that only the first segment has: CWR.
const FIRST_ONLY: u8 = 0x80;

/// What a driver takes.
#[derive(Debug, Default)]
pub(crate) struct Fit(AtomicU8);

impl Fit {
    /// A driver says what it takes.
    pub(crate) fn set(&self, offloads: Offloads) {
        self.0.store(offloads.bits(), Ordering::Relaxed);
    }

    /// Offers a frame as the driver takes it; says whether it was taken. A frame that makes no sense counts as taken.
    pub(crate) fn offer(&self, frame: &mut [u8], take: &mut dyn FnMut(&[&[u8]]) -> bool) -> bool {
        let offloads = Offloads::from_bits_truncate(self.0.load(Ordering::Relaxed));
        let Some(header) = frame.first_chunk().and_then(Header::parse) else { return true };
        let cut = match header.gso {
            Gso::None => false,
            Gso::Tcp4 => !offloads.contains(Offloads::TSO4),
            Gso::Tcp6 => !offloads.contains(Offloads::TSO6),
            Gso::Udp => return true,
        };
        if cut {
            // Either all segments are taken or, where the first is not, none: what is behind is lost then, as on a
            // link that is full.
            let mut segments = segments(frame, &header).into_iter();
            return segments.next().is_none_or(|first| {
                let taken = take(&[&first]);
                taken && {
                    segments.for_each(|segment| drop_unless_taken(take, &segment));
                    true
                }
            });
        }
        if header.checksum.is_some() && !offloads.contains(Offloads::CHECKSUM) && !complete(frame, &header) {
            return true;
        }
        take(&[frame])
    }
}

fn drop_unless_taken(take: &mut dyn FnMut(&[&[u8]]) -> bool, segment: &[u8]) {
    let _taken = take(&[segment]);
}

/// Most bytes of an IP header with its options.
const MOST_IP_HEADER: usize = 60;
/// Most segments that a frame is cut into.
const MOST_SEGMENTS: usize = 1024;

/// Completes the checksum; `false` if it is not in the frame.
fn complete(frame: &mut [u8], header: &Header) -> bool {
    let Some((start, offset)) = header.checksum else { return true };
    let start = HEADER_LEN + usize::from(start);
    let place = start + usize::from(offset);
    let Some(bytes) = frame.get(start..).filter(|_| place + 2 <= frame.len()) else { return false };
    let sum = Sum::default().add(bytes).checksum();
    frame[place..place + 2].copy_from_slice(&sum.to_be_bytes());
    frame[..HEADER_LEN].copy_from_slice(&Header::default().bytes());
    true
}

/// Cuts a frame with TCP into segments that are complete; into none if it makes no sense.
fn segments(frame: &[u8], header: &Header) -> Vec<Vec<u8>> {
    cut(frame, header).unwrap_or_default()
}

fn cut(frame: &[u8], header: &Header) -> Option<Vec<Vec<u8>>> {
    let (tcp, _) = header.checksum?;
    let tcp = HEADER_LEN + usize::from(tcp);
    let ip = HEADER_LEN + 14;
    let v4 = header.gso == Gso::Tcp4;
    let headers = tcp + usize::from(frame.get(tcp + 12)? >> 4) * 4;
    let payload = frame.get(headers..)?;
    if header.segment == 0 || headers < tcp + 20 || tcp < ip + if v4 { 20 } else { 40 } {
        return None;
    }
    // No frame of a driver's that means well has longer headers, or smaller segments.
    let segments = payload.len() / usize::from(header.segment);
    if tcp > ip + MOST_IP_HEADER || frame.len() - ip > usize::from(u16::MAX) || segments > MOST_SEGMENTS {
        return None;
    }
    let seq = u32::from_be_bytes(*frame.get(tcp + 4..)?.first_chunk()?);
    let number = u16::from_be_bytes(*frame.get(ip + 4..)?.first_chunk()?);
    let parts = payload.chunks(header.segment.into());
    let last = parts.len().saturating_sub(1);
    let mut all = Vec::with_capacity(parts.len());
    for (n, part) in parts.enumerate() {
        let mut segment = [&frame[..headers], part].concat();
        segment[..HEADER_LEN].copy_from_slice(&Header::default().bytes());
        let at = seq.wrapping_add(n as u32 * u32::from(header.segment));
        segment[tcp + 4..tcp + 8].copy_from_slice(&at.to_be_bytes());
        segment[tcp + 13] &= !(if n < last { LAST_ONLY } else { 0 } | if n > 0 { FIRST_ONLY } else { 0 });
        let len = (segment.len() - ip) as u16;
        let (from, to) = if v4 {
            segment[ip + 2..ip + 4].copy_from_slice(&len.to_be_bytes());
            segment[ip + 4..ip + 6].copy_from_slice(&number.wrapping_add(n as u16).to_be_bytes());
            segment[ip + 10..ip + 12].fill(0);
            let sum = Sum::default().add(&segment[ip..tcp]).checksum();
            segment[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
            (ip + 12, ip + 20)
        } else {
            segment[ip + 4..ip + 6].copy_from_slice(&(len - 40).to_be_bytes());
            (ip + 8, ip + 40)
        };
        segment[tcp + 16..tcp + 18].fill(0);
        let pseudo =
            Sum::default().add(&segment[from..to]).add(&(6 + (segment.len() - tcp) as u32).to_be_bytes());
        let sum = pseudo.add(&segment[tcp..]).checksum();
        segment[tcp + 16..tcp + 18].copy_from_slice(&sum.to_be_bytes());
        all.push(segment);
    }
    Some(all)
}
