//! ICMP for both kinds of IP: echoes of our own, errors, and neighbours (RFC 792, 4443, 4861, 8106).

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use super::addresses::{DNS6, OWN_MAC, PREFIX6, ROUTER6, is_own};
use super::wire::{Mac, Packet, Route, packet, protocol};

/// Types of messages.
pub(super) mod kind {
    pub const ECHO_REPLY4: u8 = 0;
    pub const UNREACHABLE4: u8 = 3;
    pub const ECHO_REQUEST4: u8 = 8;
    pub const UNREACHABLE6: u8 = 1;
    pub const ECHO_REQUEST6: u8 = 128;
    pub const ECHO_REPLY6: u8 = 129;
    pub const ROUTER_SOLICITATION: u8 = 133;
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    pub const NEIGHBOUR_SOLICITATION: u8 = 135;
    pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
}

/// Seconds for which a router is one unless it says so again, and for which its name server is.
const ROUTER_LIFETIME: u16 = 9000;
/// All nodes of a link, and their Ethernet address.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];

/// Why something is not reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// There is no way.
    Network,
    /// There is nobody.
    Host,
    /// The port is closed.
    Port,
    /// It is forbidden.
    Forbidden,
}

impl Why {
    fn code(self, v4: bool) -> u8 {
        match (self, v4) {
            (Self::Network, _) => 0,
            (Self::Host, true) => 1,
            (Self::Host, false) => 3,
            (Self::Port, true) => 3,
            (Self::Port, false) => 4,
            (Self::Forbidden, true) => 13,
            (Self::Forbidden, false) => 1,
        }
    }
}

/// An error about a packet of a flow that begins with `start`: the ports and what follows them.
pub(super) fn unreachable(
    guest: SocketAddr,
    remote: SocketAddr,
    mac: Mac,
    number: u8,
    start: [u8; 8],
    why: Why,
) -> Vec<u8> {
    let v4 = guest.is_ipv4();
    let quoted = Route { own: mac, mac: OWN_MAC, from: guest.ip(), to: remote.ip() };
    let mut quote = Vec::new();
    super::wire::begin(&mut quote, &Default::default(), &quoted, number, start.len());
    let headers = crate::HEADER_LEN + super::wire::ETHERNET_LEN;
    let kind = if v4 { kind::UNREACHABLE4 } else { kind::UNREACHABLE6 };
    let message = [&[kind, why.code(v4), 0, 0, 0, 0, 0, 0], &quote[headers..], &start].concat();
    // Of us, for it is we who cannot pass it on, unless the port itself is closed.
    let from = match (why, v4) {
        (Why::Port, _) => remote.ip(),
        (_, true) => super::addresses::GATEWAY4.into(),
        (_, false) => ROUTER6.into(),
    };
    message_to(from, guest.ip(), mac, &message)
}

/// A message of ICMP, its checksum filled in.
pub(super) fn message_to(from: IpAddr, to: IpAddr, mac: Mac, message: &[u8]) -> Vec<u8> {
    let number = if to.is_ipv4() { protocol::ICMP } else { protocol::ICMP6 };
    packet(&Route { own: OWN_MAC, mac, from, to }, number, message, 2)
}

/// The identifier of an echo request, if the message is one.
pub(super) fn echo_request(from: IpAddr, message: &[u8]) -> Option<u16> {
    let wanted = if from.is_ipv4() { kind::ECHO_REQUEST4 } else { kind::ECHO_REQUEST6 };
    let header = message.first_chunk::<8>()?;
    (header[..2] == [wanted, 0]).then(|| u16::from_be_bytes([header[4], header[5]]))
}

/// The answer to an echo request: all of it, of another type.
pub(super) fn echo_reply(from: IpAddr, to: IpAddr, mac: Mac, request: &[u8]) -> Vec<u8> {
    let mut reply = request.to_vec();
    reply[0] = if to.is_ipv4() { kind::ECHO_REPLY4 } else { kind::ECHO_REPLY6 };
    reply[2..4].fill(0);
    message_to(from, to, mac, &reply)
}

/// Answers what is asked of us as a neighbour and router of IPv6.
pub(super) fn discovery(asked: &Packet, message: &[u8], mtu: u16) -> Option<Vec<u8>> {
    match (*message.first()?, asked.from) {
        (kind::ROUTER_SOLICITATION, IpAddr::V6(from)) => {
            let (to, mac) =
                if from.is_unspecified() { (ALL_NODES, ALL_NODES_MAC) } else { (from, asked.mac) };
            Some(advertisement(to, mac, mtu))
        }
        (kind::NEIGHBOUR_SOLICITATION, IpAddr::V6(from)) => {
            let wanted = Ipv6Addr::from(*message.get(8..)?.first_chunk::<16>()?);
            // From nobody: someone looks whether an address is free (RFC 4862, 5.4).
            let (to, mac, flags) = if from.is_unspecified() {
                (ALL_NODES, ALL_NODES_MAC, 0xa0)
            } else {
                (from, asked.mac, 0xe0)
            };
            let mut answer = vec![kind::NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
            answer.extend(wanted.octets());
            answer.extend([2, 1]);
            answer.extend(OWN_MAC);
            is_own(wanted.into()).then(|| message_to(wanted.into(), to.into(), mac, &answer))
        }
        _ => None,
    }
}

/// What the router tells everyone from time to time.
pub(super) fn announcement(mtu: u16) -> Vec<u8> {
    advertisement(ALL_NODES, ALL_NODES_MAC, mtu)
}

/// Who the router is: prefix for addresses that hosts make themselves, name server, largest packet.
fn advertisement(to: Ipv6Addr, mac: Mac, mtu: u16) -> Vec<u8> {
    let mut message = vec![kind::ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0];
    message.extend(ROUTER_LIFETIME.to_be_bytes());
    message.extend([0; 8]);
    message.extend([1, 1]);
    message.extend(OWN_MAC);
    message.extend([5, 1, 0, 0, 0, 0]);
    message.extend(mtu.to_be_bytes());
    // On the link, and for addresses of one's own; for ever.
    message.extend([3, 4, 64, 0xc0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    message.extend(PREFIX6.octets());
    message.extend([25, 3, 0, 0]);
    message.extend(u32::from(ROUTER_LIFETIME).to_be_bytes());
    message.extend(DNS6.octets());
    message_to(ROUTER6.into(), to.into(), mac, &message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HEADER_LEN;
    use crate::user::wire::{Content, Sum, parse};

    fn read(frame: &[u8]) -> (Packet, Vec<u8>) {
        let frame = &frame[HEADER_LEN..];
        let Some(Content::Ip(packet)) = parse(frame, frame.len()) else { panic!() };
        let (at, len) = packet.payload;
        let sum = match packet.protocol {
            protocol::ICMP6 => Sum::pseudo(packet.from, packet.to, protocol::ICMP6, len),
            _ => Sum::default(),
        };
        assert_eq!(sum.add(&frame[at..at + len]).checksum(), 0);
        (packet, frame[at..at + len].to_vec())
    }

    fn asked(from: &str) -> Packet {
        let (from, to) = (from.parse().unwrap(), "ff02::2".parse().unwrap());
        Packet { mac: [4; 6], from, to, protocol: protocol::ICMP6, payload: (54, 8) }
    }

    #[test]
    fn a_router_is_found() {
        let frame = discovery(&asked("fe80::15"), &[133, 0, 0, 0, 0, 0, 0, 0], 1500).unwrap();
        let (packet, message) = read(&frame);
        assert_eq!((packet.from, packet.to), (ROUTER6.into(), "fe80::15".parse().unwrap()));
        assert_eq!((message[0], message.len()), (134, 16 + 8 + 8 + 32 + 24));
        assert_eq!(message[16 + 8 + 4..16 + 16], 1500u32.to_be_bytes());
        let (packet, _) = read(&discovery(&asked("::"), &[133, 0, 0, 0, 0, 0, 0, 0], 1500).unwrap());
        assert_eq!(packet.to, IpAddr::V6(ALL_NODES));
    }

    #[test]
    fn neighbours_hear_of_our_addresses_only() {
        let ask = |address: Ipv6Addr| {
            let message = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &address.octets()].concat();
            discovery(&asked("fe80::15"), &message, 1500)
        };
        let (_, message) = read(&ask(DNS6).unwrap());
        assert_eq!((message[0], message[4], &message[26..]), (136, 0xe0, &OWN_MAC[..]));
        assert!(ask("fe80::15".parse().unwrap()).is_none());
        assert!(discovery(&asked("fe80::15"), &[135, 0, 0, 0, 0, 0, 0, 0, 1], 1500).is_none());
    }

    #[test]
    fn errors_quote_what_they_are_about() {
        let (guest, remote) = ("10.0.2.15:1000".parse().unwrap(), "9.9.9.9:53".parse().unwrap());
        let frame = unreachable(guest, remote, [4; 6], protocol::UDP, [3, 232, 0, 53, 0, 9, 0, 0], Why::Port);
        let (packet, message) = read(&frame);
        assert_eq!((packet.from, &message[..2]), (remote.ip(), &[3, 3][..]));
        assert_eq!((&message[8 + 12..8 + 16], &message[28..32]), (&[10, 0, 2, 15][..], &[3, 232, 0, 53][..]));
        let (guest, remote) =
            ("[fd52:7573:6500::9]:1000".parse().unwrap(), "[2001:db8::1]:53".parse().unwrap());
        let (packet, message) =
            read(&unreachable(guest, remote, [4; 6], protocol::TCP, [0; 8], Why::Network));
        assert_eq!((packet.from, &message[..2], message.len()), (ROUTER6.into(), &[1, 0][..], 8 + 40 + 8));
    }
}
