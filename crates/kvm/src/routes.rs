//! Which message each of the kernel's interrupt numbers stands for (KVM_SET_GSI_ROUTING), and eventfds that raise them
//! (KVM_IRQFD).

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KVM_IRQFD_FLAG_DEASSIGN, KvmIrqRouting, kvm_irq_routing_entry, kvm_irqfd,
};
use kvm_ioctls::VmFd;
use ruse_engine::{EngineError, Message, MessageSource};

use crate::{ioctl, vm::Shared};

/// Numbers that belong to the I/O APIC's pins, of which there are at most so many: the kernel looks at them to see which
/// ends of interrupts it reports.
pub const PINS: u32 = 64;
/// Numbers that there are (KVM_MAX_IRQ_ROUTES).
const NUMBERS: u32 = 4096;

/// The routes of a VM.
#[derive(Default)]
pub struct Routes {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    pins: Vec<Option<Message>>,
    /// Numbers above the pins' that are taken.
    sources: BTreeMap<u32, Option<Message>>,
}

impl Routes {
    /// Sets what the pins send.
    pub fn set_pins(&self, vm: &VmFd, pins: &[Option<Message>]) -> io::Result<()> {
        let mut table = self.lock();
        if table.pins == pins {
            return Ok(());
        }
        table.pins = pins.to_vec();
        table.give_to(vm)
    }

    /// Takes a number that nobody has.
    fn take(&self) -> Option<u32> {
        let mut table = self.lock();
        let number = (PINS..NUMBERS).find(|number| !table.sources.contains_key(number))?;
        table.sources.insert(number, None);
        Some(number)
    }

    /// Sets what a number that was taken stands for.
    fn set(&self, vm: &VmFd, number: u32, message: Option<Message>) -> io::Result<()> {
        let mut table = self.lock();
        table.sources.insert(number, message);
        table.give_to(vm)
    }

    /// Gives a number back, which stands for nothing any more.
    fn give_back(&self, number: u32) {
        self.lock().sources.remove(&number);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// The whole table goes to the kernel, under the lock, so that the last one wins.
    fn give_to(&self, vm: &VmFd) -> io::Result<()> {
        let pins = (0..).zip(&self.pins);
        let all = pins.chain(self.sources.iter().map(|(&number, message)| (number, message)));
        let routes: Vec<_> = all.filter_map(|(gsi, message)| Some(route(gsi, (*message)?))).collect();
        let routes = KvmIrqRouting::from_entries(&routes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(vm.set_gsi_routing(&routes)?)
    }
}

fn route(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let mut route = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    route.u.msi.address_lo = message.address as u32;
    route.u.msi.address_hi = (message.address >> 32) as u32;
    route.u.msi.data = message.data;
    route
}

/// An eventfd with a number.
pub struct Source {
    vm: Arc<Shared>,
    event: OwnedFd,
    number: u32,
    /// What its number stands for; the kernel listens to the eventfd only as long as that is something.
    message: Mutex<Option<Message>>,
}

impl Source {
    /// A source that is masked.
    pub fn new(vm: Arc<Shared>, event: OwnedFd) -> Result<Self, EngineError> {
        let none_left = || EngineError::Guest(format!("KVM has only {NUMBERS} numbers of interrupts"));
        let number = vm.routes.take().ok_or_else(none_left)?;
        Ok(Self { vm, event, number, message: Mutex::default() })
    }

    fn change(&self, message: Option<Message>) -> io::Result<()> {
        let mut now = self.message.lock().unwrap_or_else(PoisonError::into_inner);
        if *now == message {
            return Ok(());
        }
        let set = || self.vm.routes.set(&self.vm.fd, self.number, message);
        match (*now, message) {
            (None, Some(_)) => {
                set()?;
                // Signals that wait in the eventfd arrive with this.
                self.listen(0)?;
            }
            (Some(_), None) => {
                // In this order: without a route, a signal would be lost.
                self.listen(KVM_IRQFD_FLAG_DEASSIGN)?;
                set()?;
            }
            _ => set()?,
        }
        *now = message;
        Ok(())
    }

    fn listen(&self, flags: u32) -> io::Result<()> {
        let fd = self.event.as_raw_fd() as u32;
        ioctl::irqfd(&self.vm.fd, &kvm_irqfd { fd, gsi: self.number, flags, ..Default::default() })
    }
}

impl MessageSource for Source {
    fn set(&self, message: Option<Message>) -> Result<(), EngineError> {
        self.change(message).map_err(|source| EngineError::Host {
            what: "cannot set what an eventfd interrupts with",
            source,
        })
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if let Err(error) = self.change(None) {
            tracing::warn!(%error, "KVM does not let go of an eventfd");
        }
        self.vm.routes.give_back(self.number);
    }
}
