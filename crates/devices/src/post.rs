//! Port 0x80: power-on self-test codes, and the port that systems write to wait about a microsecond.

use serde::{Deserialize, Serialize};

use crate::{Access, Device};

/// The port.
pub const POST_PORT: u16 = 0x80;

/// Takes every write and remembers the last byte, for diagnosis; reads as all ones.
#[derive(Debug, Default)]
pub struct Post {
    state: PostState,
}

/// Saved state of [`Post`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostState {
    /// The last code written.
    pub code: u8,
}

impl Post {
    /// Number of ports.
    pub const LEN: u64 = 1;

    /// The device after power-up.
    pub fn new() -> Self {
        Self::default()
    }
    /// The last code written.
    pub fn code(&self) -> u8 {
        self.state.code
    }
    /// The state to save.
    pub fn state(&self) -> PostState {
        self.state.clone()
    }
    /// Takes a saved state.
    pub fn restore(&mut self, state: &PostState) {
        self.state = state.clone();
    }
}

impl Device for Post {
    fn read(&mut self, _access: &mut Access, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write(&mut self, _access: &mut Access, offset: u64, data: &[u8]) {
        if let (0, Some(&code)) = (offset, data.first()) {
            self.state.code = code;
        }
    }
    fn reset(&mut self, _access: &mut Access) {
        self.state = PostState::default();
    }
}
