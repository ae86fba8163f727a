//! Checksums of IP and what is above it.

use std::net::IpAddr;

/// The internet checksum (RFC 1071), of parts of any length.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum {
    total: u64,
    odd: bool,
}

impl Sum {
    pub(crate) fn add(mut self, mut bytes: &[u8]) -> Self {
        if self.odd {
            let Some((&first, rest)) = bytes.split_first() else { return self };
            self.total += u64::from(first);
            (self.odd, bytes) = (false, rest);
        }
        let (words, rest) = bytes.as_chunks::<4>();
        self.total += words.iter().map(|&word| u64::from(u32::from_be_bytes(word))).sum::<u64>();
        let (pairs, last) = rest.as_chunks::<2>();
        self.total += pairs.iter().map(|&pair| u64::from(u16::from_be_bytes(pair))).sum::<u64>();
        if let &[last] = last {
            self.total += u64::from(last) << 8;
            self.odd = true;
        }
        self
    }

    /// The beginning of a sum over what TCP, UDP and ICMPv6 have it of besides their packets.
    pub(crate) fn pseudo(from: IpAddr, to: IpAddr, protocol: u8, len: usize) -> Self {
        let sum = match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => Self::default().add(&from.octets()).add(&to.octets()),
            (IpAddr::V6(from), IpAddr::V6(to)) => Self::default().add(&from.octets()).add(&to.octets()),
            _ => Self::default(),
        };
        sum.add(&(len as u32).to_be_bytes()).add(&[0, 0, 0, protocol])
    }

    /// The sum in 16 bits.
    pub(crate) fn folded(self) -> u16 {
        let mut total = self.total;
        while total > 0xffff {
            total = (total & 0xffff) + (total >> 16);
        }
        total as u16
    }

    /// What goes into a packet.
    pub(crate) fn checksum(self) -> u16 {
        !self.folded()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_do_not_depend_on_how_bytes_are_parted() {
        let bytes: Vec<u8> = (0..101u32).map(|n| (n * 37) as u8).collect();
        let whole = Sum::default().add(&bytes).checksum();
        for cut in 0..=bytes.len() {
            for other in cut..=bytes.len() {
                let sum = Sum::default().add(&bytes[..cut]).add(&bytes[cut..other]).add(&bytes[other..]);
                assert_eq!(sum.checksum(), whole, "{cut} {other}");
            }
        }
        // The example of RFC 1071, 3.
        assert_eq!(Sum::default().add(&[0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7]).folded(), 0xddf2);
    }
}
