//! What all transports have registers for: status, features, queues and the configuration's generation (virtio 1.2, 2.1 to
//! 2.6 and 3.1).

use serde::{Deserialize, Serialize};

use crate::device::{Device, Identity, Served};
use crate::features;
use crate::ring::{Layout, Queue, RingError};

/// Bits of the device status (2.1).
mod status {
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
}

/// What a transport has to pass on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// To the driver: chains of a queue were given back.
    Used(u16),
    /// To the driver: the configuration or the status has changed.
    Config,
    /// To whoever serves this queue: there may be work.
    Serve(u16),
}

/// A queue that is lent to its handler, with what was negotiated.
#[derive(Debug)]
pub struct Work {
    /// Its number.
    pub index: u16,
    /// The features.
    pub features: u64,
    /// How often the device has been reset: what a handler keeps about its driver ends when it changes.
    pub resets: u64,
    /// The queue.
    pub queue: Queue,
}

/// Where a queue is.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// It is not enabled.
    Nowhere,
    /// Here.
    Here(Queue),
    /// Lent to its handler.
    Away,
}

#[derive(Debug)]
struct Slot {
    most: u16,
    layout: Layout,
    place: Place,
    /// It is to be reset when it has come back (2.6.1).
    resetting: bool,
    /// Somebody outside may still touch its buffers ([`Served::outside`]).
    outside: bool,
}

impl Slot {
    fn new(most: u16) -> Self {
        Self {
            most,
            layout: Layout { size: most, ..Layout::default() },
            place: Place::Nowhere,
            resetting: false,
            outside: false,
        }
    }

    fn is_busy(&self) -> bool {
        self.outside || self.place == Place::Away
    }
}

/// The registers of a device behind any transport.
pub struct Core {
    device: Box<dyn Device>,
    status: u8,
    driver_features: u64,
    generation: u8,
    slots: Vec<Slot>,
    resets: u64,
    /// All is to be reset when the last queue has come back. Until then the driver sees the old status.
    resetting: bool,
    notices: Vec<Notice>,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core")
            .field("identity", &self.device.identity())
            .field("status", &self.status)
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}

/// Saved state of a [`Core`] none of whose queues is lent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreState {
    status: u8,
    driver_features: u64,
    generation: u8,
    queues: Vec<(Layout, Option<Queue>)>,
}

impl Core {
    /// The registers after power-up.
    pub fn new(device: Box<dyn Device>) -> Self {
        let slots = device.queues().into_iter().map(Slot::new).collect();
        Self {
            device,
            status: 0,
            driver_features: 0,
            generation: 0,
            slots,
            resets: 0,
            resetting: false,
            notices: Vec::new(),
        }
    }

    /// Who the device is.
    pub fn identity(&self) -> Identity {
        self.device.identity()
    }

    /// Takes what is to be passed on.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Which thread serves queue `index` ([`Device::thread`]).
    pub fn thread(&self, index: u16) -> u16 {
        self.device.thread(index)
    }

    /// The features that are offered.
    pub fn features(&self) -> u64 {
        self.device.features()
    }

    /// The features that the driver has taken.
    pub fn driver_features(&self) -> u64 {
        self.driver_features
    }

    /// The driver takes features; no more once they are agreed on.
    pub fn set_driver_features(&mut self, features: u64) {
        if self.status & status::FEATURES_OK == 0 {
            self.driver_features = features;
        }
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// The driver writes the device status; 0 asks for a reset.
    pub fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.resetting = true;
            let outside = |index: &u16| self.slots[usize::from(*index)].outside;
            self.notices.extend((0..self.slots.len() as u16).filter(outside).map(Notice::Serve));
            self.finish_reset();
            return;
        }
        if self.resetting {
            return;
        }
        let mut new = value & !status::NEEDS_RESET | self.status & status::NEEDS_RESET;
        let agreed =
            self.driver_features & !self.features() == 0 && self.driver_features & features::VERSION_1 != 0;
        if !agreed {
            new &= !status::FEATURES_OK;
        }
        if new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        let starts = new & !self.status & status::DRIVER_OK != 0;
        self.status = new;
        if starts {
            // What was made available before was notified to nobody.
            self.notices.extend((0..self.slots.len() as u16).map(Notice::Serve));
        }
    }

    /// Back to the state after power-up, if no queue is lent.
    fn finish_reset(&mut self) {
        if self.resetting && !self.is_busy() {
            self.resetting = false;
            self.resets += 1;
            (self.status, self.driver_features, self.generation) = (0, 0, 0);
            self.slots = self.slots.iter().map(|slot| Slot::new(slot.most)).collect();
            // Whoever serves a queue learns that its driver has gone.
            self.notices = (0..self.slots.len() as u16).map(Notice::Serve).collect();
        }
    }

    /// How often the device has been reset.
    pub fn resets(&self) -> u64 {
        self.resets
    }

    /// Whether a queue is lent, or its buffers are.
    pub fn is_busy(&self) -> bool {
        self.slots.iter().any(Slot::is_busy)
    }

    /// Whether the driver has the device running.
    fn is_live(&self) -> bool {
        self.status & status::DRIVER_OK != 0 && self.status & status::NEEDS_RESET == 0 && !self.resetting
    }

    /// Number of queues.
    pub fn queues(&self) -> u16 {
        self.slots.len() as u16
    }

    /// Where queue `index` is to be; all zero if there is no such queue.
    pub fn layout(&self, index: u16) -> Layout {
        self.slots.get(usize::from(index)).map_or_else(Layout::default, |slot| slot.layout)
    }

    /// The most entries of queue `index`; 0 if there is no such queue.
    pub fn most_entries(&self, index: u16) -> u16 {
        self.slots.get(usize::from(index)).map_or(0, |slot| slot.most)
    }

    /// The driver changes where queue `index` is to be, which it can while the queue is not enabled.
    pub fn set_layout(&mut self, index: u16, change: impl FnOnce(&mut Layout)) {
        if let Some(slot) = self.slots.get_mut(usize::from(index))
            && slot.place == Place::Nowhere
            && !self.resetting
        {
            change(&mut slot.layout);
        }
    }

    /// Whether queue `index` is enabled.
    pub fn is_enabled(&self, index: u16) -> bool {
        self.slots.get(usize::from(index)).is_some_and(|slot| slot.place != Place::Nowhere)
    }

    /// The driver enables queue `index`. A queue that cannot be where it is to be, or has not got its features yet, stays as
    /// it is, which the driver sees.
    pub fn enable(&mut self, index: u16) {
        let agreed = self.status & status::FEATURES_OK != 0 && !self.resetting;
        let live = self.is_live();
        let Some(slot) =
            self.slots.get_mut(usize::from(index)).filter(|slot| agreed && slot.place == Place::Nowhere)
        else {
            return;
        };
        match Queue::new(slot.layout, self.driver_features).filter(|_| slot.layout.size <= slot.most) {
            Some(queue) => slot.place = Place::Here(queue),
            None => tracing::debug!(index, layout = ?slot.layout, "a queue cannot be there"),
        }
        if live {
            self.notices.push(Notice::Serve(index));
        }
    }

    /// Whether a reset of queue `index` alone is under way.
    pub fn is_queue_resetting(&self, index: u16) -> bool {
        self.slots.get(usize::from(index)).is_some_and(|slot| slot.resetting)
    }

    /// The driver resets queue `index` alone.
    pub fn reset_queue(&mut self, index: u16) {
        if self.driver_features & features::RING_RESET != 0 {
            self.stop_queue(index);
        }
    }

    /// The driver does without queue `index`, which stays enabled until it has come back.
    pub fn stop_queue(&mut self, index: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            if slot.is_busy() {
                slot.resetting = true;
                // Its handler takes back what is outside.
                self.notices.extend(slot.outside.then_some(Notice::Serve(index)));
            } else {
                *slot = Slot::new(slot.most);
            }
        }
    }

    /// Nobody outside touches buffers of queue `index` any more, and what was not answered is forgotten.
    pub fn recalled(&mut self, index: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(index)).filter(|slot| slot.outside) else { return };
        slot.outside = false;
        if slot.resetting {
            *slot = Slot::new(slot.most);
        }
        self.finish_reset();
    }

    /// Lends queue `index` to its handler, if there is anything to be served.
    pub fn begin(&mut self, index: u16) -> Option<Work> {
        let (live, resets) = (self.is_live(), self.resets);
        let slot = self.slots.get_mut(usize::from(index)).filter(|slot| live && !slot.resetting)?;
        match std::mem::replace(&mut slot.place, Place::Away) {
            Place::Here(queue) => Some(Work { index, features: self.driver_features, resets, queue }),
            other => {
                slot.place = other;
                None
            }
        }
    }

    /// Takes a queue back. `result` is what came of serving it. Says whether there is more to be done.
    pub fn finish(&mut self, work: Work, result: Result<Served, RingError>) -> bool {
        let Some(slot) = self.slots.get_mut(usize::from(work.index)) else { return false };
        let over = slot.resetting || self.resetting;
        slot.place = Place::Here(work.queue);
        slot.outside = result.as_ref().is_ok_and(|served| served.outside);
        if over {
            // Nobody waits for what has come of it.
            if slot.outside {
                self.notices.push(Notice::Serve(work.index));
            } else if slot.resetting {
                *slot = Slot::new(slot.most);
            }
            self.finish_reset();
            return false;
        }
        match result {
            Ok(served) => {
                if served.interrupt {
                    self.notices.push(Notice::Used(work.index));
                }
                served.more
            }
            Err(error) => {
                tracing::info!(%error, kind = self.device.identity().kind, queue = work.index, "a device needs a reset");
                self.status |= status::NEEDS_RESET;
                self.notices.push(Notice::Config);
                false
            }
        }
    }

    /// The device's configuration has changed.
    pub fn config_changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        if self.is_live() {
            self.notices.push(Notice::Config);
        }
    }

    /// Changes whenever the configuration does.
    pub fn generation(&self) -> u8 {
        self.generation
    }

    /// Reads bytes at `offset` of the configuration.
    pub fn config_read(&self, offset: u64, data: &mut [u8]) {
        let config = self.device.config();
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| config.get(at).copied()).unwrap_or(0);
        }
    }

    /// The driver writes bytes at `offset` of the configuration.
    pub fn config_write(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    /// The state to save; `None` while a queue is lent, or its buffers are.
    pub fn state(&self) -> Option<CoreState> {
        if self.is_busy() {
            return None;
        }
        let queue = |slot: &Slot| match &slot.place {
            Place::Here(queue) => Some((slot.layout, Some(queue.clone()))),
            Place::Nowhere => Some((slot.layout, None)),
            Place::Away => None,
        };
        Some(CoreState {
            status: self.status,
            driver_features: self.driver_features,
            generation: self.generation,
            queues: self.slots.iter().map(queue).collect::<Option<_>>()?,
        })
    }

    /// Takes a saved state, with which all queues are looked at anew. No queue may be lent.
    pub fn restore(&mut self, state: &CoreState) {
        (self.status, self.driver_features, self.generation) =
            (state.status, state.driver_features, state.generation);
        for (slot, (layout, queue)) in self.slots.iter_mut().zip(&state.queues) {
            slot.layout = *layout;
            slot.place = queue.clone().map_or(Place::Nowhere, Place::Here);
        }
        self.notices.extend((0..self.slots.len() as u16).map(Notice::Serve));
    }
}

#[cfg(test)]
mod tests;
