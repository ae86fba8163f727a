//! What serves the rings.

use std::io;
use std::os::fd::BorrowedFd;

/// A part of the memory that a backend reaches.
#[derive(Clone, Copy, Debug)]
pub struct Region<'a> {
    /// Guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Where it is mapped in this process, which is how addresses of rings are given.
    pub host: u64,
    /// The file behind it.
    pub file: BorrowedFd<'a>,
    /// Where it begins in the file.
    pub offset: u64,
}

/// A ring that is to be served from its beginning.
#[derive(Clone, Copy, Debug)]
pub struct RingSetup<'a> {
    /// Entries.
    pub size: u16,
    /// Where its parts are in this process: descriptors, available ring, used ring.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
    /// An eventfd that is signalled when more is available.
    pub kick: BorrowedFd<'a>,
    /// An eventfd for the backend to signal when something was used.
    pub call: BorrowedFd<'a>,
}

/// What is wrong with a backend.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// It has ended, or closed its socket: another one may take its place.
    #[error("it has closed the connection")]
    Closed,
    /// It does not answer.
    #[error("it does not answer")]
    Silent,
    /// It says what it may not say.
    #[error("it does not keep to the protocol: {0}")]
    Nonsense(&'static str),
    /// It refuses a request.
    #[error("it refuses {0}")]
    Refused(&'static str),
    /// It cannot do what is needed.
    #[error("{0}")]
    Unfit(String),
    /// The host fails.
    #[error("{0}")]
    Host(#[from] io::Error),
}

/// Serves the rings of one device. No call waits longer than some seconds.
pub trait Backend: Send {
    /// The features that it offers.
    fn features(&self) -> u64;
    /// A driver has started with these features; the memory is where it was. No ring is served.
    fn configure(&mut self, features: u64, memory: &[Region]) -> Result<(), BackendError>;
    /// Serves a ring.
    fn start(&mut self, index: u16, ring: &RingSetup) -> Result<(), BackendError>;
    /// Serves a ring no more: afterwards it touches no buffer of it.
    fn stop(&mut self, index: u16) -> Result<(), BackendError>;
    /// A file that is hung up when the backend ends.
    fn life(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
