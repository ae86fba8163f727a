//! A tiny guest with which the engine tries out what this host's KVM does.

use std::{sync::Arc, thread};

use ruse_arch::{
    Segment, VcpuState,
    flags::{cr0, cr4, efer, rflags},
    state::seg,
};
use ruse_engine::{EngineError, Vcpu, Vm};
use ruse_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

/// Where its program begins.
pub const CODE: u64 = 0x8000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;

/// RAM with the program and its page tables: one entry each, for a large page.
pub fn ram(program: &[u8]) -> Result<GuestRam, EngineError> {
    const PRESENT_WRITABLE_USER: u64 = 7;
    const LARGE: u64 = 1 << 7;
    let failed = |source: std::io::Error| EngineError::Host { what: "cannot make RAM for a trial", source };
    let ram = GuestRam::new(64 << 10).map_err(|error| failed(std::io::Error::other(error)))?;
    let put = |at: u64, bytes: &[u8]| {
        ram.memory()
            .write_slice(bytes, GuestAddress(at))
            .map_err(|error| failed(std::io::Error::other(error)))
    };
    put(PML4, &(PDPT | PRESENT_WRITABLE_USER).to_le_bytes())?;
    put(PDPT, &(PD | PRESENT_WRITABLE_USER).to_le_bytes())?;
    put(PD, &(LARGE | PRESENT_WRITABLE_USER).to_le_bytes())?;
    put(CODE, program)?;
    Ok(ram)
}

/// Long mode at this privilege over two identity-mapped megabytes, with ports open to user code: CPUs without
/// "unrestricted guest" emulate the modes before.
pub fn state(cpl: u16) -> VcpuState {
    let level = cpl << 5;
    let data = Segment { base: 0, limit: u32::MAX, attr: 0xc093 | level, selector: 0x10 | cpl };
    let mut state = VcpuState {
        rip: CODE,
        rflags: rflags::FIXED | rflags::IOPL,
        cr0: cr0::PE | cr0::PG | cr0::ET | cr0::NE,
        cr3: PML4,
        cr4: cr4::PAE,
        efer: efer::LME | efer::LMA,
        seg: [data; 6],
        ..VcpuState::default()
    };
    state.seg[seg::CS] = Segment { base: 0, limit: u32::MAX, attr: 0xa09b | level, selector: 8 | cpl };
    state
}

/// Is done with it. The end of a VM waits for all CPUs of the host, which takes long beside a start: nobody has to wait
/// for it. Where there can be no thread, it is here.
pub fn dispose(vcpu: Box<dyn Vcpu>, vm: Arc<dyn Vm>) {
    thread::Builder::new().spawn(move || drop((vcpu, vm))).ok();
}
