//! All interrupt chips of a machine and the wires between them.
//!
//! The machine keeps one [`Interrupts`] behind a lock. What a call makes CPUs do is collected as [`CpuSignal`]s, which
//! the machine takes and carries out after the call. What every CPU asks all the time, whether an interrupt waits,
//! it asks its [`CpuLine`] without the lock.

mod line;
mod state;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::fabric::{Msi, Request};
use crate::ioapic::IoApic;
use crate::lapic::{DeliveryMode, Lapic, LintEvent, MsrError, Outcome};
use crate::pic::Pic;
pub use line::CpuLine;
pub use state::InterruptsState;

/// Interrupt line of the interval timer.
const TIMER_LINE: u8 = 0;
/// The I/O APIC's pin of the interval timer. The others have their own number (MADT interrupt source override).
const TIMER_PIN: usize = 2;
/// The lines below this are inputs of the 8259s too.
const PIC_LINES: u8 = 16;
/// The CPU that the 8259's output is wired to.
const PIC_CPU: usize = 0;

/// What a CPU has to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignalKind {
    /// A maskable interrupt waits where none did: wake the CPU.
    Interrupt,
    /// A non-maskable interrupt.
    Nmi,
    /// INIT. The CPU calls [`Interrupts::init_cpu`] when it carries it out.
    Init,
    /// Start-up IPI with this page number.
    Sipi(u8),
}

/// A signal to a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuSignal {
    /// Index of the CPU.
    pub cpu: u32,
    /// What it is told.
    pub kind: SignalKind,
}

/// The interrupt chips of a machine.
pub struct Interrupts {
    /// The 8259s. Ports go through [`Interrupts::pic_read`] and [`Interrupts::pic_write`].
    pic: Pic,
    ioapic: IoApic,
    lapics: Vec<Lapic>,
    lines: Vec<Arc<CpuLine>>,
    signals: Vec<CpuSignal>,
    /// The engine has the local APICs: messages are collected for it.
    external: bool,
    messages: Vec<Msi>,
}

impl Interrupts {
    /// The chips of a machine with `cpus` CPUs, after power-up.
    pub fn new(cpus: u32, tsc_hz: u64) -> Self {
        let lapics: Vec<_> = (0..cpus).map(|id| Lapic::new(id, tsc_hz)).collect();
        Self::with_lapics(lapics, false)
    }

    /// The chips of a machine whose engine has the local APICs. Messages for them are collected
    /// ([`Interrupts::take_messages`]), EOIs come through [`Interrupts::broadcast_eoi`], what the I/O APIC's pins send is
    /// told by [`Interrupts::pin_messages`], and the boot CPU's line is the 8259s' output.
    pub fn with_external_lapics() -> Self {
        Self::with_lapics(Vec::new(), true)
    }

    fn with_lapics(lapics: Vec<Lapic>, external: bool) -> Self {
        // The line of the boot CPU is there whoever has the local APICs.
        let lines = (0..lapics.len().max(1)).map(|_| Arc::default()).collect();
        let (pic, ioapic) = (Pic::new(), IoApic::default());
        let mut all =
            Self { pic, ioapic, lapics, lines, signals: Vec::new(), external, messages: Vec::new() };
        all.update_all();
        all
    }

    /// The same with an I/O APIC of so many pins.
    pub fn with_pins(mut self, pins: usize) -> Self {
        self.ioapic = IoApic::new(pins);
        self
    }

    /// Power-up reset of all chips. Lines keep the levels that devices drive.
    pub fn reset(&mut self) {
        self.pic.reset();
        self.ioapic.reset();
        self.lapics.iter_mut().for_each(Lapic::reset);
        self.update_all();
    }

    /// Leaves the boot CPU's pins as firmware would ([`Lapic::virtual_wire`]).
    pub fn virtual_wire(&mut self) {
        if let Some(lapic) = self.lapics.get_mut(PIC_CPU) {
            lapic.virtual_wire();
        }
        self.update(PIC_CPU);
    }

    /// The CPU's line, to keep in its thread.
    pub fn cpu_line(&self, cpu: u32) -> Option<Arc<CpuLine>> {
        self.lines.get(cpu as usize).cloned()
    }

    /// Takes the signals that the calls since the last time made. Empty ones cost nothing.
    pub fn take_signals(&mut self) -> Vec<CpuSignal> {
        std::mem::take(&mut self.signals)
    }

    /// Takes the messages for the engine's local APICs.
    pub fn take_messages(&mut self) -> Vec<Msi> {
        std::mem::take(&mut self.messages)
    }

    /// Sets the level of interrupt line `gsi`: a pin of the I/O APIC and, below 16, an input of the 8259s.
    pub fn set_line(&mut self, gsi: u8, level: bool) {
        let pin = if gsi == TIMER_LINE { TIMER_PIN } else { usize::from(gsi) };
        if gsi < PIC_LINES {
            self.pic.set_irq(gsi, level);
            self.pic_changed();
        }
        // Line 2 does not exist outside of the 8259s, its pin is the timer's.
        let message = if usize::from(gsi) == TIMER_PIN { None } else { self.ioapic.set_pin(pin, level) };
        if let Some(msi) = message {
            self.msi(msi);
        }
    }

    /// Delivers a message-signalled interrupt.
    pub fn msi(&mut self, msi: Msi) {
        if self.external {
            self.messages.push(msi);
        } else if let Some(request) = msi.decode() {
            self.deliver(&request);
        }
    }

    /// The machine's NMI button: raises and lowers every CPU's LINT1.
    pub fn nmi(&mut self) {
        for cpu in 0..self.lapics.len() {
            let event = self.lapics[cpu].set_lint(1, true);
            self.lapics[cpu].set_lint(1, false);
            self.lint_event(cpu, event);
        }
    }

    /// Whether an interrupt waits for the CPU; [`CpuLine::pending`] says the same without a lock.
    pub fn pending(&self, cpu: u32) -> bool {
        let cpu = cpu as usize;
        let Some(lapic) = self.lapics.get(cpu) else {
            return self.external && cpu == PIC_CPU && self.pic.intr();
        };
        lapic.pending_vector().is_some() || (cpu == PIC_CPU && lapic.extint_enabled() && self.pic.intr())
    }

    /// Takes the CPU's interrupt in service and returns its vector: the local APIC's, else the 8259's.
    pub fn acknowledge(&mut self, cpu: u32) -> Option<u8> {
        let index = cpu as usize;
        let mut vector = self.lapics.get_mut(index).and_then(Lapic::acknowledge);
        // Without an interrupt of the local APIC, what is pending is the 8259s'.
        if vector.is_none() && self.pending(cpu) {
            vector = Some(self.pic.acknowledge());
            self.pic_changed();
        }
        self.update(index);
        vector
    }

    /// Reads bytes of the CPU's xAPIC page ([`CpuLine::apic_page`] says where it is).
    pub fn lapic_read(&mut self, cpu: u32, offset: u64, data: &mut [u8], now: u64) {
        match self.lapics.get_mut(cpu as usize) {
            Some(lapic) => lapic.read(offset, data, now),
            None => data.fill(0xff),
        }
        // A read of a register that does not exist may raise the error interrupt.
        self.update(cpu as usize);
    }

    /// Writes bytes of the CPU's xAPIC page.
    pub fn lapic_write(&mut self, cpu: u32, offset: u64, data: &[u8], now: u64) {
        if let Some(lapic) = self.lapics.get_mut(cpu as usize) {
            let outcome = lapic.write(offset, data, now);
            self.finish(cpu as usize, outcome);
        }
    }

    /// Reads IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    pub fn msr_read(&self, cpu: u32, msr: u32, now: u64) -> Result<u64, MsrError> {
        self.lapics.get(cpu as usize).ok_or(MsrError)?.read_msr(msr, now)
    }

    /// Writes IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    pub fn msr_write(&mut self, cpu: u32, msr: u32, value: u64, now: u64) -> Result<(), MsrError> {
        let lapic = self.lapics.get_mut(cpu as usize).ok_or(MsrError)?;
        let outcome = lapic.write_msr(msr, value, now)?;
        self.finish(cpu as usize, outcome);
        Ok(())
    }

    /// CR8 of the CPU.
    pub fn cr8(&self, cpu: u32) -> u8 {
        self.lapics.get(cpu as usize).map_or(0, Lapic::cr8)
    }

    /// Sets CR8 of the CPU.
    pub fn set_cr8(&mut self, cpu: u32, value: u8) {
        if let Some(lapic) = self.lapics.get_mut(cpu as usize) {
            lapic.set_cr8(value);
            self.update(cpu as usize);
        }
    }

    /// The CPU goes through INIT: its local APIC resets.
    pub fn init_cpu(&mut self, cpu: u32) {
        if let Some(lapic) = self.lapics.get_mut(cpu as usize) {
            lapic.init_reset();
            self.update(cpu as usize);
        }
    }

    /// When the first timer is due, in nanoseconds since the machine's start.
    pub fn deadline(&self) -> Option<u64> {
        self.lapics.iter().filter_map(Lapic::deadline).min()
    }

    /// Time has come to `now`: fires the timers that are due.
    pub fn tick(&mut self, now: u64) {
        for cpu in 0..self.lapics.len() {
            if self.lapics[cpu].deadline().is_some_and(|at| at <= now) {
                self.lapics[cpu].tick(now);
                self.update(cpu);
            }
        }
    }

    /// Reads a port of the 8259s ([`crate::pic::PORTS`]).
    pub fn pic_read(&mut self, port: u16) -> u8 {
        let value = self.pic.read_port(port);
        self.pic_changed();
        value
    }

    /// Writes a port of the 8259s.
    pub fn pic_write(&mut self, port: u16, value: u8) {
        self.pic.write_port(port, value);
        self.pic_changed();
    }

    /// Reads the I/O APIC's window ([`crate::ioapic::BASE`]).
    pub fn ioapic_read(&self, offset: u64, data: &mut [u8]) {
        self.ioapic.read(offset, data);
    }

    /// Writes the I/O APIC's window.
    pub fn ioapic_write(&mut self, offset: u64, data: &[u8]) {
        let mut messages = Vec::new();
        self.ioapic.write(offset, data, |msi| messages.push(msi));
        messages.into_iter().for_each(|msi| self.msi(msi));
    }

    /// What the I/O APIC's pins send that are level-triggered: an engine with its own local APICs has to know whose ends
    /// of interrupts matter.
    pub fn pin_messages(&self) -> Vec<Option<Msi>> {
        self.ioapic.level_messages()
    }

    /// A level-triggered interrupt of this vector has ended at some local APIC.
    pub fn broadcast_eoi(&mut self, vector: u8) {
        let mut messages = Vec::new();
        self.ioapic.end_of_interrupt(vector, |msi| messages.push(msi));
        messages.into_iter().for_each(|msi| self.msi(msi));
    }

    /// Carries out what an access to a local APIC asks for.
    fn finish(&mut self, cpu: usize, outcome: Outcome) {
        if let Some(vector) = outcome.eoi {
            self.broadcast_eoi(vector);
        }
        if let Some(ipi) = outcome.ipi {
            self.deliver(&Request::from_ipi(&ipi, cpu));
        }
        self.update(cpu);
    }

    /// Delivers a request to all its targets.
    fn deliver(&mut self, request: &Request) {
        if request.mode == DeliveryMode::LowestPriority {
            if let Some(cpu) = request.lowest_priority(&self.lapics) {
                self.lapics[cpu].accept_fixed(request.vector, request.level);
                self.update(cpu);
            }
            return;
        }
        for cpu in 0..self.lapics.len() {
            if request.targets(cpu, &self.lapics[cpu]) {
                self.deliver_to(cpu, request);
            }
        }
    }

    fn deliver_to(&mut self, cpu: usize, request: &Request) {
        match request.mode {
            DeliveryMode::Fixed => {
                self.lapics[cpu].accept_fixed(request.vector, request.level);
                self.update(cpu);
            }
            DeliveryMode::Nmi => self.signal(cpu, SignalKind::Nmi),
            DeliveryMode::Init => self.signal(cpu, SignalKind::Init),
            DeliveryMode::StartUp => self.signal(cpu, SignalKind::Sipi(request.vector)),
            // There is no SMM; an ExtINT message would ask for the 8259's vector, whose output is wired to LINT0.
            DeliveryMode::LowestPriority
            | DeliveryMode::Smi
            | DeliveryMode::ExtInt
            | DeliveryMode::Reserved => {}
        }
    }

    /// The 8259s' output may have changed: it is the boot CPU's LINT0.
    fn pic_changed(&mut self) {
        let level = self.pic.intr();
        if let Some(lapic) = self.lapics.get_mut(PIC_CPU) {
            let event = lapic.set_lint(0, level);
            self.lint_event(PIC_CPU, event);
        }
        self.update(PIC_CPU);
    }

    fn lint_event(&mut self, cpu: usize, event: LintEvent) {
        match event {
            LintEvent::None => {}
            LintEvent::Nmi => self.signal(cpu, SignalKind::Nmi),
            LintEvent::Init => self.signal(cpu, SignalKind::Init),
        }
        self.update(cpu);
    }

    fn signal(&mut self, cpu: usize, kind: SignalKind) {
        self.signals.push(CpuSignal { cpu: cpu as u32, kind });
    }

    /// Brings a CPU's line up to date, and signals an interrupt where none waited.
    fn update(&mut self, cpu: usize) {
        let pending = self.pending(cpu as u32);
        let Some(line) = self.lines.get(cpu) else { return };
        line.set_page(self.lapics.get(cpu).and_then(Lapic::page));
        if line.set_pending(pending) {
            self.signal(cpu, SignalKind::Interrupt);
        }
    }

    fn update_all(&mut self) {
        (0..self.lines.len()).for_each(|cpu| self.update(cpu));
    }
}
