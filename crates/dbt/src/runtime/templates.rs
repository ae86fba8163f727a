//! Which blocks can be copied for the same code at another linear address, and what changes in the copies. Processes share
//! the pages of libraries, but each has them elsewhere.

use std::ops::Range;

use super::{
    blocks::Map,
    packed::{put, take},
};
use crate::backend::x86_64::{asm::Relocated, emit::Code};

/// Linear addresses between which code can be moved: wherever it lies there, its addresses, and all that it can name by
/// their distance, are encoded in the same form and belong to the same half of the address space.
const MOVABLE: Range<u64> = 1 << 33..1 << 47;

/// Whether code at this linear address can be copied from elsewhere, and elsewhere from here.
pub fn is_movable(va: u64) -> bool {
    MOVABLE.contains(&va)
}

/// What is translated.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// Host address of the guest's code.
    pub host: u64,
    pub mode: u32,
}

impl Place {
    /// Of code at linear address `va`, whose page is at host address `page`.
    pub fn new(va: u64, page: u64, mode: u32) -> Self {
        Self { host: page | va & 0xfff, mode }
    }
}

/// A block that can be copied.
pub struct Template {
    pub block: u32,
    /// Bytes of its code.
    pub len: u32,
    /// Its links.
    pub links: Range<u32>,
    /// Offsets of the rounds of a loop that were counted before.
    pub rounds: Range<u32>,
    /// Where its relocations begin, and how many they are.
    relocations: (u32, u32),
}

/// How far a copy lies from its template.
#[derive(Clone, Copy)]
pub struct Distance {
    /// Of the guest's code.
    pub guest: u64,
    /// Of the host's.
    pub host: u32,
    /// Of the numbers of its links.
    pub links: u32,
}

/// The templates of a store of blocks. There are many: their descriptions are packed.
#[derive(Default)]
pub struct Templates {
    /// Block, and where its description begins.
    by_place: Map<Place, (u32, u32)>,
    bytes: Vec<u8>,
}

impl Templates {
    /// A block can be copied from now on.
    pub fn add(&mut self, place: Place, block: u32, first_link: u32, code: &Code) {
        let at = self.bytes.len() as u32;
        let Range { start, end } = code.rounds;
        let head = [code.bytes.len() as u32, first_link, code.links.len() as u32, start, end - start];
        head.into_iter().for_each(|value| put(&mut self.bytes, value));
        put(&mut self.bytes, code.relocations.len() as u32);
        let mut last = 0;
        for relocation in &code.relocations {
            put(&mut self.bytes, (relocation.at - last) * KINDS.len() as u32 + relocation.what as u32);
            last = relocation.at;
        }
        self.by_place.insert(place, (block, at));
    }

    /// The block that can be copied for a place.
    pub fn find(&self, place: Place) -> Option<Template> {
        let &(block, at) = self.by_place.get(&place)?;
        let all = &self.bytes[at as usize..];
        let mut bytes = all.iter();
        let mut next = || take(&mut bytes);
        let (len, first, links, start, rounds, count) = (next(), next(), next(), next(), next(), next());
        let at = at + (all.len() - bytes.len()) as u32;
        let (links, rounds) = (first..first + links, start..start + rounds);
        Some(Template { block, len, links, rounds, relocations: (at, count) })
    }

    /// Changes the constants in a copy of a template's code.
    pub fn relocate(&self, template: &Template, code: &mut [u8], by: Distance) {
        let (at, count) = template.relocations;
        let mut bytes = self.bytes[at as usize..].iter();
        let mut at = 0;
        for _ in 0..count {
            let word = take(&mut bytes);
            at += word as usize / KINDS.len();
            let what = KINDS[word as usize % KINDS.len()];
            let constant = &mut code[at..at + what.size()];
            match what {
                Relocated::Address => add64(constant, by.guest),
                Relocated::AddressLow => add32(constant, by.guest as u32),
                Relocated::Shared => add32(constant, by.host.wrapping_neg()),
                Relocated::Own => add32(constant, by.host),
                Relocated::Link => add32(constant, by.links),
            }
        }
    }

    /// No block is to be copied for the place any more.
    pub fn remove(&mut self, place: Place) {
        self.by_place.remove(&place);
    }

    /// Nor is any other.
    pub fn clear(&mut self) {
        self.by_place.clear();
        self.bytes.clear();
    }
}

/// By their numbers.
const KINDS: [Relocated; 5] =
    [Relocated::Address, Relocated::AddressLow, Relocated::Shared, Relocated::Own, Relocated::Link];

fn add64(constant: &mut [u8], by: u64) {
    let value = u64::from_le_bytes((&*constant).try_into().expect("eight bytes"));
    constant.copy_from_slice(&value.wrapping_add(by).to_le_bytes());
}

fn add32(constant: &mut [u8], by: u32) {
    let value = u32::from_le_bytes((&*constant).try_into().expect("four bytes"));
    constant.copy_from_slice(&value.wrapping_add(by).to_le_bytes());
}
