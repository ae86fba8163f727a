//! The vCPU block: the guest CPU's registers and what generated code needs, at fixed offsets from the GS base.

use std::{
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, Ordering},
    },
};

use ruse_arch::{
    DescriptorTable, Exception, MpState, Segment, VcpuState,
    flags::{cr0, cr4, efer, rflags},
    paging::{PHYS_BITS, PagingMode, Privilege},
    state::{reg, seg},
};
use ruse_engine::{Bus, Clock, CpuidTable, DoorbellReader, IoAddress};

use crate::{
    backend::x86_64::{groups::GROUPS, loops::FIRST_ROUNDS},
    counters::Counters,
    direct::{self, Running},
    mmu::Mmu,
};

/// What other threads ask of a vCPU; bits of [`Shared::requests`]. Any bit makes translated code return at the next
/// block.
pub mod request {
    /// Return from `run`.
    pub const KICK: u32 = 1 << 0;
    /// A maskable interrupt may wait on the bus.
    pub const INTERRUPT: u32 = 1 << 1;
    /// A non-maskable interrupt.
    pub const NMI: u32 = 1 << 2;
    /// INIT.
    pub const INIT: u32 = 1 << 3;
    /// A start-up IPI; the vector is in [`super::Shared::sipi_vector`].
    pub const SIPI: u32 = 1 << 4;
    /// Another vCPU or a device changed what this one derived from memory.
    pub const MEMORY: u32 = 1 << 5;
    /// The vCPU itself must look at its state before the next block (interrupt window, single step).
    pub const SELF: u32 = 1 << 6;
    /// Direct writes to all pages must end, so that the dirty log sees the next ones.
    pub const LOG: u32 = 1 << 7;
    /// Another vCPU ends HLT.
    pub const UNHALT: u32 = 1 << 8;
    /// Another vCPU is alone: nothing is to be executed as long as this is set.
    pub const STAND_STILL: u32 = 1 << 9;
}

/// The part of a vCPU that other threads reach.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct Shared {
    /// Bits of [`request`].
    pub requests: AtomicU32,
    /// Vector of the last start-up IPI.
    pub sipi_vector: AtomicU8,
    /// What stops user code that is executed directly, as it looks at no requests.
    pub direct: Running,
}

impl Shared {
    /// Adds requests; the caller wakes the thread.
    pub fn raise(&self, bits: u32) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
        self.direct.stop();
    }
    /// Takes the given requests away and says which were there.
    pub fn take(&self, bits: u32) -> u32 {
        self.requests.fetch_and(!bits, Ordering::SeqCst) & bits
    }
}

/// A buffer aligned for every vector access.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Bounce(pub [u64; 8]);

/// x87, SSE and AVX registers: an FXSAVE image (SDM volume 1, 10.5.1) and the upper halves of the YMM registers, which
/// is also the standard XSAVE layout with the header between left as it is.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct FpuArea {
    /// FXSAVE64 image: control words, ST0 to ST7, XMM0 to XMM15.
    pub fxsave: [u8; 512],
    /// XSAVE header.
    pub header: [u64; 8],
    /// High halves of YMM0 to YMM15.
    pub ymm_high: [[u64; 2]; 16],
}

/// Which part of the guest's address space rules apply to an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The access of an instruction at the current privilege level.
    Current,
    /// An access that the CPU itself makes with supervisor rights: descriptor tables, TSS, stack switches.
    System,
}

/// Decoded properties of the current mode that many decisions need; recomputed by [`Cpu::update_mode`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mode {
    /// Current privilege level.
    pub cpl: u8,
    /// EFER.LMA.
    pub long: bool,
    /// Long mode with CS.L: 64-bit code.
    pub code64: bool,
    /// CS.D (and not 64-bit): 32-bit code.
    pub code32: bool,
    /// CR0.PE is clear.
    pub real: bool,
    /// Virtual-8086 mode.
    pub vm86: bool,
}

/// The guest CPU. One lives in each [`Arena`]; generated code addresses it through GS.
#[repr(C, align(64))]
pub struct Cpu {
    /// General registers, in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer of the next instruction.
    pub rip: u64,
    /// All flags. While translated code runs, the arithmetic ones are in `arith`.
    pub rflags: u64,
    /// Arithmetic flags as PUSHFQ stored them; meaningful only inside translated code.
    pub arith: u64,
    /// Entries of the TLB view in force.
    pub tlb: *mut crate::mmu::tlb::Entry,
    /// Entries of the kernel's views without and with AC, for STAC and CLAC; valid at CPL 0.
    pub kernel_tlbs: [*mut crate::mmu::tlb::Entry; 2],
    /// Entries of the jump cache in force.
    pub jumps: *mut crate::mmu::tlb::Jump,
    /// Generation of the kernel half's executable mappings.
    pub kernel_generation: u32,
    /// Generation of the user half's executable mappings, unique over address spaces.
    pub user_generation: u32,
    /// The x87 registers are in the host's unit, not in `fpu`.
    pub x87_resident: u32,
    /// The vector registers and MXCSR are in the host's registers, not in `fpu`; only while translated code runs.
    pub vectors_resident: u32,
    /// An interrupt waits on the bus that IF holds back: generated code leaves STI to tier 0.
    pub irq_waiting: u32,
    /// Why generated code was left (a number of the back end).
    pub exit_reason: u32,
    /// Details of the exit.
    pub exit_value: u64,
    /// More details of the exit.
    pub exit_aux: u64,
    /// The block's own address, for calls from generated code.
    pub this: u64,
    /// Scratch of generated code and its thunks.
    pub scratch: [u64; 8],
    /// Bytes of an access that cannot be made in place.
    pub bounce: Bounce,
    /// Vector and x87 registers.
    pub fpu: FpuArea,
    /// Scratch for the host's MXCSR.
    pub host_mxcsr: u32,
    /// Host stack pointer to go back to.
    pub host_rsp: u64,
    /// Host addresses of the groups of accesses of the region that runs.
    pub groups: [u64; GROUPS],
    /// Where those that walk through memory were last: linear and host address of the page. For those that move evenly: the
    /// way from the registers of the address to host memory, in the second place.
    pub group_pages: [[u64; 2]; GROUPS],
    /// Rounds, less one, in the first copy of the code of loops with tables. Loops share the places.
    pub first_rounds: [u32; LOOPS],
    /// Rounds that a loop may yet make.
    pub rounds: u32,
    /// What the register that counts them holds when there are none left.
    pub last_round: u64,
    /// Calls of generated code push no return addresses below this.
    pub stack_limit: u64,
    /// Host stack pointer with which user code goes on after SYSRET.
    pub user_returns: u64,
    /// Low half of the address of the code of the return that led to elsewhere last.
    pub return_site: u32,
    /// ES, CS, SS, DS, FS, GS.
    pub seg: [Segment; 6],
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table.
    pub idtr: DescriptorTable,
    /// CR0, CR3, CR4, EFER and the PDPTEs: what the MMU depends on. Change through the `set_` functions of tier 0.
    pub paging: PagingMode,
    /// Page-fault address.
    pub cr2: u64,
    /// Enabled XSAVE components.
    pub xcr0: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// Debug status.
    pub dr6: u64,
    /// Debug control.
    pub dr7: u64,
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub sfmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// SYSENTER's CS, ESP and EIP.
    pub sysenter: [u64; 3],
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// IA32_SPEC_CTRL.
    pub spec_ctrl: u64,
    /// IA32_MTRR_DEF_TYPE.
    pub mtrr_def_type: u64,
    /// Fixed-range MTRRs.
    pub mtrr_fixed: [u64; 11],
    /// Variable-range MTRRs.
    pub mtrr_variable: [(u64, u64); 8],
    /// What is added to the clock's counter, IA32_TSC_ADJUST not included.
    pub tsc_offset: u64,
    /// Properties of the current mode.
    pub mode: Mode,
    /// What the vCPU is doing.
    pub mp_state: MpState,
    /// Interrupts (and debug traps after MOV SS) are blocked for the next instruction.
    pub interrupt_shadow: bool,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// An exception to deliver before the next instruction (from a restored state).
    pub exception: Option<Exception>,
    /// An interrupt to deliver before the next instruction (from a restored state).
    pub interrupt: Option<u8>,
    /// KVM's paravirtual interfaces.
    pub paravirt: crate::paravirt::Unit,
    /// What CPUID says.
    pub cpuid: CpuidTable,
    /// Index and APIC id.
    pub id: u32,
    /// Guest time.
    pub clock: Arc<Clock>,
    /// The software MMU.
    pub mmu: Mmu,
    /// Which user code is executed directly.
    pub direct: direct::Policy,
    /// Decoded instructions of tier 0.
    pub decoded: crate::tier0::DecodeCache,
    /// Counters for diagnosis.
    pub counters: Counters,
    /// DR6 bits of data and port breakpoints that the current instruction has met.
    pub debug_hits: u64,
    /// Bytes (guest physical address, length) of pages with code that this vCPU wrote and the translator has not seen.
    pub written_code: Vec<(u64, u32)>,
    /// Writes that the bus does not see.
    pub doorbells: DoorbellReader,
    bus: Option<NonNull<dyn Bus>>,
    shared: NonNull<Shared>,
}

/// Allocation of one vCPU: the shared part lies right before the block, so that generated code reaches both.
#[repr(C, align(4096))]
pub struct Arena {
    /// What other threads reach.
    pub shared: Shared,
    cpu: std::cell::UnsafeCell<std::mem::MaybeUninit<Cpu>>,
}

/// Places for the first rounds of loops; a power of two.
pub const LOOPS: usize = 256;

/// Offset of [`Shared::requests`] from the GS base (which is the address of the [`Cpu`]).
pub const REQUESTS_OFFSET: i32 = std::mem::offset_of!(Arena, shared) as i32
    + std::mem::offset_of!(Shared, requests) as i32
    - std::mem::offset_of!(Arena, cpu) as i32;

// SAFETY: `shared` is atomics; `cpu` is reached only through the one `CpuBox` of the arena.
unsafe impl Sync for Arena {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl Send for Arena {}

/// The owner of a [`Cpu`]: the only way to it.
pub struct CpuBox {
    arena: Arc<Arena>,
}

// SAFETY: a `Cpu` belongs to its box; its raw pointers lead into allocations that it owns or, the bus, are set only
// while `run` is on the stack.
unsafe impl Send for CpuBox {}

impl CpuBox {
    /// A vCPU in the state after power-up.
    pub fn new(id: u32, cpuid: CpuidTable, clock: Arc<Clock>, mmu: Mmu) -> Self {
        let mut arena: Arc<Arena> = Arc::new(Arena {
            shared: Shared::default(),
            cpu: std::cell::UnsafeCell::new(std::mem::MaybeUninit::uninit()),
        });
        let inner = Arc::get_mut(&mut arena).expect("just made");
        let shared = NonNull::from(&inner.shared);
        let cpu = inner.cpu.get_mut().write(Cpu::blank(id, cpuid, clock, mmu, shared));
        cpu.this = std::ptr::from_mut(cpu) as u64;
        cpu.load_state(&VcpuState::default());
        Self { arena }
    }

    /// The arena, for handles of other threads.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }
}

impl std::ops::Deref for CpuBox {
    type Target = Cpu;
    fn deref(&self) -> &Cpu {
        // SAFETY: initialised in `new`; the box is the only way to the cell, and it is borrowed.
        unsafe { (*self.arena.cpu.get()).assume_init_ref() }
    }
}

impl std::ops::DerefMut for CpuBox {
    fn deref_mut(&mut self) -> &mut Cpu {
        // SAFETY: as in `deref`, and the box is borrowed exclusively.
        unsafe { (*self.arena.cpu.get()).assume_init_mut() }
    }
}

impl Drop for CpuBox {
    fn drop(&mut self) {
        // SAFETY: initialised in `new`, dropped once; handles that outlive the box use only `shared`.
        unsafe { (*self.arena.cpu.get()).assume_init_drop() }
    }
}

impl Cpu {
    fn blank(id: u32, cpuid: CpuidTable, clock: Arc<Clock>, mmu: Mmu, shared: NonNull<Shared>) -> Self {
        Self {
            gpr: [0; 16],
            rip: 0,
            rflags: rflags::FIXED,
            arith: 0,
            tlb: std::ptr::null_mut(),
            kernel_tlbs: [std::ptr::null_mut(); 2],
            jumps: std::ptr::null_mut(),
            kernel_generation: 0,
            user_generation: 0,
            x87_resident: 0,
            vectors_resident: 0,
            irq_waiting: 0,
            exit_reason: 0,
            exit_value: 0,
            exit_aux: 0,
            this: 0,
            scratch: [0; 8],
            bounce: Bounce([0; 8]),
            fpu: FpuArea { fxsave: [0; 512], header: [0; 8], ymm_high: [[0; 2]; 16] },
            host_mxcsr: 0x1f80,
            host_rsp: 0,
            groups: [0; GROUPS],
            group_pages: [[0; 2]; GROUPS],
            first_rounds: [FIRST_ROUNDS; LOOPS],
            rounds: 0,
            last_round: 0,
            stack_limit: 0,
            user_returns: 0,
            return_site: 0,
            seg: [Segment::default(); 6],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            paging: PagingMode::default(),
            cr2: 0,
            xcr0: 1,
            dr: [0; 4],
            dr6: 0,
            dr7: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter: [0; 3],
            pat: 0,
            tsc_aux: 0,
            tsc_adjust: 0,
            misc_enable: 0,
            spec_ctrl: 0,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [(0, 0); 8],
            tsc_offset: clock.tsc_offset(),
            mode: Mode::default(),
            mp_state: MpState::Running,
            interrupt_shadow: false,
            nmi_blocked: false,
            nmi_pending: false,
            exception: None,
            interrupt: None,
            paravirt: crate::paravirt::Unit::default(),
            cpuid,
            id,
            clock,
            mmu,
            direct: direct::Policy::new(direct::DirectMode::Off, 0),
            decoded: crate::tier0::DecodeCache::default(),
            counters: Counters::default(),
            debug_hits: 0,
            written_code: Vec::new(),
            doorbells: DoorbellReader::default(),
            bus: None,
            shared,
        }
    }

    /// What other threads reach of this vCPU.
    pub fn shared<'a>(&self) -> &'a Shared {
        // SAFETY: the arena holds both, and outlives every borrow that the engine makes inside `run`.
        unsafe { self.shared.as_ref() }
    }

    /// The machine. Only inside [`Cpu::with_bus`].
    ///
    /// # Panics
    /// Outside `with_bus`, which would be a bug of the engine.
    pub fn bus<'a>(&self) -> &'a dyn Bus {
        let bus = self.bus.expect("guest code runs only inside with_bus");
        // SAFETY: set by `with_bus`, whose borrow of the bus lasts until the field is cleared.
        unsafe { bus.as_ref() }
    }

    /// Writes to a port.
    pub fn port_write(&mut self, port: u16, bytes: &[u8]) {
        if !self.doorbells.ring(IoAddress::Port(port), bytes) {
            self.bus().pio_write(self.id, port, bytes);
        }
    }

    /// Runs `body` with the machine in reach.
    pub fn with_bus<R>(&mut self, bus: &dyn Bus, body: impl FnOnce(&mut Self) -> R) -> R {
        Self::attach(self, |cpu| cpu, bus, body)
    }

    /// Runs `body` on the owner of a vCPU, with the machine in the vCPU's reach.
    pub fn attach<T, R>(
        owner: &mut T,
        cpu: fn(&mut T) -> &mut Self,
        bus: &dyn Bus,
        body: impl FnOnce(&mut T) -> R,
    ) -> R {
        struct Clear<'a, T>(&'a mut T, fn(&mut T) -> &mut Cpu);
        impl<T> Drop for Clear<'_, T> {
            fn drop(&mut self) {
                self.1(self.0).bus = None;
            }
        }
        // SAFETY: only the lifetime changes; `Clear` takes the pointer away before the borrow ends.
        let bus: NonNull<dyn Bus> = unsafe { std::mem::transmute(NonNull::from(bus)) };
        cpu(owner).bus = Some(bus);
        let clear = Clear(owner, cpu);
        body(clear.0)
    }

    /// Recomputes [`Mode`] and chooses the TLB view. Call after any change of CS, SS's DPL, CR0, EFER, RFLAGS.VM or
    /// RFLAGS.AC. The current privilege level is SS's DPL (SDM volume 3, 5.5).
    pub fn update_mode(&mut self) {
        let real = self.paging.cr0 & cr0::PE == 0;
        let vm86 = !real && self.rflags & rflags::VM != 0;
        let long = self.paging.efer & efer::LMA != 0;
        let cs = &self.seg[seg::CS];
        let code64 = long && cs.attr & Segment::L != 0;
        self.mode = Mode {
            cpl: if real {
                0
            } else if vm86 {
                3
            } else {
                self.seg[seg::SS].dpl()
            },
            long,
            code64,
            code32: !code64 && !real && !vm86 && cs.attr & Segment::DB != 0,
            real,
            vm86,
        };
        if real && cs.attr & Segment::DB != 0 {
            // CS keeps its size when PE goes off until a far jump loads it.
            self.mode.code32 = true;
        }
        self.select_view();
    }

    /// Chooses the TLB view by privilege and AC.
    pub fn select_view(&mut self) {
        let who = self.privilege(Who::Current);
        let smap = self.paging.cr4 & cr4::SMAP != 0;
        let (tlb, jumps) = self.mmu.select(who.user, !smap || who.ac);
        self.tlb = tlb;
        self.jumps = jumps;
        if !who.user {
            self.kernel_tlbs = self.mmu.kernel_entries(smap);
        }
        self.user_generation = self.mmu.user_generation();
    }

    /// Rights of an access.
    pub fn privilege(&self, who: Who) -> Privilege {
        match who {
            Who::Current => Privilege { user: self.mode.cpl == 3, ac: self.rflags & rflags::AC != 0 },
            Who::System => Privilege { user: false, ac: false },
        }
    }

    /// CR3 without its flags.
    pub fn root(&self) -> u64 {
        self.paging.cr3 & ((1 << PHYS_BITS) - 1) & !0xfff
    }

    /// The guest's time-stamp counter now.
    pub fn tsc(&self) -> u64 {
        self.clock.counter().wrapping_add(self.tsc_offset).wrapping_add(self.tsc_adjust)
    }

    /// How far the vCPU's TSC is ahead of the machine's clock.
    pub fn tsc_lead(&self) -> u64 {
        self.tsc_offset.wrapping_add(self.tsc_adjust).wrapping_sub(self.clock.tsc_offset())
    }

    /// Takes over a whole architectural state.
    pub fn load_state(&mut self, s: &VcpuState) {
        self.gpr = s.gpr;
        self.rip = s.rip;
        self.rflags = s.rflags;
        self.seg = s.seg;
        (self.ldtr, self.tr, self.gdtr, self.idtr) = (s.ldtr, s.tr, s.gdtr, s.idtr);
        self.paging = PagingMode { cr0: s.cr0, cr3: s.cr3, cr4: s.cr4, efer: s.efer, pdpte: s.pdpte };
        (self.cr2, self.xcr0) = (s.cr2, s.xcr0);
        (self.dr, self.dr6, self.dr7) = (s.dr, s.dr6, s.dr7);
        self.fpu.load(&s.fpu);
        self.x87_resident = 0;
        (self.star, self.lstar, self.cstar, self.sfmask) = (s.star, s.lstar, s.cstar, s.sfmask);
        self.kernel_gs_base = s.kernel_gs_base;
        self.sysenter = [s.sysenter_cs, s.sysenter_esp, s.sysenter_eip];
        (self.pat, self.tsc_aux, self.tsc_adjust) = (s.pat, s.tsc_aux, s.tsc_adjust);
        (self.misc_enable, self.spec_ctrl) = (s.misc_enable, s.spec_ctrl);
        self.mtrr_def_type = s.mtrr_def_type;
        (self.mtrr_fixed, self.mtrr_variable) = (s.mtrr_fixed, s.mtrr_variable);
        if s.tsc != 0 {
            let counter = self.clock.counter();
            self.tsc_offset = s.tsc.wrapping_sub(s.tsc_adjust).wrapping_sub(counter);
        }
        crate::paravirt::load(self, s);
        self.mp_state = s.mp_state;
        self.interrupt_shadow = s.interrupt_shadow;
        (self.nmi_blocked, self.nmi_pending) = (s.nmi_blocked, s.nmi_pending);
        (self.exception, self.interrupt) = (s.exception, s.interrupt);
        self.mmu.flush_all();
        self.mmu.set_space(&self.paging);
        self.update_mode();
    }

    /// The whole architectural state.
    pub fn save_state(&self) -> VcpuState {
        VcpuState {
            gpr: self.gpr,
            rip: self.rip,
            rflags: self.rflags,
            seg: self.seg,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.paging.cr0,
            cr2: self.cr2,
            cr3: self.paging.cr3,
            cr4: self.paging.cr4,
            xcr0: self.xcr0,
            dr: self.dr,
            dr6: self.dr6,
            dr7: self.dr7,
            pdpte: self.paging.pdpte,
            fpu: self.fpu.save(),
            efer: self.paging.efer,
            star: self.star,
            lstar: self.lstar,
            cstar: self.cstar,
            sfmask: self.sfmask,
            kernel_gs_base: self.kernel_gs_base,
            sysenter_cs: self.sysenter[0],
            sysenter_esp: self.sysenter[1],
            sysenter_eip: self.sysenter[2],
            pat: self.pat,
            tsc_aux: self.tsc_aux,
            tsc_adjust: self.tsc_adjust,
            misc_enable: self.misc_enable,
            spec_ctrl: self.spec_ctrl,
            mtrr_def_type: self.mtrr_def_type,
            mtrr_fixed: self.mtrr_fixed,
            mtrr_variable: self.mtrr_variable,
            tsc: self.tsc(),
            paravirt: self.paravirt.registers(),
            mp_state: self.mp_state,
            interrupt_shadow: self.interrupt_shadow,
            nmi_blocked: self.nmi_blocked,
            nmi_pending: self.nmi_pending,
            exception: self.exception,
            interrupt: self.interrupt,
            lapic: None,
        }
    }

    /// The stack pointer register's index, for readers of tier 0.
    pub const RSP: usize = reg::RSP;
}

impl FpuArea {
    /// Takes over an architectural state.
    pub fn load(&mut self, s: &ruse_arch::FpuState) {
        self.fxsave = s.to_fxsave();
        self.ymm_high = s.ymm.map(|ymm| [ymm[2], ymm[3]]);
    }

    /// The architectural state.
    pub fn save(&self) -> ruse_arch::FpuState {
        ruse_arch::FpuState::from_fxsave(&self.fxsave, &self.ymm_high)
    }
}
