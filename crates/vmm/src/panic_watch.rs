//! Sees in what a guest prints that its kernel panicked.

/// What Linux prints first (kernel/panic.c).
const MARK: &[u8] = b"Kernel panic - not syncing";
/// Most bytes of a line that are looked at.
const LINE_LIMIT: usize = 512;

/// Watches one stream of output.
#[derive(Debug, Default)]
pub(crate) struct PanicWatch {
    line: Vec<u8>,
    found: Option<String>,
}

impl PanicWatch {
    /// The guest has printed these bytes.
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' || byte == b'\r' {
                self.end_line();
            } else if self.line.len() < LINE_LIMIT {
                self.line.push(byte);
            }
        }
    }

    /// The line that tells of the first panic since the last reset, if there was one.
    pub(crate) fn take(&mut self) -> Option<String> {
        self.end_line();
        self.found.take()
    }

    fn end_line(&mut self) {
        if self.found.is_none()
            && let Some(at) = self.line.windows(MARK.len()).position(|part| part == MARK)
        {
            let text = String::from_utf8_lossy(&self.line[at..]);
            self.found = Some(text.chars().filter(|c| !c.is_control()).collect());
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_seen_in_pieces() {
        let mut watch = PanicWatch::default();
        for part in
            ["[    1.0] x\r\n[    1.2] Kernel pa", "nic - not syncing: VFS: no root\x07\r", "\n---[ end ]"]
        {
            watch.feed(part.as_bytes());
        }
        assert_eq!(watch.take().unwrap(), "Kernel panic - not syncing: VFS: no root");
        assert_eq!(watch.take(), None);
    }

    #[test]
    fn other_output_is_not_a_panic() {
        let mut watch = PanicWatch::default();
        watch.feed(&[b'x'; 100_000]);
        assert!(watch.line.len() <= LINE_LIMIT);
        watch.feed(b"Kernel panic - not syncing");
        assert_eq!(watch.take(), None, "the line is too long to be one");
        watch.feed(b"Kernel panic");
        assert_eq!(watch.take(), None);
        watch.feed(b"Kernel panic - not syncing");
        assert!(watch.take().is_some());
    }
}
