//! The common configuration structure (virtio 1.2, 4.1.4.3).

use super::{NO_VECTOR, Vectors, VirtioPci};

/// Bytes of the structure.
pub(super) const LEN: u64 = 0x40;

/// Offsets of the registers.
mod register {
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const CONFIG_VECTOR: u64 = 0x10;
    pub const QUEUES: u64 = 0x12;
    pub const STATUS: u64 = 0x14;
    pub const GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFFSET: u64 = 0x1e;
    pub const QUEUE_DESCRIPTORS: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
    pub const QUEUE_RESET: u64 = 0x3a;
}

/// The half of a 64-bit register that a 32-bit one shows.
fn half(value: u64, select: u32) -> u32 {
    value.checked_shr(32 * select.min(2)).unwrap_or(0) as u32
}

/// A 64-bit register with one half replaced.
fn with_half(value: u64, upper: bool, new: u32) -> u64 {
    let shift = if upper { 32 } else { 0 };
    value & !(0xffff_ffff << shift) | u64::from(new) << shift
}

impl VirtioPci {
    /// Reads bytes: any width, any offset.
    pub(super) fn read_common(&self, offset: u64, data: &mut [u8]) {
        let image = self.common();
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| image.get(at).copied()).unwrap_or(0);
        }
    }

    /// All registers.
    fn common(&self) -> [u8; LEN as usize] {
        let mut image = [0; LEN as usize];
        let mut put =
            |at: u64, bytes: &[u8]| image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        let (core, selected) = (&self.core, &self.selected);
        let (queue, layout) = (selected.queue, core.layout(selected.queue));
        let vector = self.vectors.queues.get(usize::from(queue)).copied().unwrap_or(NO_VECTOR);
        for (at, value) in [
            (register::DEVICE_FEATURE_SELECT, selected.device_features),
            (register::DEVICE_FEATURE, half(core.features(), selected.device_features)),
            (register::DRIVER_FEATURE_SELECT, selected.driver_features),
            (register::DRIVER_FEATURE, half(core.driver_features(), selected.driver_features)),
        ] {
            put(at, &value.to_le_bytes());
        }
        for (at, value) in [
            (register::CONFIG_VECTOR, self.vectors.config),
            (register::QUEUES, core.queues()),
            (register::QUEUE_SELECT, queue),
            (register::QUEUE_SIZE, layout.size),
            (register::QUEUE_VECTOR, vector),
            (register::QUEUE_ENABLE, core.is_enabled(queue).into()),
            (register::QUEUE_NOTIFY_OFFSET, queue),
            (register::QUEUE_RESET, core.is_queue_resetting(queue).into()),
        ] {
            put(at, &value.to_le_bytes());
        }
        for (at, value) in [
            (register::QUEUE_DESCRIPTORS, layout.descriptors),
            (register::QUEUE_DRIVER, layout.driver),
            (register::QUEUE_DEVICE, layout.device),
        ] {
            put(at, &value.to_le_bytes());
        }
        put(register::STATUS, &[core.status()]);
        put(register::GENERATION, &[core.generation()]);
        image
    }

    /// Writes a register in its width; a 64-bit one by halves, or whole. Other writes are dropped (4.1.3.1).
    pub(super) fn write_common(&mut self, offset: u64, data: &[u8]) {
        match *data {
            [value] if offset == register::STATUS => self.write_status(value),
            [a, b] => self.write_word(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_dword(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if offset >= register::QUEUE_DESCRIPTORS => {
                self.write_dword(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_dword(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) {
        if value == 0 {
            self.reset_device();
        } else {
            self.core.set_status(value);
        }
    }

    /// What a reset by the status register resets (4.1.5.1.2.1 and 2.1.2).
    pub(super) fn reset_device(&mut self) {
        self.core.set_status(0);
        self.vectors = Vectors::none(self.core.queues());
        self.isr = 0;
    }

    fn write_word(&mut self, offset: u64, value: u16) {
        let queue = self.selected.queue;
        let vector = if usize::from(value) < self.msix.vectors() { value } else { NO_VECTOR };
        match offset {
            register::CONFIG_VECTOR => self.vectors.config = vector,
            register::QUEUE_SELECT => self.selected.queue = value,
            register::QUEUE_SIZE => self.core.set_layout(queue, |layout| layout.size = value),
            register::QUEUE_VECTOR => {
                if let Some(place) = self.vectors.queues.get_mut(usize::from(queue)) {
                    *place = vector;
                }
            }
            register::QUEUE_ENABLE if value == 1 => self.core.enable(queue),
            register::QUEUE_RESET if value == 1 => self.core.reset_queue(queue),
            _ => {}
        }
    }

    fn write_dword(&mut self, offset: u64, value: u32) {
        let (queue, upper) = (self.selected.queue, offset & 4 != 0);
        match offset {
            register::DEVICE_FEATURE_SELECT => self.selected.device_features = value,
            register::DRIVER_FEATURE_SELECT => self.selected.driver_features = value,
            register::DRIVER_FEATURE if self.selected.driver_features < 2 => {
                let upper = self.selected.driver_features == 1;
                self.core.set_driver_features(with_half(self.core.driver_features(), upper, value));
            }
            _ => self.core.set_layout(queue, |layout| {
                let area = match offset & !7 {
                    register::QUEUE_DESCRIPTORS => &mut layout.descriptors,
                    register::QUEUE_DRIVER => &mut layout.driver,
                    register::QUEUE_DEVICE => &mut layout.device,
                    _ => return,
                };
                if offset.is_multiple_of(4) {
                    *area = with_half(*area, upper, value);
                }
            }),
        }
    }
}
