//! virtio over PCI (virtio 1.2, 4.1): one 64-bit memory range with all structures, MSI-X, and the window to that range in
//! the configuration space.

mod common;
#[cfg(test)]
mod tests;

use ruse_devices::pci::{
    Bar, BarDoorbell, ConfigSpace, ConfigSpaceState, Identity, IntxPin, Msix, MsixState, PciAddress,
    PciFunction,
};
use ruse_devices::{Access, Effects, Ring};
use serde::{Deserialize, Serialize};

use crate::core::{Core, CoreState, Notice};
use crate::device::Device;
use crate::transport::Transport;

/// Vendor, and the first device id (4.1.2).
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
/// The range with everything in it.
const BAR: u8 = 0;
/// Bytes of the range, and what is where in it.
const BAR_LEN: u64 = 0x8000;
const ISR: u64 = 0x1000;
const DEVICE_CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x6000;
const PART_LEN: u64 = 0x1000;
/// Bytes between the doorbells of two queues.
const NOTIFY_STEP: u64 = 4;

/// The vendor-specific capability, and the types of structure that it tells of (4.1.4).
const CAPABILITY: u8 = 0x09;
const COMMON_TYPE: u8 = 1;
const NOTIFY_TYPE: u8 = 2;
const ISR_TYPE: u8 = 3;
const DEVICE_TYPE: u8 = 4;
const WINDOW_TYPE: u8 = 5;
/// Registers of the window, from the capability on (4.1.4.9).
const WINDOW_BAR: u16 = 4;
const WINDOW_OFFSET: u16 = 8;
const WINDOW_LENGTH: u16 = 12;
const WINDOW_DATA: u16 = 16;

/// Bits of the interrupt status (4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
/// No vector (4.1.5.1.2).
const NO_VECTOR: u16 = 0xffff;

/// A virtio device as a PCI function.
pub struct VirtioPci {
    space: ConfigSpace,
    msix: Msix,
    core: Core,
    pin: IntxPin,
    window: u16,
    selected: Selected,
    vectors: Vectors,
    isr: u8,
}

/// What the registers are of now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Selected {
    device_features: u32,
    driver_features: u32,
    queue: u16,
}

/// Which vector tells what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Vectors {
    config: u16,
    queues: Vec<u16>,
}

impl Vectors {
    fn none(queues: u16) -> Self {
        Self { config: NO_VECTOR, queues: vec![NO_VECTOR; queues.into()] }
    }
}

/// Saved state of a [`VirtioPci`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciState {
    space: ConfigSpaceState,
    msix: MsixState,
    core: CoreState,
    selected: Selected,
    vectors: Vectors,
    isr: u8,
}

impl VirtioPci {
    /// A device at `at`, whose interrupt pin leads to line `gsi`.
    pub fn new(at: PciAddress, gsi: u8, device: Box<dyn Device>) -> Self {
        let core = Core::new(device);
        let identity = core.identity();
        let mut space = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE + identity.kind,
            class: identity.pci_class,
            // Not a transitional device (4.1.2.1).
            revision: 1,
            subsystem_vendor: VENDOR,
            subsystem: FIRST_DEVICE + identity.kind,
            interrupt_pin: 1,
        });
        space.set_bar(BAR.into(), Bar::Memory64 { size: BAR_LEN, prefetchable: false });
        let msix = Msix::new(&mut space, usize::from(core.queues()) + 1, BAR, TABLE as u32, PENDING as u32);
        for (kind, offset, len) in
            [(COMMON_TYPE, 0, common::LEN), (ISR_TYPE, ISR, 1), (DEVICE_TYPE, DEVICE_CONFIG, PART_LEN)]
        {
            space.add_capability(CAPABILITY, &capability(kind, offset, len), &[]);
        }
        let mut notify = capability(NOTIFY_TYPE, NOTIFY, PART_LEN).to_vec();
        notify.extend((NOTIFY_STEP as u32).to_le_bytes());
        notify[0] += 4;
        space.add_capability(CAPABILITY, &notify, &[]);
        let mut window = capability(WINDOW_TYPE, 0, 0).to_vec();
        window.extend([0; 4]);
        window[0] += 4;
        let mut writable = [0; 18];
        // The range, and from the offset on all registers.
        writable[2] = 0xff;
        writable[6..].fill(0xff);
        let window = space.add_capability(CAPABILITY, &window, &writable).into();
        let (pin, vectors) = (IntxPin::new(at, gsi), Vectors::none(core.queues()));
        Self { space, msix, core, pin, window, selected: Selected::default(), vectors, isr: 0 }
    }

    /// Whose doorbells its queues have ([`Ring::source`]).
    pub fn source(&self) -> u16 {
        self.pin.source()
    }

    fn interrupt(&mut self, effects: &mut Effects, vector: u16, isr: u8) {
        if self.msix.is_enabled(&self.space) {
            self.msix.raise(effects, &self.space, vector);
        } else {
            self.isr |= isr;
        }
    }

    fn read(&mut self, effects: &mut Effects, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            0..ISR => self.read_common(offset, data),
            // Reading it takes it (4.1.4.5.1).
            ISR => {
                data[0] = std::mem::take(&mut self.isr);
                self.settle(effects);
            }
            DEVICE_CONFIG..NOTIFY => self.core.config_read(offset - DEVICE_CONFIG, data),
            TABLE..PENDING => self.msix.table_read(offset - TABLE, data),
            PENDING..BAR_LEN => self.msix.pending_read(offset - PENDING, data),
            _ => {}
        }
    }

    fn write(&mut self, effects: &mut Effects, offset: u64, data: &[u8]) {
        match offset {
            0..ISR => self.write_common(offset, data),
            NOTIFY..TABLE => {
                let number = ((offset - NOTIFY) / NOTIFY_STEP) as u16;
                if number < self.core.queues() {
                    effects.rings.push(Ring { source: self.source(), number });
                }
            }
            DEVICE_CONFIG..NOTIFY => self.core.config_write(offset - DEVICE_CONFIG, data),
            TABLE..PENDING => self.msix.table_write(effects, &self.space, offset - TABLE, data),
            _ => {}
        }
        self.settle(effects);
    }

    /// The access that the window stands for (4.1.4.9.1): its offset and width, if it is possible.
    fn window_access(&self) -> Option<(u64, usize)> {
        let [bar, offset, length] = [WINDOW_BAR, WINDOW_OFFSET, WINDOW_LENGTH]
            .map(|register| self.space.read(self.window + register));
        let possible = bar as u8 == BAR && matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length);
        (possible && u64::from(offset) < BAR_LEN).then_some((offset.into(), length as usize))
    }

    /// The state to save; `None` while a queue is lent.
    pub fn state(&self) -> Option<VirtioPciState> {
        Some(VirtioPciState {
            space: self.space.state(),
            msix: self.msix.state(),
            core: self.core.state()?,
            selected: self.selected,
            vectors: self.vectors.clone(),
            isr: self.isr,
        })
    }

    /// Takes a saved state. No queue may be lent.
    pub fn restore(&mut self, access: &mut Access, state: &VirtioPciState) {
        self.space.restore(&state.space);
        self.msix.restore(&state.msix);
        self.core.restore(&state.core);
        (self.selected, self.isr) = (state.selected, state.isr);
        self.vectors = state.vectors.clone();
        self.settle(access.effects);
    }
}

impl Transport for VirtioPci {
    fn core(&self) -> &Core {
        &self.core
    }

    fn core_mut(&mut self) -> &mut Core {
        &mut self.core
    }

    /// Passes notices on, and brings the pin up to date.
    fn settle(&mut self, effects: &mut Effects) {
        for notice in self.core.take_notices() {
            match notice {
                Notice::Used(queue) => {
                    let vector = self.vectors.queues.get(usize::from(queue)).copied();
                    self.interrupt(effects, vector.unwrap_or(NO_VECTOR), ISR_QUEUE);
                }
                Notice::Config => self.interrupt(effects, self.vectors.config, ISR_CONFIG),
                Notice::Serve(queue) => effects.rings.push(Ring { source: self.source(), number: queue }),
            }
        }
        self.pin.set(effects, &self.space, self.isr != 0);
    }
}

/// A capability's body: length, type, range, offset and length of the structure (4.1.4).
fn capability(kind: u8, offset: u64, len: u64) -> [u8; 14] {
    let mut body = [0; 14];
    (body[0], body[1], body[2]) = (16, kind, BAR);
    body[6..10].copy_from_slice(&(offset as u32).to_le_bytes());
    body[10..].copy_from_slice(&(len as u32).to_le_bytes());
    body
}

impl PciFunction for VirtioPci {
    fn space(&self) -> &ConfigSpace {
        &self.space
    }

    fn space_mut(&mut self) -> &mut ConfigSpace {
        &mut self.space
    }

    fn config_read(&mut self, access: &mut Access, register: u16) -> u32 {
        if register == self.window + WINDOW_DATA
            && let Some((offset, width)) = self.window_access()
        {
            let mut data = [0; 4];
            self.read(access.effects, offset, &mut data[..width]);
            return u32::from_le_bytes(data);
        }
        self.space.read(register)
    }

    fn config_write(&mut self, access: &mut Access, register: u16, value: u32, enables: u8) {
        self.space.write(register, value, enables);
        if register == self.window + WINDOW_DATA
            && let Some((offset, width)) = self.window_access()
        {
            // A part of the register may have been written before.
            let value = self.space.read(register);
            self.write(access.effects, offset, &value.to_le_bytes()[..width]);
        }
        self.msix.changed(access.effects, &self.space);
        self.settle(access.effects);
    }

    fn bar_read(&mut self, access: &mut Access, _bar: u8, offset: u64, data: &mut [u8]) {
        self.read(access.effects, offset, data);
    }

    fn bar_write(&mut self, access: &mut Access, _bar: u8, offset: u64, data: &[u8]) {
        self.write(access.effects, offset, data);
    }

    fn doorbells(&self) -> Vec<BarDoorbell> {
        let offset = |number| NOTIFY + NOTIFY_STEP * u64::from(number);
        (0..self.core.queues())
            .map(|number| BarDoorbell { bar: BAR, offset: offset(number), number })
            .collect()
    }

    /// A queue that is lent delays this: whoever resets the machine waits for handlers first.
    fn reset(&mut self, access: &mut Access) {
        self.space.reset();
        self.msix.reset();
        self.selected = Selected::default();
        self.reset_device();
        self.settle(access.effects);
    }
}
