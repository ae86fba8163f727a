//! What the scratch registers hold: copies of guest registers that live in the vCPU block.
//!
//! The block is always up to date; a copy saves the load from there, and the time from a store to the load of the same. Copies
//! are kept from one instruction of the identity lane to the next, as long as nothing else needs the register.

use super::{
    Home,
    asm::{
        Mem,
        host::{T0, T1},
    },
    emit::Emitter,
    home,
};
use crate::ir::Op;

/// The registers that copies may be in.
const SCRATCH: [u8; 2] = [T0, T1];

/// Guest registers of which [`SCRATCH`] hold copies.
#[derive(Default)]
pub(super) struct Copies {
    of: [Option<u8>; 2],
    /// The code that is being made tells when it changes a scratch register.
    kept: bool,
}

impl Emitter<'_> {
    /// Before the code of an operation.
    pub(super) fn copies_at(&mut self, op: &Op) {
        self.copies.kept = matches!(op, Op::Host(_) | Op::Address);
        if !self.copies.kept && !matches!(op, Op::Nop | Op::Branch { .. }) {
            self.copies.of = [None; 2];
        }
    }

    /// Nothing is known of the scratch registers.
    pub(super) fn forget_copies(&mut self) {
        self.copies = Copies::default();
        self.held = None;
    }

    /// A scratch register is about to change.
    pub(super) fn changes(&mut self, scratch: u8) {
        self.copies.of[usize::from(scratch == T1)] = None;
        if scratch == T0 {
            self.held = None;
        }
    }

    /// A scratch register now holds what the guest register does.
    pub(super) fn copied(&mut self, guest: u8, scratch: u8) {
        if self.copies.kept {
            self.copies.of = self.copies.of.map(|of| of.filter(|&other| other != guest));
            self.copies.of[usize::from(scratch == T1)] = Some(guest);
        }
    }

    /// The scratch register with a copy of the guest register.
    pub(super) fn copy_of(&self, guest: u8) -> Option<u8> {
        self.copies.of.iter().position(|&of| of == Some(guest)).map(|n| SCRATCH[n])
    }

    /// Host register with the guest register's value; `scratch` is loaded if it lives in the block and there is no copy.
    pub(super) fn loaded(&mut self, guest: u8, scratch: u8) -> u8 {
        match (home(guest), self.copy_of(guest)) {
            (Home::Host(r), _) | (_, Some(r)) => r,
            (Home::Block(at), None) => {
                self.changes(scratch);
                self.asm.load(scratch, Mem::Block(at));
                self.copied(guest, scratch);
                scratch
            }
        }
    }

    /// As [`Self::loaded`] for the registers of an address.
    pub(super) fn both_loaded(&mut self, base: Option<u8>, index: Option<u8>) -> (Option<u8>, Option<u8>) {
        let index_now = index.and_then(|index| self.copy_of(index));
        let base = base.map(|base| self.loaded(base, if index_now == Some(T0) { T1 } else { T0 }));
        let index = index.map(|index| self.loaded(index, if base == Some(T1) { T0 } else { T1 }));
        (base, index)
    }

    /// A scratch register for a guest register that lives in the block, not one of the `taken`; whether it holds a copy.
    pub(super) fn scratch_for(&mut self, guest: u8, taken: &[u8]) -> Option<(u8, bool)> {
        if let Some(copy) = self.copy_of(guest).filter(|copy| !taken.contains(copy)) {
            return Some((copy, true));
        }
        let of_use = |r: u8| self.copies.of[usize::from(r == T1)].is_some() || r == T0 && self.held.is_some();
        let free = SCRATCH.into_iter().filter(|r| !taken.contains(r));
        let scratch = free.min_by_key(|&r| of_use(r))?;
        self.changes(scratch);
        Some((scratch, false))
    }
}
