//! The block device (virtio 1.2, 5.2) over a [`Disk`].

mod request;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::sync::Arc;

use ruse_block::Disk;

use crate::core::Work;
use crate::device::{Device, Handler, Identity, Served, serve};
use crate::dma::Dma;
use crate::features;
use crate::ring::RingError;
use request::Request;

/// Device type.
const KIND: u16 = 2;
/// A mass storage controller of no kind that PCI knows.
const PCI_CLASS: u32 = 0x01_80_00;
/// Entries of each queue.
pub const ENTRIES: u16 = 256;
/// Bytes of a sector, which is what drivers count in (5.2.4).
pub const SECTOR: u64 = 512;
/// Bytes of a serial number (5.2.6.1).
pub const SERIAL_LEN: usize = 20;
/// The most sectors and ranges of a request to discard or to zero.
const MOST_SECTORS: u32 = 1 << 17;
const MOST_RANGES: u32 = 16;

/// Feature bits (5.2.3).
mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// A disk, and how the guest sees it.
#[derive(Clone)]
pub struct Block {
    disk: Arc<dyn Disk>,
    serial: [u8; SERIAL_LEN],
    queues: u16,
    common_features: u64,
}

impl Block {
    /// A block device with `queues` queues (at least one). Of `serial`, the first 20 bytes count.
    pub fn new(disk: Arc<dyn Disk>, serial: &str, queues: u16) -> Self {
        let mut bytes = [0; SERIAL_LEN];
        bytes.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        Self { disk, serial: bytes, queues: queues.max(1), common_features: features::COMMON }
    }

    /// The same with split rings only, for drivers that make mistakes with packed ones.
    pub fn with_split_rings(self) -> Self {
        Self { common_features: self.common_features & !features::RING_PACKED, ..self }
    }

    /// What serves one of its queues.
    pub fn handler(&self) -> BlockHandler {
        BlockHandler { disk: self.disk.clone(), serial: self.serial, complained: Cell::new(false) }
    }

    /// Whole sectors of the disk.
    fn sectors(&self) -> u64 {
        self.disk.size() / SECTOR
    }
}

impl Device for Block {
    fn identity(&self) -> Identity {
        Identity { kind: KIND, pci_class: PCI_CLASS }
    }

    fn features(&self) -> u64 {
        let writes = match self.disk.is_read_only() {
            true => feature::RO,
            false => feature::DISCARD | feature::WRITE_ZEROES,
        };
        let queues = if self.queues > 1 { feature::MQ } else { 0 };
        let own = feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH | feature::TOPOLOGY;
        self.common_features | own | writes | queues
    }

    fn queues(&self) -> Vec<u16> {
        vec![ENTRIES; self.queues.into()]
    }

    /// The configuration (5.2.4).
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors().to_le_bytes());
        // Each request has a header and a status beside its data.
        put(12, &(u32::from(ENTRIES) - 2).to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Blocks of the storage behind it: 4 KiB, which are best written whole.
        put(24, &[3, 0]);
        put(26, &8u16.to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        put(36, &MOST_SECTORS.to_le_bytes());
        put(40, &MOST_RANGES.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        put(48, &MOST_SECTORS.to_le_bytes());
        put(52, &MOST_RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }
}

/// Serves one queue of a block device; each has its own.
pub struct BlockHandler {
    disk: Arc<dyn Disk>,
    serial: [u8; SERIAL_LEN],
    /// The disk has failed before, of which the log tells once.
    complained: Cell<bool>,
}

impl Handler for BlockHandler {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        // A driver that knows of no flush relies on what is written being there (5.2.6.2).
        let write_through = work.features & feature::FLUSH == 0;
        serve(&mut work.queue, dma, |chain| {
            let (disk, serial, complained) = (&*self.disk, &self.serial, &self.complained);
            Request { chain, dma, disk, serial, write_through, complained }.serve()
        })
    }
}
