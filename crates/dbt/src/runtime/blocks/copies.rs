//! Blocks for code that is there at another linear address as well, made of the blocks for that.

use std::ops::Range;

use super::{Block, Blocks, Key, NONE};
use crate::{
    backend::x86_64::{audit::audit, emit::Code},
    frontend::x86_64::CodeMode,
    runtime::templates::{Distance, Place, Template, is_movable},
};

/// A block that was copied.
pub(super) struct Copy {
    pub block: u32,
    mode: CodeMode,
    /// Links of the block that it was made of, and its own.
    pub links: (Range<u32>, Range<u32>),
}

impl Blocks {
    /// A block for the code at `va` on the page at host address `page`, made of one for the same code at another address.
    /// What that leads to without a guard comes along: it is on the same page, and was executed before. `None`: there is
    /// nothing to copy, or no room.
    pub fn copy(&mut self, va: u64, page: u64, mode: CodeMode) -> Option<u32> {
        let first = self.copy_one(va, page, mode)?;
        let block = first.block;
        let mut copies = vec![first];
        while let Some(Copy { mode, links: (templates, own), .. }) = copies.pop() {
            for (link, own) in templates.zip(own) {
                let link = &self.links[link as usize];
                if link.guarded || link.to == NONE {
                    continue;
                }
                let mode = CodeMode { plain: link.plain, ..mode };
                let va = self.links[own as usize].target;
                let there = self.existing(Key { va, page, mode: mode.bits() }).or_else(|| {
                    let copy = self.copy_one(va, page, mode)?;
                    let block = copy.block;
                    copies.push(copy);
                    Some(block)
                });
                if let Some(there) = there {
                    self.resolve(own, there, 0);
                }
            }
        }
        Some(block)
    }

    /// As [`Blocks::copy`], with links that lead nowhere yet.
    pub(super) fn copy_one(&mut self, va: u64, page: u64, mode: CodeMode) -> Option<Copy> {
        let place = Place::new(va, page, mode.bits());
        let template = self.templates.find(place).filter(|_| is_movable(va))?;
        let Block { va: from_va, host: from, marks, before, len, .. } = self.blocks[template.block as usize];
        let host = self.memory.used().next_multiple_of(16) as u32;
        let first_link = self.links.len() as u32;
        let by = Distance {
            guest: va.wrapping_sub(from_va),
            host: host.wrapping_sub(from),
            links: first_link - template.links.start,
        };
        let mut bytes = std::mem::take(&mut self.copied);
        self.read_unlinked(&template, from, &mut bytes);
        self.templates.relocate(&template, &mut bytes, by);
        if self.audited {
            self.audit_copy(&template, &bytes, host);
        }
        self.push_code(va, mode, &bytes)?;
        self.copied = bytes;
        self.links.extend_from_within(template.links.start as usize..template.links.end as usize);
        for link in &mut self.links[first_link as usize..] {
            link.target = link.target.wrapping_add(by.guest);
            link.site = link.site.wrapping_add(by.host);
            link.unresolved = link.unresolved.wrapping_add(by.host);
            (link.to, link.next) = (NONE, NONE);
        }
        let block = self.add(Block {
            va,
            page,
            second: 0,
            host,
            marks,
            incoming: NONE,
            before,
            len,
            mode: mode.bits() as u8,
            alive: true,
        });
        self.counts.copied += 1;
        Some(Copy { block, mode, links: (template.links, first_link..self.links.len() as u32) })
    }

    /// The code of a template, which begins at the offset `from`, with links that lead nowhere.
    fn read_unlinked(&self, template: &Template, from: u32, bytes: &mut Vec<u8>) {
        bytes.resize(template.len as usize, 0);
        self.memory.read(from as usize, bytes);
        for link in &self.links[template.links.start as usize..template.links.end as usize] {
            link.unlinked(link.site - from, link.unresolved - from, |at, word| {
                bytes[at as usize..at as usize + 4].copy_from_slice(&word.to_le_bytes());
            });
        }
    }

    fn audit_copy(&self, template: &Template, bytes: &[u8], host: u32) {
        let (links, marks, relocations) = (Vec::new(), Vec::new(), Vec::new());
        let code = Code { bytes: bytes.to_vec(), links, marks, rounds: template.rounds.clone(), relocations };
        let base = self.memory.rx_ptr() as u64 + u64::from(host);
        if let Err(what) = audit(&code, base, &self.thunks) {
            panic!("a copy of block {}: {what}", template.block);
        }
    }
}
