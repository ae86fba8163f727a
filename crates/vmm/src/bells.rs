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

impl Bells {
    /// From now on a ring signals `event`, an eventfd.
    pub(crate) fn add(&self, ring: Ring, event: OwnedFd) {
        lock(&self.events).insert(ring, event);
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

    /// The doorbells are at other addresses. Where the engine cannot catch one, its writes are accesses like others.
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
            let added = event
                .try_clone()
                .map_err(|error| error.to_string())
                .and_then(|event| engine.add(doorbell(bell), event).map_err(|error| error.to_string()));
            match added {
                Ok(()) => caught.push(*bell),
                Err(error) => tracing::warn!(error, ?bell, "a doorbell goes the long way"),
            }
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
