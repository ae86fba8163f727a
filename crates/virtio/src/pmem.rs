//! Persistent memory (virtio 1.2, 5.19): the guest finds a file in its physical memory, and asks when all that it has written
//! there has to be on stable storage.

use std::fs::File;
use std::sync::Arc;

use crate::chain::Chain;
use crate::core::Work;
use crate::device::{Device, Handler, Identity, Served, serve};
use crate::dma::Dma;
use crate::features;
use crate::ring::RingError;

/// Device type.
const KIND: u16 = 27;
/// A memory controller of no other kind.
const PCI_CLASS: u32 = 0x05_80_00;
/// Entries of its queue.
const ENTRIES: u16 = 64;
/// The request to flush, the only one there is (5.19.6).
const FLUSH: u32 = 0;
/// What is answered to a flush (5.19.7).
const DONE: u32 = 0;
const FAILED: u32 = u32::MAX;

/// The registers' side.
#[derive(Clone, Copy, Debug)]
pub struct Pmem {
    start: u64,
    size: u64,
}

impl Pmem {
    /// A device whose file is mapped at guest address `start` for `size` bytes, with the handler of its queue.
    pub fn new(start: u64, size: u64, file: Arc<File>) -> (Self, Vec<Box<dyn Handler>>) {
        (Self { start, size }, vec![Box::new(Flush(file))])
    }
}

impl Device for Pmem {
    fn identity(&self) -> Identity {
        Identity { kind: KIND, pci_class: PCI_CLASS }
    }
    fn features(&self) -> u64 {
        features::COMMON
    }
    fn queues(&self) -> Vec<u16> {
        vec![ENTRIES]
    }
    fn config(&self) -> Vec<u8> {
        [self.start, self.size].map(u64::to_le_bytes).concat()
    }
}

/// Serves its queue.
struct Flush(Arc<File>);

impl Handler for Flush {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        serve(&mut work.queue, dma, |chain| self.request(chain, dma))
    }
}

impl Flush {
    fn request(&self, chain: &Chain, dma: &Dma) -> Result<u32, RingError> {
        let mut kind = [0; 4];
        chain.read(dma, 0, &mut kind)?;
        let answer = match u32::from_le_bytes(kind) {
            FLUSH => self.flush(),
            _ => FAILED,
        };
        chain.write(dma, 0, &answer.to_le_bytes())?;
        Ok(4)
    }

    /// The host's kernel knows which pages of a mapping were written.
    fn flush(&self) -> u32 {
        match self.0.sync_data() {
            Ok(()) => DONE,
            Err(error) => {
                tracing::warn!(%error, "persistent memory cannot be flushed");
                FAILED
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ruse_memory::GuestRam;

    use super::*;
    use crate::chain::Buffer;
    use crate::ring::Queue;
    use crate::ring::driver::Driver;

    const REQUEST: u64 = 0x4_0000;
    const ANSWER: u64 = 0x4_1000;

    /// What is answered to a request of this kind, with so much room for the answer.
    fn ask(file: File, kind: u32, room: u32) -> Result<u32, RingError> {
        let ram = GuestRam::new(1 << 20).unwrap();
        let dma = Dma::new(&ram);
        let (_, mut handlers) = Pmem::new(0, 0, Arc::new(file));
        let mut driver = Driver::new(0x1_0000, 8, 0);
        let queue = Queue::new(driver.layout, 0).unwrap();
        let mut work = Work { index: 0, features: 0, resets: 0, queue };
        dma.write(REQUEST, &kind.to_le_bytes()).unwrap();
        dma.write(ANSWER, &[0x55; 4]).unwrap();
        let parts = [(Buffer { at: REQUEST, len: 4 }, false), (Buffer { at: ANSWER, len: room }, true)];
        driver.add(&dma, &parts, false).unwrap();
        handlers[0].serve(&mut work, &dma)?;
        assert_eq!(driver.take(&dma), Some((0, 4)));
        let mut answer = [0; 4];
        dma.read(ANSWER, &mut answer).unwrap();
        Ok(u32::from_le_bytes(answer))
    }

    #[test]
    fn a_flush_is_answered_with_what_came_of_it() {
        assert_eq!(ask(tempfile::tempfile().unwrap(), FLUSH, 4).unwrap(), DONE);
        let (pipe, _other) = std::io::pipe().unwrap();
        let cannot_be_flushed = File::from(std::os::fd::OwnedFd::from(pipe));
        assert_eq!(ask(cannot_be_flushed, FLUSH, 4).unwrap(), FAILED);
    }

    #[test]
    fn other_requests_fail_and_lists_that_are_too_short_are_an_error() {
        assert_eq!(ask(tempfile::tempfile().unwrap(), 1, 4).unwrap(), FAILED);
        assert!(ask(tempfile::tempfile().unwrap(), FLUSH, 3).is_err());
    }

    #[test]
    fn the_configuration_says_where_the_memory_is() {
        let (pmem, _) = Pmem::new(0x1_4000_0000, 0x20_0000, Arc::new(tempfile::tempfile().unwrap()));
        assert_eq!(pmem.config(), [0, 0, 0, 0x40, 1, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0]);
    }
}
