//! One connection: its socket, how far it has come, and how much each side may send (virtio 1.2, 5.10.6.3).

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{HOST_CID, Header, STREAM, shutdown};

/// Bytes that the guest may send before the host's program takes them.
pub(super) const ROOM: u32 = 256 << 10;
/// Longest line in which a program says what it wants.
const LINE: usize = 32;

/// The ports of both ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// How far a connection has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The host's program says which port it wants; this is what has come of the line.
    Greeting(Vec<u8>),
    /// The guest was asked.
    Asked,
    /// It stands.
    Open,
    /// The guest knows of it no more; what it had sent is still on its way to the host's program.
    Leaving,
}

/// Flow control in both directions. The counters of bytes run freely.
#[derive(Debug, Default)]
struct Credit {
    /// What the guest has told last.
    guest_room: u32,
    guest_passed_on: u32,
    sent: u32,
    received: u32,
    passed_on: u32,
    /// The guest knows of so much of `passed_on`.
    told: u32,
}

/// What came of reading the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// So many bytes.
    Bytes(usize),
    /// Nothing yet.
    Nothing,
    /// The guest has no room.
    NoRoom,
    /// Nothing more: the program will not send, or the guest not receive.
    End,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) ports: Ports,
    pub(super) stage: Stage,
    pub(super) stream: UnixStream,
    credit: Credit,
    /// What the host's program has not taken yet.
    output: VecDeque<u8>,
    /// What each side does no more ([`shutdown`]).
    pub(super) guest_shut: u32,
    pub(super) host_shut: u32,
    /// The guest knows of so much of `host_shut`.
    told_shut: u32,
    /// Nothing is read until the guest has room again.
    pub(super) waits_for_room: bool,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, ports: Ports, stage: Stage) -> Self {
        Self {
            ports,
            stage,
            stream,
            credit: Credit::default(),
            output: VecDeque::new(),
            guest_shut: 0,
            host_shut: 0,
            told_shut: 0,
            waits_for_room: false,
        }
    }

    /// The header of a packet to the guest, by which it also learns of the room here.
    pub(super) fn header(&mut self, cid: u32, op: u16, flags: u32) -> Header {
        self.credit.told = self.credit.passed_on;
        let Ports { host, guest } = self.ports;
        Header {
            src_cid: HOST_CID,
            dst_cid: cid.into(),
            src_port: host,
            dst_port: guest,
            len: 0,
            kind: STREAM,
            op,
            flags,
            buf_alloc: ROOM,
            fwd_cnt: self.credit.passed_on,
        }
    }

    /// Takes what a packet tells of the guest's room.
    pub(super) fn hear(&mut self, header: &Header) {
        (self.credit.guest_room, self.credit.guest_passed_on) = (header.buf_alloc, header.fwd_cnt);
    }

    /// Bytes that the guest has room for.
    pub(super) fn guest_room(&self) -> u32 {
        let on_the_way = self.credit.sent.wrapping_sub(self.credit.guest_passed_on);
        self.credit.guest_room.saturating_sub(on_the_way)
    }

    /// Whether the guest should be told of the room here.
    pub(super) fn has_news(&self) -> bool {
        self.credit.passed_on.wrapping_sub(self.credit.told) >= ROOM / 4
    }

    /// Reads the line that names the guest's port; `None` while it is not whole.
    pub(super) fn greeting(&mut self) -> io::Result<Option<u32>> {
        let Stage::Greeting(line) = &mut self.stage else { return Err(io::ErrorKind::InvalidInput.into()) };
        // One by one: what follows the line is for the guest.
        while line.len() < LINE {
            let mut byte = [0];
            match (&self.stream).read(&mut byte) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) if byte == *b"\n" => {
                    return parse(line).map(Some).ok_or(io::ErrorKind::InvalidData.into());
                }
                Ok(_) => line.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }

    /// The guest has agreed, of which the host's program is told.
    pub(super) fn welcome(&mut self) -> io::Result<()> {
        self.stage = Stage::Open;
        // A socket to which nothing was written has room for this.
        (&self.stream).write_all(format!("OK {}\n", self.ports.host).as_bytes())
    }

    /// Reads what the host's program has sent, as far as the guest has room.
    pub(super) fn read(&mut self, bytes: &mut [u8]) -> Input {
        if self.host_shut & shutdown::SEND != 0 || self.guest_shut & shutdown::RECEIVE != 0 {
            return Input::End;
        }
        let most = bytes.len().min(self.guest_room() as usize);
        if most == 0 {
            self.waits_for_room = true;
            return Input::NoRoom;
        }
        match (&self.stream).read(&mut bytes[..most]) {
            Ok(0) => Input::End,
            Ok(count) => {
                self.credit.sent = self.credit.sent.wrapping_add(count as u32);
                Input::Bytes(count)
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Input::Nothing
            }
            Err(_) => Input::End,
        }
    }

    /// Takes bytes from the guest; `false` if it was not allowed to send that many.
    pub(super) fn accept(&mut self, bytes: &[u8]) -> bool {
        let credit = &mut self.credit;
        let waiting = credit.received.wrapping_sub(credit.passed_on);
        if bytes.len() as u64 > u64::from(ROOM - waiting) {
            return false;
        }
        credit.received = credit.received.wrapping_add(bytes.len() as u32);
        self.output.extend(bytes);
        self.write();
        true
    }

    /// Writes what the host's program takes just now.
    pub(super) fn write(&mut self) {
        while !self.output.is_empty() {
            let written = match (&self.stream).write(self.output.as_slices().0) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => {
                    // Nobody reads it any more.
                    self.host_shut |= shutdown::RECEIVE;
                    self.output.len()
                }
            };
            self.output.drain(..written);
            self.credit.passed_on = self.credit.passed_on.wrapping_add(written as u32);
        }
    }

    /// What the guest has to be told that the host's program does no more, once.
    pub(super) fn shutdown_to_tell(&mut self) -> Option<u32> {
        let before = std::mem::replace(&mut self.told_shut, self.host_shut);
        (before != self.host_shut).then_some(self.host_shut)
    }

    /// Whether bytes wait for the host's program.
    pub(super) fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// The host's program learns what the guest does no more, once it has all that came before.
    pub(super) fn pass_shutdown_on(&self) {
        // A socket whose other end has gone needs nothing.
        if self.guest_shut & shutdown::SEND != 0 && self.output.is_empty() {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        if self.guest_shut & shutdown::RECEIVE != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
        }
    }
}

/// `CONNECT port`.
fn parse(line: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?.trim_end();
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_says_what_it_wants_in_a_line() {
        for (line, port) in
            [("CONNECT 52", Some(52)), ("CONNECT 4294967295\r", Some(u32::MAX)), ("CONNECT 4294967296", None)]
        {
            assert_eq!(parse(line.as_bytes()), port, "{line}");
        }
        for line in ["", "CONNECT", "CONNECT ", "connect 5", "CONNECT +5", "CONNECT 5 5", "\u{661}"] {
            assert_eq!(parse(line.as_bytes()), None, "{line}");
        }
    }
}
