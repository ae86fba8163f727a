//! Doorbells: writes of a guest that signal an eventfd, and that the machine's bus does not see.

use std::{
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::EngineError;

/// Where a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IoAddress {
    /// An I/O port.
    Port(u16),
    /// A guest physical address that is not RAM.
    Memory(u64),
}

/// A write that signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// Where it begins.
    pub at: IoAddress,
    /// Only a write of this value signals; without one, every write of any width.
    pub only: Option<DoorbellValue>,
}

/// A value as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoorbellValue {
    /// Bytes of the write: 1, 2, 4 or 8 (ports at most 4).
    pub width: u8,
    /// What is written.
    pub value: u64,
}

impl Doorbell {
    /// Whether a write of these bytes to its address signals.
    fn is_rung_by(&self, data: &[u8]) -> bool {
        self.only.is_none_or(|only| {
            data.len() == usize::from(only.width)
                && data.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)) == only.value
        })
    }

    /// Whether one write could signal both.
    fn meets(&self, other: &Self) -> bool {
        self.at == other.at && (self.only.is_none() || other.only.is_none() || self.only == other.only)
    }

    fn check(&self) -> Result<(), EngineError> {
        let widths: &[u8] = match self.at {
            IoAddress::Port(_) => &[1, 2, 4],
            IoAddress::Memory(_) => &[1, 2, 4, 8],
        };
        match self.only {
            Some(only) if !widths.contains(&only.width) => Err(failed(std::io::ErrorKind::InvalidInput)),
            _ => Ok(()),
        }
    }
}

fn failed(kind: std::io::ErrorKind) -> EngineError {
    EngineError::Host { what: "cannot make a doorbell", source: kind.into() }
}

/// The doorbells of a VM.
pub trait Doorbells: Send + Sync {
    /// From now on a write signals `event`, an eventfd. No two doorbells may be rung by one write.
    fn add(&self, doorbell: Doorbell, event: OwnedFd) -> Result<(), EngineError>;
    /// Takes a doorbell away; one that is not there is none. A write under way may still signal.
    fn remove(&self, doorbell: &Doorbell);
}

type Entries = Arc<[Arc<(Doorbell, OwnedFd)>]>;

/// Doorbells that an engine itself looks for. Each vCPU has a copy, which it changes only when the table has changed.
#[derive(Default)]
pub struct DoorbellTable {
    /// Changes with each change of the entries.
    version: AtomicU64,
    /// By address.
    entries: Mutex<Entries>,
}

impl DoorbellTable {
    /// A vCPU's view of the table.
    pub fn reader(self: &Arc<Self>) -> DoorbellReader {
        DoorbellReader { table: self.clone(), version: 0, entries: Entries::default() }
    }

    fn change<R>(&self, change: impl FnOnce(&mut Vec<Arc<(Doorbell, OwnedFd)>>) -> R) -> R {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let mut list = entries.to_vec();
        let result = change(&mut list);
        *entries = list.into();
        self.version.fetch_add(1, Ordering::Release);
        result
    }
}

impl Doorbells for DoorbellTable {
    fn add(&self, doorbell: Doorbell, event: OwnedFd) -> Result<(), EngineError> {
        doorbell.check()?;
        self.change(|list| {
            if list.iter().any(|entry| entry.0.meets(&doorbell)) {
                return Err(failed(std::io::ErrorKind::AlreadyExists));
            }
            let at = list.partition_point(|entry| entry.0.at < doorbell.at);
            list.insert(at, Arc::new((doorbell, event)));
            Ok(())
        })
    }

    fn remove(&self, doorbell: &Doorbell) {
        self.change(|list| list.retain(|entry| entry.0 != *doorbell));
    }
}

/// The table as one vCPU reads it.
#[derive(Default)]
pub struct DoorbellReader {
    table: Arc<DoorbellTable>,
    version: u64,
    entries: Entries,
}

impl DoorbellReader {
    /// Whether a write was a doorbell's, which it has signalled then.
    pub fn ring(&mut self, at: IoAddress, data: &[u8]) -> bool {
        if self.table.version.load(Ordering::Acquire) != self.version {
            self.refresh();
        }
        let first = self.entries.partition_point(|entry| entry.0.at < at);
        let mut here = self.entries[first..].iter().take_while(|entry| entry.0.at == at);
        let Some(entry) = here.find(|entry| entry.0.is_rung_by(data)) else { return false };
        // It can only fail because so many signals wait already.
        let _ = rustix::io::write(&entry.1, &1u64.to_ne_bytes());
        true
    }

    #[cold]
    fn refresh(&mut self) {
        let entries = self.table.entries.lock().unwrap_or_else(PoisonError::into_inner);
        self.version = self.table.version.load(Ordering::Acquire);
        self.entries = entries.clone();
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn event() -> OwnedFd {
        eventfd(0, EventfdFlags::NONBLOCK).unwrap()
    }

    /// How often the event was signalled since the last call.
    fn signals(event: &OwnedFd) -> u64 {
        let mut count = [0; 8];
        rustix::io::read(event, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    }

    #[test]
    fn a_write_rings_the_doorbell_of_its_address_and_value() {
        let table = Arc::new(DoorbellTable::default());
        let mut reader = table.reader();
        assert!(!reader.ring(IoAddress::Port(5), &[1]));
        let value = |width, value| Some(DoorbellValue { width, value });
        let bells = [
            Doorbell { at: IoAddress::Memory(0x1000), only: value(4, 0x0102_0304) },
            Doorbell { at: IoAddress::Port(5), only: None },
            Doorbell { at: IoAddress::Memory(0x1000), only: value(2, 7) },
        ];
        let events = bells.map(|_| event());
        for (bell, event) in bells.iter().zip(&events) {
            table.add(*bell, event.try_clone().unwrap()).unwrap();
        }
        assert!(reader.ring(IoAddress::Memory(0x1000), &[4, 3, 2, 1]));
        assert!(reader.ring(IoAddress::Memory(0x1000), &[7, 0]));
        assert!(reader.ring(IoAddress::Port(5), &[9, 9]));
        assert_eq!(events.each_ref().map(signals), [1, 1, 1]);
        assert!(!reader.ring(IoAddress::Memory(0x1000), &[7]), "another width");
        assert!(!reader.ring(IoAddress::Memory(0x1000), &[4, 3, 2, 2]), "another value");
        assert!(!reader.ring(IoAddress::Memory(5), &[1]), "memory is not a port");
        table.remove(&bells[1]);
        assert!(!reader.ring(IoAddress::Port(5), &[9, 9]));
        assert_eq!(events.each_ref().map(signals), [0, 0, 0]);
    }

    #[test]
    fn doorbells_that_could_be_rung_together_are_refused() {
        let table = DoorbellTable::default();
        let at = IoAddress::Port(5);
        let only = |width, value| Doorbell { at, only: Some(DoorbellValue { width, value }) };
        table.add(only(2, 1), event()).unwrap();
        table.add(only(2, 2), event()).unwrap();
        for bell in [only(2, 1), Doorbell { at, only: None }, only(8, 1), only(3, 1)] {
            assert!(table.add(bell, event()).is_err(), "{bell:?}");
        }
    }
}
