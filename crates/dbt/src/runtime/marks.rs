//! Tables that say to which guest instruction each piece of generated code belongs, packed: they are as many as the
//! instructions, and read only at faults.

use super::packed::{put, take};
use crate::backend::x86_64::emit::Mark;

/// The tables of many blocks, one behind the other.
#[derive(Default)]
pub struct Marks {
    bytes: Vec<u8>,
}

impl Marks {
    /// Adds a table of marks with ascending host offsets; returns where it begins.
    pub fn push(&mut self, marks: &[Mark]) -> u32 {
        let at = self.bytes.len() as u32;
        put(&mut self.bytes, marks.len() as u32);
        let (mut host, mut guest) = (0, 0);
        for mark in marks {
            put(&mut self.bytes, mark.host - host);
            // Offsets go back where code is out of line.
            let step = i32::from(mark.guest) - guest;
            let step = (step << 1 ^ step >> 31) as u32;
            put(&mut self.bytes, step << 1 | u32::from(mark.host_flags));
            (host, guest) = (mark.host, i32::from(mark.guest));
        }
        at
    }

    /// The last mark at or before the host offset `inside`, of the table that begins at `table`.
    pub fn find(&self, table: u32, inside: u32) -> Option<Mark> {
        let mut bytes = self.bytes.get(table as usize..)?.iter();
        let (mut host, mut guest, mut found) = (0, 0, None);
        for _ in 0..take(&mut bytes) {
            host += take(&mut bytes);
            let word = take(&mut bytes);
            let step = word >> 1;
            guest += (step >> 1) as i32 ^ -((step & 1) as i32);
            if host > inside {
                break;
            }
            found = Some(Mark { host, guest: guest as u16, host_flags: word & 1 != 0 });
        }
        found
    }

    /// Forgets all tables.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_found_as_they_were_put() {
        let mark = |host, guest, host_flags| Mark { host, guest, host_flags };
        let first = [mark(0, 0, false), mark(0, 0, true), mark(200, 4095, true), mark(20_000, 3, false)];
        let second = [mark(5, 7, true)];
        let mut marks = Marks::default();
        let (a, b) = (marks.push(&first), marks.push(&second));
        for (inside, expected) in [(0, first[1]), (199, first[1]), (200, first[2]), (1 << 20, first[3])] {
            assert_eq!(marks.find(a, inside), Some(expected));
        }
        assert_eq!(marks.find(b, 4), None);
        assert_eq!(marks.find(b, 5), Some(second[0]));
    }
}
