//! The loop of a vCPU: requests from other threads, interrupts, then translated code or tier 0, over and over.

use std::{sync::Arc, time::Instant};

use iced_x86::FlowControl;
use ruse_arch::{
    Exception, MpState, VcpuState,
    flags::{cr0, rflags},
    paging::{Access, is_canonical},
    state::{reg, seg},
};
use ruse_engine::{Bus, Counters, EngineError, Halt, HaltPoll, Vcpu, VcpuHandle, host_tsc};

use super::{
    blocks::{Blocks, Source},
    engine::{DbtOptions, Handle},
    enter, fault,
    user::Direct,
};
use crate::{
    backend::x86_64::{exit, thunks::Calls},
    cpu::{Cpu, CpuBox, Who, request},
    direct::{DirectMode, Policy},
    frontend::x86_64::{CodeMode, Lifter, Piece},
    ir::Region,
    mmu::{
        access::Place,
        watch::{Note, Peer},
    },
    paravirt,
    tier0::{
        self, Features,
        interrupt::{self, Event},
        vector,
    },
};

/// Bytes of code that a region is lifted from at most, and bytes before it that are looked at.
const LIFTED: usize = 512;
const BEFORE: usize = 256;

/// Why [`Blocks::locate`] knows every address in generated code.
const MARKED: &str = "generated code has marks from its first byte on";

/// A vCPU of the translator.
pub struct DbtVcpu {
    pub(super) cpu: CpuBox,
    pub(super) blocks: Blocks,
    handle: Arc<Handle>,
    halt_poll: HaltPoll,
    pub(super) peer: Arc<Peer>,
    options: DbtOptions,
    /// A link by which translated code left, to be resolved when its target is found.
    pending_link: Option<u32>,
    /// What check mode found.
    mismatch: Option<String>,
    pub(super) direct: Direct,
}

impl DbtVcpu {
    /// A vCPU around a CPU; it becomes a peer of the others with the same code map.
    pub fn new(mut cpu: CpuBox, options: DbtOptions) -> std::io::Result<Self> {
        let handle = Arc::new(Handle::new(cpu.arena().clone()));
        let waker = handle.clone();
        let wake = Box::new(move || waker.parker.wake());
        let peer = cpu.mmu.code.join(cpu.id, cpu.arena().clone(), wake);
        let features = Features::new(&cpu.cpuid);
        // The check executes what tier 0 does only once.
        let lifter = Lifter::new(Box::new(move |i| features.allow(i)), !options.check);
        let avx = std::is_x86_feature_detected!("avx");
        let mut blocks = Blocks::new(
            Calls {
                slow_access: enter::slow_access,
                slow_group: enter::slow_group,
                step: enter::step,
                // The check executes in both tiers whatever it can.
                interpret: (!options.check).then_some(enter::INTERPRET),
            },
            lifter,
            avx,
        )?;
        if options.audit {
            blocks.audit();
        }
        cpu.update_mode();
        let direct = if options.check || options.tier == Some(0) { DirectMode::Off } else { options.direct };
        cpu.direct = Policy::new(direct, cpu.clock.tsc_hz());
        Ok(Self {
            cpu,
            blocks,
            handle,
            halt_poll: HaltPoll::default(),
            peer,
            options,
            pending_link: None,
            mismatch: None,
            direct: Direct::default(),
        })
    }

    /// The CPU.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// The CPU, to be changed between two runs.
    pub fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.cpu
    }

    /// Runs until an exception, which is not delivered: for comparisons with other executors.
    pub fn run_until_fault(&mut self, bus: &dyn Bus) -> Exception {
        self.on_this_thread(bus, |this| {
            loop {
                this.serve_requests();
                if let Err(fault) = this.execute() {
                    return fault;
                }
            }
        })
    }

    /// Runs `body`, which may enter translated code.
    fn on_this_thread<R>(&mut self, bus: &dyn Bus, body: impl FnOnce(&mut Self) -> R) -> R {
        let _inside = self.peer.enter();
        enter::set_gs(&self.cpu);
        fault::arm(&self.blocks.code_range(), self.blocks.thunks().exit_fault);
        Cpu::attach(
            self,
            |this| &mut this.cpu,
            bus,
            |this| {
                let result = body(this);
                this.direct.place.leave();
                // The host's x87 registers belong to this thread; whoever asks for the state may be another.
                vector::spill_x87(&mut this.cpu);
                result
            },
        )
    }

    fn run_loop(&mut self) -> Result<Halt, EngineError> {
        loop {
            if let Some(halt) = self.serve_requests() {
                return Ok(halt);
            }
            match self.cpu.mp_state {
                MpState::Running => {}
                MpState::Halted if self.event_waits() => {
                    self.cpu.paravirt.unhalted = false;
                    self.cpu.mp_state = MpState::Running;
                }
                MpState::Halted | MpState::WaitForSipi => {
                    let shared = self.cpu.shared();
                    let ready = || shared.requests.load(std::sync::atomic::Ordering::SeqCst) != 0;
                    self.direct.place.leave();
                    let sleep = || self.handle.parker.sleep_until(ready);
                    self.peer.outside(|| self.halt_poll.wait(ready, sleep));
                    continue;
                }
                MpState::Shutdown => return Ok(Halt::TripleFault),
            }
            let result = match self.next_event() {
                Some(event) => self.deliver(event),
                None => self.execute().or_else(|e| self.deliver(Event::Exception(e))),
            };
            if let Some(text) = self.mismatch.take() {
                return Err(EngineError::Mismatch(text));
            }
            if result.is_err() {
                self.cpu.mp_state = MpState::Shutdown;
            }
        }
    }

    fn deliver(&mut self, event: Event) -> Result<(), interrupt::Shutdown> {
        match event {
            Event::Exception(exception) => self.cpu.counters.exception(exception.vector),
            _ => self.cpu.counters.interrupts += 1,
        }
        if matches!(event, Event::Interrupt(_)) {
            let (root, user) = (self.cpu.root(), self.cpu.mode.cpl == 3);
            self.cpu.direct.interrupted(root, user, host_tsc());
            if !self.cpu.direct.wants(root) {
                self.direct.place.leave();
            } else if user {
                self.reconsider();
            }
            paravirt::steal::tell(&mut self.cpu);
        }
        interrupt::deliver(&mut self.cpu, event)
    }

    /// Looks after what other threads asked for.
    fn serve_requests(&mut self) -> Option<Halt> {
        let shared = self.cpu.shared();
        if shared.requests.load(std::sync::atomic::Ordering::SeqCst) == 0 {
            return None;
        }
        self.peer.stand_still(|| ());
        let bits = shared.take(!(request::KICK | request::STAND_STILL));
        if bits & request::LOG != 0 {
            self.cpu.mmu.drop_all_writers();
        }
        if bits & request::MEMORY != 0 {
            self.memory_changed();
        }
        if bits & request::INIT != 0 {
            self.init();
        }
        if bits & request::SIPI != 0 && self.cpu.mp_state == MpState::WaitForSipi {
            self.start_up(shared.sipi_vector.load(std::sync::atomic::Ordering::SeqCst));
        }
        if bits & request::UNHALT != 0 {
            self.cpu.paravirt.unhalted = true;
        }
        if bits & request::NMI != 0 {
            self.cpu.nmi_pending = true;
        }
        (shared.take(request::KICK) != 0).then_some(Halt::Kicked)
    }

    /// INIT (SDM volume 3, table 9-1): what the FPU, the TSC and the MTRRs hold survives.
    fn init(&mut self) {
        let old = self.cpu.save_state();
        let state = VcpuState {
            fpu: old.fpu,
            tsc_adjust: old.tsc_adjust,
            pat: old.pat,
            mtrr_def_type: old.mtrr_def_type,
            mtrr_fixed: old.mtrr_fixed,
            mtrr_variable: old.mtrr_variable,
            cr0: cr0::ET | old.cr0 & (cr0::CD | cr0::NW),
            xcr0: old.xcr0,
            misc_enable: old.misc_enable,
            mp_state: if self.cpu.id == 0 { MpState::Running } else { MpState::WaitForSipi },
            ..VcpuState::default()
        };
        self.cpu.load_state(&state);
        self.cpu.bus().apic_init(self.cpu.id);
    }

    /// Start-up IPI (SDM volume 3, 8.4.3).
    fn start_up(&mut self, vector: u8) {
        let cs = &mut self.cpu.seg[seg::CS];
        cs.selector = u16::from(vector) << 8;
        cs.base = u64::from(vector) << 12;
        self.cpu.rip = 0;
        self.cpu.mp_state = MpState::Running;
        self.cpu.update_mode();
    }

    /// Whether something ends HLT.
    fn event_waits(&self) -> bool {
        let cpu = &self.cpu;
        cpu.exception.is_some()
            || cpu.interrupt.is_some()
            || cpu.paravirt.unhalted
            || (cpu.nmi_pending && !cpu.nmi_blocked)
            || (cpu.rflags & rflags::IF != 0 && cpu.bus().interrupt_pending(cpu.id))
    }

    /// What is to be delivered before the next instruction (SDM volume 3, table 6-2).
    fn next_event(&mut self) -> Option<Event> {
        let cpu = &mut self.cpu;
        if let Some(exception) = cpu.exception.take() {
            return Some(Event::Exception(exception));
        }
        if let Some(vector) = cpu.interrupt.take() {
            return Some(Event::Interrupt(vector));
        }
        cpu.irq_waiting = 0;
        if cpu.interrupt_shadow {
            return None;
        }
        if cpu.nmi_pending && !cpu.nmi_blocked {
            cpu.nmi_pending = false;
            return Some(Event::Nmi);
        }
        if cpu.bus().interrupt_pending(cpu.id) {
            if cpu.rflags & rflags::IF != 0 {
                return cpu.bus().acknowledge_interrupt(cpu.id).map(Event::Interrupt);
            }
            cpu.irq_waiting = 1;
        }
        None
    }

    /// Runs translated code where that is possible, else one instruction in tier 0.
    fn execute(&mut self) -> Result<(), Exception> {
        if self.direct.wants(&mut self.cpu) {
            self.pending_link = None;
            return self.run_directly();
        }
        let mode = if self.options.tier == Some(0) { None } else { self.cpu.code_mode(self.options.check) };
        let Some(mut mode) = mode else { return tier0::step(&mut self.cpu) };
        let link = self.pending_link.and_then(|link| self.blocks.link_target(link));
        mode.plain = link == Some((self.cpu.rip, true));
        if self.options.check {
            self.mismatch = self.check(mode)?;
            return Ok(());
        }
        let Some(block) = self.find(mode)? else {
            self.pending_link = None;
            return tier0::step(&mut self.cpu);
        };
        self.resolve_link(block);
        self.enter(block, mode);
        self.after_exit()
    }

    /// The block at RIP, translated if it is not there yet. `None`: tier 0 has to execute here, or should.
    pub(super) fn find(&mut self, mode: CodeMode) -> Result<Option<u32>, Exception> {
        let va = self.cpu.rip;
        if !is_canonical(va) {
            return Ok(None);
        }
        let Place::Ram(host) = self.cpu.place(va, 1, Access::Fetch, Who::Current)? else { return Ok(None) };
        let page = host as u64 & !0xfff;
        if let Some(block) = self.blocks.find(va, page, mode) {
            return Ok(self.second_page_holds(block, va)?.then_some(block));
        }
        if self.options.interprets_patches() && self.blocks.interprets(va, page, mode) {
            return Ok(None);
        }
        let started = Instant::now();
        let block = match self.blocks.copy(va, page, mode) {
            Some(block) => Ok(Some(block)),
            None => self.translate(va, host, page, mode),
        };
        self.cpu.counters.translation_ns += started.elapsed().as_nanos() as u64;
        block
    }

    /// Whether a block that reaches into a second page still finds the same page there.
    fn second_page_holds(&mut self, block: u32, va: u64) -> Result<bool, Exception> {
        let Some(page) = self.blocks.second_page(block) else { return Ok(true) };
        if self.second_page(va)? == Some(page) {
            return Ok(true);
        }
        self.blocks.invalidate(page, 0..4096);
        self.cpu.mmu.flush_jumps();
        Ok(false)
    }

    /// Host address of the page behind that of `va`, as code.
    fn second_page(&mut self, va: u64) -> Result<Option<u64>, Exception> {
        let place = self.cpu.place((va | 0xfff).wrapping_add(1), 1, Access::Fetch, Who::Current)?;
        Ok(if let Place::Ram(host) = place { Some(host as u64) } else { None })
    }

    fn translate(
        &mut self,
        va: u64,
        host: *const u8,
        page: u64,
        mode: CodeMode,
    ) -> Result<Option<u32>, Exception> {
        self.guard_page(page);
        let mut bytes = [0; BEFORE + LIFTED];
        let offset = va as usize % 4096;
        let (before, left) = (offset.min(BEFORE), 4096 - offset);
        let here = left.min(LIFTED);
        crate::mmu::access::load(host.wrapping_sub(before), &mut bytes[..before + here]);
        let piece = Piece { start: va - before as u64, bytes: &bytes[..before + here] };
        if let Some(region) = self.lift(va, piece, mode) {
            return Ok(self.store(&region, Source { page, second: None }, mode));
        }
        // The first instruction leaves the page: a block of its own. Its faults are tier 0's.
        let Ok(Some(second)) = self.second_page(va) else { return Ok(None) };
        self.guard_page(second);
        let all = left + 15;
        crate::mmu::access::load(second as *const u8, &mut bytes[before + left..before + all]);
        let piece = Piece { start: va, bytes: &bytes[before..before + all] };
        let Some(mut region) = self.blocks.lift_one(va, piece, mode) else { return Ok(None) };
        if self.options.check {
            region.keep_flags();
        }
        Ok(self.store(&region, Source { page, second: Some(second) }, mode))
    }

    /// Lifts the region at `va`; in check mode it is one instruction, all of whose flags count.
    fn lift(&mut self, va: u64, piece: Piece, mode: CodeMode) -> Option<Region> {
        if !self.options.check {
            return self.blocks.lift(va, piece, mode);
        }
        let mut region = self.blocks.lift_one(va, piece, mode)?;
        region.keep_flags();
        Some(region)
    }

    /// Translates a region. `None` if there was no room: everything has been thrown away then. Nobody has watched the
    /// region's pages for a moment, so that it must be read anew.
    fn store(&mut self, region: &Region, source: Source, mode: CodeMode) -> Option<u32> {
        let block = self.blocks.translate(region, source, mode);
        if block.is_none() {
            self.clear_blocks();
        }
        block
    }

    /// Sees to it that every write to the page is noticed from now on.
    fn guard_page(&mut self, page: u64) {
        if !self.blocks.has_page(page)
            && let Some(gpa) = self.cpu.mmu.gpa_of_host(page)
        {
            self.cpu.mmu.guard(gpa);
        }
    }

    /// No room is left: everything is translated anew.
    fn clear_blocks(&mut self) {
        for page in self.blocks.clear() {
            if let Some(gpa) = self.cpu.mmu.gpa_of_host(page) {
                self.cpu.mmu.code.unwatch(gpa, self.cpu.id);
            }
        }
        self.direct.pool.forget_all_code(&mut self.cpu);
        self.pending_link = None;
        self.cpu.mmu.flush_jumps();
    }

    fn resolve_link(&mut self, block: u32) {
        let Some(link) = self.pending_link.take() else { return };
        if self.blocks.link_target(link).is_none_or(|(target, _)| target != self.cpu.rip) {
            return;
        }
        let generation = if self.cpu.rip >> 63 != 0 {
            self.cpu.mmu.kernel_generation()
        } else {
            self.cpu.mmu.user_generation()
        };
        self.blocks.resolve(link, block, generation);
    }

    pub(super) fn enter(&mut self, block: u32, mode: CodeMode) {
        let entry = self.blocks.entry(block);
        let cpu = &mut *self.cpu;
        cpu.select_view();
        cpu.mmu.set_jump_mode(CodeMode { plain: false, ..mode }.bits());
        cpu.kernel_generation = cpu.mmu.kernel_generation();
        if !self.options.check && !mode.plain {
            let va = cpu.rip;
            cpu.mmu.fill_jump(va, entry);
        }
        // The next instruction clears it.
        cpu.rflags &= !rflags::RF;
        cpu.arith = cpu.rflags & rflags::ARITH | rflags::FIXED;
        cpu.fpu.header[0] = 7;
        cpu.counters.dispatches += 1;
        let thunk = self.blocks.thunks().enter;
        self.peer.set_running(true);
        // SAFETY: `run` has set GS to this vCPU's block; the entry is a block of this vCPU's own store, and the view
        // was selected above.
        unsafe { enter::enter(thunk, entry) };
        self.peer.set_running(false);
        let cpu = &mut *self.cpu;
        cpu.counters.exit(cpu.exit_reason);
        cpu.rflags = cpu.rflags & !rflags::ARITH | cpu.arith & rflags::ARITH;
        match cpu.exit_reason {
            exit::LINK => {
                let target = self.blocks.link_target(cpu.exit_aux as u32);
                cpu.exit_value = target.expect("blocks go only between runs of generated code").0;
            }
            exit::MISS => self.miss(self.cpu.exit_aux),
            exit::RETURN => self.miss(self.blocks.whole_address(self.cpu.return_site)),
            exit::POLL => {
                cpu.exit_reason = exit::AT;
                cpu.exit_value = self.blocks.locate(cpu.exit_value - 1).expect(MARKED).rip;
            }
            _ => {}
        }
    }

    /// An indirect jump or a return leads where the jump cache knows nothing. Out of the address space, the instruction
    /// itself faults: tier 0 executes it anew. The code right before `site` belongs to it.
    fn miss(&mut self, site: u64) {
        let cpu = &mut *self.cpu;
        cpu.exit_reason = exit::AT;
        if is_canonical(cpu.exit_value) {
            return;
        }
        let at = self.blocks.locate(site - 1).expect(MARKED).rip;
        (cpu.exit_reason, cpu.exit_value, cpu.rip) = (exit::INTERPRET, at, at);
        if let Ok(insn) = tier0::decode(cpu)
            && insn.i.flow_control() == FlowControl::Return
        {
            let extra = if insn.i.op_count() > 0 { u64::from(insn.i.immediate16()) } else { 0 };
            cpu.gpr[reg::RSP] = cpu.gpr[reg::RSP].wrapping_sub(8 + extra);
        }
    }

    fn after_exit(&mut self) -> Result<(), Exception> {
        let value = self.cpu.exit_value;
        match self.cpu.exit_reason {
            exit::LINK => {
                self.cpu.rip = value;
                self.pending_link = Some(self.cpu.exit_aux as u32);
                Ok(())
            }
            exit::INTERPRET => {
                self.cpu.rip = value;
                tier0::step(&mut self.cpu)
            }
            exit::FAULT => {
                let point = self.blocks.locate(value).expect(MARKED);
                self.cpu.rip = point.rip;
                if point.host_flags {
                    let flags = self.cpu.scratch[1];
                    self.cpu.rflags = self.cpu.rflags & !rflags::ARITH | flags & rflags::ARITH;
                }
                tier0::step(&mut self.cpu)
            }
            _ => {
                self.cpu.rip = value;
                // What an instruction inside the region has raised.
                self.cpu.exception.take().map_or(Ok(()), Err)
            }
        }
    }

    /// Code was written, by this vCPU or others, or others are about to translate from pages that this one writes to.
    fn memory_changed(&mut self) {
        let mut dropped = false;
        for (gpa, len) in std::mem::take(&mut self.cpu.written_code) {
            let start = (gpa & 0xfff) as u32;
            dropped |= self.invalidate(gpa, start..start + len);
        }
        for note in self.peer.take_notes() {
            match note {
                Note::Written(gpa) => dropped |= self.invalidate(gpa, 0..4096),
                Note::Guard(gpa) => {
                    self.cpu.mmu.code.take_writer(gpa, self.cpu.id);
                    self.cpu.mmu.drop_writers(gpa);
                }
            }
        }
        if dropped {
            self.cpu.mmu.flush_jumps();
        }
    }

    pub(super) fn invalidate(&mut self, gpa: u64, bytes: std::ops::Range<u32>) -> bool {
        let Some(page) = self.cpu.mmu.host_page(gpa) else { return false };
        self.direct.pool.forget_code(&mut self.cpu, gpa);
        let dropped = self.blocks.invalidate(page as u64, bytes);
        if !self.blocks.has_page(page as u64) {
            self.cpu.mmu.code.unwatch(gpa, self.cpu.id);
        }
        dropped
    }
}

impl Vcpu for DbtVcpu {
    fn run(&mut self, bus: &dyn Bus) -> Result<Halt, EngineError> {
        self.on_this_thread(bus, |this| {
            paravirt::enter(&mut this.cpu);
            this.run_loop()
        })
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        self.handle.clone()
    }

    fn state(&mut self) -> Result<VcpuState, EngineError> {
        Ok(self.cpu.save_state())
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        loadable(state)?;
        self.cpu.load_state(state);
        Ok(())
    }

    fn held(&mut self) {
        paravirt::clock::held(&mut self.cpu);
    }

    fn counters(&self) -> Counters {
        let mut all = self.cpu.counters.named();
        all.extend(self.cpu.mmu.counters());
        all.extend(self.blocks.counters());
        all
    }
}

/// Refuses a state with parts that this engine does not have: they would be lost.
fn loadable(state: &VcpuState) -> Result<(), EngineError> {
    const XCR0: u64 = 7;
    let unknown = match state.fpu.extended.keys().next() {
        Some(component) => format!("extended state {component} (AVX-512 is 5 to 7)"),
        None if state.xcr0 & !XCR0 != 0 => format!("XCR0 {:#x}", state.xcr0),
        None if state.cr4 & !tier0::CR4_KNOWN != 0 => format!("CR4 {:#x}", state.cr4),
        None => return Ok(()),
    };
    Err(EngineError::State(format!("the translator has no {unknown}")))
}
