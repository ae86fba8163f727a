//! DHCP (RFC 2131): an address for whoever asks.

use std::net::Ipv4Addr;

use super::addresses::{DNS4, GATEWAY4, MASK4, OWN_MAC};
use super::hosts::Hosts;
use super::wire::{Mac, Route, packet, protocol};

/// Ports of servers and clients.
pub(super) const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
/// What options begin with, behind the fixed part.
const COOKIE: [u8; 4] = [99, 130, 83, 99];
const FIXED: usize = 236;
/// Seconds for which addresses are lent.
const LEASE: u32 = 86400;

/// Options (RFC 2132).
mod option {
    pub const MASK: u8 = 1;
    pub const ROUTER: u8 = 3;
    pub const DNS: u8 = 6;
    pub const MTU: u8 = 26;
    pub const REQUESTED: u8 = 50;
    pub const LEASE: u8 = 51;
    pub const TYPE: u8 = 53;
    pub const SERVER: u8 = 54;
    pub const END: u8 = 255;
}

/// Types of messages.
mod kind {
    pub const DISCOVER: u8 = 1;
    pub const OFFER: u8 = 2;
    pub const REQUEST: u8 = 3;
    pub const ACK: u8 = 5;
    pub const NAK: u8 = 6;
    pub const INFORM: u8 = 8;
}

/// Answers a message to the server's port. `mtu` is the largest packet.
pub(super) fn answer(message: &[u8], hosts: &mut Hosts, mtu: u16) -> Option<Vec<u8>> {
    let fixed = message.first_chunk::<FIXED>()?;
    let options = message[FIXED..].strip_prefix(&COOKIE)?;
    // A request over Ethernet.
    if fixed[..3] != [1, 1, 6] {
        return None;
    }
    let mac: Mac = *fixed[28..].first_chunk()?;
    let asked = *find(options, option::TYPE)?.first()?;
    let address = |bytes: &[u8]| Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?));
    let current = address(&fixed[12..])?;
    let server = find(options, option::SERVER).and_then(address);
    if server.is_some_and(|server| server != GATEWAY4) {
        return None;
    }
    if asked == kind::INFORM {
        return Some(reply(fixed, mac, kind::ACK, None, mtu));
    }
    let lent = hosts.lend(mac)?;
    let wanted =
        find(options, option::REQUESTED).and_then(address).or((!current.is_unspecified()).then_some(current));
    match asked {
        kind::DISCOVER => Some(reply(fixed, mac, kind::OFFER, Some(lent), mtu)),
        kind::REQUEST if wanted == Some(lent) => Some(reply(fixed, mac, kind::ACK, Some(lent), mtu)),
        kind::REQUEST => Some(reply(fixed, mac, kind::NAK, None, mtu)),
        _ => None,
    }
}

/// What an option has.
fn find(mut options: &[u8], wanted: u8) -> Option<&[u8]> {
    loop {
        match *options {
            [0, ref rest @ ..] => options = rest,
            [option::END, ..] | [] => return None,
            [option, len, ref rest @ ..] => {
                let (value, rest) = rest.split_at_checked(len.into())?;
                if option == wanted {
                    return Some(value);
                }
                options = rest;
            }
            [_] => return None,
        }
    }
}

fn reply(request: &[u8; FIXED], mac: Mac, kind: u8, lent: Option<Ipv4Addr>, mtu: u16) -> Vec<u8> {
    let mut message = request.to_vec();
    message[0] = 2;
    message[16..20].copy_from_slice(&lent.map_or([0; 4], |address| address.octets()));
    message[20..24].copy_from_slice(&GATEWAY4.octets());
    message[44..].fill(0);
    message.extend(COOKIE);
    let mut put = |option: u8, value: &[u8]| {
        message.extend([option, value.len() as u8]);
        message.extend(value);
    };
    put(option::TYPE, &[kind]);
    put(option::SERVER, &GATEWAY4.octets());
    if kind != kind::NAK {
        put(option::MASK, &MASK4.octets());
        put(option::ROUTER, &GATEWAY4.octets());
        put(option::DNS, &DNS4.octets());
        put(option::MTU, &mtu.to_be_bytes());
    }
    if lent.is_some() {
        put(option::LEASE, &LEASE.to_be_bytes());
    }
    message.push(option::END);
    datagram(&message, mac)
}

/// Clients hear what goes to everyone at their own Ethernet address, whatever their address is yet.
fn datagram(message: &[u8], mac: Mac) -> Vec<u8> {
    let route = Route { own: OWN_MAC, mac, from: GATEWAY4.into(), to: Ipv4Addr::BROADCAST.into() };
    let len = (8 + message.len()) as u16;
    let words = [SERVER_PORT, CLIENT_PORT, len, 0].map(u16::to_be_bytes);
    packet(&route, protocol::UDP, &[words.as_flattened(), message].concat(), 6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HEADER_LEN;

    fn message(kind: u8, requested: Option<[u8; 4]>) -> Vec<u8> {
        let mut message = vec![0; FIXED];
        message[..8].copy_from_slice(&[1, 1, 6, 0, 9, 8, 7, 6]);
        message[28..34].copy_from_slice(&[4; 6]);
        message.extend(COOKIE);
        message.extend([0, option::TYPE, 1, kind]);
        message.extend(requested.iter().flat_map(|&[a, b, c, d]| [option::REQUESTED, 4, a, b, c, d]));
        message.push(option::END);
        message
    }

    /// The message in an answer.
    fn answered(message: &[u8]) -> Vec<u8> {
        let frame = answer(message, &mut Hosts::new([4; 6]), 1500).unwrap();
        assert_eq!(frame[HEADER_LEN..HEADER_LEN + 6], [4; 6]);
        frame[HEADER_LEN + 14 + 20 + 8..].to_vec()
    }

    #[test]
    fn a_client_is_lent_an_address() {
        let offer = answered(&message(kind::DISCOVER, None));
        assert_eq!((offer[0], &offer[4..8], &offer[16..20]), (2, &[9, 8, 7, 6][..], &[10, 0, 2, 15][..]));
        let options = &offer[FIXED + 4..];
        assert_eq!(find(options, option::TYPE), Some(&[kind::OFFER][..]));
        assert_eq!(find(options, option::ROUTER), Some(&[10, 0, 2, 2][..]));
        assert_eq!(find(options, option::DNS), Some(&[10, 0, 2, 3][..]));
        assert_eq!(find(options, option::MTU), Some(&1500u16.to_be_bytes()[..]));
        let ack = answered(&message(kind::REQUEST, Some([10, 0, 2, 15])));
        assert_eq!(find(&ack[FIXED + 4..], option::TYPE), Some(&[kind::ACK][..]));
        let nak = answered(&message(kind::REQUEST, Some([192, 168, 0, 4])));
        assert_eq!(
            (find(&nak[FIXED + 4..], option::TYPE), &nak[16..20]),
            (Some(&[kind::NAK][..]), &[0; 4][..])
        );
    }

    #[test]
    fn nonsense_is_not_answered() {
        let hosts = &mut Hosts::new([4; 6]);
        let whole = message(kind::DISCOVER, None);
        assert!((0..FIXED + 8).all(|len| answer(&whole[..len], hosts, 1500).is_none()));
        let mut other = message(kind::REQUEST, Some([10, 0, 2, 15]));
        other.truncate(other.len() - 1);
        other.extend([option::SERVER, 4, 10, 0, 2, 99, option::END]);
        assert!(answer(&other, hosts, 1500).is_none(), "another server is meant");
        assert_eq!(find(&[7, 200, 1], 7), None);
    }
}
