//! How the preparation of the guest tells what it is doing.

/// Told of each step as it begins and, where its length is known, of how far it has come.
pub trait Progress {
    /// A step begins; the one before it, if any, is over.
    fn step(&mut self, what: &str);
    /// The current step has come to `done` of `total` bytes.
    fn bytes(&mut self, done: u64, total: u64);
    /// The current step has come to `done` of `total` things.
    fn items(&mut self, _done: u64, _total: u64) {}
    /// Everything is done, or failed: whatever was drawn can go.
    fn finish(&mut self) {}
}

/// Says nothing.
#[derive(Debug, Default, Clone, Copy)]
pub struct Silent;

impl Progress for Silent {
    fn step(&mut self, _what: &str) {}
    fn bytes(&mut self, _done: u64, _total: u64) {}
}
