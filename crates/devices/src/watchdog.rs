//! The watchdog timer of Intel's 6300ESB (datasheet 300641, chapter 15) on PCI, as QEMU has it: a system that does not say in
//! time that it is alive is dealt with.
//!
//! The timer has two stages. The end of the first does nothing here (it could raise an interrupt, which no driver uses); the end
//! of the second is what counts.

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::pci::{Bar, ConfigSpace, ConfigSpaceState, Identity, PciFunction};
use crate::{Access, Power};

/// Bytes of its range.
const LEN: u32 = 16;

/// Registers of its range (15.4), double words but for the last, which is a word.
mod register {
    pub const PRELOAD_1: u64 = 0x00;
    pub const PRELOAD_2: u64 = 0x04;
    pub const RELOAD: u64 = 0x0c;
}

/// The reload register: the timer begins anew; the second stage has ended at some time (written as one: that is seen).
const PING: u16 = 1 << 8;
const TIMED_OUT: u16 = 1 << 9;
/// What is written to the reload register before each write that counts (15.4.5).
const UNLOCK: [u16; 2] = [0x80, 0x86];
/// Bits of a preload value.
const PRELOAD_MASK: u32 = 0xf_ffff;

/// Double words of configuration space with registers of its own (15.3): a word, and a byte.
const CONFIG: u16 = 0x60;
const LOCK: u16 = 0x68;
/// The configuration register: what the first stage raises, a clock of 1 MHz in place of 1 kHz, no output at the end.
const INTERRUPT_TYPE: u8 = 3;
const FAST: u8 = 1 << 2;
const NO_OUTPUT: u8 = 1 << 5;
/// The lock register: it stays as it is until a reset, the timer runs, and begins anew after its end.
const LOCKED: u8 = 1 << 0;
const ENABLED: u8 = 1 << 1;
const FREE_RUNNING: u8 = 1 << 2;

/// Nanoseconds of a tick of the PCI clock, of which one of the timer's has 2 to the power of 15, or of 5 if it is fast.
const PCI_TICK: u64 = 30;
const SLOW_SHIFT: u32 = 15;
const FAST_SHIFT: u32 = 5;

/// [`Effects::watchdog`](crate::Effects::watchdog) of a timer that does not run.
const NEVER: u64 = u64::MAX;

/// The device.
#[derive(Debug)]
pub struct Watchdog {
    space: ConfigSpace,
    /// What becomes of the machine at the end of the second stage.
    action: Option<Power>,
    timer: Timer,
}

/// All that is not in the configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Timer {
    preload: [u32; 2],
    config: u8,
    lock: u8,
    /// How many values of [`UNLOCK`] were written.
    unlocked: u8,
    /// The stage that runs: 0 or 1.
    stage: usize,
    /// When it ends.
    deadline: Option<u64>,
    timed_out: bool,
}

impl Default for Timer {
    fn default() -> Self {
        Self {
            preload: [PRELOAD_MASK; 2],
            config: 0,
            lock: 0,
            unlocked: 0,
            stage: 0,
            deadline: None,
            timed_out: false,
        }
    }
}

impl Timer {
    /// Begins a stage, if the timer is enabled.
    fn begin(&mut self, now: u64, stage: usize) {
        if self.lock & ENABLED != 0 {
            let shift = if self.config & FAST != 0 { FAST_SHIFT } else { SLOW_SHIFT };
            let time = (u64::from(self.preload[stage]) << shift) * PCI_TICK;
            (self.stage, self.deadline) = (stage, Some(now.saturating_add(time)));
        }
    }

    /// A write of 16 or 32 bits to a register of the range.
    fn write(&mut self, now: u64, offset: u64, value: u32) {
        let unlocks = offset == register::RELOAD
            && UNLOCK.get(usize::from(self.unlocked)).is_some_and(|next| u32::from(*next) == value);
        if unlocks {
            self.unlocked += 1;
            return;
        }
        if usize::from(std::mem::take(&mut self.unlocked)) < UNLOCK.len() {
            return;
        }
        match offset {
            register::PRELOAD_1 => self.preload[0] = value & PRELOAD_MASK,
            register::PRELOAD_2 => self.preload[1] = value & PRELOAD_MASK,
            register::RELOAD => {
                self.timed_out &= value as u16 & TIMED_OUT == 0;
                if value as u16 & PING != 0 {
                    self.begin(now, 0);
                }
            }
            _ => {}
        }
    }

    fn set_lock(&mut self, now: u64, value: u8) {
        if self.lock & LOCKED != 0 {
            return;
        }
        let was_enabled = self.lock & ENABLED != 0;
        self.lock = value & (LOCKED | ENABLED | FREE_RUNNING);
        match (was_enabled, value & ENABLED != 0) {
            (false, true) => self.begin(now, 0),
            (_, false) => self.deadline = None,
            (true, true) => {}
        }
    }

    /// A stage has ended; whether it was the second one, and somebody wants to know of that.
    fn expire(&mut self, now: u64) -> bool {
        self.deadline = None;
        if self.stage == 0 {
            self.begin(now, 1);
            return false;
        }
        if self.lock & FREE_RUNNING != 0 {
            self.begin(now, 0);
        }
        let counts = self.config & NO_OUTPUT == 0;
        self.timed_out |= counts;
        counts
    }
}

/// Saved state of a [`Watchdog`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogState {
    space: ConfigSpaceState,
    timer: Timer,
}

impl Watchdog {
    /// A watchdog that does this to the machine; only notes that its time is up if that is nothing.
    pub fn new(action: Option<Power>) -> Self {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x25ab,
            class: 0x08_80_00,
            ..Identity::default()
        });
        space.set_bar(0, Bar::Memory32(LEN));
        Self { space, action, timer: Timer::default() }
    }

    /// Its time may have come. Says whether the system was too late.
    pub fn tick(&mut self, access: &mut Access) -> bool {
        let due = self.timer.deadline.is_some_and(|deadline| deadline <= access.now);
        let late = due && self.timer.expire(access.now);
        if late && self.action.is_some() {
            access.effects.power = self.action;
            // The machine does not go on as it did, so nobody pings it either.
            self.timer.deadline = None;
        }
        self.announce(access);
        late
    }

    /// The machine was held, and its system with it: the stage that runs begins anew.
    pub fn held(&mut self, access: &mut Access) {
        if self.timer.deadline.is_some() {
            self.timer.begin(access.now, self.timer.stage);
        }
        self.announce(access);
    }

    fn announce(&self, access: &mut Access) {
        access.effects.watchdog = Some(self.timer.deadline.unwrap_or(NEVER));
    }

    /// The state to save.
    pub fn state(&self) -> WatchdogState {
        WatchdogState { space: self.space.state(), timer: self.timer.clone() }
    }

    /// Takes a saved state.
    pub fn restore(&mut self, access: &mut Access, state: &WatchdogState) {
        self.space.restore(&state.space);
        self.timer = state.timer.clone();
        self.timer.stage &= 1;
        self.announce(access);
    }
}

impl PciFunction for Watchdog {
    fn space(&self) -> &ConfigSpace {
        &self.space
    }

    fn space_mut(&mut self) -> &mut ConfigSpace {
        &mut self.space
    }

    fn config_read(&mut self, _access: &mut Access, register: u16) -> u32 {
        match register {
            CONFIG => self.timer.config.into(),
            LOCK => self.timer.lock.into(),
            _ => self.space.read(register),
        }
    }

    fn config_write(&mut self, access: &mut Access, register: u16, value: u32, enables: u8) {
        match register {
            CONFIG | LOCK if enables & 1 == 0 => {}
            CONFIG => self.timer.config = value as u8 & (INTERRUPT_TYPE | FAST | NO_OUTPUT),
            LOCK => {
                self.timer.set_lock(access.now, value as u8);
                self.announce(access);
            }
            _ => self.space.write(register, value, enables),
        }
    }

    fn bar_read(&mut self, _access: &mut Access, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (register::RELOAD, [_, high, ..], true) = (offset, &mut *data, self.timer.timed_out) {
            *high = (TIMED_OUT >> 8) as u8;
        }
    }

    fn bar_write(&mut self, access: &mut Access, _bar: u8, offset: u64, data: &[u8]) {
        let value = match *data {
            [a, b] => u16::from_le_bytes([a, b]).into(),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => return,
        };
        self.timer.write(access.now, offset, value);
        self.announce(access);
    }

    /// That time was up stays known.
    fn reset(&mut self, access: &mut Access) {
        self.space.reset();
        self.timer = Timer { timed_out: self.timer.timed_out, ..Timer::default() };
        self.announce(access);
    }
}
