//! Code that is written again and again, as trampolines and inline caches are. A translation of it that is executed once
//! costs several times what tier 0 needs for the few instructions, and its page has to be watched again. So a place whose
//! translation was dropped before, because single instructions were written, is interpreted some times first: the
//! oftener it was dropped the oftener, up to what a translation costs.

use super::{blocks::hash, templates::Place};

/// Places that are remembered; a power of two. One that had to make room has never been written.
const PLACES: usize = 1 << 12;
/// What is written at once, in bytes, at most: who writes more puts other code there, and not the same with another operand.
const PATCH: usize = 64;
/// Translations that were dropped are counted up to here.
const DROPS: u8 = 5;

/// What is known of a place.
#[derive(Clone, Copy, Default)]
struct Entry {
    /// The part of the place's hash that does not say where the entry is.
    tag: u16,
    /// How many translations were dropped.
    drops: u8,
    /// How many times it is to be interpreted yet.
    left: u8,
}

/// Places in code that were written after they had been translated.
pub struct Rewritten {
    /// By hash.
    places: Box<[Entry]>,
}

impl Default for Rewritten {
    fn default() -> Self {
        Self { places: vec![Entry::default(); PLACES].into() }
    }
}

impl Rewritten {
    /// The translation of the code at a place was dropped, because so many bytes were written.
    pub fn dropped(&mut self, place: Place, written: usize) {
        if written > PATCH {
            return;
        }
        let (entry, tag) = self.entry(place);
        let drops = if entry.tag == tag { (entry.drops + 1).min(DROPS) } else { 1 };
        *entry = Entry { tag, drops, left: (1 << drops) - 2 };
    }

    /// Whether the code at a place, which has no translation, is to be interpreted this time.
    pub fn interprets(&mut self, place: Place) -> bool {
        let (entry, tag) = self.entry(place);
        let interprets = entry.tag == tag && entry.left > 0;
        entry.left -= u8::from(interprets);
        interprets
    }

    fn entry(&mut self, place: Place) -> (&mut Entry, u16) {
        let hash = hash(&place);
        (&mut self.places[hash as usize % PLACES], (hash >> 48) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(rewritten: &mut Rewritten, place: Place) -> usize {
        (0..100).take_while(|_| rewritten.interprets(place)).count()
    }

    #[test]
    fn what_is_written_again_and_again_is_interpreted() {
        let mut rewritten = Rewritten::default();
        let place = Place { host: 0x7f12_3456_7008, mode: 5 };
        assert_eq!(times(&mut rewritten, place), 0, "never written");
        for expected in [0, 2, 6, 14, 30, 30] {
            rewritten.dropped(place, 4);
            assert_eq!(times(&mut rewritten, place), expected);
        }
        let others = [Place { mode: 4, ..place }, Place { host: place.host + 1, ..place }];
        assert_eq!(others.map(|other| times(&mut rewritten, other)), [0, 0], "another mode, another place");
    }

    #[test]
    fn other_code_on_the_page_is_translated_at_once() {
        let mut rewritten = Rewritten::default();
        let place = Place { host: 0x7f12_3456_7008, mode: 5 };
        (0..9).for_each(|_| rewritten.dropped(place, 4096));
        assert_eq!(times(&mut rewritten, place), 0);
    }
}
