//! The driver's side of a queue, for tests: it lays the rings out, makes chains available and takes them back.

use super::Layout;
use crate::chain::Buffer;
use crate::dma::Dma;
use crate::features;

/// A buffer of a chain, and whether the device writes it.
pub type Part = (Buffer, bool);

/// A driver of one queue.
pub struct Driver {
    /// Where the queue is.
    pub layout: Layout,
    packed: bool,
    event_index: bool,
    /// Descriptors that are free; a packed ring counts them only.
    free: Vec<u16>,
    /// For each id, its descriptors.
    in_flight: Vec<Vec<u16>>,
    next: u16,
    next_used: u16,
    wrap: bool,
    used_wrap: bool,
    /// Where tables of descriptors go, one after the other.
    tables: u64,
}

impl Driver {
    /// A queue of `size` entries in the 64 KiB from `at` on.
    pub fn new(at: u64, size: u16, features: u64) -> Self {
        let packed = features & features::RING_PACKED != 0;
        let bytes = u64::from(size) * 16;
        let layout = Layout { size, descriptors: at, driver: at + bytes, device: at + bytes + 0x4000 };
        Self {
            layout,
            packed,
            event_index: features & features::EVENT_IDX != 0,
            free: (0..size).rev().collect(),
            in_flight: vec![Vec::new(); size.into()],
            next: 0,
            next_used: 0,
            wrap: true,
            used_wrap: true,
            tables: at + 0xc000,
        }
    }

    /// Makes a chain available, if there is room, in a table of its own where `indirect` says so; gives its id.
    pub fn add(&mut self, dma: &Dma, parts: &[Part], indirect: bool) -> Option<u16> {
        let needed = if indirect { 1 } else { parts.len() };
        if self.free.len() < needed || parts.is_empty() {
            return None;
        }
        let taken: Vec<u16> = (0..needed).filter_map(|_| self.free.pop()).collect();
        let id = taken[0];
        let table = indirect.then(|| self.write_table(dma, parts));
        let chain: Vec<(Buffer, u16)> = match table {
            Some(table) => vec![(table, super::descriptor::INDIRECT)],
            None => flags_of(parts),
        };
        if self.packed {
            self.add_packed(dma, &chain, id)
        } else {
            self.add_split(dma, &chain, &taken)
        }
        self.in_flight[usize::from(id)] = taken;
        Some(id)
    }

    fn write_table(&mut self, dma: &Dma, parts: &[Part]) -> Buffer {
        let at = self.tables;
        for (n, (buffer, flags)) in (0..).zip(flags_of(parts)) {
            // In a packed ring's table a descriptor's place is all that says what follows.
            let words = if self.packed { [0, flags & !1] } else { [flags, n + 1] };
            write_descriptor(dma, at, n, buffer, words);
        }
        self.tables += 16 * parts.len() as u64;
        if self.tables > self.layout.descriptors + 0xe000 {
            self.tables = self.layout.descriptors + 0xc000;
        }
        Buffer { at, len: 16 * parts.len() as u32 }
    }

    fn add_split(&mut self, dma: &Dma, chain: &[(Buffer, u16)], taken: &[u16]) {
        for (n, (&index, &(buffer, flags))) in taken.iter().zip(chain).enumerate() {
            let next = taken.get(n + 1).copied().unwrap_or(0);
            write_descriptor(dma, self.layout.descriptors, index, buffer, [flags, next]);
        }
        let entry = u64::from(self.next % self.layout.size);
        dma.store(self.layout.driver + 4 + 2 * entry, taken[0]).expect("the ring is in RAM");
        self.next = self.next.wrapping_add(1);
        dma.store(self.layout.driver + 2, self.next).expect("the ring is in RAM");
    }

    fn add_packed(&mut self, dma: &Dma, chain: &[(Buffer, u16)], id: u16) {
        let head = self.next;
        let mut head_flags = 0;
        for (n, &(buffer, flags)) in chain.iter().enumerate() {
            let flags = flags | if self.wrap { 1 << 7 } else { 1 << 15 };
            let shown = if n == 0 { 0 } else { flags };
            if n == 0 {
                head_flags = flags;
                // Not yet available: neither flag is this round's.
                let old = dma
                    .load(self.layout.descriptors + 16 * u64::from(head) + 14)
                    .expect("the ring is in RAM");
                write_descriptor(dma, self.layout.descriptors, head, buffer, [id, old]);
            } else {
                write_descriptor(dma, self.layout.descriptors, self.next, buffer, [id, shown]);
            }
            self.next += 1;
            if self.next == self.layout.size {
                self.next = 0;
                self.wrap = !self.wrap;
            }
        }
        dma.store(self.layout.descriptors + 16 * u64::from(head) + 14, head_flags)
            .expect("the ring is in RAM");
    }

    /// Takes the next chain that the device has given back: its id and what was written.
    pub fn take(&mut self, dma: &Dma) -> Option<(u16, u32)> {
        let (id, written) = if self.packed { self.take_packed(dma)? } else { self.take_split(dma)? };
        let taken = std::mem::take(&mut self.in_flight[usize::from(id)]);
        assert!(!taken.is_empty(), "{id} was not in flight");
        if self.packed {
            let next = u32::from(self.next_used) + taken.len() as u32;
            self.used_wrap ^= next >= u32::from(self.layout.size);
            self.next_used = (next % u32::from(self.layout.size)) as u16;
        }
        self.free.extend(taken);
        Some((id, written))
    }

    fn take_split(&mut self, dma: &Dma) -> Option<(u16, u32)> {
        if dma.load(self.layout.device + 2).expect("the ring is in RAM") == self.next_used {
            return None;
        }
        let mut bytes = [0; 8];
        let entry = u64::from(self.next_used % self.layout.size);
        dma.read(self.layout.device + 4 + 8 * entry, &mut bytes).expect("the ring is in RAM");
        self.next_used = self.next_used.wrapping_add(1);
        let [a, b, c, d, e, f, g, h] = bytes;
        Some((u32::from_le_bytes([a, b, c, d]) as u16, u32::from_le_bytes([e, f, g, h])))
    }

    fn take_packed(&mut self, dma: &Dma) -> Option<(u16, u32)> {
        let at = self.layout.descriptors + 16 * u64::from(self.next_used);
        let flags = dma.load(at + 14).expect("the ring is in RAM");
        if (flags & 1 << 7 != 0) != self.used_wrap || (flags & 1 << 15 != 0) != self.used_wrap {
            return None;
        }
        let mut bytes = [0; 6];
        dma.read(at + 8, &mut bytes).expect("the ring is in RAM");
        let [a, b, c, d, e, f] = bytes;
        Some((u16::from_le_bytes([e, f]), u32::from_le_bytes([a, b, c, d])))
    }

    /// Asks for an interrupt at the next chain that is given back, or for none.
    pub fn ask_for_interrupts(&self, dma: &Dma, on: bool) {
        let (layout, place) = (&self.layout, self.next_used);
        let store = |at, word| dma.store(at, word).expect("the ring is in RAM");
        match (self.packed, self.event_index && on) {
            (false, true) => store(layout.driver + 4 + 2 * u64::from(layout.size), place),
            (false, false) => store(layout.driver, u16::from(!on)),
            (true, true) => {
                store(layout.driver, place | if self.used_wrap { 1 << 15 } else { 0 });
                store(layout.driver + 2, 2);
            }
            (true, false) => store(layout.driver + 2, u16::from(!on)),
        }
    }

    /// Whether the device wants to know of a chain that was just made available.
    pub fn must_notify(&self, dma: &Dma) -> bool {
        let load = |at| dma.load(at).expect("the ring is in RAM");
        let layout = &self.layout;
        match (self.packed, self.event_index) {
            (false, false) => load(layout.device) & 1 == 0,
            (false, true) => {
                load(layout.device + 4 + 8 * u64::from(layout.size)) == self.next.wrapping_sub(1)
            }
            (true, _) => load(layout.device + 2) != 1,
        }
    }
}

fn flags_of(parts: &[Part]) -> Vec<(Buffer, u16)> {
    let last = parts.len() - 1;
    let flags = |n, writable| u16::from(n != last) | u16::from(writable) << 1;
    parts.iter().enumerate().map(|(n, &(buffer, writable))| (buffer, flags(n, writable))).collect()
}

fn write_descriptor(dma: &Dma, table: u64, index: u16, buffer: Buffer, words: [u16; 2]) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&buffer.at.to_le_bytes());
    bytes[8..12].copy_from_slice(&buffer.len.to_le_bytes());
    bytes[12..14].copy_from_slice(&words[0].to_le_bytes());
    bytes[14..].copy_from_slice(&words[1].to_le_bytes());
    dma.write(table + 16 * u64::from(index), &bytes).expect("the table is in RAM");
}
