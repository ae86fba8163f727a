//! Values with numbers that are never given twice.

/// Generations, after which a number comes again: they are part of an event's name of 64 bits.
const GENERATIONS: u32 = 1 << 24;

/// The number of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Id {
    index: u32,
    generation: u32,
}

impl Id {
    /// In 56 bits.
    pub(super) fn bits(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    /// From [`Id::bits`].
    pub(super) fn from_bits(bits: u64) -> Self {
        Self { index: bits as u32, generation: (bits >> 32) as u32 % GENERATIONS }
    }
}

/// The values.
pub(super) struct Slab<T> {
    entries: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(super) fn new() -> Self {
        Self { entries: Vec::new(), free: Vec::new() }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub(super) fn insert(&mut self, value: T) -> Id {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push((0, None));
            self.entries.len() as u32 - 1
        });
        let (generation, place) = &mut self.entries[index as usize];
        *place = Some(value);
        Id { index, generation: *generation }
    }

    pub(super) fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        let (generation, place) = self.entries.get_mut(id.index as usize)?;
        if *generation == id.generation { place.as_mut() } else { None }
    }

    pub(super) fn remove(&mut self, id: Id) -> Option<T> {
        let (generation, place) = self.entries.get_mut(id.index as usize)?;
        let value = if *generation == id.generation { place.take() } else { None }?;
        *generation = (*generation + 1) % GENERATIONS;
        self.free.push(id.index);
        Some(value)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (Id, &mut T)> {
        (0..).zip(&mut self.entries).filter_map(|(index, (generation, place))| {
            Some((Id { index, generation: *generation }, place.as_mut()?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_names_one_value_only() {
        let mut slab = Slab::new();
        let (a, b) = (slab.insert('a'), slab.insert('b'));
        assert_eq!(Id::from_bits(a.bits()), a);
        assert_eq!((slab.remove(a), slab.remove(a), slab.len()), (Some('a'), None, 1));
        let c = slab.insert('c');
        let mut get = |id| slab.get_mut(id).copied();
        assert_eq!((get(a), get(b), get(c)), (None, Some('b'), Some('c')));
        assert_eq!(slab.iter_mut().map(|(id, value)| (id, *value)).collect::<Vec<_>>(), [(c, 'c'), (b, 'b')]);
    }
}
