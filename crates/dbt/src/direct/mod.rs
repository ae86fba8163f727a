//! Direct execution of user code: the guest's 64-bit user programs on the host's CPU as they are, in a process whose memory is
//! what the guest's page tables map (`ruse-sandbox`). System calls, faults and interrupts lead back to the vCPU, which goes on
//! in the guest's kernel by translation.
//!
//! A sandbox stands for the TLB of its vCPU as user code of one address space sees it. What the guest flushes is noted by
//! the MMU ([`crate::mmu::changes`]) and done before the sandbox runs again; a flush of everything does not empty it, but has each
//! of its mappings compared with the page tables.

mod mappings;
mod policy;
mod registers;
pub mod scan;
mod space;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use ruse_memory::PAGE_SIZE;
use ruse_sandbox::{Kicker, Sandbox, SandboxError};

use self::space::Followed;
pub use self::{
    policy::Policy,
    registers::{can_run, load, store},
    space::{Space, Unresolved},
};
use crate::cpu::Cpu;

/// When user code is executed directly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirectMode {
    /// Never.
    #[default]
    Off,
    /// Where that is faster.
    Auto,
    /// Wherever it is possible: for tests.
    Always,
}

/// Address spaces with a process at the same time.
const SPACES: usize = 12;
/// Pages with replaced instructions that are remembered at most.
const REPLACED: usize = 1024;

/// The address spaces of a vCPU that have a sandbox.
#[derive(Default)]
pub struct Pool {
    spaces: Vec<Space>,
    tick: u64,
    /// Instructions that were replaced, by their pages of RAM, as long as nobody writes to those. What leads to them may have
    /// run directly, so that nothing else knows it.
    replaced: HashMap<u64, Vec<u16>>,
}

impl Pool {
    /// The address space in force, ready to be entered; with a new process if it has none. `None`: it has become another one,
    /// of which nothing is known.
    pub fn current(&mut self, cpu: &mut Cpu) -> Result<Option<&mut Space>, SandboxError> {
        self.tick += 1;
        let root = cpu.root();
        let index = match self.spaces.iter().position(|space| space.root == root) {
            Some(index) if self.spaces[index].follow(cpu) == Followed::Same => index,
            Some(index) => {
                self.spaces.swap_remove(index);
                return Ok(None);
            }
            None => self.add(cpu, root)?,
        };
        let space = &mut self.spaces[index];
        space.used = self.tick;
        Ok(Some(space))
    }

    fn add(&mut self, cpu: &mut Cpu, root: u64) -> Result<usize, SandboxError> {
        cpu.counters.direct.spaces += 1;
        if self.spaces.len() == SPACES {
            let oldest = (0..SPACES).min_by_key(|&i| self.spaces[i].used).expect("not empty");
            self.spaces.swap_remove(oldest);
        }
        self.spaces.push(Space::new(cpu, root)?);
        Ok(self.spaces.len() - 1)
    }

    /// Whether code at an address of the address space in force is not to run directly.
    pub fn avoids(&self, cpu: &Cpu) -> bool {
        let root = cpu.root();
        self.spaces.iter().any(|space| space.root == root && space.avoids(cpu.rip))
    }

    /// See [`Space::reconsider`], of the address space in force.
    pub fn reconsider(&mut self, cpu: &mut Cpu) -> Option<u64> {
        let root = cpu.root();
        self.spaces.iter_mut().find(|space| space.root == root)?.reconsider(cpu)
    }

    /// Makes a page of code at `va` executable in the address space in force ([`Space::look_through`]). `roots` are offsets
    /// of instructions that are executed.
    pub fn look_through(&mut self, cpu: &mut Cpu, va: u64, gpa: u64, mut roots: Vec<u16>) {
        let gpa = gpa & !(PAGE_SIZE - 1);
        roots.extend(self.replaced.get(&gpa).into_iter().flatten());
        let Ok(Some(space)) = self.current(cpu) else { return };
        let replaced = space.look_through(cpu, va, gpa, roots);
        if let Some(replaced) = replaced.filter(|replaced| !replaced.is_empty()) {
            if self.replaced.len() >= REPLACED {
                self.replaced.clear();
            }
            self.replaced.insert(gpa, replaced);
        }
    }

    /// A page of RAM is not executed directly any more: its bytes change.
    pub fn forget_code(&mut self, cpu: &mut Cpu, gpa: u64) {
        self.replaced.remove(&(gpa & !(PAGE_SIZE - 1)));
        self.spaces.iter_mut().for_each(|space| space.forget_code(cpu, gpa));
    }

    /// No page is executed directly any more.
    pub fn forget_all_code(&mut self, cpu: &mut Cpu) {
        self.replaced.clear();
        self.spaces.iter_mut().for_each(|space| space.forget_all_code(cpu));
    }

    /// Ends the process of an address space.
    pub fn end(&mut self, root: u64) {
        self.spaces.retain(|space| space.root != root);
    }
}

/// Whether a vCPU's user code runs directly at the moment, and how other threads stop it.
#[derive(Debug, Default)]
pub struct Running {
    on: AtomicBool,
    kicker: Mutex<Option<Arc<Kicker>>>,
}

impl Running {
    /// Stops user code, if it runs. What it is to look at then has been stored before, with a full fence.
    pub fn stop(&self) {
        if self.on.load(Ordering::SeqCst)
            && let Some(kicker) = &*self.kicker.lock().unwrap_or_else(PoisonError::into_inner)
        {
            kicker.kick();
        }
    }

    /// User code of the sandbox is about to run: what is requested from now on stops it.
    pub fn begin(&self, sandbox: &Sandbox) {
        *self.kicker.lock().unwrap_or_else(PoisonError::into_inner) = Some(sandbox.kicker());
        self.on.store(true, Ordering::SeqCst);
    }

    /// User code has stopped.
    pub fn end(&self) {
        self.on.store(false, Ordering::SeqCst);
    }
}
