//! Which TLB entry leads to a page with the right to write: to take that right away without a look at all entries.

use ruse_memory::PAGE_SIZE;

use super::zeroed::Zeroed;

/// An entry: the number of its view and its index there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Space and view.
    pub view: usize,
    /// Index in the view.
    pub index: usize,
}

/// What is known of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// No entry.
    None,
    /// At most this one.
    One(Place),
    /// Any.
    Many,
}

const MANY: u32 = u32::MAX;
/// Bits of an index.
const INDEX_BITS: u32 = 16;

/// The writers of each page of RAM.
pub struct Writers {
    /// By region of RAM: 0 is none, [`MANY`] is many, else one more than view and index.
    regions: Vec<(u64, Zeroed<u32>)>,
}

impl Writers {
    /// None, for RAM of these regions (guest physical address, bytes).
    pub fn new(regions: impl Iterator<Item = (u64, u64)>) -> std::io::Result<Self> {
        let table = |(gpa, size): (u64, u64)| Ok((gpa, Zeroed::new((size / PAGE_SIZE).max(1) as usize)?));
        Ok(Self { regions: regions.map(table).collect::<std::io::Result<_>>()? })
    }

    /// What is known of the page.
    pub fn get(&self, gpa: u64) -> Writer {
        match self.slot(gpa).map(|(region, page)| self.regions[region].1[page]) {
            None | Some(0) => Writer::None,
            Some(MANY) => Writer::Many,
            Some(n) => Writer::One(Place {
                view: ((n - 1) >> INDEX_BITS) as usize,
                index: ((n - 1) & ((1 << INDEX_BITS) - 1)) as usize,
            }),
        }
    }

    /// Sets what is known of the page.
    pub fn set(&mut self, gpa: u64, writer: Writer) {
        let value = match writer {
            Writer::None => 0,
            Writer::One(Place { view, index }) => ((view as u32) << INDEX_BITS | index as u32) + 1,
            Writer::Many => MANY,
        };
        if let Some((region, page)) = self.slot(gpa) {
            self.regions[region].1[page] = value;
        }
    }

    fn slot(&self, gpa: u64) -> Option<(usize, usize)> {
        self.regions.iter().enumerate().find_map(|(n, (base, pages))| {
            let page = usize::try_from(gpa.checked_sub(*base)? / PAGE_SIZE).ok()?;
            (page < pages.len()).then_some((n, page))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_found() {
        let mut writers = Writers::new([(0, 0x10_0000), (1 << 32, 0x1000)].into_iter()).unwrap();
        let one = Writer::One(Place { view: 23, index: 0xffff });
        for (gpa, writer) in [(0x5000, one), (1 << 32, Writer::Many), (0xf_f000, Writer::None)] {
            writers.set(gpa, writer);
            assert_eq!(writers.get(gpa + 0xfff), writer);
        }
        assert_eq!(writers.get(0x6000), Writer::None);
        writers.set(1 << 33, one);
        assert_eq!(writers.get(1 << 33), Writer::None, "not RAM");
    }
}
