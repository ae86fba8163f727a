//! The threads of the vCPUs.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use ruse_arch::{MpState, VcpuState};
use ruse_devices::lapic::Lapic;
use ruse_engine::{EngineError, Halt, Vcpu};
use ruse_loader::entry;
use ruse_memory::GuestRam;

use crate::board::Board;
use crate::dump::CpuDump;
use crate::lifecycle::Step;
use crate::report::Outcome;

/// What a vCPU thread needs.
pub(crate) struct VcpuThread {
    pub(crate) id: u32,
    pub(crate) vcpu: Box<dyn Vcpu>,
    pub(crate) board: Arc<Board>,
    pub(crate) ram: GuestRam,
    /// State in which the vCPU starts, at first and after each reset.
    pub(crate) start: VcpuState,
}

/// The state in which vCPU `id` starts, where vCPU 0 starts with `entry`. `with_lapic`: the local APICs are the engine's.
pub(crate) fn start_state(id: u32, entry: &VcpuState, with_lapic: bool) -> VcpuState {
    let mut state = entry.clone();
    if id != 0 {
        state = VcpuState { mp_state: MpState::WaitForSipi, ..VcpuState::default() };
        entry::set_mtrrs(&mut state);
    }
    if with_lapic {
        let mut lapic = Lapic::new(id, 0);
        if id == 0 {
            lapic.virtual_wire();
        }
        state.lapic = Some(lapic.state(0));
    }
    state
}

/// The text of a panic.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(|s| &**s));
    format!("a bug in the monitor: {}", text.unwrap_or("no message"))
}

impl VcpuThread {
    /// Starts the thread.
    pub(crate) fn spawn(mut self) -> io::Result<JoinHandle<()>> {
        Builder::new().name(format!("vcpu{}", self.id)).spawn(move || {
            let failed = match catch_unwind(AssertUnwindSafe(|| self.run())) {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(error.to_string()),
                Err(panic) => Some(panic_text(&*panic)),
            };
            let lifecycle = &self.board.lifecycle;
            if let Some(what) = failed {
                lifecycle.end(Outcome::Failed { what, vcpu: Some(self.id) });
                self.board.kick_all();
            }
            lifecycle.left(self.id);
        })
    }

    fn run(&mut self) -> Result<(), EngineError> {
        let board = self.board.clone();
        let mut epoch = 0;
        loop {
            match board.lifecycle.next(self.id, &mut epoch) {
                Step::Leave => return Ok(()),
                Step::Start => {
                    self.vcpu.set_state(&self.start)?;
                }
                Step::Resume => self.vcpu.held(),
                Step::Run => {}
            }
            let halt = self.vcpu.run(&*board)?;
            let state = self.vcpu.state()?;
            board.lifecycle.report(self.id, Some(state.clone()), self.vcpu.counters());
            if halt == Halt::TripleFault {
                let dump = Box::new(CpuDump::new(state, &self.ram));
                board.lifecycle.end(Outcome::TripleFault { vcpu: self.id, dump });
                board.kick_all();
            }
        }
    }
}
