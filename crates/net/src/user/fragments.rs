//! Datagrams to the guest that are larger than its largest packet (RFC 791, 3.2; RFC 8200, 4.5).

use super::link::Link;
use super::tcp::Flow;
use super::wire::{Route, Sum, begin, protocol};
use crate::HEADER_LEN;
use crate::header::Header;
use crate::user::wire::ETHERNET_LEN;

/// Next header: a fragment.
const FRAGMENT: u8 = 44;

impl Link {
    /// Sends a datagram of UDP in fragments.
    pub(super) fn send_fragments(&mut self, route: &Route, flow: Flow, payload: &[u8]) {
        let len = (8 + payload.len()) as u16;
        let words = [flow.remote.port(), flow.guest.port(), len, 0].map(u16::to_be_bytes);
        let mut datagram = [words.as_flattened(), payload].concat();
        let sum = Sum::pseudo(route.from, route.to, protocol::UDP, datagram.len()).add(&datagram).checksum();
        datagram[6..8].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
        let number = self.random();
        let room = (usize::from(self.mtu()) - route.ip_len() - 8) / 8 * 8;
        let count = datagram.len().div_ceil(room);
        for (n, part) in datagram.chunks(room).enumerate() {
            let more = u16::from(n + 1 < count);
            let frame = match route.to.is_ipv4() {
                true => fragment4(route, number as u16, (n * room / 8) as u16 | more << 13, part),
                false => fragment6(route, number, (n * room) as u16 | more, part),
            };
            self.send(frame);
        }
    }
}

fn fragment4(route: &Route, number: u16, place: u16, part: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    begin(&mut frame, &Header::default(), route, protocol::UDP, part.len());
    let header = &mut frame[HEADER_LEN + ETHERNET_LEN..];
    header[4..6].copy_from_slice(&number.to_be_bytes());
    header[6..8].copy_from_slice(&place.to_be_bytes());
    header[10..12].fill(0);
    let sum = Sum::default().add(header).checksum();
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(part);
    frame
}

fn fragment6(route: &Route, number: u32, place: u16, part: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    begin(&mut frame, &Header::default(), route, FRAGMENT, 8 + part.len());
    frame.extend([protocol::UDP, 0]);
    frame.extend(place.to_be_bytes());
    frame.extend(number.to_be_bytes());
    frame.extend(part);
    frame
}
