//! The state of a vCPU as a page of text, for messages about guests that failed.

use std::fmt;

use ruse_arch::VcpuState;
use ruse_arch::paging::{Access, PagingMode, PhysMemory, Privilege, walk};
use ruse_arch::state::seg;
use ruse_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

/// Most bytes of code that a dump shows.
const CODE_BYTES: u64 = 16;

/// A vCPU's state and the code at its instruction pointer.
#[derive(Clone, Debug)]
pub struct CpuDump {
    /// The state.
    pub state: VcpuState,
    /// Bytes at the instruction pointer, as many as can be read.
    pub code: Vec<u8>,
}

impl CpuDump {
    /// Takes a state and reads the code of it, without a change to the guest.
    pub fn new(state: VcpuState, ram: &GuestRam) -> Self {
        let code = read_code(&state, ram);
        Self { state, code }
    }

    /// Whether this is the state after a reset, into which KVM brings a vCPU whose state a shutdown has left undefined
    /// (AMD APM volume 2, 15.14.3).
    fn is_after_reset(&self) -> bool {
        let reset = VcpuState::default();
        let begin = |s: &VcpuState| (s.rip, s.seg[seg::CS], s.cr0, s.gpr[0]);
        begin(&self.state) == begin(&reset)
    }
}

/// Guest memory for a walk that leaves accessed bits alone.
struct Untouched<'a>(&'a GuestRam);

impl PhysMemory for Untouched<'_> {
    fn read_entry(&mut self, gpa: u64, wide: bool) -> u64 {
        let (memory, at) = (self.0.memory(), GuestAddress(gpa));
        if wide {
            memory.read_obj::<u64>(at).unwrap_or(u64::MAX)
        } else {
            memory.read_obj::<u32>(at).unwrap_or(u32::MAX).into()
        }
    }
    fn set_bits(&mut self, _gpa: u64, _wide: bool, _old: u64, _bits: u64) -> bool {
        true
    }
}

fn read_code(state: &VcpuState, ram: &GuestRam) -> Vec<u8> {
    let mode =
        PagingMode { cr0: state.cr0, cr3: state.cr3, cr4: state.cr4, efer: state.efer, pdpte: state.pdpte };
    let who = Privilege { user: state.seg[seg::SS].dpl() == 3, ac: true };
    let start = state.seg[seg::CS].base.wrapping_add(state.rip);
    let byte = |at: u64| {
        let gpa = walk(&mode, at, Access::Fetch, who, &mut Untouched(ram)).ok()?.gpa;
        ram.memory().read_obj::<u8>(GuestAddress(gpa)).ok()
    };
    (0..CODE_BYTES).map_while(|n| byte(start.wrapping_add(n))).collect()
}

impl fmt::Display for CpuDump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 16] = [
            "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13",
            "R14", "R15",
        ];
        let s = &self.state;
        if self.is_after_reset() {
            writeln!(f, "  (as after a reset: AMD's CPUs do not keep what was before a triple fault)")?;
        }
        writeln!(f, "  RIP {:016x}  RFLAGS {:016x}", s.rip, s.rflags)?;
        for (names, values) in NAMES.chunks(4).zip(s.gpr.chunks(4)) {
            let row: Vec<_> = names.iter().zip(values).map(|(n, v)| format!("{n:3} {v:016x}")).collect();
            writeln!(f, "  {}", row.join("  "))?;
        }
        for (name, segment) in ["ES", "CS", "SS", "DS", "FS", "GS", "LDT", "TR"]
            .into_iter()
            .zip(s.seg.iter().chain([&s.ldtr, &s.tr]))
        {
            writeln!(
                f,
                "  {name:3} {:04x}  base {:016x}  limit {:08x}  attributes {:04x}",
                segment.selector, segment.base, segment.limit, segment.attr
            )?;
        }
        for (name, table) in [("GDT", &s.gdtr), ("IDT", &s.idtr)] {
            writeln!(f, "  {name}       base {:016x}  limit {:08x}", table.base, table.limit)?;
        }
        writeln!(f, "  CR0 {:016x}  CR2 {:016x}  CR3 {:016x}  CR4 {:016x}", s.cr0, s.cr2, s.cr3, s.cr4)?;
        writeln!(f, "  EFER {:x}  XCR0 {:x}  DR6 {:x}  DR7 {:x}", s.efer, s.xcr0, s.dr6, s.dr7)?;
        let code: Vec<_> = self.code.iter().map(|byte| format!("{byte:02x}")).collect();
        write!(f, "  code at RIP: {}", if code.is_empty() { "not readable".into() } else { code.join(" ") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dump_shows_registers_and_code() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let mut state = VcpuState { rip: 0x1000, ..VcpuState::default() };
        state.gpr[0] = 0xdead_beef;
        state.seg[seg::CS].base = 0x2000;
        ram.memory().write_slice(&[0x0f, 0x0b], GuestAddress(0x3000)).unwrap();
        let text = CpuDump::new(state.clone(), &ram).to_string();
        for part in ["RAX 00000000deadbeef", "code at RIP: 0f 0b 00", "CS  f000", "CR0 0000000060000010"] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        assert!(!text.contains("reset"), "{text}");
        state.seg[seg::CS].base = 0xffff_0000;
        assert!(CpuDump::new(state, &ram).to_string().ends_with("not readable"));
        assert!(CpuDump::new(VcpuState::default(), &ram).to_string().contains("as after a reset"));
    }
}
