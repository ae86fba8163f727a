//! User code that is executed directly ([`crate::direct`]), as the loop of a vCPU sees it.

use std::sync::atomic::Ordering;

use iced_x86::Mnemonic;
use ruse_arch::{
    Exception,
    paging::{Access, fault},
};
use ruse_engine::host_tsc;
use ruse_sandbox::{Place, SandboxError, Trap};

use super::vcpu::DbtVcpu;
use crate::{
    cpu::{Cpu, Who, request},
    direct::{self, Pool, Unresolved},
    mmu::watch::Peer,
    tier0,
};

/// Bytes of SYSCALL and INT n.
const CALL: u64 = 2;
const INT1: u8 = 0xf1;
const INT3: u8 = 0xcc;
/// Processes that may be refused something, or end, before nothing runs directly any more.
const PATIENCE: u32 = 8;

/// Direct execution of a vCPU.
#[derive(Default)]
pub struct Direct {
    /// The processes.
    pub pool: Pool,
    /// Where the thread and the processes run.
    pub place: Place,
    /// Processes that were refused something or have ended.
    refused: u32,
}

impl Direct {
    /// Whether the vCPU's next instructions are to be executed directly.
    pub fn wants(&self, cpu: &mut Cpu) -> bool {
        cpu.mode.cpl == 3 && cpu.direct.wants(cpu.root()) && direct::can_run(cpu) && !self.pool.avoids(cpu)
    }
}

/// How a stay in user code ended. The registers are the guest's again.
enum Stay {
    /// By a trap.
    Trap(Trap),
    /// By a page fault at an address, for which nothing could be mapped.
    Fault(u64, Unresolved),
    /// Requests have arrived, or nothing is known of the address space.
    Pause,
}

impl DbtVcpu {
    /// Runs user code directly until something else has to be done.
    pub(super) fn run_directly(&mut self) -> Result<(), Exception> {
        let stay = match stay(&mut self.direct, &mut self.cpu, &self.peer) {
            Ok(stay) => stay,
            Err(error) => return self.lost(&error),
        };
        let cpu = &mut *self.cpu;
        match stay {
            Stay::Pause | Stay::Trap(Trap::Kicked) => Ok(()),
            Stay::Fault(address, Unresolved::Fault(error)) => Err(Exception::pf(address, error)),
            Stay::Fault(_, Unresolved::Code(gpa)) => {
                cpu.direct.rewritten(cpu.root(), host_tsc());
                self.forget_code(gpa);
                tier0::step(&mut self.cpu)
            }
            Stay::Fault(va, Unresolved::Suspicious(gpa)) => {
                self.look_through(va, gpa);
                Ok(())
            }
            // Unless it is an instruction that only ends on the page that is avoided.
            Stay::Fault(va, Unresolved::Detour) if cpu.rip ^ va <= 0xfff => Ok(()),
            Stay::Fault(_, Unresolved::Elsewhere | Unresolved::Detour) => tier0::step(cpu),
            Stay::Trap(Trap::SystemCall) => {
                cpu.rip = cpu.rip.wrapping_sub(CALL);
                tier0::step_known(cpu, Mnemonic::Syscall, CALL, tier0::system_call)
            }
            // INT 80h and INT 4.
            Stay::Trap(Trap::OldSystemCall | Trap::Exception(4)) => {
                cpu.rip = cpu.rip.wrapping_sub(CALL);
                tier0::step(cpu)
            }
            // User code has set TF itself.
            Stay::Trap(Trap::Exception(1)) if last_byte(cpu) != Some(INT1) => {
                Err(Exception::db(tier0::DR6_BS))
            }
            Stay::Trap(Trap::Exception(1 | 3)) => {
                let short = matches!(last_byte(cpu), Some(INT1 | INT3));
                cpu.rip = cpu.rip.wrapping_sub(if short { 1 } else { CALL });
                tier0::step(cpu)
            }
            Stay::Trap(_) => tier0::step(cpu),
        }
    }

    /// User code is interrupted that would run directly, if it was known what some bytes of its page are: more of the page may
    /// be known by now.
    pub(super) fn reconsider(&mut self) {
        if let Some(gpa) = self.direct.pool.reconsider(&mut self.cpu) {
            self.look_through(self.cpu.rip, gpa);
        }
    }

    /// Sees to it that code of a page can run directly, if that is possible. The instruction at RIP lies on it, at least in
    /// part.
    fn look_through(&mut self, va: u64, gpa: u64) {
        let Some(host) = self.cpu.mmu.host_page(gpa) else { return };
        let mut roots = self.blocks.starts_on(host as u64);
        let Ok(instruction) = tier0::decode(&mut self.cpu) else { return };
        let executed = [instruction.rip, instruction.next].map(|at| at.wrapping_sub(va & !0xfff));
        roots.extend(executed.into_iter().filter_map(|at| u16::try_from(at).ok()).filter(|at| *at < 0x1000));
        self.direct.pool.look_through(&mut self.cpu, va, gpa, roots);
    }

    /// Translations of code of a page to which user code writes go, so that it may be written to directly.
    fn forget_code(&mut self, gpa: u64) {
        if self.invalidate(gpa, 0..4096) {
            self.cpu.mmu.flush_jumps();
        }
        self.cpu.mmu.code.written(gpa, Some(self.cpu.id));
    }

    /// There is no process, or none any more.
    fn lost(&mut self, error: &SandboxError) -> Result<(), Exception> {
        tracing::info!("direct execution: {error}");
        let root = self.cpu.root();
        self.direct.pool.end(root);
        self.cpu.direct.forget(root);
        self.direct.refused += 1;
        if matches!(error, SandboxError::Unsupported(_)) || self.direct.refused > PATIENCE {
            tracing::info!("user code is translated from now on");
            self.cpu.direct.give_up();
        }
        // If somebody has killed it, or user code itself has made it useless, what it has done since its last trap is lost: as
        // far as the guest can see, it has done something that it must not.
        if matches!(error, SandboxError::Ended) { Err(Exception::gp(0)) } else { Ok(()) }
    }
}

/// Runs user code of the address space in force, and maps what it needs.
fn stay(direct: &mut Direct, cpu: &mut Cpu, peer: &Peer) -> Result<Stay, SandboxError> {
    let Some(space) = direct.pool.current(cpu)? else {
        cpu.direct.forget(cpu.root());
        return Ok(Stay::Pause);
    };
    direct.place.share(&mut space.sandbox);
    space.map_awaited(cpu);
    direct::store(cpu, &mut space.sandbox);
    let shared = cpu.shared();
    loop {
        // Who asks for something and finds that nothing runs does not wait: so requests are looked at after that is said.
        peer.set_running(true);
        shared.direct.begin(&space.sandbox);
        if shared.requests.load(Ordering::SeqCst) & !request::SELF != 0 {
            shared.direct.end();
            peer.set_running(false);
            direct::load(cpu, &space.sandbox);
            return Ok(Stay::Pause);
        }
        cpu.counters.direct.runs += 1;
        let (changes, entered) = (space.sandbox.changes_mappings(), host_tsc());
        let trap = space.sandbox.run();
        cpu.direct.stayed(cpu.root(), host_tsc().saturating_sub(entered), changes);
        peer.set_running(false);
        shared.direct.end();
        let trap = trap.inspect_err(|_| direct::load(cpu, &space.sandbox))?;
        count(cpu, trap);
        let end = match trap {
            Trap::PageFault { address, error } => match space.resolve(cpu, address, access(error)) {
                Ok(()) => continue,
                Err(why) => Stay::Fault(address, why),
            },
            trap => Stay::Trap(trap),
        };
        direct::load(cpu, &space.sandbox);
        return Ok(end);
    }
}

/// The last byte of the instruction before RIP.
fn last_byte(cpu: &mut Cpu) -> Option<u8> {
    let mut last = [0];
    let at = cpu.rip.wrapping_sub(1);
    cpu.read_linear(at, &mut last, Who::Current).ok().map(|()| last[0])
}

fn access(error: u32) -> Access {
    match error {
        e if e & fault::I != 0 => Access::Fetch,
        e if e & fault::W != 0 => Access::Write,
        _ => Access::Read,
    }
}

fn count(cpu: &mut Cpu, trap: Trap) {
    let counters = &mut cpu.counters.direct;
    *match trap {
        Trap::SystemCall | Trap::OldSystemCall => &mut counters.system_calls,
        Trap::PageFault { .. } => &mut counters.faults,
        Trap::Exception(_) => &mut counters.exceptions,
        Trap::Kicked => &mut counters.kicks,
    } += 1;
}
