//! The entropy device (virtio 1.2, 5.4): fills buffers with the host's random bytes.

use rustix::rand::{GetRandomFlags, getrandom};

use crate::chain::Chain;
use crate::core::Work;
use crate::device::{Device, Handler, Identity, Served, serve};
use crate::dma::Dma;
use crate::features;
use crate::ring::RingError;

/// Device type.
const KIND: u16 = 4;
/// Entries of its queue.
const ENTRIES: u16 = 64;
/// Most bytes for one chain, whatever room it has: drivers take what they get.
const MOST: u64 = 64 << 10;

/// The registers' side.
#[derive(Clone, Copy, Debug, Default)]
pub struct Entropy;

impl Device for Entropy {
    fn identity(&self) -> Identity {
        // A device that fits no other class.
        Identity { kind: KIND, pci_class: 0xff_00_00 }
    }
    fn features(&self) -> u64 {
        features::COMMON
    }
    fn queues(&self) -> Vec<u16> {
        vec![ENTRIES]
    }
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
}

/// Serves its queue.
#[derive(Clone, Copy, Debug, Default)]
pub struct EntropyHandler;

impl Handler for EntropyHandler {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        serve(&mut work.queue, dma, |chain| fill(chain, dma))
    }
}

fn fill(chain: &Chain, dma: &Dma) -> Result<u32, RingError> {
    let len = chain.writable_len().min(MOST);
    let (mut done, mut bytes) = (0, [0; 256]);
    while done < len {
        let part = &mut bytes[..(len - done).min(256) as usize];
        // The host's generator is always there once it has been seeded, and 256 bytes come whole.
        match getrandom(&mut *part, GetRandomFlags::empty()) {
            Ok(count) => {
                chain.write(dma, done, &part[..count])?;
                done += count as u64;
            }
            Err(error) => {
                tracing::warn!(%error, "the host has no random bytes");
                break;
            }
        }
    }
    Ok(done as u32)
}

#[cfg(test)]
mod tests {
    use ruse_memory::GuestRam;

    use super::*;
    use crate::chain::Buffer;
    use crate::ring::Queue;
    use crate::ring::driver::Driver;

    #[test]
    fn buffers_are_filled_with_other_bytes_each_time() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let dma = Dma::new(&ram);
        let mut driver = Driver::new(0x1_0000, 8, 0);
        let queue = Queue::new(driver.layout, 0).unwrap();
        let mut work = Work { index: 0, features: 0, resets: 0, queue };
        for at in [0x4_0000, 0x4_1000] {
            driver.add(&dma, &[(Buffer { at, len: 600 }, true)], false).unwrap();
        }
        driver.add(&dma, &[(Buffer { at: 0x5_0000, len: 0x8_0000 }, true)], false).unwrap();
        driver.add(&dma, &[(Buffer { at: 0x5_0000, len: 8 }, false)], false).unwrap();
        let served = EntropyHandler.serve(&mut work, &dma).unwrap();
        assert_eq!(served, Served { interrupt: true, more: false, ..Served::default() });
        let written: Vec<_> = std::iter::from_fn(|| driver.take(&dma)).map(|(_, written)| written).collect();
        assert_eq!(written, [600, 600, MOST as u32, 0]);
        let [mut one, mut other, mut behind] = [[0; 600]; 3];
        dma.read(0x4_0000, &mut one).unwrap();
        dma.read(0x4_1000, &mut other).unwrap();
        dma.read(0x4_0000 + 600, &mut behind).unwrap();
        assert!(one != other && one.iter().filter(|&&byte| byte == 0).count() < 50);
        assert_eq!(behind[..100], [0; 100]);
        driver.add(&dma, &[(Buffer { at: 0xfee0_0000, len: 8 }, true)], false).unwrap();
        assert!(EntropyHandler.serve(&mut work, &dma).is_err());
    }
}
