//! Messages of the vhost-user protocol over a socket, and how they are answered.
//!
//! Ruse's own: the `vhost` crate waits for an answer without end, whatever time limits its socket has.

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::backend::BackendError;

/// Bytes of a header: request, flags, bytes that follow.
const HEADER_LEN: usize = 12;
/// Flags of a header.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// Most files that go with a message.
pub(super) const MOST_FILES: usize = 8;

/// Requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Code {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    GetConfig = 24,
}

impl Code {
    /// For messages.
    fn name(self) -> &'static str {
        match self {
            Self::GetFeatures => "GET_FEATURES",
            Self::SetFeatures => "SET_FEATURES",
            Self::SetOwner => "SET_OWNER",
            Self::SetMemTable => "SET_MEM_TABLE",
            Self::SetVringNum => "SET_VRING_NUM",
            Self::SetVringAddr => "SET_VRING_ADDR",
            Self::SetVringBase => "SET_VRING_BASE",
            Self::GetVringBase => "GET_VRING_BASE",
            Self::SetVringKick => "SET_VRING_KICK",
            Self::SetVringCall => "SET_VRING_CALL",
            Self::GetProtocolFeatures => "GET_PROTOCOL_FEATURES",
            Self::SetProtocolFeatures => "SET_PROTOCOL_FEATURES",
            Self::GetQueueNum => "GET_QUEUE_NUM",
            Self::SetVringEnable => "SET_VRING_ENABLE",
            Self::GetConfig => "GET_CONFIG",
        }
    }
}

/// A connection to a backend.
pub(super) struct Connection {
    stream: UnixStream,
    /// How long an answer may take.
    patience: Duration,
    /// The backend answers each request (VHOST_USER_PROTOCOL_F_REPLY_ACK).
    pub(super) acks: bool,
}

impl Connection {
    /// A connection whose answers take so long at most.
    pub(super) fn new(stream: UnixStream, patience: Duration) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Self { stream, patience, acks: false })
    }

    /// The socket.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Makes a request without an answer of its own. Where the backend says whether it has obeyed, that is waited for.
    pub(super) fn tell(&mut self, code: Code, body: &[u8], files: &[BorrowedFd]) -> Result<(), BackendError> {
        self.send(code, if self.acks { NEED_REPLY } else { 0 }, body, files)?;
        if self.acks && self.receive(code, 8)? != [0; 8] {
            return Err(BackendError::Refused(code.name()));
        }
        Ok(())
    }

    /// Makes a request for a number.
    pub(super) fn ask(&mut self, code: Code) -> Result<u64, BackendError> {
        let answer = self.ask_bytes(code, &[], 8)?;
        Ok(answer.try_into().map_or(0, u64::from_le_bytes))
    }

    /// Makes a request whose answer has so many bytes.
    pub(super) fn ask_bytes(&mut self, code: Code, body: &[u8], len: usize) -> Result<Vec<u8>, BackendError> {
        self.send(code, 0, body, &[])?;
        self.receive(code, len)
    }

    fn send(&self, code: Code, flags: u32, body: &[u8], files: &[BorrowedFd]) -> Result<(), BackendError> {
        let header = [code as u32, VERSION | flags, body.len() as u32].map(u32::to_le_bytes).concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(files));
        }
        let message = [&header, body].concat();
        // It is shorter than what a socket takes at once.
        match sendmsg(&self.stream, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL) {
            Ok(sent) if sent == message.len() => Ok(()),
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Err(BackendError::Silent),
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => Err(BackendError::Closed),
            Err(error) => Err(BackendError::Host(error.into())),
        }
    }

    /// Takes the answer to a request, which has so many bytes. Files that come with it are dropped.
    fn receive(&mut self, code: Code, len: usize) -> Result<Vec<u8>, BackendError> {
        let limit = Instant::now() + self.patience;
        let mut header = [0; HEADER_LEN];
        self.read(&mut header, limit)?;
        let [request, flags, size] =
            [0, 4, 8].map(|at| u32::from_le_bytes([0, 1, 2, 3].map(|n| header[at + n])));
        if request != code as u32 {
            return Err(BackendError::Nonsense("an answer to something that it was not asked"));
        }
        if flags & VERSION_MASK != VERSION || flags & REPLY == 0 {
            return Err(BackendError::Nonsense("an answer with flags that it cannot have"));
        }
        if size as usize != len {
            return Err(BackendError::Nonsense("an answer of a length that it cannot have"));
        }
        let mut body = vec![0; len];
        self.read(&mut body, limit)?;
        Ok(body)
    }

    fn read(&mut self, mut bytes: &mut [u8], limit: Instant) -> Result<(), BackendError> {
        while !bytes.is_empty() {
            let left = limit.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(BackendError::Silent);
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(bytes) {
                Ok(0) => return Err(BackendError::Closed),
                Ok(len) => bytes = &mut bytes[len..],
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Err(BackendError::Silent),
                    io::ErrorKind::ConnectionReset => return Err(BackendError::Closed),
                    io::ErrorKind::Interrupted => {}
                    _ => return Err(error.into()),
                },
            }
        }
        Ok(())
    }
}
