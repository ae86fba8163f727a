//! The header before each frame (virtio 1.2, 5.1.6).

/// Bytes of a header.
pub const HEADER_LEN: usize = 12;

/// Flag: the checksum has to be completed.
const NEEDS_CHECKSUM: u8 = 1;
/// Flag of the kind of segmentation: congestion marks.
const ECN: u8 = 0x80;

/// Into what a frame is to be cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Gso {
    /// Nothing.
    #[default]
    None = 0,
    /// Segments of TCP over IPv4.
    Tcp4 = 1,
    /// Segments of TCP over IPv6.
    Tcp6 = 4,
    /// Datagrams of UDP.
    Udp = 5,
}

/// What is left to be done of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Where the checksum begins and where it goes, counted from there, if it has to be completed.
    pub checksum: Option<(u16, u16)>,
    /// Into what the frame is to be cut.
    pub gso: Gso,
    /// Its segments may have congestion marks.
    pub ecn: bool,
    /// Bytes of headers that each segment gets; a hint.
    pub header_len: u16,
    /// Bytes of payload of each segment.
    pub segment: u16,
}

impl Header {
    /// Reads a header; `None` for a kind of segmentation that nobody has.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Option<Self> {
        let [flags, kind, h0, h1, g0, g1, s0, s1, o0, o1, ..] = *bytes;
        let gso = match kind & !ECN {
            0 => Gso::None,
            1 => Gso::Tcp4,
            4 => Gso::Tcp6,
            5 => Gso::Udp,
            _ => return None,
        };
        let word = |low, high| u16::from_le_bytes([low, high]);
        Some(Self {
            checksum: (flags & NEEDS_CHECKSUM != 0).then_some((word(s0, s1), word(o0, o1))),
            gso,
            ecn: kind & ECN != 0,
            header_len: word(h0, h1),
            segment: word(g0, g1),
        })
    }

    /// The bytes of the header, of a frame in one buffer.
    pub fn bytes(&self) -> [u8; HEADER_LEN] {
        let (start, offset) = self.checksum.unwrap_or_default();
        let flags = if self.checksum.is_some() { NEEDS_CHECKSUM } else { 0 };
        let kind = self.gso as u8 | if self.ecn { ECN } else { 0 };
        let [h0, h1] = self.header_len.to_le_bytes();
        let [g0, g1] = self.segment.to_le_bytes();
        let [s0, s1] = start.to_le_bytes();
        let [o0, o1] = offset.to_le_bytes();
        [flags, kind, h0, h1, g0, g1, s0, s1, o0, o1, 1, 0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let header =
            Header { checksum: Some((34, 16)), gso: Gso::Tcp6, ecn: true, header_len: 74, segment: 1440 };
        assert_eq!(Header::parse(&header.bytes()), Some(header));
        assert_eq!(Header::parse(&[0; HEADER_LEN]), Some(Header::default()));
        assert_eq!(
            Header::parse(&[0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            None,
            "fragments of UDP are of the past"
        );
    }
}
