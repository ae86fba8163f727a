//! Segments of TCP (RFC 9293, 3.1).

use crate::header::{Gso, Header};
use crate::user::wire::{ETHERNET_LEN, Route, Sum, begin, protocol};
use crate::{HEADER_LEN, Offloads};

/// Flags.
pub(super) const FIN: u8 = 1;
pub(super) const SYN: u8 = 2;
pub(super) const RST: u8 = 4;
const PSH: u8 = 8;
pub(super) const ACK: u8 = 16;

/// Where the checksum is.
const CHECKSUM_AT: u16 = 16;
/// Bytes of a header without options.
const LEN: usize = 20;

/// A segment's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) from_port: u16,
    pub(super) to_port: u16,
    pub(super) seq: u32,
    pub(super) ack: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    /// Options of a SYN: the largest segment, and by how many bits windows are shifted.
    pub(super) mss: Option<u16>,
    pub(super) shift: Option<u8>,
}

impl Segment {
    /// Reads a header; gives the header's length as well.
    pub(super) fn parse(bytes: &[u8]) -> Option<(Self, usize)> {
        let header = bytes.first_chunk::<LEN>()?;
        let len = usize::from(header[12] >> 4) * 4;
        let options = bytes.get(LEN..len)?;
        let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let long = |at: usize| u32::from(word(at)) << 16 | u32::from(word(at + 2));
        let mut segment = Self {
            from_port: word(0),
            to_port: word(2),
            seq: long(4),
            ack: long(8),
            flags: header[13],
            window: word(14),
            ..Self::default()
        };
        if segment.has(SYN) {
            segment.read_options(options);
        }
        Some((segment, len))
    }

    fn read_options(&mut self, mut options: &[u8]) {
        loop {
            match *options {
                [1, ref rest @ ..] => options = rest,
                [2, 4, high, low, ref rest @ ..] => {
                    self.mss = Some(u16::from_be_bytes([high, low]));
                    options = rest;
                }
                [3, 3, shift, ref rest @ ..] => {
                    // More makes no sense (RFC 7323, 2.3).
                    self.shift = Some(shift.min(14));
                    options = rest;
                }
                [0, ..] => return,
                [_, len, ..] if len >= 2 => match options.get(usize::from(len)..) {
                    Some(rest) => options = rest,
                    None => return,
                },
                _ => return,
            }
        }
    }

    pub(super) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Writes the headers of a frame with this segment in front of `payload`, of which `offloads` says what may be left
    /// to the guest; what is longer than `mss` is left to be cut.
    pub(super) fn write(
        &self,
        frame: &mut Vec<u8>,
        route: &Route,
        payload: [&[u8]; 2],
        mss: u16,
        offloads: Offloads,
    ) {
        let mut options = Vec::new();
        if let Some(mss) = self.mss {
            options.extend([2, 4]);
            options.extend(mss.to_be_bytes());
        }
        if let Some(shift) = self.shift {
            options.extend([1, 3, 3, shift]);
        }
        let (own, payload_len) = (LEN + options.len(), payload[0].len() + payload[1].len());
        let start = ETHERNET_LEN + route.ip_len();
        let mut header = Header::default();
        if offloads.contains(Offloads::CHECKSUM) {
            header.checksum = Some((start as u16, CHECKSUM_AT));
        }
        if payload_len > usize::from(mss) {
            header.gso = if route.to.is_ipv4() { Gso::Tcp4 } else { Gso::Tcp6 };
            (header.header_len, header.segment) = ((start + own) as u16, mss);
        }
        begin(frame, &header, route, protocol::TCP, own + payload_len);
        let at = frame.len();
        frame.extend(self.from_port.to_be_bytes());
        frame.extend(self.to_port.to_be_bytes());
        frame.extend(self.seq.to_be_bytes());
        frame.extend(self.ack.to_be_bytes());
        let push = if payload_len > 0 { PSH } else { 0 };
        frame.extend([(own as u8 / 4) << 4, self.flags | push]);
        frame.extend(self.window.to_be_bytes());
        frame.extend([0; 4]);
        frame.extend(options);
        let pseudo = Sum::pseudo(route.from, route.to, protocol::TCP, own + payload_len);
        let sum = match header.checksum {
            Some(_) => pseudo.folded(),
            None => pseudo.add(&frame[at..]).add(payload[0]).add(payload[1]).checksum(),
        };
        let place = at + usize::from(CHECKSUM_AT);
        frame[place..place + 2].copy_from_slice(&sum.to_be_bytes());
        debug_assert_eq!(frame.len(), HEADER_LEN + start + own);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_read_as_it_was_written() {
        let (from, to) = ("10.0.2.2".parse().unwrap(), "10.0.2.15".parse().unwrap());
        let route = Route { own: [2; 6], mac: [4; 6], from, to };
        let segment = Segment {
            from_port: 80,
            to_port: 4000,
            seq: 7,
            ack: 0x8000_0001,
            flags: SYN | ACK,
            window: 500,
            mss: Some(1460),
            shift: Some(7),
        };
        for offloads in [Offloads::empty(), Offloads::CHECKSUM] {
            let mut frame = Vec::new();
            segment.write(&mut frame, &route, [b"abc", b"de"], 1460, offloads);
            let at = HEADER_LEN + ETHERNET_LEN + 20;
            let (read, len) = Segment::parse(&frame[at..]).unwrap();
            assert_eq!((read, len), (Segment { flags: SYN | ACK | PSH, ..segment }, 28));
            let header = Header::parse(frame.first_chunk().unwrap()).unwrap();
            let pseudo = Sum::pseudo(from, to, protocol::TCP, 33);
            match header.checksum {
                Some(place) => {
                    assert_eq!(place, (34, 16));
                    assert_eq!(frame[at + 16..at + 18], pseudo.folded().to_be_bytes());
                }
                None => assert_eq!(pseudo.add(&frame[at..]).add(b"abcde").checksum(), 0),
            }
        }
        let mut frame = Vec::new();
        Segment::default().write(&mut frame, &route, [&[0; 3000], &[]], 1460, Offloads::all());
        let header = Header::parse(frame.first_chunk().unwrap()).unwrap();
        assert_eq!((header.gso, header.segment, header.header_len), (Gso::Tcp4, 1460, 54));
    }

    #[test]
    fn options_that_lie_end_the_options() {
        let mut bytes = vec![0; 20];
        (bytes[12], bytes[13]) = (0x70, SYN);
        bytes.extend([8, 200, 2, 4, 5, 6, 0, 0]);
        assert_eq!(Segment::parse(&bytes).unwrap().0.mss, None);
        bytes[20..].copy_from_slice(&[4, 2, 2, 4, 5, 6, 1, 0]);
        assert_eq!(Segment::parse(&bytes).unwrap().0.mss, Some(0x506));
        assert!(Segment::parse(&bytes[..27]).is_none() && Segment::parse(&bytes[..19]).is_none());
        bytes[12] = 0x40;
        assert!(Segment::parse(&bytes).is_none());
    }
}
