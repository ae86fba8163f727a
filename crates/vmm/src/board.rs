//! The board: devices, interrupt chips, clock and alarm, and how the side effects of an access reach the vCPUs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use ruse_devices::fabric::Msi;
use ruse_devices::interrupts::{CpuLine, CpuSignal, Interrupts, SignalKind};
use ruse_devices::pci::{PciAddress, PciHost, SharedFunction, SlotTaken};
use ruse_devices::serial::Serial;
use ruse_devices::watchdog::Watchdog;
use ruse_devices::{Access, Device, Effects, Ring};
use ruse_engine::{Clock, LocalApics, Message, VcpuHandle, Vm};

use crate::alarm::Alarm;
use crate::bells::Bells;
use crate::lifecycle::Lifecycle;
use crate::mmio_slots;
use crate::platform::{Platform, lock, number};
use crate::virtio::Gate;
use crate::wires::Wires;

/// The alarm's slot of the local APICs' timers.
const LAPIC_SLOT: usize = number::COUNT;
/// The alarm's slot of serial output that waits to be written.
pub(crate) const OUTPUT_SLOT: usize = number::COUNT + 1;
/// The alarm's slot of the watchdog.
const WATCHDOG_SLOT: usize = number::COUNT + 2;
/// Slots of the alarm.
pub(crate) const SLOTS: usize = number::COUNT + 3;
/// The driver of an interrupt line that is no device of the platform: the CPUs' x87 error line.
pub(crate) const X87_DRIVER: usize = number::COUNT;
/// What is plugged in drives interrupt lines from this number on.
const PCI_DRIVERS: usize = X87_DRIVER + 1;
/// Interrupt line of the x87 error.
pub(crate) const X87_LINE: u8 = 13;
/// Serial output waits so long for more, in nanoseconds: one write for many bytes, and nobody sees the delay.
const OUTPUT_DELAY: u64 = 300_000;

/// The interrupt chips and the wires to them.
struct Chips {
    interrupts: Interrupts,
    wires: Wires,
}

impl Chips {
    /// `driver` drives line `gsi`.
    fn drive(&mut self, driver: usize, gsi: u8, level: bool) {
        if let Some(level) = self.wires.drive(driver, gsi, level) {
            self.interrupts.set_line(gsi, level);
        }
    }
}

/// What the interrupt chips want done by others.
#[derive(Default)]
struct Orders {
    signals: Vec<CpuSignal>,
    messages: Vec<Msi>,
}

impl Orders {
    fn take(interrupts: &mut Interrupts) -> Self {
        Self { signals: interrupts.take_signals(), messages: interrupts.take_messages() }
    }
}

/// Everything of a machine but its vCPUs and threads.
pub(crate) struct Board {
    pub(crate) clock: Arc<Clock>,
    pub(crate) alarm: Alarm,
    pub(crate) platform: Platform,
    pub(crate) lifecycle: Arc<Lifecycle>,
    chips: Mutex<Chips>,
    lines: Vec<Arc<CpuLine>>,
    handles: OnceLock<Vec<Arc<dyn VcpuHandle>>>,
    vm: Option<Arc<dyn Vm>>,
    watchdog: OnceLock<Arc<Mutex<Watchdog>>>,
    /// The doorbells of devices.
    pub(crate) bells: Bells,
    /// Where those pass who serve devices.
    pub(crate) gate: Gate,
    /// The I/O thread holds input back for lack of room in COM1.
    input_waits: AtomicBool,
}

impl Board {
    /// A board for `cpus` vCPUs, whose handles come later ([`Board::connect`]). Without a VM the local APICs are the
    /// board's, and doorbells are accesses like others.
    pub(crate) fn new(
        cpus: u32,
        clock: Arc<Clock>,
        platform: Platform,
        lifecycle: Arc<Lifecycle>,
        vm: Option<Arc<dyn Vm>>,
    ) -> std::io::Result<Self> {
        let external = vm.as_ref().is_some_and(|vm| vm.local_apics().is_some());
        let interrupts = match external {
            true => Interrupts::with_external_lapics(),
            false => Interrupts::new(cpus, clock.tsc_hz()),
        };
        let mut interrupts = interrupts.with_pins(platform.io_apic_pins());
        interrupts.virtual_wire();
        let lines = (0..cpus).filter_map(|cpu| interrupts.cpu_line(cpu)).collect();
        Ok(Self {
            alarm: Alarm::new(clock.clone(), SLOTS)?,
            clock,
            platform,
            lifecycle,
            chips: Mutex::new(Chips { interrupts, wires: Wires::default() }),
            lines,
            handles: OnceLock::new(),
            vm,
            watchdog: OnceLock::new(),
            bells: Bells::default(),
            gate: Gate::default(),
            input_waits: AtomicBool::new(false),
        })
    }

    /// Gives the board the handles of its vCPUs, in order.
    pub(crate) fn connect(&self, handles: Vec<Arc<dyn VcpuHandle>>) {
        if self.handles.set(handles).is_err() {
            tracing::error!("the board is connected already");
        }
    }

    /// The line of a vCPU.
    pub(crate) fn line(&self, vcpu: u32) -> Option<&CpuLine> {
        self.lines.get(vcpu as usize).map(|line| &**line)
    }

    /// Makes all vCPUs leave `run`, and all who serve devices look whether the machine has ended.
    pub(crate) fn kick_all(&self) {
        self.handles.get().into_iter().flatten().for_each(|handle| handle.kick());
        self.bells.ring_all();
    }

    /// Accesses a device and carries out its side effects. `vcpu` is who makes the access, if it is one.
    pub(crate) fn access(
        &self,
        device: usize,
        vcpu: Option<u32>,
        access: impl FnOnce(&mut dyn Device, &mut Access),
    ) {
        let mut effects = Effects::default();
        let now = self.clock.now_ns();
        let orders = self.platform.with(device, |target| {
            access(target, &mut Access { now, effects: &mut effects });
            self.settle(device, target, &mut effects)
        });
        self.carry_out(orders.unwrap_or_default());
        effects.rings.iter().for_each(|&ring| self.bells.ring(ring));
        self.change_power(&effects, vcpu);
        if device < number::PIT {
            self.serial_accessed(device, now);
        }
    }

    fn change_power(&self, effects: &Effects, vcpu: Option<u32>) {
        if let Some(power) = effects.power {
            self.lifecycle.power(power, vcpu);
            self.kick_all();
        }
    }

    /// Accesses a serial port from the line's side.
    pub(crate) fn with_serial<R>(
        &self,
        port: usize,
        call: impl FnOnce(&mut Serial, &mut Access) -> R,
    ) -> Option<R> {
        let mut effects = Effects::default();
        let (result, signals) = {
            let mut serial = self.platform.serial(port)?;
            let mut access = Access { now: self.clock.now_ns(), effects: &mut effects };
            let result = call(&mut serial, &mut access);
            (result, self.settle(number::SERIAL + port, &*serial, &mut effects))
        };
        self.carry_out(signals);
        Some(result)
    }

    /// Presses the power button.
    pub(crate) fn press_power_button(&self) {
        let mut effects = Effects::default();
        let signals = {
            let mut pm = self.platform.pm();
            pm.press_power_button(&mut Access { now: self.clock.now_ns(), effects: &mut effects });
            self.settle(number::PM, &*pm, &mut effects)
        };
        self.carry_out(signals);
    }

    /// Accesses a PCI function, or a virtio device without PCI, from its other side.
    pub(crate) fn access_function<F: ?Sized, R>(
        &self,
        function: &Mutex<F>,
        call: impl FnOnce(&mut F, &mut Access) -> R,
    ) -> R {
        self.access_function_by(None, function, call)
    }

    /// Accesses one of these; `vcpu` is who makes the access, if it is one.
    pub(crate) fn access_function_by<F: ?Sized, R>(
        &self,
        vcpu: Option<u32>,
        function: &Mutex<F>,
        call: impl FnOnce(&mut F, &mut Access) -> R,
    ) -> R {
        let mut effects = Effects::default();
        let (result, orders) = {
            let mut function = lock(function);
            let result = call(&mut function, &mut Access { now: self.clock.now_ns(), effects: &mut effects });
            (result, self.interrupt(None, &effects))
        };
        self.carry_out(orders);
        effects.rings.iter().for_each(|&ring| self.bells.ring(ring));
        self.change_power(&effects, vcpu);
        result
    }

    /// Plugs a PCI function in.
    pub(crate) fn plug(&self, at: PciAddress, function: SharedFunction) -> Result<(), SlotTaken> {
        let mut result = Err(SlotTaken(at));
        self.access_pci(|host, access| result = host.insert(access, at, function));
        result
    }

    /// Has the engine catch the doorbells of a virtio device without PCI, of its first `queues` queues.
    pub(crate) fn catch_doorbells(&self, at: PciAddress, queues: u16) {
        let Some(vm) = &self.vm else { return };
        for number in 0..queues {
            let ring = Ring { source: at.id(), number };
            self.bells.stay_at(vm.doorbells(), mmio_slots::doorbell(at, number), ring);
        }
    }

    /// Plugs the watchdog in.
    pub(crate) fn plug_watchdog(&self, at: PciAddress, watchdog: Watchdog) -> Result<(), SlotTaken> {
        let watchdog = Arc::new(Mutex::new(watchdog));
        self.plug(at, watchdog.clone())?;
        if self.watchdog.set(watchdog).is_err() {
            tracing::error!("there is a watchdog already");
        }
        Ok(())
    }

    /// The machine, which was held, goes on.
    pub(crate) fn go_on(&self) {
        if let Some(watchdog) = self.watchdog.get() {
            self.access_function(&**watchdog, Watchdog::held);
        }
    }

    /// Takes a PCI function out.
    pub(crate) fn unplug(&self, at: PciAddress) {
        self.access_pci(|host, access| {
            host.remove(access, at);
        });
    }

    /// Gives PCI functions their places, as firmware does.
    pub(crate) fn assign_pci(&self) {
        if let Some(mut host) = self.platform.pci() {
            host.assign();
        }
    }

    fn access_pci(&self, call: impl FnOnce(&mut PciHost, &mut Access)) {
        let mut effects = Effects::default();
        let orders = {
            let Some(mut host) = self.platform.pci() else { return };
            call(&mut host, &mut Access { now: self.clock.now_ns(), effects: &mut effects });
            self.settle(number::PCI, &*host, &mut effects)
        };
        self.carry_out(orders);
    }

    /// After a change of a device, still under its lock: notes its deadline, routes PCI accesses, and drives its interrupt
    /// lines, so that levels arrive in the order in which the device gave them. The chips' lock is taken inside; nothing
    /// is taken inside that. What the vCPUs have to be told is returned.
    fn settle<D: Device + ?Sized>(&self, number: usize, device: &D, effects: &mut Effects) -> Orders {
        self.alarm.set(number, device.deadline());
        if let Some(ranges) = effects.pci_ranges.take() {
            if let Some(vm) = &self.vm {
                self.bells.move_to(vm.doorbells(), &ranges.doorbells);
            }
            self.platform.set_pci_ranges(ranges);
        }
        self.interrupt(Some(number), effects)
    }

    /// Brings a device's levels and messages to the interrupt chips, and the watchdog's time to the alarm.
    fn interrupt(&self, driver: Option<usize>, effects: &Effects) -> Orders {
        if let Some(time) = effects.watchdog {
            self.alarm.set(WATCHDOG_SLOT, Some(time));
        }
        if effects.lines.is_empty() && effects.intx.is_empty() && effects.messages.is_empty() {
            return Orders::default();
        }
        let lines = effects.lines.iter().filter_map(|&(gsi, level)| Some((driver?, gsi, level)));
        let pins = effects.intx.iter().map(|pin| (PCI_DRIVERS + usize::from(pin.source), pin.gsi, pin.level));
        let mut chips = lock(&self.chips);
        lines.chain(pins).for_each(|(driver, gsi, level)| chips.drive(driver, gsi, level));
        effects.messages.iter().for_each(|&message| chips.interrupts.msi(message));
        Orders::take(&mut chips.interrupts)
    }

    /// Drives a line that is not a device's.
    pub(crate) fn drive_line(&self, driver: usize, gsi: u8, level: bool) {
        let orders = {
            let mut chips = lock(&self.chips);
            chips.drive(driver, gsi, level);
            Orders::take(&mut chips.interrupts)
        };
        self.carry_out(orders);
    }

    /// Calls the interrupt chips at the present time and carries out what they ask for.
    pub(crate) fn interrupts<R>(&self, call: impl FnOnce(&mut Interrupts, u64) -> R) -> R {
        let (result, signals) = {
            let mut chips = lock(&self.chips);
            let result = call(&mut chips.interrupts, self.clock.now_ns());
            self.alarm.set(LAPIC_SLOT, chips.interrupts.deadline());
            (result, Orders::take(&mut chips.interrupts))
        };
        self.carry_out(signals);
        result
    }

    /// Whether the local APICs are the engine's.
    pub(crate) fn has_external_apics(&self) -> bool {
        self.local_apics().is_some()
    }

    /// The local APICs, if they are the engine's.
    fn local_apics(&self) -> Option<&dyn LocalApics> {
        self.vm.as_ref()?.local_apics()
    }

    /// The I/O APIC's table may have changed, which the engine's local APICs have to know.
    pub(crate) fn pins_changed(&self) {
        if let Some(apics) = self.local_apics() {
            // Under the chips' lock, so that the last table wins.
            let chips = lock(&self.chips);
            let message = |msi: Msi| Message { address: msi.address, data: msi.data };
            let pins: Vec<_> =
                chips.interrupts.pin_messages().into_iter().map(|pin| pin.map(message)).collect();
            apics.set_pins(&pins);
        }
    }

    fn carry_out(&self, Orders { signals, messages }: Orders) {
        if let Some(apics) = self.local_apics() {
            messages.iter().for_each(|msi| apics.deliver(Message { address: msi.address, data: msi.data }));
        }
        let Some(handles) = self.handles.get() else { return };
        for signal in signals {
            let Some(handle) = handles.get(signal.cpu as usize) else { continue };
            match signal.kind {
                SignalKind::Interrupt => handle.notify_interrupt(),
                SignalKind::Nmi => handle.nmi(),
                SignalKind::Init => handle.init(),
                SignalKind::Sipi(vector) => handle.sipi(vector),
            }
        }
    }

    /// The guest has accessed a serial port: there may be output to write, or room for input.
    fn serial_accessed(&self, port: usize, now: u64) {
        let Some((output, space)) = self.platform.serial(port).map(|s| (s.has_output(), s.input_space()))
        else {
            return;
        };
        if output {
            self.alarm.bring_forward(OUTPUT_SLOT, now.saturating_add(OUTPUT_DELAY));
        }
        if port == 0 && space > 0 && self.input_waits.load(Ordering::Acquire) {
            self.input_waits.store(false, Ordering::Release);
            self.lifecycle.wake_io();
        }
    }

    /// The I/O thread says whether it holds input back. After saying so it looks at the room once more.
    pub(crate) fn set_input_waits(&self, waits: bool) {
        self.input_waits.store(waits, Ordering::SeqCst);
    }

    /// Ticks everything whose time has come.
    pub(crate) fn tick(&self) {
        let now = self.clock.now_ns();
        for device in 0..number::COUNT {
            if self.alarm.is_due(device, now) {
                self.access(device, None, |target, access| target.tick(access));
            }
        }
        if let Some(watchdog) = self.watchdog.get().filter(|_| self.alarm.is_due(WATCHDOG_SLOT, now))
            && self.access_function(&**watchdog, Watchdog::tick)
        {
            tracing::warn!("the guest's watchdog was not answered in time");
        }
        if self.alarm.is_due(LAPIC_SLOT, now) {
            self.interrupts(|interrupts, now| interrupts.tick(now));
        }
    }

    /// Everything back to the state after power-up, as firmware leaves it. No vCPU may run.
    pub(crate) fn reset(&self) {
        for device in 0..number::COUNT {
            self.access(device, None, |target, access| target.reset(access));
        }
        for device in self.platform.slots.devices() {
            self.access_function(device, |device, access| device.reset(access));
        }
        self.drive_line(X87_DRIVER, X87_LINE, false);
        self.interrupts(|interrupts, _| {
            interrupts.reset();
            interrupts.virtual_wire();
            // Nobody is there to hear of what the old system left.
            Orders::take(interrupts);
        });
        self.pins_changed();
        self.handles.get().into_iter().flatten().for_each(|handle| handle.withdraw());
    }
}
