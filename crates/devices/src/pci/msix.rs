//! MSI-X (PCI 3.0, 6.8.2): the capability, the table of vectors and the pending bits.

use serde::{Deserialize, Serialize};

use super::ConfigSpace;
use crate::Effects;
use crate::fabric::Msi;
use crate::lanes::{enabled_bits, read_dwords, write_dwords};

/// Capability id.
const ID: u8 = 0x11;
/// Message control, in the upper half of the first double word.
const ENABLE: u32 = 1 << 31;
const MASK_ALL: u32 = 1 << 30;
/// Most vectors of a function.
const MOST_VECTORS: usize = 2048;
/// Bytes of a table entry.
const ENTRY: u64 = 16;

/// A vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Vector {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

impl Default for Vector {
    /// A vector is masked after power-up (6.8.2.9).
    fn default() -> Self {
        Self { address: 0, data: 0, masked: true, pending: false }
    }
}

/// The vectors of a function. Message control is in its configuration space.
#[derive(Clone, Debug)]
pub struct Msix {
    at: u16,
    vectors: Vec<Vector>,
}

/// Saved state of an [`Msix`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    vectors: Vec<Vector>,
}

impl Msix {
    /// Adds the capability to a configuration space: `vectors` of them, whose table and pending bits lie at these
    /// offsets of the range of base address register `bar`.
    ///
    /// # Panics
    /// If there are none or too many vectors, or an offset is no multiple of 8: mistakes of the device's author.
    pub fn new(space: &mut ConfigSpace, vectors: usize, bar: u8, table: u32, pending: u32) -> Self {
        assert!(
            (1..=MOST_VECTORS).contains(&vectors) && (table | pending).is_multiple_of(8),
            "{vectors} vectors"
        );
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vectors as u16 - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        let at = space.add_capability(ID, &body, &[0, 0xc0]).into();
        Self { at, vectors: vec![Vector::default(); vectors] }
    }

    /// Number of vectors.
    pub fn vectors(&self) -> usize {
        self.vectors.len()
    }

    /// Bytes of the table.
    pub fn table_len(&self) -> u64 {
        self.vectors.len() as u64 * ENTRY
    }

    /// Whether the guest uses it.
    pub fn is_enabled(&self, space: &ConfigSpace) -> bool {
        space.read(self.at) & ENABLE != 0
    }

    /// Sends a vector's message, or notes that it is pending. Nothing happens while the capability is not enabled, or
    /// if there is no such vector.
    pub fn raise(&mut self, effects: &mut Effects, space: &ConfigSpace, vector: u16) {
        if self.is_enabled(space)
            && let Some(vector) = self.vectors.get_mut(usize::from(vector))
        {
            vector.pending = true;
            self.changed(effects, space);
        }
    }

    /// Message control or a mask may have changed: sends what is pending and no longer masked (6.8.2.10).
    pub fn changed(&mut self, effects: &mut Effects, space: &ConfigSpace) {
        let control = space.read(self.at);
        if control & ENABLE == 0 || control & MASK_ALL != 0 {
            return;
        }
        for vector in self.vectors.iter_mut().filter(|vector| vector.pending && !vector.masked) {
            vector.pending = false;
            effects.messages.push(Msi { address: vector.address, data: vector.data });
        }
    }

    /// Reads bytes at `offset` of the table.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        read_dwords(offset, data, |at| self.register(at));
    }

    fn register(&self, at: u64) -> u32 {
        let Some(vector) = self.vectors.get((at / ENTRY) as usize) else { return 0 };
        match at % ENTRY {
            0 => vector.address as u32,
            4 => (vector.address >> 32) as u32,
            8 => vector.data,
            _ => vector.masked.into(),
        }
    }

    /// Writes bytes at `offset` of the table.
    pub fn table_write(&mut self, effects: &mut Effects, space: &ConfigSpace, offset: u64, data: &[u8]) {
        write_dwords(offset, data, |at, value, enables| {
            let mask = enabled_bits(enables);
            let value = self.register(at) & !mask | value & mask;
            let Some(vector) = self.vectors.get_mut((at / ENTRY) as usize) else { return };
            match at % ENTRY {
                // The two lowest bits of an address are zero.
                0 => vector.address = vector.address & !0xffff_ffff | u64::from(value & !3),
                4 => vector.address = vector.address & 0xffff_ffff | u64::from(value) << 32,
                8 => vector.data = value,
                _ => vector.masked = value & 1 != 0,
            }
        });
        self.changed(effects, space);
    }

    /// Reads bytes at `offset` of the pending bits.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        read_dwords(offset, data, |at| {
            let first = usize::try_from(at.saturating_mul(8)).unwrap_or(usize::MAX);
            let here = self.vectors.iter().skip(first).take(32);
            here.zip(0..).fold(0, |bits, (vector, n)| bits | u32::from(vector.pending) << n)
        });
    }

    /// Back to the state after power-up.
    pub fn reset(&mut self) {
        self.vectors.fill(Vector::default());
    }

    /// The state to save; message control is in that of the configuration space.
    pub fn state(&self) -> MsixState {
        MsixState { vectors: self.vectors.clone() }
    }

    /// Takes a saved state.
    pub fn restore(&mut self, state: &MsixState) {
        let vectors = self.vectors.len();
        self.vectors.clone_from(&state.vectors);
        self.vectors.resize(vectors, Vector::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Identity;

    fn msix() -> (ConfigSpace, Msix) {
        let mut space = ConfigSpace::new(Identity::default());
        let mut msix = Msix::new(&mut space, 40, 2, 0x1000, 0x2000);
        for n in 0..40u32 {
            let mut entry = [0; 16];
            entry[..4].copy_from_slice(&(0xfee0_0000 | n << 12).to_le_bytes());
            entry[8..12].copy_from_slice(&(0x30 + n).to_le_bytes());
            entry[12] = 1;
            for (at, part) in (u64::from(n) * 16..).step_by(4).zip(entry.chunks(4)) {
                msix.table_write(&mut Effects::default(), &space, at, part);
            }
        }
        (space, msix)
    }
    fn unmask(msix: &mut Msix, space: &ConfigSpace, vector: u64) -> Vec<Msi> {
        let mut effects = Effects::default();
        msix.table_write(&mut effects, space, vector * 16 + 12, &[0; 4]);
        effects.messages
    }
    fn raise(msix: &mut Msix, space: &ConfigSpace, vector: u16) -> usize {
        let mut effects = Effects::default();
        msix.raise(&mut effects, space, vector);
        effects.messages.len()
    }
    fn pending(msix: &Msix) -> u64 {
        let mut bits = [0; 8];
        msix.pending_read(0, &mut bits);
        u64::from_le_bytes(bits)
    }

    #[test]
    fn the_capability_tells_where_everything_is() {
        let (space, msix) = msix();
        let words = [0, 4, 8].map(|at| space.read(msix.at + at));
        assert_eq!(words, [0x0027_0011, 0x1002, 0x2002]);
        let mut entry = [0; 16];
        for (n, part) in entry.chunks_mut(8).enumerate() {
            msix.table_read(39 * 16 + 8 * n as u64, part);
        }
        assert_eq!(entry, [0, 0x70, 0xe2, 0xfe, 0, 0, 0, 0, 0x57, 0, 0, 0, 1, 0, 0, 0]);
        msix.table_read(40 * 16, &mut entry[..8]);
        assert_eq!(entry[..8], [0; 8], "beyond the table");
    }

    #[test]
    fn masked_vectors_are_pending_until_they_are_unmasked() {
        let (mut space, mut msix) = msix();
        assert_eq!((raise(&mut msix, &space, 1), pending(&msix)), (0, 0), "not enabled");
        space.write(msix.at, ENABLE, 0xf);
        raise(&mut msix, &space, 1);
        raise(&mut msix, &space, 33);
        raise(&mut msix, &space, 33);
        raise(&mut msix, &space, 99);
        assert_eq!(pending(&msix), 1 << 33 | 1 << 1);
        assert_eq!(unmask(&mut msix, &space, 33), [Msi { address: 0xfee2_1000, data: 0x51 }]);
        assert_eq!(pending(&msix), 1 << 1);
        assert_eq!(raise(&mut msix, &space, 33), 1);
    }

    #[test]
    fn the_functions_mask_holds_all_back() {
        let (mut space, mut msix) = msix();
        space.write(msix.at, ENABLE | MASK_ALL, 0xf);
        assert!(unmask(&mut msix, &space, 5).is_empty());
        assert_eq!((raise(&mut msix, &space, 5), pending(&msix)), (0, 1 << 5));
        space.write(msix.at, ENABLE, 0xf);
        let mut effects = Effects::default();
        msix.changed(&mut effects, &space);
        assert_eq!((effects.messages.len(), pending(&msix)), (1, 0));
    }
}
