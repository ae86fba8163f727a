//! What a program has found, as one number.

/// A sum over values in their order.
#[derive(Clone, Copy, Default)]
pub struct Digest(u64);

impl Digest {
    /// Adds a value.
    pub fn add(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    /// The sum.
    pub fn value(self) -> u64 {
        self.0
    }
}
