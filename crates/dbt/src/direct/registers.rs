//! The guest's registers on their way into a sandbox and back.

use ruse_arch::{
    Segment,
    flags::{cr0, cr4, rflags},
    state::{reg, seg},
};
use ruse_sandbox::{Registers, Sandbox};

use crate::{cpu::Cpu, tier0::vector};

/// Flags that user code can change where IOPL is 0: the arithmetic ones, TF, DF, NT, AC, ID.
const OF_USER: u64 = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;

/// Selectors of CS and SS in the host's user code.
const HOST_CS: u16 = 0x33;
const HOST_SS: u16 = 0x2b;
/// The host's other selector of user code, and what it selects: 32-bit code in the first 4 GiB.
const HOST_CS32: u16 = 0x23;
const CODE32: Segment = Segment { base: 0, limit: 0xffff_ffff, attr: 0xc0fb, selector: HOST_CS32 };

/// Whether the guest's code can run directly as things are: 64-bit user code, to which the host's CPU looks as its own, and
/// that nobody debugs.
pub fn can_run(cpu: &Cpu) -> bool {
    const EVERYTHING: u64 = 7;
    let user = cpu.mode.cpl == 3 && cpu.mode.code64 && !cpu.interrupt_shadow;
    let debugged = cpu.rflags & rflags::TF != 0 || cpu.dr7 & 0xff != 0;
    let selectors = cpu.seg[seg::CS].selector == HOST_CS && cpu.seg[seg::SS].selector == HOST_SS;
    let plain = cpu.rflags & rflags::IOPL == 0;
    let registers = cpu.paging.cr0 & (cr0::EM | cr0::TS | cr0::PG) == cr0::PG
        && cpu.paging.cr4 & cr4::OSFXSR != 0
        && cpu.xcr0 == EVERYTHING
        && cpu.paging.cr4 & cr4::FSGSBASE != 0;
    user && !debugged && selectors && plain && registers
}

/// Puts the guest's registers into the sandbox.
pub fn store(cpu: &mut Cpu, sandbox: &mut Sandbox) {
    vector::spill_x87(cpu);
    let g = &cpu.gpr;
    sandbox.set_registers(&Registers {
        rax: g[reg::RAX],
        rcx: g[reg::RCX],
        rdx: g[reg::RDX],
        rbx: g[reg::RBX],
        rsp: g[reg::RSP],
        rbp: g[reg::RBP],
        rsi: g[reg::RSI],
        rdi: g[reg::RDI],
        r8: g[8],
        r9: g[9],
        r10: g[10],
        r11: g[11],
        r12: g[12],
        r13: g[13],
        r14: g[14],
        r15: g[15],
        rip: cpu.rip,
        rflags: cpu.rflags & OF_USER | rflags::IF | rflags::FIXED,
    });
    sandbox.set_bases(cpu.seg[seg::FS].base, cpu.seg[seg::GS].base);
    sandbox.store_fpu(&cpu.fpu.fxsave, &cpu.fpu.ymm_high);
}

/// Takes the guest's registers out of the sandbox.
pub fn load(cpu: &mut Cpu, sandbox: &Sandbox) {
    let r = sandbox.registers();
    cpu.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ];
    cpu.rip = r.rip;
    cpu.rflags = cpu.rflags & !(OF_USER | rflags::RF) | r.rflags & OF_USER;
    (cpu.seg[seg::FS].base, cpu.seg[seg::GS].base) = sandbox.bases();
    sandbox.load_fpu(&mut cpu.fpu.fxsave, &mut cpu.fpu.ymm_high);
    if sandbox.code_selector() == HOST_CS32 {
        cpu.seg[seg::CS] = CODE32;
        cpu.update_mode();
    }
}
