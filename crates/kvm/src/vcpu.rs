//! A vCPU: the loop around KVM_RUN, and what each exit asks of the machine.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    sync::{Arc, atomic::AtomicU8},
};

use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_IO_IN, KVM_INTERNAL_ERROR_EMULATION, KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET, kvm_debug_exit_arch, kvm_msr_entry, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use ruse_arch::{MpState, VcpuState, msr};
use ruse_engine::{Bus, Counters, EngineError, Halt, Vcpu, VcpuHandle, clock::host_tsc};

use crate::{clock, finish::Finisher, handle::Handle, ioctl, state, syscall_entry::SyscallEntry, vm::Shared};

/// A vCPU of KVM.
pub struct KvmVcpu {
    id: u32,
    fd: VcpuFd,
    vm: Arc<Shared>,
    handle: Arc<Handle>,
    /// Made when it is first needed, which is never on most hosts.
    finisher: Option<Finisher>,
    /// On a KVM that needs it.
    syscall_entry: Option<SyscallEntry>,
    /// The last exit left an instruction unfinished, which the next KVM_RUN completes.
    unfinished: bool,
    exits: Exits,
}

/// Exits by reason.
#[derive(Default)]
struct Exits {
    port: u64,
    mmio: u64,
    signal: u64,
    window: u64,
    eoi: u64,
    log: u64,
}

/// What the loop does next.
enum Next {
    Run,
    Stop(Halt),
}

impl KvmVcpu {
    /// Takes over a vCPU that was just made.
    pub fn new(id: u32, fd: VcpuFd, vm: Arc<Shared>) -> Result<Self, EngineError> {
        let failed = |source| EngineError::Host { what: "cannot set up a vCPU", source };
        // SAFETY: the file is open as long as `fd`.
        let file = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        let handle = Arc::new(Handle::new(id, vm.clone(), file.try_clone_to_owned().map_err(failed)?));
        vm.log.add_vcpu(&handle);
        vm.coalesced.find(&vm.fd, file).map_err(failed)?;
        let syscall_entry = vm.finish_syscalls.then(SyscallEntry::default);
        let (unfinished, exits) = Default::default();
        let this = Self { id, fd, vm, handle, finisher: None, syscall_entry, unfinished, exits };
        this.set_tsc_offset(this.vm.clock.tsc_offset()).map_err(|source| EngineError::Host {
            what: "cannot set the guest's time-stamp counter",
            source,
        })?;
        Ok(this)
    }

    fn run_loop(&mut self, bus: &dyn Bus) -> Result<Halt, EngineError> {
        loop {
            // Before the look at requests: a signal that comes later sets it again.
            self.fd.set_kvm_immediate_exit(0);
            if self.handle.take_kick() {
                self.complete(bus)?;
                return Ok(Halt::Kicked);
            }
            if self.id == 0 {
                self.offer_interrupt(bus)?;
            }
            if let Next::Stop(halt) = self.enter(bus)? {
                return Ok(halt);
            }
        }
    }

    /// Lets KVM complete the instruction that an access has interrupted, without executing another.
    fn complete(&mut self, bus: &dyn Bus) -> Result<(), EngineError> {
        while self.unfinished {
            self.fd.set_kvm_immediate_exit(1);
            self.enter(bus)?;
        }
        self.fd.set_kvm_immediate_exit(0);
        Ok(())
    }

    /// The 8259s' interrupt, which the kernel knows nothing of.
    fn offer_interrupt(&mut self, bus: &dyn Bus) -> Result<(), EngineError> {
        let mut waits = bus.interrupt_pending(self.id);
        let run = self.fd.get_kvm_run();
        let ready = run.ready_for_interrupt_injection != 0 && run.if_flag != 0;
        if waits
            && ready
            && let Some(vector) = bus.acknowledge_interrupt(self.id)
        {
            state::interrupt(&self.fd, vector)
                .map_err(|source| EngineError::Host { what: "KVM does not take an interrupt", source })?;
            self.fd.get_kvm_run().ready_for_interrupt_injection = 0;
            waits = bus.interrupt_pending(self.id);
        }
        self.fd.get_kvm_run().request_interrupt_window = waits.into();
        Ok(())
    }

    /// One KVM_RUN and what its exit asks for.
    fn enter(&mut self, bus: &dyn Bus) -> Result<Next, EngineError> {
        self.unfinished = false;
        let id = self.id;
        self.handle.cross();
        let exit = self.fd.run();
        self.handle.cross();
        self.vm.coalesced.empty(id, bus);
        match exit {
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => {
                self.exits.port += 1;
                self.unfinished = true;
                port_access(self.fd.get_kvm_run(), id, bus);
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                bus.mmio_read(id, gpa, data);
                self.exits.mmio += 1;
                self.unfinished = true;
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                bus.mmio_write(id, gpa, data);
                self.exits.mmio += 1;
                self.unfinished = true;
            }
            Ok(VcpuExit::IoapicEoi(vector)) => {
                self.exits.eoi += 1;
                bus.end_of_interrupt(vector);
            }
            Ok(VcpuExit::IrqWindowOpen) => self.exits.window += 1,
            Ok(VcpuExit::Intr | VcpuExit::Hlt) => self.exits.signal += 1,
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                self.exits.log += 1;
                self.vm
                    .make_room()
                    .map_err(|source| EngineError::Host { what: "KVM's dirty log", source })?;
            }
            Ok(VcpuExit::X86Wrmsr(exit)) => {
                let data = exit.data;
                self.write_lstar(data)?;
            }
            Ok(VcpuExit::Debug(exit)) => self.stopped(&exit)?,
            Ok(VcpuExit::Shutdown) => return Ok(Next::Stop(Halt::TripleFault)),
            Ok(VcpuExit::InternalError) => return self.internal_error(bus),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                let text =
                    format!("the CPU refuses to enter the guest: reason {reason:#x} on host CPU {cpu}");
                return Err(EngineError::Guest(text));
            }
            Ok(exit) => return Err(EngineError::Guest(format!("KVM left the guest for {exit:?}"))),
            // A vCPU that waits for its start-up IPI says EAGAIN.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => self.exits.signal += 1,
            Err(error) => return Err(EngineError::Host { what: "KVM_RUN", source: error.into() }),
        }
        Ok(Next::Run)
    }

    /// KVM gave up. Where its emulator did not know an instruction, tier 0 does.
    fn internal_error(&mut self, bus: &dyn Bus) -> Result<Next, EngineError> {
        // SAFETY: the exit was KVM_EXIT_INTERNAL_ERROR, whose part of the union this is; it is plain data.
        let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        if suberror != KVM_INTERNAL_ERROR_EMULATION {
            let state = self.save()?;
            return Err(EngineError::Guest(format!(
                "KVM stopped with internal error {suberror} at {:#x}",
                state.rip
            )));
        }
        let before = self.save()?;
        let (id, vm) = (self.id, &self.vm);
        let finisher = self.finisher.get_or_insert_with(|| {
            let mut finisher = Finisher::new(id, vm.clock.clone(), &vm.ram);
            finisher.set_doorbells(&vm.doorbells.table);
            finisher
        });
        let after = {
            let _finishing = vm.log.finishing();
            finisher.finish(&before, bus)?
        };
        if after.mp_state == MpState::Shutdown {
            return Ok(Next::Stop(Halt::TripleFault));
        }
        self.load(&after)?;
        Ok(Next::Run)
    }

    /// The guest writes LSTAR, which KVM tells of where its SYSCALL has to be finished.
    fn write_lstar(&mut self, data: u64) -> Result<(), EngineError> {
        let Some(entry) = &mut self.syscall_entry else { return Ok(()) };
        let taken = entry
            .write_lstar(&self.fd, &self.vm.ram, data)
            .map_err(|source| EngineError::Host { what: "cannot set the guest's entry", source })?;
        self.fd.get_kvm_run().__bindgen_anon_1.msr.error = u8::from(!taken);
        self.unfinished = true;
        Ok(())
    }

    /// The vCPU has stopped at a breakpoint or after a step.
    fn stopped(&mut self, exit: &kvm_debug_exit_arch) -> Result<(), EngineError> {
        let Some(entry) = &mut self.syscall_entry else { return Ok(()) };
        entry
            .stopped(&self.fd, &self.vm.ram, exit)
            .map_err(|source| EngineError::Host { what: "cannot finish a SYSCALL", source })
    }

    fn save(&self) -> Result<VcpuState, EngineError> {
        let mut state = state::save(&self.fd, &self.vm.support)
            .map_err(|source| EngineError::Host { what: "cannot read a vCPU's state", source })?;
        if let Some(entry) = &self.syscall_entry {
            entry.finish(&mut state);
        }
        Ok(state)
    }

    fn load(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        let mut set = || {
            state::load(&self.fd, &self.vm.support, state)?;
            clock::take_over(&self.vm, state);
            if state.tsc != 0 {
                self.set_tsc_offset(state.tsc.wrapping_sub(host_tsc()))?;
            }
            if let Some(entry) = &mut self.syscall_entry {
                entry.watch(&self.fd, &self.vm.ram, state.lstar)?;
            }
            Ok(())
        };
        set().map_err(|source| EngineError::Host { what: "cannot set a vCPU's state", source })
    }

    /// Sets what is added to the host's counter. A kernel that does not take that takes a value, which is a little old
    /// when it arrives.
    fn set_tsc_offset(&self, offset: u64) -> io::Result<()> {
        if ioctl::set_attribute(&self.fd, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, offset).is_ok() {
            return Ok(());
        }
        let data = host_tsc().wrapping_add(offset);
        state::write_msr(&self.fd, kvm_msr_entry { index: msr::TSC, data, ..Default::default() })
    }

    /// The field by which a signal keeps the thread from entering.
    fn immediate_exit(&mut self) -> *const AtomicU8 {
        std::ptr::from_mut(&mut self.fd.get_kvm_run().immediate_exit).cast()
    }
}

/// A port access, of one element or (INS, OUTS) of several.
fn port_access(run: &mut kvm_run, id: u32, bus: &dyn Bus) {
    // SAFETY: the exit was KVM_EXIT_IO, whose part of the union this is; it is plain data.
    let io = unsafe { run.__bindgen_anon_1.io };
    let len = usize::from(io.size) * io.count as usize;
    let data = std::ptr::from_mut(run).cast::<u8>().wrapping_add(io.data_offset as usize);
    // SAFETY: the kernel says where in the mapping of `kvm_run`, which is larger than the structure, the bytes are.
    let data = unsafe { std::slice::from_raw_parts_mut(data, len) };
    for element in data.chunks_exact_mut(io.size.into()) {
        if u32::from(io.direction) == KVM_EXIT_IO_IN {
            bus.pio_read(id, io.port, element);
        } else {
            bus.pio_write(id, io.port, element);
        }
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, bus: &dyn Bus) -> Result<Halt, EngineError> {
        let flag = self.immediate_exit();
        let handle = self.handle.clone();
        let _running = handle.enter(flag);
        self.run_loop(bus)
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        self.handle.clone()
    }

    fn state(&mut self) -> Result<VcpuState, EngineError> {
        self.save()
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        self.load(state)
    }

    fn held(&mut self) {
        // EINVAL: the guest has no clock of KVM's.
        let _ = self.fd.kvmclock_ctrl();
    }

    fn counters(&self) -> Counters {
        let exits = &self.exits;
        Counters::from_iter([
            ("exits.port", exits.port),
            ("exits.mmio", exits.mmio),
            ("exits.signal", exits.signal),
            ("exits.window", exits.window),
            ("exits.eoi", exits.eoi),
            ("exits.log", exits.log),
            ("finished.in_tier0", self.finisher.as_ref().map_or(0, Finisher::total)),
            ("finished.syscalls", self.syscall_entry.as_ref().map_or(0, SyscallEntry::total)),
        ])
    }
}
