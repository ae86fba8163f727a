//! virtio over memory-mapped registers (virtio 1.2, 4.2), for machines without PCI.

use ruse_devices::pci::IntxLevel;
use ruse_devices::{Access, Device as RegisterDevice, Effects, Ring};
use serde::{Deserialize, Serialize};

use crate::core::{Core, CoreState, Notice};
use crate::device::Device;
use crate::transport::Transport;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// Not a legacy device.
const VERSION: u32 = 2;
/// Vendor: the one of PCI devices.
const VENDOR: u32 = 0x1af4;

/// Offsets of the registers (4.2.2).
mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE: u64 = 0x008;
    pub const VENDOR: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_MOST: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESCRIPTORS: u64 = 0x080;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    pub const SHARED_MEMORY_FIRST: u64 = 0x0b0;
    pub const SHARED_MEMORY_LAST: u64 = 0x0bc;
    pub const QUEUE_RESET: u64 = 0x0c0;
    pub const GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Bits of the interrupt status.
const INTERRUPT_QUEUE: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// A virtio device behind registers in memory.
pub struct VirtioMmio {
    core: Core,
    source: u16,
    gsi: u8,
    line: bool,
    registers: Registers,
}

/// The transport's own registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    device_features_select: u32,
    driver_features_select: u32,
    queue: u16,
    interrupts: u32,
}

/// Saved state of a [`VirtioMmio`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioMmioState {
    core: CoreState,
    registers: Registers,
}

impl VirtioMmio {
    /// Bytes of its registers.
    pub const LEN: u64 = 0x200;
    /// Offset of the doorbell of all queues: a double word, into which a queue's number is written.
    pub const NOTIFY: u64 = register::NOTIFY;

    /// A device whose interrupt is line `gsi`, and whose pin and doorbells are those of `source`.
    pub fn new(source: u16, gsi: u8, device: Box<dyn Device>) -> Self {
        Self { core: Core::new(device), source, gsi, line: false, registers: Registers::default() }
    }

    fn read_register(&self, at: u64) -> u32 {
        let (core, own) = (&self.core, &self.registers);
        let half = |value: u64, select: u32| value.checked_shr(select.saturating_mul(32)).unwrap_or(0) as u32;
        match at {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE => core.identity().kind.into(),
            register::VENDOR => VENDOR,
            register::DEVICE_FEATURES => half(core.features(), own.device_features_select),
            register::QUEUE_MOST => core.most_entries(own.queue).into(),
            register::QUEUE_READY => core.is_enabled(own.queue).into(),
            register::INTERRUPT_STATUS => own.interrupts,
            register::STATUS => core.status().into(),
            // There is no shared memory (4.2.2.1).
            register::SHARED_MEMORY_FIRST..=register::SHARED_MEMORY_LAST => u32::MAX,
            register::QUEUE_RESET => core.is_queue_resetting(own.queue).into(),
            register::GENERATION => core.generation().into(),
            _ => 0,
        }
    }

    fn write_register(&mut self, effects: &mut Effects, at: u64, value: u32) {
        let queue = self.registers.queue;
        match at {
            register::DEVICE_FEATURES_SELECT => self.registers.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => self.registers.driver_features_select = value,
            register::DRIVER_FEATURES if self.registers.driver_features_select < 2 => {
                let shift = 32 * self.registers.driver_features_select;
                let others = self.core.driver_features() & !(0xffff_ffff << shift);
                self.core.set_driver_features(others | u64::from(value) << shift);
            }
            register::QUEUE_SELECT => self.registers.queue = u16::try_from(value).unwrap_or(u16::MAX),
            register::QUEUE_SIZE => {
                let size = u16::try_from(value).unwrap_or(u16::MAX);
                self.core.set_layout(queue, |layout| layout.size = size);
            }
            register::QUEUE_READY if value == 1 => self.core.enable(queue),
            register::QUEUE_READY if value == 0 => self.core.stop_queue(queue),
            register::NOTIFY => {
                if value < self.core.queues().into() {
                    effects.rings.push(Ring { source: self.source, number: value as u16 });
                }
            }
            register::INTERRUPT_ACK => self.registers.interrupts &= !value,
            register::STATUS if value & 0xff == 0 => self.reset_device(),
            register::STATUS => self.core.set_status(value as u8),
            register::QUEUE_RESET if value == 1 => self.core.reset_queue(queue),
            _ => self.write_address(queue, at, value),
        }
        self.settle(effects);
    }

    fn write_address(&mut self, queue: u16, at: u64, value: u32) {
        self.core.set_layout(queue, |layout| {
            let area = match at & !7 {
                register::QUEUE_DESCRIPTORS => &mut layout.descriptors,
                register::QUEUE_DRIVER => &mut layout.driver,
                register::QUEUE_DEVICE => &mut layout.device,
                _ => return,
            };
            let shift = 8 * (at & 4);
            *area = *area & !(0xffff_ffff << shift) | u64::from(value) << shift;
        });
    }

    fn reset_device(&mut self) {
        self.core.set_status(0);
        self.registers.interrupts = 0;
    }

    /// The state to save; `None` while a queue is lent.
    pub fn state(&self) -> Option<VirtioMmioState> {
        Some(VirtioMmioState { core: self.core.state()?, registers: self.registers })
    }

    /// Takes a saved state. No queue may be lent.
    pub fn restore(&mut self, access: &mut Access, state: &VirtioMmioState) {
        self.core.restore(&state.core);
        self.registers = state.registers;
        self.settle(access.effects);
    }
}

impl Transport for VirtioMmio {
    fn core(&self) -> &Core {
        &self.core
    }

    fn core_mut(&mut self) -> &mut Core {
        &mut self.core
    }

    /// The interrupt is asserted as long as its status is not zero (4.2.3.4).
    fn settle(&mut self, effects: &mut Effects) {
        for notice in self.core.take_notices() {
            match notice {
                Notice::Used(_) => self.registers.interrupts |= INTERRUPT_QUEUE,
                Notice::Config => self.registers.interrupts |= INTERRUPT_CONFIG,
                Notice::Serve(number) => effects.rings.push(Ring { source: self.source, number }),
            }
        }
        let level = self.registers.interrupts != 0;
        if level != self.line {
            self.line = level;
            effects.intx.push(IntxLevel { source: self.source, gsi: self.gsi, level });
        }
    }
}

impl RegisterDevice for VirtioMmio {
    /// Registers are read as whole double words, the configuration in any width (4.2.2.2).
    fn read(&mut self, _access: &mut Access, offset: u64, data: &mut [u8]) {
        match offset.checked_sub(register::CONFIG) {
            Some(offset) => self.core.config_read(offset, data),
            None if data.len() == 4 => data.copy_from_slice(&self.read_register(offset).to_le_bytes()),
            None => data.fill(0),
        }
    }

    fn write(&mut self, access: &mut Access, offset: u64, data: &[u8]) {
        match (offset.checked_sub(register::CONFIG), data) {
            (Some(offset), data) => self.core.config_write(offset, data),
            (None, &[a, b, c, d]) if offset.is_multiple_of(4) => {
                self.write_register(access.effects, offset, u32::from_le_bytes([a, b, c, d]));
            }
            _ => {}
        }
    }

    /// A queue that is lent delays this: whoever resets the machine waits for handlers first.
    fn reset(&mut self, access: &mut Access) {
        self.registers = Registers::default();
        self.reset_device();
        self.settle(access.effects);
    }
}

#[cfg(test)]
mod tests;
