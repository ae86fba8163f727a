//! ARP (RFC 826): who we are.

use std::net::Ipv4Addr;

use super::addresses::{OWN_MAC, is_own};
use super::wire::{ETHERNET_LEN, Mac, ethertype};
use crate::header::Header;

/// Ethernet and IPv4, their lengths.
const KIND: [u8; 6] = [0, 1, 8, 0, 6, 4];
const REQUEST: u16 = 1;
const REPLY: u16 = 2;

/// What a guest says of itself, and what it is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Heard {
    pub(super) mac: Mac,
    pub(super) address: Ipv4Addr,
    pub(super) answer: Option<Vec<u8>>,
}

/// Takes a frame with ARP.
pub(super) fn take(frame: &[u8]) -> Option<Heard> {
    let body = frame.get(ETHERNET_LEN..)?.first_chunk::<28>()?;
    let address = |at: usize| Some(Ipv4Addr::from(*body[at..].first_chunk::<4>()?));
    let mac: Mac = *body[8..].first_chunk()?;
    let (from, to) = (address(14)?, address(24)?);
    if body[..6] != KIND {
        return None;
    }
    let asked = u16::from_be_bytes([body[6], body[7]]) == REQUEST && is_own(to.into());
    let answer = asked.then(|| {
        let mut answer = Header::default().bytes().to_vec();
        answer.extend(mac);
        answer.extend(OWN_MAC);
        answer.extend(ethertype::ARP.to_be_bytes());
        answer.extend(KIND);
        answer.extend(REPLY.to_be_bytes());
        answer.extend(OWN_MAC);
        answer.extend(to.octets());
        answer.extend(mac);
        answer.extend(from.octets());
        answer
    });
    Some(Heard { mac, address: from, answer })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HEADER_LEN;

    #[test]
    fn who_asks_for_us_is_answered() {
        let request = |to: [u8; 4]| {
            [&[0xff; 6][..], &[4; 6], &[8, 6], &KIND, &[0, 1], &[4; 6], &[10, 0, 2, 15], &[0; 6], &to]
                .concat()
        };
        let heard = take(&request([10, 0, 2, 2])).unwrap();
        assert_eq!((heard.mac, heard.address), ([4; 6], "10.0.2.15".parse().unwrap()));
        let answer = heard.answer.unwrap();
        let expected = [
            &[4; 6][..],
            &OWN_MAC,
            &[8, 6],
            &KIND,
            &[0, 2],
            &OWN_MAC,
            &[10, 0, 2, 2],
            &[4; 6],
            &[10, 0, 2, 15],
        ];
        assert_eq!(answer[HEADER_LEN..], expected.concat());
        assert_eq!(take(&request([10, 0, 2, 15])).unwrap().answer, None, "nobody else is answered for");
        assert!(take(&request([10, 0, 2, 2])[..41]).is_none());
    }
}
