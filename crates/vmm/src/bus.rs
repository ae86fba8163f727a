//! The machine as a vCPU sees it: routes accesses to devices and interrupt chips.

use ruse_devices::Device;
use ruse_devices::bus::AddressMap;
use ruse_devices::fabric::Msi;
use ruse_devices::lapic;
use ruse_devices::pci::BarTarget;
use ruse_engine::{Bus, Message, MsrFault};

use crate::board::{Board, X87_DRIVER, X87_LINE};
use crate::platform::Target;

impl Board {
    fn read(&self, map: &AddressMap<Target>, vcpu: u32, address: u64, data: &mut [u8]) {
        map.read(address, data, |&target, offset, bytes| match target {
            Target::Device(n) => {
                self.access(n, Some(vcpu), |device, access| device.read(access, offset, bytes))
            }
            Target::Pic => self.interrupts(|chips, _| {
                bytes.iter_mut().for_each(|byte| *byte = chips.pic_read(offset as u16));
            }),
            Target::IoApic => self.interrupts(|chips, _| chips.ioapic_read(offset, bytes)),
            Target::X87 => bytes.fill(0xff),
            Target::PciPorts => self.bar_read(vcpu, &self.platform.pci_ranges().ports, offset, bytes),
            Target::PciMemory => self.bar_read(vcpu, &self.platform.pci_ranges().memory, offset, bytes),
            Target::MmioSlots => self.slot_read(vcpu, offset, bytes),
        });
    }

    fn write(&self, map: &AddressMap<Target>, vcpu: u32, address: u64, data: &[u8]) {
        map.write(address, data, |&target, offset, bytes| match target {
            Target::Device(n) => {
                self.access(n, Some(vcpu), |device, access| device.write(access, offset, bytes))
            }
            Target::Pic => self.interrupts(|chips, _| {
                bytes.iter().for_each(|&byte| chips.pic_write(offset as u16, byte));
            }),
            Target::IoApic => {
                self.interrupts(|chips, _| chips.ioapic_write(offset, bytes));
                self.pins_changed();
            }
            Target::X87 => self.drive_line(X87_DRIVER, X87_LINE, false),
            Target::PciPorts => self.bar_write(vcpu, &self.platform.pci_ranges().ports, offset, bytes),
            Target::PciMemory => self.bar_write(vcpu, &self.platform.pci_ranges().memory, offset, bytes),
            Target::MmioSlots => self.slot_write(vcpu, offset, bytes),
        });
    }

    fn bar_read(&self, vcpu: u32, ranges: &AddressMap<BarTarget>, address: u64, data: &mut [u8]) {
        ranges.read(address, data, |target, offset, bytes| {
            self.access_function_by(Some(vcpu), &*target.function, |function, access| {
                function.bar_read(access, target.bar, offset, bytes);
            });
        });
    }

    fn bar_write(&self, vcpu: u32, ranges: &AddressMap<BarTarget>, address: u64, data: &[u8]) {
        ranges.write(address, data, |target, offset, bytes| {
            self.access_function_by(Some(vcpu), &*target.function, |function, access| {
                function.bar_write(access, target.bar, offset, bytes);
            });
        });
    }

    fn slot_read(&self, vcpu: u32, offset: u64, data: &mut [u8]) {
        match self.platform.slots.find(offset) {
            Some((device, offset)) => self.access_function_by(Some(vcpu), device, |device, access| {
                device.read(access, offset, data);
            }),
            None => data.fill(0xff),
        }
    }

    fn slot_write(&self, vcpu: u32, offset: u64, data: &[u8]) {
        if let Some((device, offset)) = self.platform.slots.find(offset) {
            self.access_function_by(Some(vcpu), device, |device, access| device.write(access, offset, data));
        }
    }

    /// The offset of `gpa` in the vCPU's local APIC page, if it lies there.
    fn lapic_offset(&self, vcpu: u32, gpa: u64) -> Option<u64> {
        let page = self.line(vcpu)?.apic_page()?;
        gpa.checked_sub(page).filter(|&offset| offset < lapic::PAGE_SIZE)
    }
}

impl Bus for Board {
    fn pio_read(&self, vcpu: u32, port: u16, data: &mut [u8]) {
        self.read(&self.platform.ports, vcpu, port.into(), data);
    }
    fn pio_write(&self, vcpu: u32, port: u16, data: &[u8]) {
        self.write(&self.platform.ports, vcpu, port.into(), data);
    }
    fn mmio_read(&self, vcpu: u32, gpa: u64, data: &mut [u8]) {
        match self.lapic_offset(vcpu, gpa) {
            Some(offset) => self.interrupts(|chips, now| chips.lapic_read(vcpu, offset, data, now)),
            None => self.read(&self.platform.memory, vcpu, gpa, data),
        }
    }
    fn mmio_write(&self, vcpu: u32, gpa: u64, data: &[u8]) {
        match self.lapic_offset(vcpu, gpa) {
            Some(offset) => self.interrupts(|chips, now| chips.lapic_write(vcpu, offset, data, now)),
            None => self.write(&self.platform.memory, vcpu, gpa, data),
        }
    }

    fn interrupt_pending(&self, vcpu: u32) -> bool {
        self.line(vcpu).is_some_and(|line| line.pending())
    }
    fn acknowledge_interrupt(&self, vcpu: u32) -> Option<u8> {
        self.interrupts(|chips, _| chips.acknowledge(vcpu))
    }
    fn cr8(&self, vcpu: u32) -> u8 {
        self.interrupts(|chips, _| chips.cr8(vcpu))
    }
    fn set_cr8(&self, vcpu: u32, value: u8) {
        self.interrupts(|chips, _| chips.set_cr8(vcpu, value));
    }
    fn apic_msr(&self, vcpu: u32, msr: u32) -> Result<u64, MsrFault> {
        self.interrupts(|chips, now| chips.msr_read(vcpu, msr, now)).map_err(|_| MsrFault)
    }
    fn set_apic_msr(&self, vcpu: u32, msr: u32, value: u64) -> Result<(), MsrFault> {
        self.interrupts(|chips, now| chips.msr_write(vcpu, msr, value, now)).map_err(|_| MsrFault)
    }
    fn apic_init(&self, vcpu: u32) {
        self.interrupts(|chips, _| chips.init_cpu(vcpu));
    }

    fn deliver(&self, message: Message) {
        let Message { address, data } = message;
        self.interrupts(|chips, _| chips.msi(Msi { address, data }));
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.interrupts(|chips, _| chips.broadcast_eoi(vector));
    }

    fn x87_error(&self, _vcpu: u32) {
        self.drive_line(X87_DRIVER, X87_LINE, true);
    }
}

#[cfg(test)]
mod tests;
