//! The doorbells of devices: the eventfds that wake who serves them, and where the engine catches a guest's writes to them.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use ruse_devices::Ring;
use ruse_devices::pci::PciDoorbell;
use ruse_engine::{Doorbell, Doorbells, IoAddress};

use crate::platform::lock;

/// All doorbells of a machine.
#[derive(Default)]
pub(crate) struct Bells {
    events: Mutex<BTreeMap<Ring, OwnedFd>>,
    /// Where the engine catches them.
    caught: Mutex<Vec<PciDoorbell>>,
}

fn doorbell(at: &PciDoorbell) -> Doorbell {
    Doorbell { at: IoAddress::Memory(at.address), only: None }
}

fn signal(event: &OwnedFd) {
    // It can only fail because so many signals wait already.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// Says whether the engine catches a doorbell from now on. If not, its writes are accesses like others.
fn catch(engine: &dyn Doorbells, doorbell: Doorbell, event: &OwnedFd) -> bool {
    let added = event
        .try_clone()
        .map_err(|error| error.to_string())
        .and_then(|event| engine.add(doorbell, event).map_err(|error| error.to_string()));
    if let Err(error) = &added {
        tracing::warn!(error, ?doorbell, "a doorbell goes the long way");
    }
    added.is_ok()
}

impl Bells {
    /// From now on a ring signals `event`, an eventfd.
    pub(crate) fn add(&self, ring: Ring, event: OwnedFd) {
        lock(&self.events).insert(ring, event);
    }

    /// From now on the rings of a device signal nobody; who serves it is woken a last time.
    pub(crate) fn remove(&self, source: u16) {
        lock(&self.events).retain(|ring, event| {
            let stays = ring.source != source;
            if !stays {
                signal(event);
            }
            stays
        });
    }

    /// Signals the eventfd of a doorbell that the engine has not caught.
    pub(crate) fn ring(&self, ring: Ring) {
        if let Some(event) = lock(&self.events).get(&ring) {
            signal(event);
        }
    }

    /// Signals all of them.
    pub(crate) fn ring_all(&self) {
        lock(&self.events).values().for_each(signal);
    }

    /// The doorbells of PCI functions are at other addresses.
    pub(crate) fn move_to(&self, engine: &dyn Doorbells, now: &[PciDoorbell]) {
        let events = lock(&self.events);
        let mut caught = lock(&self.caught);
        caught.retain(|bell| {
            let stays = now.contains(bell);
            if !stays {
                engine.remove(&doorbell(bell));
            }
            stays
        });
        for bell in now {
            let ring = Ring { source: bell.source, number: bell.number };
            let Some(event) = events.get(&ring).filter(|_| !caught.contains(bell)) else { continue };
            if catch(engine, doorbell(bell), event) {
                caught.push(*bell);
            }
        }
    }

    /// A doorbell is at one place for ever.
    pub(crate) fn stay_at(&self, engine: &dyn Doorbells, doorbell: Doorbell, ring: Ring) {
        if let Some(event) = lock(&self.events).get(&ring) {
            catch(engine, doorbell, event);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ruse_engine::DoorbellTable;
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn doorbells_are_caught_where_they_are_now() {
        let (bells, table) = (Bells::default(), Arc::new(DoorbellTable::default()));
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        bells.add(Ring { source: 8, number: 1 }, event.try_clone().unwrap());
        let mut reader = table.reader();
        let mut rings = |address| reader.ring(IoAddress::Memory(address), &[1, 0]);
        let bell = |address, number| PciDoorbell { address, source: 8, number };
        bells.move_to(&*table, &[bell(0x1000, 1), bell(0x1004, 2)]);
        assert_eq!([0x1000, 0x1004].map(&mut rings), [true, false], "nobody serves number 2");
        bells.move_to(&*table, &[bell(0x2000, 1)]);
        assert_eq!([0x1000, 0x2000].map(&mut rings), [false, true]);
        bells.move_to(&*table, &[]);
        assert!(!rings(0x2000));
        bells.ring(Ring { source: 8, number: 1 });
        bells.ring(Ring { source: 9, number: 1 });
        let mut count = [0; 8];
        rustix::io::read(&event, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 3);
    }
}
