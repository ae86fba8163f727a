//! The keys that are for the monitor: Ctrl-A begins them.

/// Ctrl-A.
pub const ESCAPE: u8 = 0x01;

/// What a key was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// A byte for the guest.
    Guest(u8),
    /// End the machine.
    End,
    /// Show the monitor prompt.
    Monitor,
    /// Show the list of keys.
    Help,
    /// Leave the console.
    Leave,
    /// Nothing (yet).
    Nothing,
}

/// Finds the monitor's keys among the bytes of the keyboard.
#[derive(Debug, Default)]
pub struct EscapeKeys {
    escaped: bool,
}

impl EscapeKeys {
    /// What the next byte means.
    pub fn key(&mut self, byte: u8) -> Key {
        if !std::mem::take(&mut self.escaped) {
            if byte != ESCAPE {
                return Key::Guest(byte);
            }
            self.escaped = true;
            return Key::Nothing;
        }
        match byte {
            // Ctrl held down or not.
            b'x' | b'X' | 0x18 => Key::End,
            b'c' | b'C' | 0x03 => Key::Monitor,
            b'h' | b'H' | b'?' => Key::Help,
            b'd' | b'D' | 0x04 => Key::Leave,
            ESCAPE | b'a' => Key::Guest(ESCAPE),
            _ => Key::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(bytes: &[u8]) -> Vec<Key> {
        let mut escape = EscapeKeys::default();
        bytes.iter().map(|&byte| escape.key(byte)).filter(|key| *key != Key::Nothing).collect()
    }

    #[test]
    fn escapes_are_found() {
        use Key::*;
        assert_eq!(keys(b"ax\x03"), [Guest(b'a'), Guest(b'x'), Guest(3)]);
        assert_eq!(keys(b"a\x01xb"), [Guest(b'a'), End, Guest(b'b')]);
        assert_eq!(keys(b"\x01c\x01h\x01d"), [Monitor, Help, Leave]);
        assert_eq!(keys(b"\x01\x01x"), [Guest(1), Guest(b'x')]);
        assert_eq!(keys(b"\x01zx\x01"), [Guest(b'x')], "an unknown key is dropped");
    }
}
