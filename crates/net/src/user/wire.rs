//! Ethernet, IP and checksums.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub(super) use crate::checksum::Sum;
use crate::header::{HEADER_LEN, Header};

/// An Ethernet address.
pub(super) type Mac = [u8; 6];

/// Bytes of an Ethernet header.
pub(super) const ETHERNET_LEN: usize = 14;
/// Hops that packets to the guest may take.
const HOPS: u8 = 64;

/// Types of frames.
pub(super) mod ethertype {
    pub const IPV4: u16 = 0x0800;
    pub const ARP: u16 = 0x0806;
    pub const IPV6: u16 = 0x86dd;
}

/// Protocols over IP.
pub(super) mod protocol {
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ICMP6: u8 = 58;
}

/// A packet of IP from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) mac: Mac,
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    pub(super) protocol: u8,
    /// Where its payload is in the frame, and how long it is.
    pub(super) payload: (usize, usize),
}

/// What is in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Arp,
    Ip(Packet),
}

/// Looks at a frame of `len` bytes that begins with `head`. `None` for what is nothing to us: other protocols, fragments,
/// headers that extend IPv6's, lengths that are impossible.
pub(super) fn parse(head: &[u8], len: usize) -> Option<Content> {
    let (ethernet, rest) = head.split_first_chunk::<ETHERNET_LEN>()?;
    let mac = *ethernet[6..].first_chunk()?;
    match u16::from_be_bytes([ethernet[12], ethernet[13]]) {
        ethertype::ARP => Some(Content::Arp),
        ethertype::IPV4 => parse_ipv4(mac, rest, len - ETHERNET_LEN).map(Content::Ip),
        ethertype::IPV6 => parse_ipv6(mac, rest, len - ETHERNET_LEN).map(Content::Ip),
        _ => None,
    }
}

fn parse_ipv4(mac: Mac, bytes: &[u8], most: usize) -> Option<Packet> {
    let header = bytes.first_chunk::<20>()?;
    let header_len = usize::from(header[0] & 0xf) * 4;
    let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
    if header[0] >> 4 != 4 || header_len < 20 || len < header_len || len > most || fragment {
        return None;
    }
    let address = |at: usize| Some(IpAddr::V4(Ipv4Addr::from(*header[at..].first_chunk::<4>()?)));
    let payload = (ETHERNET_LEN + header_len, len - header_len);
    Some(Packet { mac, from: address(12)?, to: address(16)?, protocol: header[9], payload })
}

fn parse_ipv6(mac: Mac, bytes: &[u8], most: usize) -> Option<Packet> {
    let header = bytes.first_chunk::<40>()?;
    let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
    if header[0] >> 4 != 6 || 40 + len > most {
        return None;
    }
    let address = |at: usize| Some(IpAddr::V6(Ipv6Addr::from(*header[at..].first_chunk::<16>()?)));
    Some(Packet {
        mac,
        from: address(8)?,
        to: address(24)?,
        protocol: header[6],
        payload: (ETHERNET_LEN + 40, len),
    })
}

/// Where a packet to the guest comes from and goes to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Route {
    pub(super) own: Mac,
    pub(super) mac: Mac,
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
}

impl Route {
    /// Bytes of the header of IP.
    pub(super) fn ip_len(&self) -> usize {
        if self.to.is_ipv4() { 20 } else { 40 }
    }
}

/// Begins a frame: the header of virtio, Ethernet's, and IP's before `len` bytes of a protocol.
pub(super) fn begin(frame: &mut Vec<u8>, header: &Header, route: &Route, protocol: u8, len: usize) {
    frame.clear();
    frame.extend(header.bytes());
    frame.extend(route.mac);
    frame.extend(route.own);
    match (route.from, route.to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            frame.extend(ethertype::IPV4.to_be_bytes());
            let start = frame.len();
            let total = ((20 + len) as u16).to_be_bytes();
            // It must not be fragmented, and therefore needs no number (RFC 6864).
            frame.extend([0x45, 0, total[0], total[1], 0, 0, 0x40, 0, HOPS, protocol, 0, 0]);
            frame.extend(from.octets());
            frame.extend(to.octets());
            let sum = Sum::default().add(&frame[start..]).checksum();
            frame[start + 10..start + 12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            frame.extend(ethertype::IPV6.to_be_bytes());
            frame.extend([0x60, 0, 0, 0]);
            frame.extend((len as u16).to_be_bytes());
            // Neighbour discovery takes only what no router has passed on (RFC 4861, 6.1).
            frame.extend([protocol, if protocol == protocol::ICMP6 { 255 } else { HOPS }]);
            frame.extend(from.octets());
            frame.extend(to.octets());
        }
        _ => unreachable!("both ends of a route are of one kind"),
    }
}

/// Makes a frame without anything left to be done, for a protocol whose checksum is at an offset of its header; `pseudo` says
/// whether it is also of the addresses.
pub(super) fn packet(route: &Route, protocol: u8, payload: &[u8], checksum_at: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER_LEN + ETHERNET_LEN + route.ip_len() + payload.len());
    begin(&mut frame, &Header::default(), route, protocol, payload.len());
    let start = frame.len();
    frame.extend(payload);
    let sum = match protocol {
        protocol::ICMP => Sum::default(),
        _ => Sum::pseudo(route.from, route.to, protocol, payload.len()),
    };
    let sum = match (sum.add(payload).checksum(), protocol) {
        // For UDP zero would mean that there is none.
        (0, protocol::UDP) => 0xffff,
        (sum, _) => sum,
    };
    if let Some(place) = frame.get_mut(start + checksum_at..start + checksum_at + 2) {
        place.copy_from_slice(&sum.to_be_bytes());
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_is_read_as_it_was_made() {
        for (from, to) in [("10.0.2.2", "10.0.2.15"), ("fe80::2", "fe80::15")] {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            let route = Route { own: [2; 6], mac: [4; 6], from, to };
            let frame = packet(&route, protocol::UDP, &[0, 1, 0, 2, 0, 11, 0, 0, 7, 8, 9], 6);
            let frame = &frame[HEADER_LEN..];
            let Some(Content::Ip(packet)) = parse(frame, frame.len()) else { panic!("{from}") };
            assert_eq!(
                (packet.mac, packet.from, packet.to, packet.protocol),
                ([2; 6], from, to, protocol::UDP)
            );
            let (at, len) = packet.payload;
            assert_eq!((at + len, len), (frame.len(), 11));
            let sum = Sum::pseudo(from, to, protocol::UDP, 11).add(&frame[at..]);
            assert_eq!(sum.checksum(), 0);
            assert!(
                parse(&frame[..at - 1], frame.len()).is_none() && parse(frame, frame.len() - 1).is_none()
            );
        }
    }
}
