//! A device for tests of the registers: it gives every chain back at once.

use crate::core::Work;
use crate::device::{Device, Handler, Identity, Served, serve};
use crate::dma::Dma;
use crate::features;
use crate::ring::RingError;

/// Two queues, one feature, and a configuration of five bytes of which the driver can write the last.
pub(crate) struct Echo(u8);

impl Echo {
    pub(crate) fn new() -> Self {
        Self(5)
    }
}

impl Device for Echo {
    fn identity(&self) -> Identity {
        Identity { kind: 42, pci_class: 0xff_00_00 }
    }
    fn features(&self) -> u64 {
        features::COMMON | 1 << 5
    }
    fn queues(&self) -> Vec<u16> {
        vec![8, 16]
    }
    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4, self.0]
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, &[byte, ..]) = (offset, data) {
            self.0 = byte;
        }
    }
}

impl Handler for Echo {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        serve(&mut work.queue, dma, |chain| Ok(chain.writable_len() as u32))
    }
}
